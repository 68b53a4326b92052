"""What reaches a tensor from the leaves that it was computed from, as directional derivatives tell."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# ("writes", layer, channel of its output), ("reads", layer, position of its input), or
# ("holds", "parameter:dimension", position along that dimension)
Side = Literal["writes", "reads", "holds"]
Place = tuple[Side, str, int]
# A derivative below this share of the largest is none, in float64
NONE = 1e-9
# What tells channels apart must exceed this share of a derivative, and rounding errors of the largest
RELATIVE = 1e-6
ROUNDING = 1e-12
# Labels of positions that depend on no channel, or on channels of several labels
NOTHING, SEVERAL = 0, -1


@dataclass(frozen=True)
class Source:
    """A leaf: what a layer computed, or what one was given, from which the network is followed anew.

    Attributes:
        side, layer: "writes" for an output, "reads" for an input, "holds" for a parameter.
        values: the leaf.
        dim: its channel dimension; None where its channels are one place, for they stay together.
        shares: (n, m) where each n channels stand for as many places that go together, m of them:
            behind a convolution whose groups go whole.
    """

    side: Side
    layer: str
    values: Tensor
    dim: int | None
    shares: tuple[int, int] = (1, 1)

    @property
    def count(self) -> int:
        """Number of its places."""
        return 1 if self.dim is None else self.values.shape[self.dim]

    def place(self, channel: int) -> Place:
        """The place of one channel."""
        here, there = self.shares
        return self.side, self.layer, channel // here * there


@dataclass(frozen=True)
class Flow:
    """A source and its slope: the derivative of a reading, against a cotangent, by the source's values."""

    source: Source
    slope: Tensor

    def steps(self, direction: Tensor, sizes: Tensor) -> Tensor:
        """Steps of all values in a direction, of a size for each place."""
        if self.source.dim is None:
            return direction * sizes
        shape = [1] * direction.dim()
        shape[self.source.dim] = self.source.count
        return direction * sizes.view(shape)


def reaching_channels(source: Source, slope: Tensor) -> list[int]:
    """Channels of a source at which its slope is not 0: those that reach the reading."""
    if source.dim is None:
        return [0] if bool(_numbers(slope.detach()).any()) else []
    return _nonzero(slope.detach(), source.dim)


def _numbers(slopes: Tensor) -> Tensor:
    """Without what is none, as a root has at 0: other entries tell, and the trial does."""
    return slopes.nan_to_num(0.0, 0.0, 0.0)


def _nonzero(tensor: Tensor, dim: int) -> list[int]:
    """Positions along a dimension at which a tensor of derivatives is not 0."""
    sizes = _numbers(tensor).abs().movedim(dim, 0).flatten(1).amax(1)
    return torch.nonzero(sizes > NONE * sizes.max()).flatten().tolist()


def along(flows: Sequence[Flow], steps: Sequence[Tensor], cotangent: Tensor, dim: int) -> Tensor:
    """[positions, everything]: how a reading moves when its sources take the given steps."""
    (moved,) = torch.autograd.grad(
        [flow.slope for flow in flows], cotangent, steps, retain_graph=True, allow_unused=True
    )
    moved = torch.zeros_like(cotangent) if moved is None else moved
    return _numbers(moved).movedim(dim, 0).reshape(moved.shape[dim], -1)


def labels_met(flows: Sequence[Flow], labels: Tensor, cotangent: Tensor, dim: int) -> list[int]:
    """For each position the label that all channels have on which it depends, else NOTHING or SEVERAL.

    By three directional derivatives: with the label, and again a random number for each, as the size of the
    step, the ratio to unit steps names the one label that a position depends on, or none.

    Args:
        labels: [channels of all flows] 1, 2 and so on.
    """
    counts = [flow.source.count for flow in flows]
    most = int(labels.max())
    numbers = labels.to(cotangent.dtype)
    marks = 1 + torch.rand(most, dtype=cotangent.dtype)
    directions = [torch.randn_like(flow.source.values) for flow in flows]

    def moved(sizes: Tensor) -> Tensor:
        parts = zip(flows, directions, torch.split(sizes, counts), strict=True)
        return along(flows, [flow.steps(*part) for flow, *part in parts], cotangent, dim)

    plain, numbered, marked = map(moved, (torch.ones_like(numbers), numbers, marks[labels - 1]))
    size = plain.abs()
    largest = float(size.max())
    present = size > NONE * largest
    strongest = size.argmax(1, keepdim=True)
    nearest = (numbered.gather(1, strongest) / plain.gather(1, strongest)).round()
    nearest = nearest.nan_to_num(1.0).clamp(1, most)  # where there is nothing at all
    allowed = size.mul_(RELATIVE).add_(ROUNDING * largest)
    depends = present.any(1) | (numbered.abs() > NONE * most * largest).any(1)
    of_one = (marked - marks[nearest.long() - 1] * plain).abs() <= allowed
    of_one &= (numbered - nearest * plain).abs() <= allowed.mul_(most)
    single = (of_one | ~present).all(1) & present.any(1)
    met = torch.where(single, nearest.long()[:, 0], SEVERAL)
    found: list[int] = torch.where(depends, met, NOTHING).tolist()
    return found
