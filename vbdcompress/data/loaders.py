"""The user's own loader: any iterable that yields (input, label) batches, once an epoch."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
)

from vbdcompress.data.batches import TensorBatches
from vbdcompress.errors import DataError
from vbdcompress.inputs import batch_size

Unpack = Callable[[Any], tuple[Any, Any]]
# What the target is called among the parts of an example
LABELS = ("labels", "label")


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


def unpack_of(loader: Iterable[Any]) -> Unpack | None:
    """How batches are taken apart that are dicts with their labels among them; None for others."""
    check_repeatable(loader)
    batch = next(iter(loader), None)
    if isinstance(batch, Mapping) and len(batch) > 1:
        for name in LABELS:
            if isinstance(batch.get(name), Tensor):
                return partial(_without, name)
    return None


def _without(name: str, batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, Mapping) or name not in batch:
        raise DataError("loader", f"yields a batch without '{name}', which the first had.")
    return {key: value for key, value in batch.items() if key != name}, batch[name]


def whole(loader: Any) -> Any:
    """A loader to measure on: with its last, smaller batch, which one to train on may leave out."""
    if isinstance(loader, Unpacked):
        return Unpacked(whole(loader.loader), loader.unpack)
    if not isinstance(loader, DataLoader) or not loader.drop_last or _iterates_itself(loader):
        return loader
    order = {} if isinstance(loader.dataset, IterableDataset) else {"sampler": loader.sampler}
    return reload(loader, loader.dataset, batch_size=loader.batch_size, **order)


def on_device(batches: Any, device: torch.device) -> Any:
    """A set in memory moved to the device, all of it for this process; any other loader as it is.

    Batch by batch, every pass over it would wait for the copies.
    """
    return batches.on(device, 0, 1) if isinstance(batches, TensorBatches) else batches


def set_epoch(batches: Any, epoch: int) -> None:
    """Tell whatever decides the order of the examples which epoch it is."""
    for part in _order_parts(batches) if isinstance(batches, DataLoader) else [batches]:
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)


def seed_generators(batches: Any, seed: int) -> None:
    """Start a DataLoader's own generators anew, so that its order is that of the seed."""
    for generator in _generators_of(batches):
        generator.manual_seed(seed)


def _order_parts(loader: DataLoader[Any]) -> list[Any]:
    """What decides the order of its examples, each once."""
    parts = loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)
    return list({id(part): part for part in parts}.values())


def seed_generator(part: Any, seed: int) -> None:
    """Start the generator of a loader or sampler anew, where it has one of its own."""
    generator = getattr(part, "generator", None)
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)


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


@contextmanager
def kept_generators(*loaders: Any) -> Iterator[None]:
    """Whatever is drawn inside, afterwards all generators are as they were, the loaders' own among them."""
    own = [generator for loader in loaders for generator in _generators_of(loader)]
    states = [generator.get_state() for generator in own]
    with forked_generators():
        try:
            yield
        finally:
            for generator, state in zip(own, states, strict=True):
                generator.set_state(state)


def _generators_of(batches: Any) -> list[torch.Generator]:
    if isinstance(batches, Unpacked):
        return _generators_of(batches.loader)
    parts = (batches, *_order_parts(batches)) if isinstance(batches, DataLoader) else ()
    found = (getattr(part, "generator", None) for part in parts)
    return [generator for generator in found if isinstance(generator, torch.Generator)]


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Inside, loaders and samplers draw by a seed alone; afterwards all generators are as they were."""
    with forked_generators():
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPU's noise too
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield


def shared_by(loader: DataLoader[Any]) -> DistributedSampler[Any] | None:
    """The sampler of the user's own that gives each process its share; None where there is none."""
    return next((part for part in _order_parts(loader) if isinstance(part, DistributedSampler)), None)


def check_repeatable(loader: Iterable[Any] | None) -> None:
    """Raise DataError where the loader is an iterator, which gives its batches only once."""
    if isinstance(loader, Iterator):
        raise DataError(
            "loader",
            f"is a {type(loader).__name__}, which gives its batches only once; every epoch needs them.",
            "Pass a list of batches, a DataLoader, or an object whose __iter__ starts anew.",
        )


def count_examples(loader: Iterable[Any]) -> int:
    """Examples in one epoch of a loader, of all processes: from its samplers, or by one pass.

    An `unpack` that gives as many examples as the loader in the first batch does so in all.

    Raises:
        DataError: the loader is empty, or an iterator, which to count would use up.
    """
    check_repeatable(loader)
    given = loader.loader if isinstance(loader, Unpacked) else loader
    known = _count_drawn(given) if isinstance(given, DataLoader) else None
    if isinstance(loader, TensorBatches):
        count = loader.num_examples
    elif known is not None and (given is loader or _keeps_size(loader, known[1])):
        count = known[0]
    else:
        count = sum(batch_size(batch[0]) for batch in loader)
    if count == 0:
        raise DataError("loader", "is empty: it yields no batch.")
    sharing = shared_by(given) if isinstance(given, DataLoader) else None
    return count if sharing is None else count * sharing.num_replicas


def _count_drawn(loader: DataLoader[Any]) -> tuple[int, int] | None:
    """Examples that its samplers draw, in all and for the first batch.

    None where they do not say, or its class makes its batches itself.
    """
    if isinstance(loader.dataset, IterableDataset) or _iterates_itself(loader):
        return None
    if loader.batch_size is not None:
        count = len(loader.sampler) if isinstance(loader.sampler, Sized) else None
        return None if count is None else (count, min(count, loader.batch_size))
    drawn = list(loader.batch_sampler or ())
    sizes = [len(each) for each in drawn if isinstance(each, Sized)]
    return (sum(sizes), sizes[0]) if sizes and len(sizes) == len(drawn) else None


def _keeps_size(loader: Iterable[Any], size: int) -> bool:
    """Whether the first batch holds so many examples."""
    batch = next(iter(loader), None)
    return batch is not None and batch_size(batch[0]) == size


def _iterates_itself(loader: DataLoader[Any]) -> bool:
    """Whether its class is the user's own and makes batches of its own."""
    return type(loader).__iter__ is not DataLoader.__iter__


def reload(loader: DataLoader[Any], dataset: Dataset[Any], **order: Any) -> DataLoader[Any]:
    """The same loader of other data, or in another order.

    Raises:
        DataError: its class makes batches of its own, as no other loader would.
    """
    if _iterates_itself(loader):
        raise DataError(
            "loader",
            f"is a {type(loader).__name__}, whose own __iter__ may make its batches otherwise: it can't be "
            "split, nor shared by several processes.",
            "Pass validation data, and fit in one process; or give torch's own DataLoader.",
        )
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
