"""What two networks give, compared: whether one is exactly the other."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Largest |masked - sliced| over the largest |masked|, in float64
EXACT = 1e-10


def as_double(tensor: Tensor) -> Tensor:
    """On the CPU; in float64 where it holds floating point numbers."""
    plain = tensor.detach().cpu()
    return plain.double() if plain.is_floating_point() else plain


def flatten_output(output: Any) -> list[Tensor]:
    """All tensors in a network's output: bare, or in tuples, lists, dicts and dataclasses."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = output.values()
    elif is_dataclass(output) and not isinstance(output, type):
        output = [getattr(output, item.name) for item in fields(output)]
    if isinstance(output, str | bytes) or not hasattr(output, "__iter__"):
        return []
    return [tensor for item in output for tensor in flatten_output(item)]


def relative_difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Largest difference over all outputs, relative to the largest expected; inf where shapes differ."""
    shapes = [tuple(tensor.shape) for tensor in expected]
    if not shapes or shapes != [tuple(tensor.shape) for tensor in found]:
        return float("inf")
    worst = 0.0
    for one, other in zip(expected, found, strict=True):
        if not one.numel():
            continue
        left, right = one.detach().double(), other.detach().double()
        equal = (left == right) | (left.isnan() & right.isnan())  # a mask's infinities too
        difference = float(torch.where(equal, 0.0, left - right).abs().max())
        scale = float(torch.where(left.isfinite(), left, 0.0).abs().max()) or 1.0
        worst = max(worst, difference / scale if np.isfinite(difference) else float("inf"))
    return worst
