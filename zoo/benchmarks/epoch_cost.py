"""Seconds of an epoch, as `fit` runs it: shuffling, augmentation, ELBO, optimizer, and the read of its loss.

    python zoo/benchmarks/epoch_cost.py --networks vgg_cifar --device cuda --precision bf16-mixed

Images are noise, as many as CIFAR-10 has for training, on the device; their content costs nothing. An
epoch's time is the median after the first epochs, in which code is compiled and CUDA graphs are recorded:
"first" is what those cost beside. Ways: eager; compiled (torch.compile); graphs (compiled, replayed as
CUDA graphs). Variants: plain (no posterior); channels; taught (channels, following the original's outputs,
as `vbdcompress run` does); weights.
"""

import copy
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from torch import nn

from vbdcompress.architectures import build_architecture
from vbdcompress.cli.options import parse_arch_args
from vbdcompress.config import FitConfig
from vbdcompress.conversion import convert
from vbdcompress.data import TensorBatches
from vbdcompress.fitting import fit

WAYS: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled": {"compile": True},
    "graphs": {"compile": True, "cuda_graphs": True},
}
VARIANTS = {"plain": None, "channels": "channels", "taught": "channels", "weights": "weights"}
CLASSES = 10
# Epochs in which code is compiled, and recorded
WARM_UP = 2


@click.command()
@click.option("--networks", default="vgg_cifar", show_default=True)
@click.option("--variants", default=",".join(VARIANTS), show_default=True)
@click.option("--ways", default="eager,compiled,graphs", show_default=True)
@click.option(
    "--arch-arg", "arch_args", multiple=True, metavar="KEY=VALUE", help="Of the networks' builders."
)
@click.option("--images", default=50_000, show_default=True)
@click.option("--batch-size", default=200, show_default=True)
@click.option("--epochs", default=5, show_default=True, help=f"Measured, after {WARM_UP}.")
@click.option("--device", default="auto", show_default=True)
@click.option("--precision", default="32-true", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures as JSON, too.")
def main(
    networks: str,
    variants: str,
    ways: str,
    arch_args: tuple[str, ...],
    images: int,
    batch_size: int,
    epochs: int,
    device: str,
    precision: str,
    out: Path | None,
) -> None:
    """Measure and print; with --out, keep."""
    torch.manual_seed(0)
    inputs, labels = torch.randn(images, 3, 32, 32), torch.randint(0, CLASSES, (images,))
    batches = TensorBatches(inputs, labels, batch_size, shuffle=True, augment="crop-flip")
    rows: list[dict[str, Any]] = []
    for network in networks.split(","):
        plain = build_architecture(network, parse_arch_args(arch_args))
        for variant in variants.split(","):
            for way in ways.split(","):
                config = FitConfig(
                    epochs=epochs + WARM_UP, device=device, precision=precision, warmup_epochs=0, **WAYS[way]
                )
                row = {"network": network, "variant": variant, "way": way, "batch": batch_size}
                rows.append(row | _measure(plain, variant, batches, config))
                told = f"{network:12} {variant:9} {way:9} first {rows[-1]['first']:7.2f} s"
                click.echo(f"{told}  an epoch {rows[-1]['seconds']:7.3f} s")
    if out is not None:
        _write(out, rows, images)


def _measure(plain: nn.Module, variant: str, batches: TensorBatches, config: FitConfig) -> dict[str, float]:
    """Seconds: the first epochs beyond later ones, and the median of the later."""
    mode, teacher = VARIANTS[variant], copy.deepcopy(plain) if variant == "taught" else None
    model = copy.deepcopy(plain) if mode is None else convert(plain, batches.inputs[:2], mode).model  # type: ignore[arg-type]
    times = [row.seconds for row in fit(model, batches, config, teacher=teacher).epochs]
    steady = median(times[WARM_UP:])
    first = sum(times[:WARM_UP]) - WARM_UP * steady
    return {"first": round(first, 2), "seconds": round(steady, 4)}


def _write(out: Path, rows: list[dict[str, Any]], images: int) -> None:
    given = sys.argv[1:]
    if "--out" in given:
        place = given.index("--out")
        del given[place : place + 2]
    content = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "images": images,
        "note": "",
        "command": " ".join(["python zoo/benchmarks/epoch_cost.py", *given]),
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
