"""The data of a run: what it must be, and what a reader of the report must know of it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from vbdcompress.data import TensorBatches, on_device
from vbdcompress.data.loaders import check_repeatable, drawn_from
from vbdcompress.errors import DataError
from vbdcompress.evaluation import to_device
from vbdcompress.inputs import Inputs, first, shapes_of, tensors_of
from vbdcompress.records import InputSpec
from vbdcompress.reporting.build import DataRecord

# Batches of a part, to see whether their shapes differ, and examples of each shape
LOOKED_AT, OF_EACH = 8, 8
TESTED = (
    "The test data hold examples that are trained on, or on which choices are made: the test error says less "
    "of new data."
)


@dataclass(frozen=True)
class Sources:
    """The data of a run, and what is known of it.

    Attributes:
        train, validation, test: yield (input, target) batches; test may be None.
        record: names and counts for the report.
        input: shape and normalisation.
        notes: sentences that a reader must know, beside those of `warnings_of`.
    """

    train: Iterable[Any]
    validation: Iterable[Any]
    test: Iterable[Any] | None
    record: DataRecord
    input: InputSpec
    notes: tuple[str, ...] = ()

    def on(self, device: torch.device) -> "Sources":
        """The same data, those in memory on the device; the order of training batches is the device's own."""
        train, validation, test = (
            on_device(batches, device) for batches in (self.train, self.validation, self.test)
        )
        return replace(self, train=train, validation=validation, test=test)


def warnings_of(sources: Sources) -> list[str]:
    """What makes the figures of a run on these data less than they seem, a sentence each."""
    messages = list(sources.notes)
    record = sources.record
    if not record.validation_held_out:
        messages.append(
            "The network may have been trained on its validation examples: it looks better on them than it "
            "is, and a budget measured there misleads. Pass validation data of your own."
        )
    if record.test is None:
        messages.append(
            "There is no test set: the error is the validation error, on which choices were made."
        )
    return messages


def other_shapes(sources: Sources, samples: Inputs, seed: int) -> list[Inputs]:
    """Inputs of other shapes than the samples', some of each that the first batches hold, on the CPU.

    Args:
        seed: of the order in which loaders that shuffle draw them.
    """
    known, found = [[size[1:] for size in shapes_of(samples)]], list[Inputs]()
    for batches in (sources.train, sources.validation, sources.test):
        if batches is None or isinstance(batches, TensorBatches):
            continue
        with drawn_from(seed):
            for inputs, _ in islice(batches, LOOKED_AT):
                if (shape := [size[1:] for size in shapes_of(inputs)]) not in known:
                    known.append(shape)
                    found.append(to_device(first(inputs, OF_EACH), torch.device("cpu")))
    return found


def check_parts(loader: Iterable[Any], validation: Iterable[Any], test: Iterable[Any] | None) -> None:
    """Raise DataError where a part yields no pairs, or them only once."""
    for batches in (loader, validation, test):
        check_repeatable(batches)
    first_batch(validation, "validation loader")
    if test is not None:
        first_batch(test, "test loader")


def first_batch(loader: Iterable[Any], where: str = "loader") -> tuple[Inputs, Any]:
    """The first (inputs, target). Raises DataError where there is none, or it is no such pair."""
    batch = next(iter(loader), None)
    if batch is None:
        raise DataError(where, "is empty: it yields no batch.")
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not tensors_of(batch[0]):
        raise DataError(
            where,
            f"yields {describe_batch(batch)}, allowed are pairs of inputs (a tensor, a tuple or a dict of "
            "tensors) and targets.",
            "From Python, say what is what: compress(..., unpack=lambda batch: (inputs, target))",
        )
    if isinstance(batch[1], int | float) or (isinstance(batch[1], Tensor) and not batch[1].dim()):
        raise DataError(
            where,
            "yields single examples, allowed are batches of them.",
            "DataLoader(dataset, batch_size=...) makes batches of a data set.",
        )
    inputs: Inputs = batch[0]
    for tensor in tensors_of(inputs):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise DataError(where, "the first batch holds NaN or infinite values.")
    return inputs, batch[1]


def describe_batch(batch: Any) -> str:
    """What a batch is, for errors: its class and how much it holds."""
    kind = type(batch).__name__
    return f"{kind}s of {len(batch)}" if isinstance(batch, tuple | list | dict) else f"{kind}s"
