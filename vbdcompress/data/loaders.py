"""The user's own loader: any iterable that yields (input, label) batches, once an epoch."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)

from vbdcompress.data.batches import TensorBatches
from vbdcompress.errors import DataError
from vbdcompress.inputs import tensors_of

Unpack = Callable[[Any], tuple[Any, Any]]


class Unpacked:
    """A loader whose batches are turned into (inputs, target) on the way.

    Args:
        loader: of the user's own kind of batches.
        unpack: batch -> (inputs, target).
    """

    def __init__(self, loader: Iterable[Any], unpack: Unpack) -> None:
        check_repeatable(loader)
        self.loader, self.unpack = loader, unpack

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for batch in self.loader:
            yield self.unpack(batch)

    def __len__(self) -> int:
        if not isinstance(self.loader, Sized):
            raise TypeError(f"a {type(self.loader).__name__} has no length")
        return len(self.loader)

    def set_epoch(self, epoch: int) -> None:
        """Tell the loader which epoch it is, where it asks."""
        set_epoch(self.loader, epoch)


def on_device(batches: Any, device: torch.device) -> Any:
    """A set in memory moved to the device, all of it for this process; any other loader as it is.

    Batch by batch, every pass over it would wait for the copies.
    """
    return batches.on(device, 0, 1) if isinstance(batches, TensorBatches) else batches


def set_epoch(batches: Any, epoch: int) -> None:
    """Tell whatever decides the order of the examples which epoch it is."""
    parts: list[Any] = [batches]
    if isinstance(batches, DataLoader):
        parts = [batches.sampler, batches.batch_sampler]
    for part in parts:
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)


def seed_generators(batches: Any, seed: int) -> None:
    """Start a DataLoader's own generators anew, so that its order is that of the seed."""
    if isinstance(batches, Unpacked):
        seed_generators(batches.loader, seed)
    elif isinstance(batches, DataLoader):
        inner = getattr(batches.batch_sampler, "sampler", None)
        for part in (batches, batches.sampler, inner):
            seed_generator(part, seed)


def seed_generator(part: Any, seed: int) -> None:
    """Start the generator of a loader or sampler anew, where it has one of its own."""
    generator = getattr(part, "generator", None)
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)


class SharedSampler(DistributedSampler[Any]):
    """A process's share of what a sampler draws. All draw the same: by the seed and the epoch alone.

    Args:
        sampler: of examples or of batches, as a DataLoader takes it.
        seed, rank, world_size: of the fit, of this process, and number of all.
    Raises:
        DataError: it has no length.
    """

    def __init__(self, sampler: Iterable[Any], seed: int, rank: int, world_size: int) -> None:
        if not isinstance(sampler, Sized):
            told = f"draws by a {type(sampler).__name__} without a length"
            raise DataError(
                "loader",
                f"{told}: {world_size} processes can't share that.",
                "Give the sampler a __len__, or fit in one process.",
            )
        places: Any = range(len(sampler))
        super().__init__(places, num_replicas=world_size, rank=rank, shuffle=False, seed=seed)
        self.sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        seed = self.seed * 1_000_003 + self.epoch
        with forked_generators():
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPU's noise too
            random.seed(seed)
            np.random.seed(seed % 2**32)
            for part in (self.sampler, getattr(self.sampler, "sampler", None)):
                seed_generator(part, seed)
            drawn = list(self.sampler)
        return iter([drawn[place] for place in super().__iter__()])

    def set_epoch(self, epoch: int) -> None:
        """Draw for this epoch."""
        super().set_epoch(epoch)
        set_epoch(self.sampler, epoch)


@contextmanager
def forked_generators(devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """Whatever is drawn or seeded inside, afterwards all generators are as they were.

    Args:
        devices: GPUs, beside the CPU.
    """
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def share(loader: DataLoader[Any], seed: int, rank: int, world_size: int) -> DataLoader[Any]:
    """The loader of one process: its share of the examples or, where a sampler draws batches, of those.

    One that a DistributedSampler shares already stays as it is.

    Raises:
        DataError: the data are a stream, or the sampler has no length.
    """
    if isinstance(loader.dataset, IterableDataset):
        told = f"reads a stream, a {type(loader.dataset).__name__}"
        raise DataError(
            "loader",
            f"{told}: each of {world_size} processes would take all of it.",
            "Use a data set with an index, or one process.",
        )
    by_batches = loader.batch_size is None and loader.batch_sampler is not None
    sampler: Any = loader.batch_sampler if by_batches else loader.sampler
    if any(isinstance(part, DistributedSampler) for part in (sampler, getattr(sampler, "sampler", None))):
        return loader
    shared = SharedSampler(sampler, seed, rank, world_size)
    if by_batches:
        return _reload(loader, loader.dataset, batch_sampler=shared)
    order = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    return _reload(loader, loader.dataset, sampler=shared, **order)


def check_repeatable(loader: Iterable[Any] | None) -> None:
    """Raise DataError where the loader is an iterator, which gives its batches only once."""
    if isinstance(loader, Iterator):
        raise DataError(
            "loader",
            f"is a {type(loader).__name__}, which gives its batches only once; every epoch needs them.",
            "Pass a list of batches, a DataLoader, or an object whose __iter__ starts anew.",
        )


def count_examples(loader: Iterable[Any]) -> int:
    """Examples in one epoch of a loader: from its sampler where it says, else by one pass.

    Raises:
        DataError: the loader is empty, or an iterator, which to count would use up.
    """
    check_repeatable(loader)
    if isinstance(loader, TensorBatches):
        count = loader.num_examples
    elif isinstance(loader, DataLoader) and isinstance(loader.sampler, Sized) and loader.batch_size:
        sampler = loader.sampler  # of all processes, where it is one's share
        count = len(sampler) * (sampler.num_replicas if isinstance(sampler, DistributedSampler) else 1)
    else:
        count = sum(_targets(batch) for batch in loader)
    if count == 0:
        raise DataError("loader", "is empty: it yields no batch.")
    return count


def _targets(batch: Any) -> int:
    """Examples in a batch: (inputs, target), targets of any nesting."""
    tensors = tensors_of(batch[1])
    return len(tensors[0]) if tensors else len(batch[1])


def split_loader(loader: Iterable[Any], fraction: float, seed: int) -> tuple[Iterable[Any], Iterable[Any]]:
    """A training and a validation loader from one, by a seeded split of its examples.

    Args:
        loader: TensorBatches, or a DataLoader over an indexed data set that takes each example
            once an epoch: all of it in order or shuffled, or the subset of a SubsetRandomSampler.
    Raises:
        DataError: any other iterable can't be split.
    """
    if isinstance(loader, TensorBatches):
        train, held = _split_indices(range(loader.num_examples), fraction, seed)
        shuffled = TensorBatches(
            loader.inputs[train],
            loader.labels[train],
            loader.batch_size,
            shuffle=loader.shuffle,
            augment=loader.augment,
            pixels=loader.pixels,
            seed=loader.seed,
        )
        return shuffled, TensorBatches(loader.inputs[held], loader.labels[held], loader.batch_size)
    indices = _indices_of(loader) if isinstance(loader, DataLoader) else None
    if isinstance(loader, DataLoader) and indices is not None:
        train, held = _split_indices(indices, fraction, seed)
        if not loader.drop_last and len(train) > 1 and len(train) % (loader.batch_size or 1) == 1:
            held = sorted([*held, train.pop()])  # norms can't train on a batch of one
        shuffle = not isinstance(loader.sampler, SequentialSampler)
        drop_last = loader.drop_last and len(train) >= (loader.batch_size or 1)  # or nothing would be left
        training, rest = Subset(loader.dataset, train), Subset(loader.dataset, held)
        size = loader.batch_size
        return (
            _reload(loader, training, batch_size=size, shuffle=shuffle, drop_last=drop_last),
            _reload(loader, rest, batch_size=size),
        )
    raise DataError(
        "loader",
        f"is a {_describe(loader)}, from which no validation data can be split off.",
        "Pass your own: compress(model, loader, validation=validation_loader)",
    )


def _describe(loader: Iterable[Any]) -> str:
    if isinstance(loader, DataLoader):
        return f"DataLoader of {type(loader.dataset).__name__} with {type(loader.sampler).__name__}"
    return type(loader).__name__


def _indices_of(loader: DataLoader[Any]) -> Sequence[int] | None:
    """The examples that the loader takes once each in every epoch; None where that can't be said."""
    sampler, dataset = loader.sampler, loader.dataset
    if loader.batch_size is None or not isinstance(dataset, Sized):
        return None
    if type(sampler) is SequentialSampler:
        return range(len(dataset))
    if type(sampler) is RandomSampler and not sampler.replacement and len(sampler) == len(dataset):
        return range(len(dataset))
    # What the sampler leaves out may be the user's own test data
    return list(sampler.indices) if type(sampler) is SubsetRandomSampler else None


def _split_indices(indices: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    count = len(indices)
    held_out = max(1, round(fraction * count))
    if held_out >= count:
        raise DataError("loader", f"has {count} examples: too few to hold some out for validation.")
    places = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    order = [int(indices[place]) for place in places]
    return sorted(order[held_out:]), sorted(order[:held_out])


def _reload(loader: DataLoader[Any], dataset: Dataset[Any], **order: Any) -> DataLoader[Any]:
    """The same loader of other data, or in another order."""
    return DataLoader(
        dataset,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        **order,
    )
