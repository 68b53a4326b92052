"""How much of the saved MACs arrives as speed in channels mode, and what odd numbers of channels cost.

    python zoo/deploy/channels.py               # on an idle machine

A VGG and a ResNet-56 for CIFAR with random weights (speed does not depend on them), cut to about a third of
their MACs by random gates, as they are and with channels in multiples of 8 and 16.
"""

import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from profiling import compare_layers, profile

from vbdcompress import convert, slim
from vbdcompress.architectures import build_architecture
from vbdcompress.conversion import Converted
from vbdcompress.count import measure_size
from vbdcompress.exporting.bench import BenchRow, bench
from vbdcompress.exporting.onnx_file import export_onnx
from vbdcompress.vbd.posterior import find_posteriors

NETWORKS = ("vgg_cifar", "resnet56")
ROUNDED = (1, 8, 16)
SHARE = 1 / 3
STEPS = 6


@click.command()
@click.option("--seconds", default=5.0, show_default=True, help="For each batch size and number of threads.")
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).with_name("channels.json"))
def main(seconds: float, out: Path) -> None:
    """Cut, export and measure."""
    rows = [row for name in NETWORKS for row in _measure(name, seconds)]
    content = {
        "command": f"python zoo/deploy/channels.py --seconds {seconds:g}",
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "rows": rows,
    }
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _measure(name: str, seconds: float) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model, example = build_architecture(name).eval(), torch.randn(2, 3, 32, 32)
    converted = convert(model, example)
    for posterior in find_posteriors(converted.model):
        posterior.log_sigma2.data.uniform_(-10.0, 10.0)
    threshold = _threshold_for(converted, SHARE * measure_size(model, example).macs)
    samples = torch.randn(64, 3, 32, 32)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / "original.onnx"]
        export_onnx(model, paths[0], samples)
        for number in ROUNDED:
            paths.append(Path(folder) / f"{number}.onnx")
            export_onnx(slim(converted, threshold, round_to=number).model, paths[-1], samples)
        first, *rest = bench(paths, batch_sizes=(1, 64), seconds=seconds)
        original, *profiles = (profile(path) for path in paths)
    rows = []
    for number, found, own in zip(ROUNDED, rest, profiles, strict=True):
        rows.append(
            {
                "network": name,
                "round_to": number,
                "fewer_macs": first.macs / found.macs,
                "bytes": found.bytes,
                "speeds": _speeds(first, found),
                "operators": own.operators,
                "original_operators": original.operators,
                "layers": compare_layers(original, own),
            }
        )
        click.echo(json.dumps(rows[-1]))
    return rows


def _speeds(first: BenchRow, found: BenchRow) -> list[dict[str, Any]]:
    return [
        {
            "threads": mine.threads,
            "batch": mine.batch,
            "milliseconds": mine.timing.median_ms,
            "speed": base.timing.median_ms / mine.timing.median_ms,
        }
        for base, mine in zip(first.timings, found.timings, strict=True)
    ]


def _threshold_for(converted: Converted, macs: float) -> float:
    """A threshold whose network has about that many MACs, by halving."""
    low, high = -10.0, 10.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        found = measure_size(slim(converted, middle).model, converted.example).macs
        low, high = (middle, high) if found < macs else (low, middle)
    return (low + high) / 2


if __name__ == "__main__":
    main()
