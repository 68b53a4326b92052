"""Holding examples out for validation: a fraction and a seed say which, wherever the examples are."""

from collections.abc import Iterable, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from vbdcompress.data.batches import TensorBatches
from vbdcompress.data.loaders import reload
from vbdcompress.errors import DataError


def split_places(count: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Places of the training and of the held-out examples, each in ascending order.

    Files keep fraction and seed, so that the same examples can be held out again.

    Args:
        count: of all examples.
        fraction: to hold out; at least one example is.
    Raises:
        DataError: none would be left to train on.
    """
    held_out = max(1, round(fraction * count))
    if held_out >= count:
        raise DataError("validation split", f"of {count} examples leaves none to train on.")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[held_out:].sort()[0], order[:held_out].sort()[0]


def check_apart(name: str, validation: str) -> None:
    """Raise DataError where the validation data are what is trained on."""
    trained_on = {Path(name).resolve(), Path(name, "train").resolve()}
    if Path(validation).exists() and Path(validation).resolve() in trained_on:
        raise DataError(
            f"data set '{name}'",
            f"the validation data '{validation}' are its training data.",
            "Give others; without any, some are split off.",
        )


def split_loader(loader: Iterable[Any], fraction: float, seed: int) -> tuple[Iterable[Any], Iterable[Any]]:
    """A training and a validation loader from one, by a seeded split of its examples.

    Args:
        loader: TensorBatches, or a DataLoader over an indexed data set that takes each example
            once an epoch: all of it in order or shuffled, or the subset of a SubsetRandomSampler.
    Raises:
        DataError: any other iterable can't be split.
    """
    if isinstance(loader, TensorBatches):
        places, held_places = split_places(loader.num_examples, fraction, seed)
        shuffled = TensorBatches(
            loader.inputs[places],
            loader.labels[places],
            loader.batch_size,
            shuffle=loader.shuffle,
            augment=loader.augment,
            pixels=loader.pixels,
            seed=loader.seed,
        )
        rest = loader.inputs[held_places], loader.labels[held_places]
        return shuffled, TensorBatches(*rest, loader.batch_size)
    indices = _indices_of(loader) if isinstance(loader, DataLoader) else None
    if isinstance(loader, DataLoader) and indices is not None:
        same: dict[int, list[int]] = {}  # those that a sampler or a Subset names more than once go together
        for index in indices:
            same.setdefault(_place_in(loader.dataset, int(index)), []).append(int(index))
        examples = list(same.values())
        parts = split_places(len(examples), fraction, seed)
        train, held = (sorted(i for place in part.tolist() for i in examples[place]) for part in parts)
        if not loader.drop_last and len(train) > 1 and len(train) % (loader.batch_size or 1) == 1:
            held = sorted([*held, train.pop()])  # norms can't train on a batch of one
        shuffle = not isinstance(loader.sampler, SequentialSampler)
        drop_last = loader.drop_last and len(train) >= (loader.batch_size or 1)  # or nothing would be left
        size = loader.batch_size
        return (
            reload(
                loader, Subset(loader.dataset, train), batch_size=size, shuffle=shuffle, drop_last=drop_last
            ),
            reload(loader, Subset(loader.dataset, held), batch_size=size),
        )
    raise DataError(
        "loader",
        f"is a {_describe(loader)}, from which no validation data can be split off.",
        "Pass your own: compress(model, loader, validation=validation_loader)",
    )


def share_examples(one: Iterable[Any] | None, other: Iterable[Any] | None) -> bool:
    """Whether two loaders are seen to give the same examples, some at least: not where data sets are two."""
    if one is None or other is None:
        return False
    if one is other:
        return True
    if isinstance(one, TensorBatches) and isinstance(other, TensorBatches):
        return one.inputs is other.inputs
    if not (isinstance(one, DataLoader) and isinstance(other, DataLoader)):
        return False
    if _source_of(one.dataset) is not _source_of(other.dataset):
        return False
    return not _places_of(one).isdisjoint(_places_of(other))


def _places_of(loader: DataLoader[Any]) -> set[int]:
    """Where the examples that a loader may take stand in what they were taken from."""
    return {_place_in(loader.dataset, int(index)) for index in _drawn_by(loader)}


def _drawn_by(loader: DataLoader[Any]) -> Sequence[int]:
    """The examples that a loader may take; none where that can't be said."""
    indices = _indices_of(loader)
    if indices is None and type(loader.sampler) in (RandomSampler, WeightedRandomSampler):
        return range(len(loader.dataset)) if isinstance(loader.dataset, Sized) else ()
    return indices or ()


def _source_of(dataset: Any) -> Any:
    """What one Subset, or several, were taken from."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return dataset


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


def _place_in(dataset: Any, index: int) -> int:
    """Where an example stands in what one Subset, or several, were taken from."""
    while type(dataset) is Subset:
        dataset, index = dataset.dataset, int(dataset.indices[index])
    return index
