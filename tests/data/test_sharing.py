"""share: what a DataLoader of the user's own draws goes to one process or another, and to no two."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
)

from vbdcompress.data.loaders import count_examples, seed_generators, set_epoch
from vbdcompress.data.sharing import share
from vbdcompress.errors import DataError

DATA = TensorDataset(torch.arange(40), torch.zeros(40))


class Buckets:
    """Batches of neighbours, in an order of its own."""

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[list[int]]:
        for number in torch.randperm(8).tolist():
            yield list(range(5 * number, 5 * number + 5))


class Endless:
    def __iter__(self) -> Iterator[int]:
        while True:
            yield 0


class ByEpoch(Endless):
    """An order for each epoch, whoever seeds what."""

    number = 0

    def __len__(self) -> int:
        return 40

    def set_epoch(self, epoch: int) -> None:
        self.number = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(40, generator=torch.Generator().manual_seed(self.number)).tolist())


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(40))


def loaders() -> dict[str, DataLoader[Any]]:
    generator = torch.Generator()
    return {
        "in order": DataLoader(DATA, 5),
        "shuffled": DataLoader(DATA, 5, shuffle=True),
        "shuffled by a generator": DataLoader(DATA, 5, shuffle=True, generator=generator),
        "batches shuffled by a generator": DataLoader(
            DATA, batch_sampler=BatchSampler(RandomSampler(DATA, generator=generator), 5, False)
        ),
        "subset": DataLoader(DATA, 5, sampler=SubsetRandomSampler(range(40))),
        "batches": DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 5, False)),
        "buckets": DataLoader(DATA, batch_sampler=Buckets()),  # type: ignore[arg-type]
        "batches by epoch": DataLoader(DATA, batch_sampler=BatchSampler(ByEpoch(), 5, False)),
        "no batches": DataLoader(DATA, None, shuffle=True),
    }


def epoch(loader: DataLoader[Any], rank: int, number: int) -> list[list[int]]:
    """Batches of one process, as a fit asks for them: its noise is its own."""
    torch.manual_seed(1000 * number + rank)
    seed_generators(loader, number)
    set_epoch(loader, number)
    return [batch[0].reshape(-1).tolist() for batch in loader]


@pytest.mark.parametrize("name", list(loaders()))
def test_each_example_is_in_one_share(name: str) -> None:
    shares = [share(loaders()[name], 3, rank, 2) for rank in range(2)]
    epochs = [[epoch(loader, rank, number) for rank, loader in enumerate(shares)] for number in range(2)]
    for halves in epochs:
        assert len(halves[0]) == len(halves[1]) == len(shares[0])
        assert sorted(number for half in halves for batch in half for number in batch) == list(range(40))
    assert (epochs[0] == epochs[1]) == (name == "in order")
    if name == "buckets":
        assert all(batch == list(range(batch[0], batch[0] + 5)) for half in epochs[0] for batch in half)
    # a fit that goes on with the second epoch draws what it drew
    again = [share(loaders()[name], 3, rank, 2) for rank in range(2)]
    assert [epoch(loader, rank, 1) for rank, loader in enumerate(again)] == epochs[1]


def test_draws_with_replacement_stay_as_many() -> None:
    sampler = RandomSampler(DATA, replacement=True, num_samples=20)
    shares = [epoch(share(DataLoader(DATA, 5, sampler=sampler), 0, rank, 2), rank, 0) for rank in range(2)]
    assert [sum(map(len, batches)) for batches in shares] == [10, 10]


def test_sharing_draws_nothing_from_the_generators_of_the_noise() -> None:
    loader = share(loaders()["subset"], 0, 0, 2)
    torch.manual_seed(7)
    list(loader.sampler)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(7)))


def test_what_is_shared_already_stays() -> None:
    sampler: Any = DistributedSampler(DATA, 2, 0)
    for loader in (
        DataLoader(DATA, 5, sampler=sampler),
        DataLoader(DATA, batch_sampler=BatchSampler(sampler, 5, False)),
    ):
        assert share(loader, 0, 0, 2) is loader
        # the posterior's KL is shared by the examples of all processes
        assert count_examples(loader) == 40


@pytest.mark.parametrize(
    ("loader", "told"),
    [
        (DataLoader(Stream(), 5), "reads a stream, a Stream: each of 2 processes would take all of it"),
        (
            DataLoader(DATA, 5, sampler=Endless()),
            "by a Endless without a length: 2 processes can't share that",
        ),  # type: ignore[arg-type]
    ],
)
def test_what_can_not_be_shared_is_refused(loader: DataLoader[Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        share(loader, 0, 0, 2)
