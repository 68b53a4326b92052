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

from vbdcompress import Result, compress
from vbdcompress.config import make_config, read_toml
from vbdcompress.data import DataSet, load_data
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
    data = load_data(
        str(loaded.data),
        data_root,
        normalisation=loaded.input,
        validation_fraction=loaded.validation["fraction"],
        validation_seed=loaded.validation["seed"],
    )
    result = _fit(loaded.model, data, checkpoints=work, resume=resume)
    content = {
        "command": "python zoo/deploy/bits.py --data-root DATA",
        "network": "LeNet-300-100",
        "nonzeros": result.report["size"]["after"]["nonzeros"],
        "rows": _measure(result, partial(measure_error, batches=data.validation_batches())),
    }
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _fit(model: nn.Module, data: DataSet, **options: Any) -> Result:
    recipe = read_toml(RECIPE)
    config = make_config(recipe)
    batches = data.train_batches(
        config.examples_a_step(len(data.train)), config.seed, config.augment, config.augment_pixels
    )
    options |= {key: value for key, value in recipe.items() if not key.startswith("augment")}
    return compress(model, batches, validation=data.validation_batches(), verbose=True, **options)


def _measure(result: Result, measure: Any) -> list[dict[str, Any]]:
    model, samples = result.model, result.files.samples
    rows = [_row("all in 32 bits", model, {}, measure, samples)]
    layers = roundable(model)
    sigma = {name: tensor.float().numpy() for name, tensor in result.sigma.items()}
    for bits in (16, 8, 4):
        codes = {name: round_weight(layer, bits) for name, layer in layers.items()}
        rows.append(_row(f"all in {bits} bits", model, codes, measure, samples))
    codes = {name: round_weight(layer, 4, sigma[name]) for name, layer in layers.items()}
    rows.append(_row("all in 4 bits, placed by sigma", model, codes, measure, samples))
    for limit in LIMITS:
        codes = {name: choose_bits(layer, sigma[name], limit) for name, layer in layers.items()}
        rows.append(_row(f"auto, up to {limit:g} sigma", model, codes, measure, samples))
    return rows


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
