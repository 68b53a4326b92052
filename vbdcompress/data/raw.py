"""A data set as it was read, before normalisation."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RawImages:
    """Images as they come, before normalisation.

    Attributes:
        images: [n, channels, height, width], 0 to `scale`.
        labels: [n] int64.
        scale: the value of a fully bright pixel: 255, 16 for digits, 1 for floats.
    """

    images: Tensor
    labels: Tensor
    scale: float


@dataclass(frozen=True)
class RawSet:
    """A data set's training part, its test part where it has one, and its classes.

    Attributes:
        notes: sentences that a reader must know who gives no validation data of his own.
    """

    train: RawImages
    test: RawImages | None
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()
