"""vbdcompress train: make a .pt file that `run` takes."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vbdcompress.cli.options import (
    config_options,
    data_options,
    given_options,
    parse_arch_args,
    parse_normalisation,
    read_config,
)
from vbdcompress.config import MACHINE
from vbdcompress.errors import ConfigError
from vbdcompress.modes import evaluated

if TYPE_CHECKING:
    from torch import nn

    from vbdcompress.config import RunConfig
    from vbdcompress.data import DataSet
    from vbdcompress.workplace import Workplace

OPTIONS = (
    "epochs",
    "batch_size",
    "optimizer",
    "lr",
    "weight_decay",
    "schedule",
    "clip_norm",
    "augment",
    "augment_pixels",
    "validation_fraction",
    "seed",
    "device",
    "devices",
    "precision",
    "compile",
    "cuda_graphs",
)


@click.command("train")
@click.argument("arch")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The .pt file to write.")
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    help="TOML file of the options from --epochs on, with _ for -.",
)
@click.option("--resume", is_flag=True, help="Go on from where an unfinished training of this file stopped.")
@click.option("--overwrite", is_flag=True, help="Replace the file.")
@click.option(
    "--arch-arg",
    "arch_args",
    multiple=True,
    metavar="KEY=VALUE",
    help="Argument of the architecture's builder.",
)
@data_options
@config_options(OPTIONS)
def command(
    arch: str,
    out: Path,
    config_file: Path | None,
    resume: bool,
    overwrite: bool,
    arch_args: tuple[str, ...],
    data: str | None,
    data_root: Path | None,
    image_size: int | None,
    mean: str | None,
    std: str | None,
    **options: Any,
) -> None:
    """Train ARCH and write a checkpoint that names its architecture, data set and split.

    The validation split is not trained on, so that `run` can choose on it honestly. A training that was
    cut off goes on with --resume; until it is done its state lies in .training beside the file.

    \b
    Examples:
      vbdcompress train lenet5 --data mnist --data-root DATA --epochs 20 --out zoo/lenet5.pt
      vbdcompress train resnet20 --data cifar10 --data-root DATA --optimizer sgd --lr 0.1
        --weight-decay 5e-4 --batch-size 128 --out resnet20.pt
    """
    if data is None:
        raise ConfigError("train", "no data set is named.", "--data digits, mnist, a folder or .npz")
    if out.is_dir():
        raise ConfigError("train", f"'{out}' is a folder.", "--out names the .pt file to write")
    if out.exists() and not overwrite:
        raise ConfigError("train", f"'{out}' exists.", "--overwrite to replace it")
    if resume and not _state_of(out).is_dir():
        raise ConfigError("train", f"there is no unfinished training of '{out}'.", "Start without --resume.")
    if _state_of(out).is_dir() and not resume and not overwrite:
        raise ConfigError(
            "train",
            f"there is an unfinished training of '{out}'.",
            "--resume to go on, or --overwrite to start anew",
        )
    config = read_config("train", config_file, given_options(options), OPTIONS)
    reading = {"root": data_root, "image_size": image_size, "normalisation": parse_normalisation(mean, std)}
    _train(_Order(arch, parse_arch_args(arch_args), data, out, resume), reading, config)


@dataclass(frozen=True)
class _Order:
    """What is trained, on what, and the file that it goes to."""

    arch: str
    arguments: dict[str, Any]
    data: str
    out: Path
    resume: bool


def _state_of(out: Path) -> Path:
    """Folder of the checkpoints until the file is written."""
    return out.parent / ".training" / out.name


def _train(order: _Order, reading: dict[str, Any], config: "RunConfig") -> None:
    from rich.console import Console
    from rich.text import Text

    from vbdcompress.data import load_data
    from vbdcompress.devices import first_on_machine_first, start_fabric, wait_for_all
    from vbdcompress.fitting import fit
    from vbdcompress.progress import FitProgress
    from vbdcompress.workplace import TRAINING, Workplace

    with first_on_machine_first(config):
        dataset = load_data(
            order.data, validation_fraction=config.validation_fraction, validation_seed=config.seed, **reading
        )
    model = _build(order, dataset, config.seed)
    fabric = start_fabric(config)
    workplace = Workplace(_state_of(order.out), order.resume)
    if fabric.is_global_zero:
        _claim(workplace, order, model, dataset, config)
    wait_for_all(fabric)
    batch_size = config.examples_a_step(len(dataset.train))
    console = Console(quiet=not fabric.is_global_zero)
    for note in dataset.notes:
        console.print(Text.assemble(("Warning:", "yellow"), f" {note}"))
    try:
        with FitProgress(console, every=max(1, config.epochs // 20)) as progress:
            result = fit(
                model,
                dataset.train_batches(batch_size, config.seed, config.augment, config.augment_pixels),
                config,
                validation=dataset.validation_batches(),
                checkpoint=workplace.checkpoint(TRAINING),
                listener=progress,
            )
    finally:
        if fabric.is_global_zero:
            workplace.remove_if_empty()
    if result.is_main:
        found = _write(order, evaluated(model), dataset, config)
        workplace.remove()
        console.print(Text.assemble("Written to ", (str(order.out), "bold"), f": {found}"), soft_wrap=True)


def _build(order: _Order, dataset: "DataSet", seed: int) -> "nn.Module":
    import torch

    from vbdcompress.architectures import build_architecture
    from vbdcompress.originals import check_model

    torch.manual_seed(seed)
    model = build_architecture(order.arch, order.arguments, trusted=True)
    check_model(model, dataset.train.inputs[:2])
    return model


def _claim(
    workplace: "Workplace", order: _Order, model: "nn.Module", dataset: "DataSet", config: "RunConfig"
) -> None:
    from vbdcompress.workplace import identify_run

    state = _state_of(order.out)
    if not order.resume and state.is_dir():
        shutil.rmtree(state)
    state.mkdir(parents=True, exist_ok=True)
    spec = dataset.input
    parts = (dataset.train_batches(1, seed=0), dataset.validation_batches())
    digests = [part.digest() for part in parts]
    data = (dataset.recorded_name, *(part.num_examples for part in parts), list(spec.mean), list(spec.std))
    workplace.claim(identify_run(model, data, config, dataset.train.inputs[:1], digests=digests))


def _write(order: _Order, model: "nn.Module", dataset: "DataSet", config: "RunConfig") -> str:
    """Write the checkpoint; the errors found, in words."""
    from vbdcompress.evaluation import measure_error
    from vbdcompress.loading import Loaded, save_checkpoint

    told = {name: getattr(config, name) for name in OPTIONS if name not in MACHINE - {"precision"}}
    errors = {"validation_error": measure_error(model, dataset.validation_batches())}
    test = dataset.test_batches()
    if test is not None:
        errors["test_error"] = measure_error(model, test)
    split = {
        "fraction": config.validation_fraction,
        "seed": config.seed,
        "examples": len(dataset.train) + len(dataset.validation),
    }
    loaded = Loaded(
        model.cpu(),
        order.arch,
        order.arguments,
        dataset.recorded_name,
        dataset.input,
        split,
        told | errors,
        classes=dataset.classes,
    )
    save_checkpoint(order.out, loaded)
    return ", ".join(f"{name.replace('_', ' ')} {error:.2f} %" for name, error in errors.items())
