"""Bytes against error: one fitted network, its weights in 32 to 4 bits, all alike or as its posterior says.

    python zoo/deploy/bits.py --data-root DATA

Errors are of the validation set: the curve is for choosing. The network is LeNet-300-100 with the recipe of
its table.
"""

import copy
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from vbdcompress import compress
from vbdcompress.config import make_config, read_toml
from vbdcompress.data import load_data
from vbdcompress.evaluation import measure_error
from vbdcompress.exporting.onnx_file import export_onnx
from vbdcompress.exporting.packing import Storage
from vbdcompress.loading import load
from vbdcompress.rounding import Rounded, choose_bits, round_weight, roundable, write_rounded_

ZOO = Path(__file__).resolve().parents[1]
RECIPE = ZOO / "recipes" / "lenet_300_100_weights.toml"
LIMITS = (0.25, 0.5, 1.0, 2.0, 4.0)


@click.command()
@click.option("--data-root", required=True, envvar="VBDCOMPRESS_DATA", type=click.Path(path_type=Path))
@click.option(
    "--work", type=click.Path(path_type=Path), default=ZOO.parent / ".runs" / "bits", help="Checkpoints."
)
@click.option("--resume", is_flag=True, help="Go on from where an unfinished run stopped.")
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).with_name("bits.json"))
def main(data_root: Path, work: Path, resume: bool, out: Path) -> None:
    """Fit once and measure every way to store it."""
    loaded = load(ZOO / "lenet_300_100.pt")
    assert loaded.validation is not None
    config = make_config(read_toml(RECIPE))
    data = load_data(
        str(loaded.data),
        data_root,
        normalisation=loaded.input,
        validation_fraction=loaded.validation["fraction"],
        validation_seed=loaded.validation["seed"],
    )
    batches = data.train_batches(
        config.examples_a_step(len(data.train)), config.seed, config.augment, config.augment_pixels
    )
    options: dict[str, Any] = {
        key: value for key, value in read_toml(RECIPE).items() if not key.startswith("augment")
    }
    result = compress(
        loaded.model,
        batches,
        validation=data.validation_batches(),
        checkpoints=work,
        resume=resume,
        verbose=True,
        **options,
    )
    measure = partial(measure_error, batches=data.validation_batches())
    rows = [_row("all in 32 bits", result.model, {}, measure, result.files.samples)]
    layers = roundable(result.model)
    sigma = {name: tensor.float().numpy() for name, tensor in result.sigma.items()}
    for bits in (16, 8, 4):
        codes = {name: round_weight(layer, bits) for name, layer in layers.items()}
        rows.append(_row(f"all in {bits} bits", result.model, codes, measure, result.files.samples))
    codes = {name: round_weight(layer, 4, sigma[name]) for name, layer in layers.items()}
    rows.append(_row("all in 4 bits, placed by sigma", result.model, codes, measure, result.files.samples))
    for limit in LIMITS:
        codes = {name: choose_bits(layer, sigma[name], limit) for name, layer in layers.items()}
        told = f"auto, up to {limit:g} sigma"
        rows.append(_row(told, result.model, codes, measure, result.files.samples))
    content = {
        "command": "python zoo/deploy/bits.py --data-root DATA",
        "network": "LeNet-300-100",
        "nonzeros": result.report["size"]["after"]["nonzeros"],
        "rows": rows,
    }
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _row(
    name: str, model: nn.Module, codes: dict[str, Rounded], measure: Any, samples: torch.Tensor
) -> dict[str, Any]:
    rounded = copy.deepcopy(model)
    write_rounded_(rounded, codes)
    with tempfile.TemporaryDirectory() as folder:
        check = export_onnx(rounded, Path(folder) / "model.onnx", samples, storage=Storage(True, codes))
    row = {
        "name": name,
        "bits": [item.bits for item in codes.values()],
        "bytes": check.bytes,
        "validation_error": measure(rounded),
    }
    click.echo(json.dumps(row))
    return row


if __name__ == "__main__":
    main()
