"""What packed files weigh, and what they cost to load and run beside the dense ones, in turn in one run.

    python zoo/deploy/deploy.py                 # on an idle machine

The networks are the finished folders in exports, packed anew without rounding and in 8 bits, and a layer of
25 million weights of which 98.7 % are zeros.
"""

import copy
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from vbdcompress import load_slim
from vbdcompress.exporting.bench import bench
from vbdcompress.exporting.onnx_file import export_onnx
from vbdcompress.exporting.packing import Storage
from vbdcompress.rounding import round_weight, roundable, write_rounded_

ROOT = Path(__file__).resolve().parents[2]
NETWORKS = {"LeNet-300-100": "lenet_300_100_weights", "LeNet-5-Caffe": "lenet5_weights"}
WIDE, ZEROS = 5000, 0.987


@click.command()
@click.option("--seconds", default=4.0, show_default=True, help="For each batch size.")
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).with_name("deploy.json"))
def main(seconds: float, out: Path) -> None:
    """Export each network dense and packed, and measure."""
    torch.manual_seed(0)
    rows = []
    for title, folder in NETWORKS.items():
        path = ROOT / "exports" / folder / "slim.safetensors"
        if path.exists():
            rows.append(_measure(title, load_slim(path).eval(), torch.randn(64, 1, 28, 28), seconds))
    wide = nn.Sequential(nn.Linear(WIDE, WIDE), nn.ReLU(), nn.Linear(WIDE, 10)).eval()
    wide[0].weight.data *= torch.rand(WIDE, WIDE) > ZEROS
    rows.append(
        _measure(f"{WIDE} x {WIDE} weights, {100 * ZEROS:.1f} % zeros", wide, torch.randn(64, WIDE), seconds)
    )
    content = {
        "command": f"python zoo/deploy/deploy.py --seconds {seconds:g}",
        "device": f"{platform.machine()} CPU, 1 thread",
        "rows": rows,
    }
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _measure(title: str, model: nn.Module, samples: Tensor, seconds: float) -> dict[str, Any]:
    """Dense, packed, and packed in 8 bits: bytes, and load and run times over the dense file's."""
    rounded = copy.deepcopy(model)
    codes = {name: round_weight(layer, 8) for name, layer in roundable(model).items()}
    write_rounded_(rounded, codes)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{name}.onnx" for name in ("dense", "packed", "packed8")]
        export_onnx(model, paths[0], samples)
        export_onnx(model, paths[1], samples, storage=Storage(True))
        export_onnx(rounded, paths[2], samples, storage=Storage(True, codes))
        found = bench(paths, batch_sizes=(1, 64), threads=(1,), seconds=seconds)
    dense = found[0]
    row = {
        "network": title,
        "nonzeros": sum(int(parameter.count_nonzero()) for parameter in model.parameters()),
        "files": [
            {
                "name": path.stem,
                "bytes": item.bytes,
                "load_ms": item.load_ms,
                "load_ratio": item.load_ms / dense.load_ms,
                "peak_bytes": item.peak_bytes,
                "run_ms": [each.timing.median_ms for each in item.timings],
                "run_ratio": [
                    each.timing.median_ms / base.timing.median_ms
                    for each, base in zip(item.timings, dense.timings, strict=True)
                ],
            }
            for path, item in zip(paths, found, strict=True)
        ],
    }
    click.echo(json.dumps(row, indent=1))
    return row


if __name__ == "__main__":
    main()
