"""fit: a fit that was cut off goes on as if it had not been."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

from vbdcompress import compress
from vbdcompress.checkpoints import FitCheckpoint
from vbdcompress.config import FitConfig
from vbdcompress.data import TensorBatches
from vbdcompress.errors import FitError, LoadError
from vbdcompress.files import load_tensors
from vbdcompress.fitting import FitResult, fit
from vbdcompress.records import EpochRow
from vbdcompress.vbd.gates import ChannelGate, InputGate, attach_gate_
from vbdcompress.vbd.sampled import attach_sampled_

Make = Callable[[], nn.Module]
Convert = Callable[..., nn.Module]
CONFIG = FitConfig(device="cpu", epochs=5, lr=0.01, warmup_epochs=2, seed=4)


class StopAfter:
    """A listener that presses Ctrl-C once an epoch is over."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_start(self, title: str, epochs: int) -> None:
        """Takes no notice."""

    def on_step(self, epoch: int, step: int, steps: int | None, examples: int) -> None:
        """Takes no notice."""

    def on_epoch(self, row: EpochRow, epochs: int) -> None:
        if row.epoch == self.epoch:
            raise KeyboardInterrupt


class EpochSampler(Sampler[int]):
    """Another order in each epoch, as torch's DistributedSampler has it."""

    epoch = 0

    def __len__(self) -> int:
        return 12

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        return iter(torch.randperm(12, generator=torch.Generator().manual_seed(self.epoch)).tolist())


IMAGES = torch.randn(12, 5, 6, 6, generator=torch.Generator().manual_seed(8))
LABELS = torch.arange(12) % 3


class Noisy(TensorDataset):
    """Augments by the generators of Python and numpy, in the main process."""

    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        return image + random.random() + float(np.random.rand()), label


def make_loader(kind: str) -> Any:
    if kind == "tensors":
        return TensorBatches(IMAGES, LABELS, 4, shuffle=True, augment="crop-flip", seed=2)
    options: dict[str, Any] = {"shuffle": True}
    if kind == "sampler":
        options = {"sampler": EpochSampler()}
    elif kind == "generator":
        options |= {"generator": torch.Generator().manual_seed(0)}
    if kind == "noisy":
        return DataLoader(Noisy(IMAGES, LABELS), batch_size=4)
    return DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4, **options)


def make_model(convert: Convert) -> nn.Module:
    """Every kind of posterior and a batch norm, whose buffers must come back as well."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(5, 6, 3),
        nn.BatchNorm2d(6),
        nn.Flatten(),
        nn.Linear(96, 8),
        nn.LayerNorm(8),
        nn.Linear(8, 3),
    )
    attach_sampled_(model[5], "weight", -2.0)
    attach_gate_(model[3], InputGate([ChannelGate(6, -2.0)], torch.arange(6).repeat_interleave(16), -1))
    return convert(model, -2.0)


def run(model: nn.Module, loader: Any, checkpoint: FitCheckpoint | None, **options: Any) -> FitResult:
    return fit(model, loader, CONFIG, checkpoint=checkpoint, validation=make_loader("tensors"), **options)


def timeless(rows: Any) -> list[EpochRow]:
    return [replace(row, seconds=0.0, examples_per_second=0.0) for row in rows]


@pytest.mark.parametrize("kind", ["tensors", "loader", "generator", "sampler", "noisy"])
@pytest.mark.parametrize("stop", [2, 4])
def test_fit_resumed_equals_an_unbroken_one(tmp_path: Path, convert: Convert, kind: str, stop: int) -> None:
    unbroken = run(make_model(convert), make_loader(kind), None)
    checkpoint = FitCheckpoint(tmp_path / "fit.ckpt", every_seconds=0)
    with pytest.raises(KeyboardInterrupt):
        run(make_model(convert), make_loader(kind), checkpoint, listener=StopAfter(stop))
    done = len(load_tensors(checkpoint.path)["rows"])
    assert done == stop  # an epoch that was reported is an epoch that is kept
    torch.manual_seed(99)  # whatever the new process has drawn before
    resumed = run(make_model(convert), make_loader(kind), replace(checkpoint, resume=True))
    assert timeless(resumed.epochs) == timeless(unbroken.epochs)
    expected: dict[str, Tensor] = unbroken.model.state_dict()
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_fit_resumed_at_the_end_trains_no_more(tmp_path: Path, convert: Convert) -> None:
    checkpoint = FitCheckpoint(tmp_path / "fit.ckpt")
    first = run(make_model(convert), make_loader("tensors"), checkpoint)
    again = run(make_model(convert), make_loader("tensors"), replace(checkpoint, resume=True))
    assert again.epochs == first.epochs
    expected = first.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.model.state_dict().items())


def test_fit_resumes_from_nothing_at_the_start(tmp_path: Path, convert: Convert) -> None:
    checkpoint = FitCheckpoint(tmp_path / "fit.ckpt", resume=True)
    assert len(run(make_model(convert), make_loader("tensors"), checkpoint).epochs) == 5


def test_fit_without_resume_starts_anew(tmp_path: Path, convert: Convert) -> None:
    checkpoint = FitCheckpoint(tmp_path / "fit.ckpt", every_seconds=0)
    with pytest.raises(KeyboardInterrupt):
        run(make_model(convert), make_loader("tensors"), checkpoint, listener=StopAfter(3))
    with pytest.raises(KeyboardInterrupt):
        run(make_model(convert), make_loader("tensors"), checkpoint, listener=StopAfter(1))
    assert len(load_tensors(checkpoint.path)["rows"]) == 1


def test_fit_checkpoints_as_seldom_as_asked(tmp_path: Path, convert: Convert) -> None:
    checkpoint = FitCheckpoint(tmp_path / "fit.ckpt", every_seconds=1e9)
    with pytest.raises(KeyboardInterrupt):
        run(make_model(convert), make_loader("tensors"), checkpoint, listener=StopAfter(4))
    assert not checkpoint.path.exists()
    run(make_model(convert), make_loader("tensors"), checkpoint)
    assert len(load_tensors(checkpoint.path)["rows"]) == 5


@pytest.mark.parametrize(
    ("every", "since", "cost", "due"),
    [
        (3.0, 3.0, 99.0, True),
        (3.0, 2.9, 0.0, False),
        # without it writing takes at most a twentieth of the time
        (None, 20.1, 1.0, True),
        (None, 19.9, 1.0, False),
        (None, 0.001, 0.0, True),
    ],
)
def test_checkpoint_is_due(every: float | None, since: float, cost: float, due: bool) -> None:
    assert FitCheckpoint(Path("fit.ckpt"), every_seconds=every).due(since, cost) is due


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("lr", 0.02, "lr was 0.01, is 0.02"),
        ("prior", "vd", "prior was vbd, is vd"),
        ("epochs", 9, "epochs was 5"),
    ],
)
def test_fit_refuses_to_resume_with_other_options(
    tmp_path: Path, convert: Convert, name: str, value: Any, found: str
) -> None:
    checkpoint = FitCheckpoint(tmp_path / "fit.ckpt", resume=True)
    run(make_model(convert), make_loader("tensors"), checkpoint)
    config = CONFIG.model_copy(update={name: value})
    with pytest.raises(FitError, match=found) as caught:
        fit(make_model(convert), make_loader("tensors"), config, checkpoint=checkpoint)
    assert "fit.ckpt" in str(caught.value)


def test_fit_resumes_on_another_machine(tmp_path: Path, convert: Convert) -> None:
    checkpoint = FitCheckpoint(tmp_path / "fit.ckpt", resume=True)
    first = run(make_model(convert), make_loader("tensors"), checkpoint)
    config = CONFIG.model_copy(update={"device": "auto", "devices": 1})
    again = fit(make_model(convert), make_loader("tensors"), config, checkpoint=checkpoint)
    assert again.epochs == first.epochs


def test_fit_refuses_the_checkpoint_of_another_network(
    tmp_path: Path, convert: Convert, make_network: Make, small_batches: TensorBatches
) -> None:
    checkpoint = FitCheckpoint(tmp_path / "fit.ckpt", resume=True)
    run(make_model(convert), make_loader("tensors"), checkpoint)
    for model in (convert(make_network()), make_network()):
        with pytest.raises(FitError, match=r"fit\.ckpt': is of another network"):
            fit(model, small_batches, CONFIG, checkpoint=checkpoint)


def test_fit_refuses_a_checkpoint_cut_short(tmp_path: Path, convert: Convert) -> None:
    checkpoint = FitCheckpoint(tmp_path / "fit.ckpt", resume=True)
    run(make_model(convert), make_loader("tensors"), checkpoint)
    whole = checkpoint.path.read_bytes()
    checkpoint.path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LoadError, match="can't be read"):
        run(make_model(convert), make_loader("tensors"), checkpoint)


def test_fit_refuses_what_is_no_checkpoint_of_a_fit(tmp_path: Path, make_network: Make) -> None:
    checkpoint = FitCheckpoint(tmp_path / "fit.ckpt", resume=True)
    torch.save(make_network().state_dict(), checkpoint.path)
    with pytest.raises(FitError, match="no checkpoint of a fit"):
        fit(make_network(), make_loader("tensors"), CONFIG, checkpoint=checkpoint)


class Interrupt:
    """A listener that ends a run at a step, counted over all its fits."""

    def __init__(self, last: int) -> None:
        self.left = last

    def on_start(self, title: str, epochs: int) -> None:
        """Takes no notice."""

    def on_step(self, epoch: int, step: int, steps: int | None, examples: int) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

    def on_epoch(self, row: EpochRow, epochs: int) -> None:
        """Takes no notice."""


@pytest.mark.parametrize(
    ("stop", "own"),  # in the second round, in fine-tuning
    [(14, False), pytest.param(29, False, marks=pytest.mark.slow), (14, True)],
)
def test_a_resumed_run_takes_the_statistics_of_norms_from_the_same_examples(
    tmp_path: Path, stop: int, own: bool
) -> None:
    torch.manual_seed(0)
    inputs, labels = torch.randn(2_100, 6), torch.randint(0, 3, (2_100,))
    stem = (nn.Linear(6, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU())
    network = nn.Sequential(*stem, nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)).eval()

    def go(**options: Any) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(7) if own else None  # as a new process makes it
        data = TensorDataset(inputs, labels)
        loader = DataLoader(data, batch_size=420, shuffle=True, generator=generator)
        given = {"validation": loader, "test": loader, "mode": "both", "beta": 5.0, "device": "cpu"}
        epochs = {"epochs": 2, "finetune_epochs": 2, "warmup_epochs": 1}
        return compress(network, loader, **given, **epochs, **options).model.state_dict()

    unbroken = go()
    with pytest.raises(KeyboardInterrupt):
        go(checkpoints=tmp_path, listener=Interrupt(stop))
    resumed = go(checkpoints=tmp_path, resume=True)
    assert unbroken.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in unbroken.items())
