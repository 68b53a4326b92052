"""The user's own loader: any iterable that yields (input, label) batches, once an epoch."""

from collections.abc import Iterable, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler, Subset

from vbdcompress.data.batches import TensorBatches
from vbdcompress.errors import DataError


def count_examples(loader: Iterable[Any]) -> int:
    """Examples in one epoch of a loader: from its sampler where it says, else by one pass.

    Raises:
        DataError: the loader is empty.
    """
    if isinstance(loader, TensorBatches):
        count = loader.num_examples
    elif isinstance(loader, DataLoader) and isinstance(loader.sampler, Sized) and loader.batch_size:
        count = len(loader.sampler)
    else:
        count = sum(len(batch[1]) for batch in loader)
    if count == 0:
        raise DataError("loader", "is empty: it yields no batch.")
    return count


def split_loader(
    loader: Iterable[Any], fraction: float, seed: int
) -> tuple[Iterable[Any], Iterable[Any]]:
    """A training and a validation loader from one, by a seeded split of its data set.

    Args:
        loader: a DataLoader over a data set with a length, or TensorBatches.
    Raises:
        DataError: any other iterable can't be split.
    """
    if isinstance(loader, TensorBatches):
        train, held = _split_indices(loader.num_examples, fraction, seed)
        shuffled = TensorBatches(
            loader.inputs[train],
            loader.labels[train],
            loader.batch_size,
            shuffle=loader.shuffle,
            augment=loader.augment,
            seed=loader.seed,
        )
        return shuffled, TensorBatches(loader.inputs[held], loader.labels[held], loader.batch_size)
    if isinstance(loader, DataLoader) and isinstance(loader.dataset, Sized) and loader.batch_size:
        train, held = _split_indices(len(loader.dataset), fraction, seed)
        shuffle = isinstance(loader.sampler, RandomSampler)
        return _reload(loader, train, shuffle), _reload(loader, held, False)
    raise DataError(
        "loader",
        f"is a {type(loader).__name__}, from which no validation data can be split off.",
        "Pass your own: compress(model, loader, validation=validation_loader)",
    )


def _split_indices(count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    held_out = max(1, round(fraction * count))
    if held_out >= count:
        raise DataError("loader", f"has {count} examples: too few to hold some out for validation.")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])


def _reload(loader: DataLoader[Any], indices: list[int], shuffle: bool) -> DataLoader[Any]:
    return DataLoader(
        Subset(loader.dataset, indices),
        batch_size=loader.batch_size,
        shuffle=shuffle,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last and shuffle,
    )
