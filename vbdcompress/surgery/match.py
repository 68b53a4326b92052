"""Which channels a tensor's positions come from, decoded from directional derivatives."""

from collections.abc import Iterator, Sequence
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


Matched = list[tuple[list[int], list[Place]]]


def match(tensor: Tensor, dim: int, flows: Sequence[Flow], cotangent: Tensor) -> tuple[Matched, list[Place]]:
    """(positions, places) of one reading, and the places of single channels that work on many positions.

    First all sources at once: most positions come from one channel of one of them. What comes from
    several, as in a sum, is looked at source by source, and then channel by channel. What works on all
    positions at once where each comes from a channel of another source, too, ties none of these, and stays
    when they go: a map of where to look, the shares of a mixture.
    """
    if not flows:
        return [], []
    matched, rest = _match_single(flows, cotangent, dim, range(tensor.shape[dim]))
    spread, meeting = list[Place](), list[tuple[Flow, tuple[list[int], list[Place]]]]()
    # position -> the flows of which it takes one channel
    single: dict[int, set[int]] = {position: set() for position in rest}
    for flow in flows:
        more, left = _match_single([flow], cotangent, dim, rest) if len(flows) > 1 else ([], rest)
        if len(more) > 1 and flow.source.dim is not None and flow.source.count == 1:
            spread.append(flow.source.place(0))
            continue
        matched += more
        for (position,), _ in more:
            single[position].add(id(flow))
        meeting += [(flow, found) for found in _components(tensor, dim, flow, left, cotangent)]
    for flow, (positions, places) in meeting:
        others = all(single.get(position, set()) - {id(flow)} for position in positions)
        if others and 1 < len(positions) == tensor.shape[dim]:
            spread += places
        else:
            matched.append((positions, places))
    return matched, spread


def match_parameter(
    name: str, parameter: Tensor, slope: Tensor, cotangent: Tensor, dim: int
) -> Matched | None:
    """(positions, places) of a parameter, with an entry for each channel along a dimension; else None."""
    for own in range(parameter.dim()):
        if parameter.shape[own] > 1:
            flow = Flow(Source("holds", f"{name}:{own}", parameter, own), slope)
            matched, rest = _match_single([flow], cotangent, dim, range(cotangent.shape[dim]))
            if not rest:
                return matched
    return None


def _along(flows: Sequence[Flow], steps: Sequence[Tensor], cotangent: Tensor, dim: int) -> Tensor:
    """[positions, everything]: how a reading moves when its sources take the given steps."""
    (moved,) = torch.autograd.grad(
        [flow.slope for flow in flows], cotangent, steps, retain_graph=True, allow_unused=True
    )
    moved = torch.zeros_like(cotangent) if moved is None else moved
    return _numbers(moved).movedim(dim, 0).reshape(moved.shape[dim], -1)


def _match_single(
    flows: Sequence[Flow], cotangent: Tensor, dim: int, among: Sequence[int]
) -> tuple[Matched, list[int]]:
    """Positions that come from one channel, by three directional derivatives, and the others.

    With the channel's number, and again a random number of its own, as the size of the step, the
    ratio to unit steps names the one channel that a position depends on, or no channel.
    """
    counts = [flow.source.count for flow in flows]
    count = sum(counts)
    numbers = torch.arange(1, count + 1, dtype=cotangent.dtype)
    marks = 1 + torch.rand(count, dtype=cotangent.dtype)
    directions = [torch.randn_like(flow.source.values) for flow in flows]

    def along(sizes: Tensor) -> Tensor:
        parts = zip(flows, directions, torch.split(sizes, counts), strict=True)
        return _along(flows, [flow.steps(*part) for flow, *part in parts], cotangent, dim)

    plain, numbered, marked = (along(sizes) for sizes in (torch.ones_like(numbers), numbers, marks))
    strongest = plain.abs().argmax(1, keepdim=True)
    largest = float(plain.abs().max())
    present = plain.abs() > NONE * largest
    safe = torch.where(present, plain, torch.ones_like(plain))
    number = (numbered / safe).gather(1, strongest)
    nearest = number.round().clamp(1, count)
    channel = nearest.long() - 1
    allowed = RELATIVE * plain.abs() + ROUNDING * largest
    of_one = (numbered - nearest * plain).abs() <= count * allowed
    of_one &= (marked - marks[channel] * plain).abs() <= allowed
    depends = present.any(1) | (numbered.abs() > NONE * count * largest).any(1)
    single = (of_one | ~present).all(1) & present.any(1)
    places = [flow.source.place(number) for flow in flows for number in range(flow.source.count)]
    matched: Matched = []
    rest = []
    for position in among:
        if bool(depends[position] & single[position]):
            matched.append(([position], [places[int(channel[position])]]))
        elif bool(depends[position]):
            rest.append(position)
    return matched, rest


def _components(
    tensor: Tensor, dim: int, flow: Flow, positions: Sequence[int], cotangent: Tensor
) -> Iterator[tuple[list[int], list[Place]]]:
    """Positions that depend on several channels, each set with all the channels that meet in it."""
    left, source = set(positions), flow.source
    while left:
        members, channels = {min(left)}, set[int]()
        while True:
            index = torch.tensor(sorted(members))
            picked = torch.zeros_like(tensor)
            picked.index_copy_(dim, index, torch.randn_like(tensor.detach().index_select(dim, index)))
            (slope,) = torch.autograd.grad(tensor, source.values, picked, retain_graph=True)
            found = set(reaching_channels(source, slope))
            steps = torch.zeros(source.count, dtype=picked.dtype)
            steps[sorted(found)] = 1 + torch.rand(len(found), dtype=picked.dtype)
            taken = flow.steps(torch.randn_like(source.values), steps)
            moved = _along([flow], [taken], cotangent, dim).abs().amax(1)
            reached = set(torch.nonzero(moved > NONE * moved.max()).flatten().tolist()) | members
            if found == channels and reached == members:
                break
            members, channels = reached, found | channels
        left -= members
        yield sorted(members), [source.place(channel) for channel in sorted(channels)]
