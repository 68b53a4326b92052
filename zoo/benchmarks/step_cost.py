"""What an ELBO step costs beside a plain training step of the same network, and beside other packages.

    python zoo/benchmarks/step_cost.py                      # CPU, one thread
    python zoo/benchmarks/step_cost.py --networks vgg_cifar,resnet20 --device cuda --precision bfloat16 \
        --compile

Steps of all variants take turns (A B C A B C ...), so that a busy machine slows all alike; a figure is
the median over the turns of step time, a ratio the median of the ratios within a turn, over the plain step
that runs alike: uncompiled, compiled, or as CUDA graphs. Each step is forward, loss and KL, backward, Adam;
on a GPU a turn is ten of them between two synchronisations, as an epoch runs them. In weights mode six matrix
products stand against three: 2.0 is the limit. cplxmodule's and pytorch-ard's layers are timed on the
LeNets where they are installed.
"""

import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vbdcompress.allocator import keep_freed_memory
from vbdcompress.architectures import build_architecture
from vbdcompress.cli.options import parse_arch_args
from vbdcompress.compilation import begin_step, compile_
from vbdcompress.config import FitConfig
from vbdcompress.conversion import convert
from vbdcompress.optimization import make_optimizer
from vbdcompress.vbd.elbo import ELBO

Step = Callable[[], None]
Penalty = Callable[[nn.Module], Tensor]
Variant = tuple[str, str]
LENETS = ("lenet_300_100", "lenet5")
BATCHES = {"lenet_300_100": 200, "lenet5": 100, "vgg_cifar": 200, "resnet20": 200, "resnet56": 200}
STEPS_A_TURN = {"cpu": 1, "cuda": 10}
WARM_UP = 5


@click.command()
@click.option("--networks", default=",".join(LENETS), show_default=True, help=f"Of {', '.join(BATCHES)}.")
@click.option(
    "--arch-arg", "arch_args", multiple=True, metavar="KEY=VALUE", help="Of the networks' builders."
)
@click.option("--batch-size", type=click.IntRange(min=1), help="Without it the network's own.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--precision", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="Also compiled.")
@click.option("--cuda-graphs", is_flag=True, help="Also compiled and as CUDA graphs.")
@click.option("--turns", default=60, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures as JSON, too.")
def main(
    networks: str,
    arch_args: tuple[str, ...],
    batch_size: int | None,
    device: str,
    precision: str,
    compiled: bool,
    cuda_graphs: bool,
    turns: int,
    threads: int,
    out: Path | None,
) -> None:
    """Measure and print; with --out, keep."""
    torch.set_num_threads(threads)
    keep_freed_memory()  # as the command line does
    ways = [FitConfig(), *([FitConfig(compile=True)] if compiled else [])]
    ways += [FitConfig(compile=True, cuda_graphs=True)] if cuda_graphs else []
    rows = []
    for name in networks.split(","):
        batch = batch_size or BATCHES[name]
        bench = Bench(name, parse_arch_args(arch_args), batch, torch.device(device), precision == "bfloat16")
        times = _take_turns(bench.variants(ways), turns, torch.device(device))
        rows += _compare(name, batch, times)
        torch.compiler.reset()
    if out is not None:
        content = {
            "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
            "threads": threads,
            "precision": precision,
            "turns": turns,
            "torch": torch.__version__,
            "command": _command(),
            "rows": rows,
        }
        out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _compare(name: str, batch: int, times: dict[Variant, list[float]]) -> list[dict[str, Any]]:
    """A row for each variant: medians, and the median of its ratios to the plain step of the same turn."""
    rows = []
    for (variant, way), taken in times.items():
        milliseconds = round(1000 * median(taken), 3)
        ratio = round(median(a / b for a, b in zip(taken, times["plain", way], strict=True)), 2)
        row = {"network": name, "batch": batch, "variant": variant + way}
        rows.append(row | {"milliseconds": milliseconds, "ratio": ratio})
        told = f"{name:14} {batch:4}  {variant + way:42} {milliseconds:9.2f} ms {ratio:5.2f}x"
        click.echo(f"{told} {batch / median(taken):9,.0f} examples/s")
    return rows


def _command() -> str:
    """As it was given, without the file that it writes to."""
    given = sys.argv[1:]
    if "--out" in given:
        place = given.index("--out")
        del given[place : place + 2]
    return " ".join(["python zoo/benchmarks/step_cost.py", *given])


def _cpu_name() -> str:
    names = Path("/proc/cpuinfo")
    if names.exists():
        for line in names.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return platform.processor() or platform.machine()


def _take_turns(
    variants: dict[Variant, Step], turns: int, device: torch.device
) -> dict[Variant, list[float]]:
    """Seconds of a step, some of every variant in each turn; the first turns only warm up."""
    times: dict[Variant, list[float]] = {name: [] for name in variants}
    count = STEPS_A_TURN[device.type]
    for turn in range(turns + WARM_UP):
        for name, step in variants.items():
            _wait(device)
            started = time.perf_counter()
            for _ in range(count):
                step()
            _wait(device)
            if turn >= WARM_UP:
                times[name].append((time.perf_counter() - started) / count)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class Bench:
    """The variants of one network, on a batch that stays on the device.

    Args:
        name, arguments: of the architecture.
        batch: examples in a step.
        low: whether the forward pass is in bfloat16.
    """

    def __init__(
        self, name: str, arguments: dict[str, Any], batch: int, device: torch.device, low: bool
    ) -> None:
        shape = (1, 28, 28) if name in LENETS else (3, 32, 32)
        self.name, self.arguments, self.low, self.device = name, arguments, low, device
        self.inputs = torch.randn(batch, *shape, device=device)
        self.labels = torch.randint(0, 10, (batch,), device=device)

    def variants(self, ways: list[FitConfig]) -> dict[Variant, Step]:
        """A step function for each variant of the network and each way of running it."""
        found = {}
        for way in ways:
            told = ", CUDA graphs" if way.cuda_graphs else ", compiled" if way.compile else ""
            for variant, (model, penalty) in self._networks(alone=way.compile).items():
                found[variant, told] = self._step(model.to(self.device), penalty, way)
        return found

    def _networks(self, alone: bool) -> dict[str, tuple[nn.Module, Penalty | None]]:
        """The plain network, ours, and, where not `alone`, those of other packages."""

        def build() -> nn.Module:
            return build_architecture(self.name, self.arguments)

        example, lenet = self.inputs[:2].cpu(), self.name in LENETS
        channels = convert(build(), example, "channels", prune_inputs=lenet).model
        networks: dict[str, tuple[nn.Module, Penalty | None]] = {
            "plain": (build(), None),
            "vbdcompress, weights": (convert(build(), example, "weights").model, None),
            f"vbdcompress, channels{' and inputs' if lenet else ''}": (channels, None),
        }
        if lenet and not alone:
            for package, swap, penalty in _others():
                networks[f"{package}, weights"] = (swap(build()), penalty)
        return networks

    def _step(self, model: nn.Module, penalty: Penalty | None, way: FitConfig) -> Step:
        """One training step; `penalty` is another package's KL, None takes ours."""
        for module in model.modules():
            if isinstance(module, nn.Conv2d):  # as `fit` lays them out
                module.to(memory_format=torch.channels_last)
        model.train()
        elbo = ELBO(model, F.cross_entropy, 60_000)
        optimizer = make_optimizer(model, FitConfig())
        beta = torch.ones((), device=self.device)
        compile_(elbo, way)

        def step() -> None:
            begin_step(way)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.low):
                if penalty is None:
                    objective = elbo(self.inputs, self.labels, beta).objective
                else:
                    objective = F.cross_entropy(model(self.inputs), self.labels) + penalty(model) / 60_000
            objective.backward()
            optimizer.step()

        return step


def _others() -> list[tuple[str, Callable[[nn.Module], nn.Module], Callable[[nn.Module], Tensor]]]:
    """(package, network with its layers, its penalty) of each package that is installed."""
    found: list[Any] = []
    try:
        relevance = importlib.import_module("cplxmodule.nn.relevance")
        found.append(
            (
                "cplxmodule",
                lambda model: _swap(model, relevance.LinearARD, relevance.Conv2dARD),
                lambda model: sum(relevance.penalties(model, reduction="sum")),
            )
        )
    except ImportError as error:
        click.echo(f"cplxmodule is not installed ({error})")
    try:
        ard = importlib.import_module("torch_ard")
        found.append(
            ("pytorch-ard", lambda model: _swap(model, ard.LinearARD, ard.Conv2dARD), ard.get_ard_reg)
        )
    except ImportError as error:
        click.echo(f"pytorch-ard is not installed ({error})")
    return found


def _swap(model: nn.Module, linear: Any, conv: Any) -> nn.Module:
    """The network with another package's layers in the place of its own."""
    for name, child in model.named_children():
        if isinstance(child, nn.Linear):
            setattr(model, name, linear(child.in_features, child.out_features))
        elif isinstance(child, nn.Conv2d):
            setattr(model, name, conv(child.in_channels, child.out_channels, child.kernel_size))
        else:
            _swap(child, linear, conv)
    return model


if __name__ == "__main__":
    main()
