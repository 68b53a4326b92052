"""fit: the loaders that users bring."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Sampler, TensorDataset

from vbdcompress.config import FitConfig
from vbdcompress.data import TensorBatches
from vbdcompress.errors import DataError
from vbdcompress.fitting import fit

Make = Callable[[], nn.Module]
Convert = Callable[..., nn.Module]


def settings(**options: Any) -> FitConfig:
    return FitConfig(**({"device": "cpu", "epochs": 2} | options))


class EpochSampler(Sampler[int]):
    """Keeps the epochs that it is told of."""

    def __init__(self) -> None:
        self.epochs: list[int] = []

    def __len__(self) -> int:
        return 12

    def __iter__(self) -> Iterator[int]:
        return iter(range(12))

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


class EpochBatchSampler(BatchSampler):
    """The same for whole batches."""

    def __init__(self) -> None:
        super().__init__(range(12), 4, drop_last=False)
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


class Unsized(Sampler[int]):
    """A sampler without a length: its examples are counted by one pass."""

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(12).tolist())


def user_loader(batches: TensorBatches, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(batches.inputs, batches.labels), batch_size=4, **options)


@pytest.mark.parametrize("kind", ["tensors", "loader", "unsized", "list"])
def test_fit_leaves_the_users_random_state(
    small_batches: TensorBatches, make_network: Make, convert: Convert, kind: str
) -> None:
    loaders = {
        "tensors": small_batches,
        "loader": user_loader(small_batches, shuffle=True),
        "unsized": user_loader(small_batches, sampler=Unsized()),
        "list": list(small_batches),
    }
    model = convert(make_network())
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    fit(model, loaders[kind], settings(), validation=user_loader(small_batches))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()


@pytest.mark.parametrize("kind", ["loader", "list"])
def test_fit_takes_the_users_loader(
    small_batches: TensorBatches, make_network: Make, convert: Convert, kind: str
) -> None:
    loader = user_loader(small_batches, shuffle=True) if kind == "loader" else list(small_batches)
    rows = fit(convert(make_network()), loader, settings(epochs=25, lr=0.03), validation=loader).epochs
    assert rows[-1].nll < 0.9 * rows[0].nll
    assert rows[0].kl == pytest.approx(rows[1].kl, rel=0.5)
    assert rows[-1].error is not None


def test_fit_takes_batches_of_any_structure(make_network: Make) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_network()

        def forward(self, batch: dict[str, Any]) -> Tensor:
            output: Tensor = self.inner(batch["x"] + batch["more"][0])
            return output

    batch = {"x": torch.randn(4, 5), "more": (torch.randn(4, 5), "note")}
    loss = nn.CrossEntropyLoss(reduction="mean")
    # a tuple of one: the dict is the network's only argument
    rows = fit(Two(), [((batch,), torch.arange(4) % 3)], settings(), loss=loss).epochs
    assert rows[1].nll < rows[0].nll


def test_fit_refuses_an_empty_loader(make_network: Make) -> None:
    with pytest.raises(DataError, match="is empty"):
        fit(make_network(), [], settings())


@pytest.mark.parametrize("kind", ["sampler", "batch_sampler"])
def test_fit_tells_the_users_sampler_the_epoch(
    small_batches: TensorBatches, make_network: Make, kind: str
) -> None:
    dataset = TensorDataset(small_batches.inputs, small_batches.labels)
    sampler = EpochSampler() if kind == "sampler" else EpochBatchSampler()
    fit(make_network(), DataLoader(dataset, **{kind: sampler}), settings(epochs=3))
    assert sampler.epochs == [0, 1, 2]


def test_fit_tells_any_iterable_the_epoch(small_batches: TensorBatches, make_network: Make) -> None:
    class Loader(list[Any]):
        set_epoch = EpochSampler.set_epoch

        def __init__(self, batches: Any) -> None:
            super().__init__(batches)
            self.epochs: list[int] = []

    loader = Loader(small_batches)
    fit(make_network(), loader, settings(epochs=3))
    assert loader.epochs == [0, 1, 2]
