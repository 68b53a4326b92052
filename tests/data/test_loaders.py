"""What counts as an example, and splitting a user's loader."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from vbdcompress.data import TensorBatches, Unpacked, count_examples, split_loader
from vbdcompress.data.loaders import kept_generators, seed_generators, set_epoch, whole
from vbdcompress.errors import DataError

SET = TensorDataset(torch.arange(20.0)[:, None], torch.arange(20) % 2)


class Stream(IterableDataset[tuple[Tensor, int]]):
    """Eleven examples, one after the other; it has a length but no index."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return iter([(torch.ones(1), 0)] * 11)

    def __len__(self) -> int:
        return 11


class Endless(Sampler[int]):
    """A sampler that does not say how long it is."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(6))


class Again:
    """An iterable that is no DataLoader."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(torch.ones(3, 1), torch.zeros(3)), (torch.ones(2, 1), torch.zeros(2))])


LOADERS: dict[str, tuple[Any, int]] = {
    "tensor_batches": (TensorBatches(torch.ones(7, 1), torch.zeros(7), 2, shuffle=True), 7),
    "loader": (DataLoader(SET, batch_size=3), 20),
    "shuffled": (DataLoader(SET, batch_size=3, shuffle=True), 20),
    "subset": (DataLoader(SET, batch_size=3, sampler=SubsetRandomSampler(range(8))), 8),
    "weighted": (DataLoader(SET, batch_size=3, sampler=WeightedRandomSampler([1.0] * 20, 33)), 33),
    "endless": (DataLoader(SET, batch_size=4, sampler=Endless()), 6),
    "batch_sampler": (DataLoader(SET, batch_sampler=BatchSampler(range(9), 4, drop_last=True)), 8),
    "stream": (DataLoader(Stream(), batch_size=4), 11),
    "list": ([(torch.ones(4, 1), torch.zeros(4)), (torch.ones(1, 1), torch.zeros(1))], 5),
    "iterable": (Again(), 5),
    "crops": (  # two of each
        Unpacked(
            DataLoader(SET, batch_size=3), lambda batch: tuple(part.repeat_interleave(2, 0) for part in batch)
        ),
        40,
    ),
    "unpacked": (Unpacked([{"x": torch.ones(4, 1)}] * 2, lambda batch: (batch["x"], None)), 8),
    "boxes": ([(torch.ones(4, 1), [{"boxes": torch.ones(7, 4)}] * 4)], 4),
    "masks": ([(torch.ones(3, 1), {"mask": torch.ones(()), "label": torch.ones(3)})], 3),
    "shared": (DataLoader(SET, batch_size=3, sampler=DistributedSampler(SET, 2, 0)), 20),
    "shared_unpacked": (
        Unpacked(DataLoader(SET, batch_sampler=BatchSampler(DistributedSampler(SET, 2, 0), 3, False)), tuple),
        20,
    ),
}


@pytest.mark.parametrize("name", LOADERS)
def test_count_examples_of_an_epoch(name: str) -> None:
    loader, count = LOADERS[name]
    assert count_examples(loader) == count
    assert count_examples(loader) == count  # counting uses nothing up


@pytest.mark.parametrize("wrap", [lambda loader: loader, lambda loader: Unpacked(loader, tuple)])
def test_each_epoch_of_a_shared_batch_sampler_has_an_order_of_its_own(wrap: Any) -> None:
    sampler = DistributedSampler(SET, 2, 0)
    loader = wrap(DataLoader(SET, batch_sampler=BatchSampler(sampler, 3, drop_last=False)))
    orders = []
    for epoch in (1, 2, 1):
        set_epoch(loader, epoch)
        orders.append([value for inputs, _ in loader for value in inputs.flatten().tolist()])
    assert orders[0] != orders[1]
    assert orders[0] == orders[2]


@pytest.mark.parametrize("loader", [[], TensorBatches(torch.ones(0, 1), torch.zeros(0), 4)])
def test_count_examples_of_an_empty_loader_is_an_error(loader: Any) -> None:
    with pytest.raises(DataError, match="is empty"):
        count_examples(loader)


def test_count_examples_refuses_what_gives_its_batches_only_once() -> None:
    loader = (batch for batch in LOADERS["list"][0])
    with pytest.raises(DataError, match="only once"):
        count_examples(loader)
    assert len(list(loader)) == 2  # and has not used it up


def examples_of(loader: Any) -> list[float]:
    return [float(value) for inputs, _ in loader for value in inputs.flatten()]


SPLITTABLE: dict[str, tuple[Any, int]] = {
    "loader": (DataLoader(SET, batch_size=3), 20),
    "shuffled": (DataLoader(SET, batch_size=3, shuffle=True, drop_last=True), 20),
    "subset": (DataLoader(SET, batch_size=3, sampler=SubsetRandomSampler(range(4, 14))), 10),
    "tensor_batches": (TensorBatches(torch.arange(20.0)[:, None], torch.arange(20), 3, shuffle=True), 20),
}


@pytest.mark.parametrize("name", SPLITTABLE)
def test_split_loader_is_disjoint_exhaustive_and_seeded(name: str) -> None:
    loader, count = SPLITTABLE[name]
    every = {float(value) for value in (range(4, 14) if name == "subset" else range(20))}
    train, held = split_loader(loader, 0.2, seed=1)
    more = int(name == "loader")  # 16 would be five batches of three, and one
    assert count_examples(train) == count - count // 5 - more
    assert count_examples(held) == len(examples_of(held)) == count // 5 + more
    seen = set()
    for epoch in range(20):  # a loader that drops its last batch shows all of it over some epochs
        if isinstance(train, TensorBatches):
            train.set_epoch(epoch)
        seen |= set(examples_of(train))
    assert seen == every - set(examples_of(held))
    assert set(examples_of(held)) < every
    again, other = split_loader(loader, 0.2, seed=1)[1], split_loader(loader, 0.2, seed=2)[1]
    assert examples_of(again) == examples_of(held) == sorted(examples_of(held))
    assert examples_of(other) != examples_of(held)


@pytest.mark.parametrize("name", ["shuffled", "subset", "tensor_batches"])
def test_split_loader_keeps_the_training_part_shuffled(name: str) -> None:
    train, _ = split_loader(SPLITTABLE[name][0], 0.2, seed=0)
    first = examples_of(train)
    if isinstance(train, TensorBatches):
        train.set_epoch(1)
    assert examples_of(train) != first
    assert first != sorted(first)


def test_split_loader_keeps_the_training_part_in_order() -> None:
    train, _ = split_loader(SPLITTABLE["loader"][0], 0.2, seed=0)
    assert examples_of(train) == sorted(examples_of(train))


def join(batch: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([pair[0] for pair in batch]) + 100, torch.stack([pair[1] for pair in batch])


def start_worker(worker: int) -> None:
    """Stands for a user's own."""


def test_split_loader_keeps_the_loaders_options() -> None:
    loader = DataLoader(
        SET,
        batch_size=4,
        shuffle=True,
        drop_last=True,
        collate_fn=join,
        num_workers=1,
        worker_init_fn=start_worker,
        persistent_workers=True,
        prefetch_factor=3,
        timeout=7,
        generator=torch.Generator().manual_seed(9),
    )
    train, held = split_loader(loader, 0.3, seed=0)
    assert isinstance(train, DataLoader)
    assert isinstance(held, DataLoader)
    kept = "batch_size collate_fn num_workers worker_init_fn persistent_workers prefetch_factor timeout"
    for name in kept.split():
        assert getattr(train, name) == getattr(held, name) == getattr(loader, name), name
    assert train.drop_last
    assert not held.drop_last  # every held-out example counts
    assert train.generator is loader.generator


UNSPLITTABLE: dict[str, Any] = {
    "generator": (batch for batch in LOADERS["list"][0]),
    "list": LOADERS["list"][0],
    "stream": LOADERS["stream"][0],
    "batch_sampler": LOADERS["batch_sampler"][0],
    "weighted": LOADERS["weighted"][0],
    "endless": LOADERS["endless"][0],
    "replacement": DataLoader(SET, batch_size=3, sampler=RandomSampler(SET, replacement=True)),
    "part": DataLoader(SET, batch_size=3, sampler=RandomSampler(SET, num_samples=5)),
}


@pytest.mark.parametrize("name", UNSPLITTABLE)
def test_split_loader_refuses_what_it_can_not_split(name: str) -> None:
    with pytest.raises(DataError, match="validation=validation_loader"):
        split_loader(UNSPLITTABLE[name], 0.1, seed=0)


def test_split_loader_refuses_too_few_examples() -> None:
    with pytest.raises(DataError, match="of 1 examples leaves none"):
        split_loader(DataLoader(TensorDataset(torch.ones(1, 1), torch.ones(1))), 0.1, seed=0)


def test_split_loader_leaves_no_batch_of_one() -> None:
    train, held = split_loader(DataLoader(SET, batch_size=4), 0.15, seed=0)  # 17 are 4 batches and one
    assert [len(batch[0]) for batch in train] == [4, 4, 4, 4]
    assert sorted(examples_of(train) + examples_of(held)) == [float(value) for value in range(20)]


def test_split_loader_takes_a_sequential_sampler_of_its_own() -> None:
    loader = DataLoader(SET, batch_size=3, sampler=SequentialSampler(SET))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train, held = split_loader(loader, 0.1, seed=0)
    assert sorted(examples_of(train) + examples_of(held)) == [float(value) for value in range(20)]


def test_split_loader_leaves_a_batch_where_the_last_one_would_be_dropped() -> None:
    train, held = split_loader(DataLoader(SET, batch_size=20, drop_last=True), 0.2, seed=0)
    assert (count_examples(train), count_examples(held)) == (16, 4)
    assert len(list(train)) == 1


class Scaling(DataLoader):
    """Makes of its batches what no other loader would."""

    def __iter__(self) -> Iterator[Any]:
        for inputs, labels in super().__iter__():
            yield inputs / 255, labels


class Named(DataLoader):
    """A class of its own, and nothing more."""


def test_a_loader_that_makes_its_batches_itself_is_not_rebuilt() -> None:
    data = TensorDataset(torch.full((10, 2), 255.0), torch.zeros(10))
    with pytest.raises(DataError, match="is a Scaling, whose own __iter__ may make its batches otherwise"):
        split_loader(Scaling(data, batch_size=3), 0.2, 0)
    loader = Scaling(data, batch_size=3, drop_last=True)
    assert whole(loader) is loader
    train, _ = split_loader(Named(data, batch_size=3), 0.2, 0)
    assert count_examples(train) == 8


def test_kept_generators_puts_a_loaders_own_back() -> None:
    own = torch.Generator().manual_seed(5)
    loader = Unpacked(DataLoader(range(10), shuffle=True, generator=own), lambda batch: (batch, batch))
    before, usual = own.get_state(), torch.get_rng_state()
    with kept_generators(loader, None, [1, 2]):
        seed_generators(loader, 3)
        assert list(loader)
    assert torch.equal(own.get_state(), before)
    assert torch.equal(torch.get_rng_state(), usual)


class Counted(TensorDataset):
    """Notes how many examples were read."""

    read = 0

    def __getitem__(self, place: Any) -> Any:
        self.read += 1
        return super().__getitem__(place)


@pytest.mark.parametrize("unpacked", [False, True])
@pytest.mark.parametrize(
    "order", [{"batch_size": 4}, {"batch_sampler": BatchSampler(RandomSampler(SET), 4, drop_last=False)}]
)
def test_examples_are_counted_without_reading_them(order: Any, unpacked: bool) -> None:
    data = Counted(*SET.tensors)
    loader = DataLoader(data, **order)
    assert count_examples(Unpacked(loader, tuple) if unpacked else loader) == 20
    assert data.read == (4 if unpacked else 0)
