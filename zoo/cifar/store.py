"""Store a trained network's weights in bfloat16, where its error stays: half the file.

    python zoo/cifar/store.py trained.pt zoo/vgg_cifar.pt --data-root DATA

Weights of two or more dimensions are rounded; biases, norms and their statistics stay as they are. Reading
the file gives a network in single precision again. Where the validation error rises by more than 0.1 points,
nothing is rounded. The errors that the file tells are those of what it holds.
"""

import copy
from dataclasses import replace
from pathlib import Path

import click
import torch
from torch import nn

from vbdcompress.data import load_data
from vbdcompress.evaluation import measure_error
from vbdcompress.loading import load, save_checkpoint

ALLOWED = 0.1


@click.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--data", help="Data set, where it is not the one that the network names.")
@click.option("--data-root", envvar="VBDCOMPRESS_DATA", type=click.Path(path_type=Path))
def main(file: Path, out: Path, data: str | None, data_root: Path | None) -> None:
    """Round the weights in FILE and write OUT."""
    loaded = load(file)
    assert loaded.validation is not None
    dataset = load_data(
        data or str(loaded.data),
        data_root,
        normalisation=loaded.input,
        validation_fraction=loaded.validation["fraction"],
        validation_seed=loaded.validation["seed"],
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def error(model: nn.Module, test: bool = False) -> float | None:
        batches = dataset.test_batches() if test else dataset.validation_batches()
        return None if batches is None else measure_error(copy.deepcopy(model).float().to(device), batches)

    rounded = round_weights(loaded.model)
    before, after = error(loaded.model), error(rounded)
    assert before is not None
    assert after is not None
    keeps = after <= before + ALLOWED
    model = rounded if keeps else loaded.model
    told = {"validation_error": after if keeps else before, "test_error": error(model, test=True)}
    told["stored"] = "bfloat16" if keeps else "float32"
    training = dict(loaded.training or {}) | {key: value for key, value in told.items() if value is not None}
    out.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(out, replace(loaded, model=model, training=training))
    click.echo(f"validation error {before:.2f} %, rounded {after:.2f} %: stored in {told['stored']}")


def round_weights(model: nn.Module) -> nn.Module:
    """A copy whose weights of two or more dimensions are bfloat16: to store, not to run."""
    rounded = copy.deepcopy(model)
    for parameter in rounded.parameters():
        if parameter.dim() >= 2:
            parameter.data = parameter.data.bfloat16()
    return rounded


if __name__ == "__main__":
    main()
