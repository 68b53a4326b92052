"""What an ELBO step costs beside a plain training step of the same network, and beside other packages.

    python zoo/benchmarks/step_cost.py                      # CPU, one thread
    python zoo/benchmarks/step_cost.py --device cuda

Steps of all variants take turns (A B C A B C ...), so that a busy machine slows all alike; a figure is
the median over the turns of step time, a ratio the median of the ratios within a turn. Each step is
forward, loss and KL, backward, Adam. In weights mode six matrix products stand against three: 2.0 is
the limit. cplxmodule's and pytorch-ard's layers are timed where they are installed.
"""

import importlib
import json
import os
import platform
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
from vbdcompress.config import FitConfig
from vbdcompress.conversion import convert
from vbdcompress.optimization import make_optimizer
from vbdcompress.vbd.elbo import ELBO

Step = Callable[[], None]
NETWORKS = {"lenet_300_100": 200, "lenet5": 100}


@click.command()
@click.option("--device", default="cpu", show_default=True)
@click.option("--precision", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--turns", default=60, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures as JSON, too.")
def main(device: str, precision: str, turns: int, threads: int, out: Path | None) -> None:
    """Measure and print; with --out, keep."""
    torch.set_num_threads(threads)
    keep_freed_memory()  # as the command line does
    rows = []
    for name, batch in NETWORKS.items():
        variants = _variants(name, batch, torch.device(device), precision == "bfloat16")
        times = _take_turns(variants, turns, torch.device(device))
        for variant, taken in times.items():
            ratio = median(mine / plain for mine, plain in zip(taken, times["plain"], strict=True))
            rows.append(
                {
                    "network": name,
                    "batch": batch,
                    "variant": variant,
                    "milliseconds": round(1000 * median(taken), 3),
                    "ratio": round(ratio, 2),
                }
            )
            click.echo(f"{name:14} {batch:4}  {variant:28} {1000 * median(taken):8.2f} ms  {ratio:5.2f}x")
    if out is not None:
        content = {
            "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
            "threads": threads,
            "precision": precision,
            "turns": turns,
            "torch": torch.__version__,
            "command": f"python zoo/benchmarks/step_cost.py --device {device} --precision {precision} "
            f"--turns {turns} --threads {threads}",
            "rows": rows,
        }
        out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _cpu_name() -> str:
    names = Path("/proc/cpuinfo")
    if names.exists():
        for line in names.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return platform.processor() or platform.machine()


def _take_turns(variants: dict[str, Step], turns: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each step, a step of every variant in each turn; the first turns only warm up."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(turns + 5):
        for name, step in variants.items():
            _wait(device)
            started = time.perf_counter()
            step()
            _wait(device)
            if turn >= 5:
                times[name].append(time.perf_counter() - started)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _variants(name: str, batch: int, device: torch.device, low: bool) -> dict[str, Step]:
    """A step function for each variant of a network."""
    shape = (batch, 1, 28, 28)
    inputs, labels = torch.randn(shape, device=device), torch.randint(0, 10, (batch,), device=device)
    networks: dict[str, tuple[nn.Module, Callable[[nn.Module], Tensor] | None]] = {
        "plain": (build_architecture(name), None),
    }
    example = inputs[:2].cpu()
    plain = build_architecture(name)
    networks["vbdcompress, weights"] = (convert(plain, example, "weights").model, None)
    networks["vbdcompress, channels and inputs"] = (
        convert(plain, example, "channels", prune_inputs=True).model,
        None,
    )
    for package, swap, penalty in _others():
        networks[f"{package}, weights"] = (swap(build_architecture(name)), penalty)
    return {
        variant: _step(model.to(device), inputs, labels, penalty, low)
        for variant, (model, penalty) in networks.items()
    }


def _step(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    penalty: Callable[[nn.Module], Tensor] | None,
    low: bool,
) -> Step:
    """One training step; `penalty` is another package's KL, None takes ours."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # as `fit` lays them out
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train()
    elbo = ELBO(model, F.cross_entropy, 60_000)
    optimizer = make_optimizer(model, FitConfig())
    beta = torch.ones((), device=inputs.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=low):
            if penalty is None:
                objective = elbo(inputs, labels, beta).objective
            else:
                objective = F.cross_entropy(model(inputs), labels) + penalty(model) / 60_000
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
