"""How convert, its groups, and slim grow with a network's depth: chains of 50 to 500 layers, and ResNets.

    python zoo/coverage/growth.py

Inputs of 16 x 16 for the chains, which never shrink them, 64 x 64 for the ResNets. The
networks take turns, a figure is the median over the turns.
"""

import json
import platform
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median

import click
import torch
import torchvision
from check import THRESHOLD, switch_off_
from torch import nn

from vbdcompress.conversion import convert
from vbdcompress.slimming import slim

OUT = Path(__file__).resolve().parent / "growth.json"
DEPTHS = (50, 100, 200, 500)


def chain(depth: int) -> nn.Module:
    """`depth` convolutions of 16 channels, each with batch norm and ReLU."""
    layers: list[nn.Module] = []
    for number in range(depth):
        layers += [nn.Conv2d(3 if number == 0 else 16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).eval()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **{f"chain of {depth}": lambda depth=depth: chain(depth) for depth in DEPTHS},
    **{
        name: lambda name=name: torchvision.models.get_model(name, weights=None).eval()
        for name in ("resnet18", "resnet50", "resnet152")
    },
}


@click.command()
@click.option("--turns", default=3, show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(turns: int, threads: int) -> None:
    """Measure, print and keep in growth.json."""
    torch.set_num_threads(threads)
    taken: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for _ in range(turns):
        for name, build in NETWORKS.items():
            taken[name].append(_measure(build(), 16 if name.startswith("chain") else 64))
    rows = []
    for name, pairs in taken.items():
        convolutions = sum(isinstance(module, nn.Conv2d) for module in NETWORKS[name]().modules())
        converting, slimming = (median(values) for values in zip(*pairs, strict=True))
        rows.append(
            {
                "network": name,
                "convolutions": convolutions,
                "convert_seconds": round(converting, 2),
                "slim_seconds": round(slimming, 2),
                "milliseconds_a_layer": round(1000 * (converting + slimming) / convolutions, 1),
            }
        )
        click.echo(rows[-1])
    content = {
        "command": "python zoo/coverage/growth.py",
        "device": f"{threads} threads of a {platform.machine()} CPU",
        "torch": torch.__version__,
        "turns": turns,
        "rows": rows,
    }
    OUT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _measure(model: nn.Module, size: int) -> tuple[float, float]:
    """Seconds to convert in channels mode, tracing and trying the groups, and to slim by 30 %."""
    example = torch.randn(2, 3, size, size)
    started = time.perf_counter()
    converted = convert(model, example, "channels")
    between = time.perf_counter()
    switch_off_(converted.model)
    resumed = time.perf_counter()
    slim(converted, THRESHOLD)
    return between - started, time.perf_counter() - resumed


if __name__ == "__main__":
    main()
