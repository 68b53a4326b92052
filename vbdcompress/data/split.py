"""Holding examples out for validation: a fraction and a seed say which, wherever the examples are."""

import torch
from torch import Tensor

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
