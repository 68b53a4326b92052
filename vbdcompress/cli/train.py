"""vbdcompress train: make a .pt file that `run` takes."""

from pathlib import Path
from typing import Any

import click

from vbdcompress.cli.options import (
    config_options,
    data_options,
    given_options,
    parse_arch_args,
    parse_normalisation,
)
from vbdcompress.config import make_config
from vbdcompress.errors import ConfigError

OPTIONS = (
    "epochs",
    "batch_size",
    "lr",
    "schedule",
    "clip_norm",
    "augment",
    "augment_pixels",
    "validation_fraction",
    "seed",
    "device",
    "devices",
    "precision",
)


@click.command("train", short_help="Train a network from scratch.")
@click.argument("arch")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The .pt file to write.")
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
    overwrite: bool,
    arch_args: tuple[str, ...],
    data: str | None,
    data_root: Path | None,
    image_size: int | None,
    mean: str | None,
    std: str | None,
    **options: Any,
) -> None:
    """Train ARCH by Adam and write a checkpoint that names its architecture, data set and split.

    The validation split is not trained on, so that `run` can choose on it honestly.

    \b
    Example:
      vbdcompress train lenet5 --data mnist --data-root DATA --epochs 20 --out zoo/lenet5.pt
    """
    if data is None:
        raise ConfigError("train", "no data set is named.", "--data digits, mnist, a folder or .npz")
    if out.exists() and not overwrite:
        raise ConfigError("train", f"'{out}' exists.", "--overwrite to replace it")
    config = make_config(given_options(options), "train")
    reading = {"root": data_root, "image_size": image_size, "normalisation": parse_normalisation(mean, std)}
    _train(arch, parse_arch_args(arch_args), out, data, reading, config)


def _train(
    arch: str,
    arguments: dict[str, Any],
    out: Path,
    data: str,
    reading: dict[str, Any],
    config: Any,
) -> None:
    import torch
    from rich.console import Console

    from vbdcompress.architectures import build_architecture
    from vbdcompress.conversion import check_model
    from vbdcompress.data import load_data
    from vbdcompress.evaluation import measure_error
    from vbdcompress.fitting import fit
    from vbdcompress.loading import Loaded, save_checkpoint
    from vbdcompress.progress import FitProgress

    split = {"fraction": config.validation_fraction, "seed": config.seed}
    dataset = load_data(data, validation_fraction=split["fraction"], validation_seed=split["seed"], **reading)
    torch.manual_seed(config.seed)
    model = build_architecture(arch, arguments, trusted=True)
    check_model(model, dataset.train.inputs[:2])
    console = Console()
    with FitProgress(console, every=max(1, config.epochs // 20)) as progress:
        result = fit(
            model,
            dataset.train_batches(
                config.examples_a_step(len(dataset.train)), config.seed, config.augment, config.augment_pixels
            ),
            config,
            validation=dataset.validation_batches(),
            listener=progress,
        )
    if not result.is_main:
        return
    training: dict[str, Any] = {
        name: getattr(config, name) for name in OPTIONS if name not in ("device", "devices")
    }
    training["validation_error"] = measure_error(model, dataset.validation_batches())
    test = dataset.test_batches()
    if test is not None:
        training["test_error"] = measure_error(model, test)
    out.parent.mkdir(parents=True, exist_ok=True)
    named = Path(data).name if Path(data).exists() else data
    save_checkpoint(out, Loaded(model.cpu().eval(), arch, arguments, named, dataset.input, split, training))
    found = f"validation error {training['validation_error']:.2f} %"
    found += f", test error {training['test_error']:.2f} %" if test is not None else ""
    console.print(f"Written to [bold]{out}[/bold]: {found}", highlight=False)
