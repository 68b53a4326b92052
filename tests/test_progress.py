"""What a run tells while it cuts and measures: each threshold, to those who listen for it."""

import io
from typing import Any

import torch
from rich.console import Console
from torch import nn

from vbdcompress import compress
from vbdcompress.progress import FitProgress
from vbdcompress.slimming import CURVE_THRESHOLDS
from vbdcompress.tracking import Listeners


class Steps:
    """A listener of epochs alone."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def on_start(self, title: str, epochs: int) -> None:
        self.told.append(title.partition(" ")[0])

    def on_step(self, epoch: int, step: int, steps: int | None, examples: int) -> None: ...

    def on_epoch(self, row: Any, epochs: int) -> None:
        self.told.append(row.epoch)


class Cuts(Steps):
    """A listener of cuts, too."""

    def on_cut(self, done: int, cuts: int) -> None:
        self.told.append((done, cuts))


def run(listener: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    inputs = torch.randn(60, 4)
    loader = [(inputs[i : i + 20], (inputs[i : i + 20, 0] > 0).long()) for i in (0, 20, 40)]
    sets = {"validation": loader, "test": loader}
    compress(model, loader, **sets, epochs=1, finetune_epochs=1, mode="channels", listener=listener)


def test_a_listener_is_told_of_each_threshold() -> None:
    cuts, steps = Cuts(), Steps()
    run(Listeners([cuts, steps]))
    number = len(CURVE_THRESHOLDS) + 1  # and the whole network
    counted = [(done, number) for done in range(number + 1)]
    assert cuts.told == ["Fitting", 1, *counted, "Fine-tuning", 1]
    assert steps.told == ["Fitting", 1, "Fine-tuning", 1]
    alone = Steps()
    run(alone)
    assert alone.told == steps.told


def test_the_terminal_says_that_cuts_are_measured() -> None:
    plain, drawn = io.StringIO(), io.StringIO()
    for output, is_terminal in ((plain, False), (drawn, True)):
        console = Console(file=output, force_terminal=is_terminal, width=120)
        with FitProgress(console) as progress:
            progress.on_start("Fitting", 1)
            for done in range(4):
                progress.on_cut(done, 3)
                progress.progress.refresh()
    assert plain.getvalue().splitlines()[1:] == ["Measuring error and size at 3 thresholds"]
    for share in ("33%", "67%", "100%"):
        assert share in drawn.getvalue()
