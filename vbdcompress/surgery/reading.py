"""Where the positions of a tensor come from, as its graph's derivatives tell."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from vbdcompress.surgery.flows import Flow, Place, Source, reaching_channels
from vbdcompress.surgery.match import match, match_parameter

Role = Literal["mixing", "reading", "between", "opaque"]
# What torch says of operations without a derivative, or without a second one
_NO_DERIVATIVE = ("derivative for", "double backward", "differentiate twice")
NO_DERIVATIVE = "what lies behind it has no second derivative, from which its channels could be told"


@dataclass(frozen=True)
class Reading:
    """What a layer was given, or what the network gave, and where it comes from.

    Attributes:
        layer: dotted name; empty for the network's output.
        role: of the layer; "opaque" for the output.
        width: size of its channel dimension; 1 where the role is "opaque".
        positions: for each set of positions that can't be told apart, the places that they come
            from: ([positions], [places]).
        places: all that reach it.
        bare: names of bare parameters that work on the way, not channel by channel.
        spread: places of channels that work on many of its positions at once.
        blocked: why it can't be told which positions come from which places; empty where it can.
    """

    layer: str
    role: Role
    width: int
    positions: list[tuple[list[int], list[Place]]]
    places: list[Place]
    bare: list[str]
    spread: list[Place]
    blocked: str = ""


@dataclass
class Recording:
    """One forward pass.

    Attributes:
        written: mixing layer -> number of its outputs.
        readings: what each layer was given, in order.
        bare: id -> name of the parameters and buffers of no layer known by its type.
        buffers: ids of those that are buffers.
        sources: id of a leaf -> what it stands for.
    """

    written: dict[str, int] = field(default_factory=dict)
    readings: list[Reading] = field(default_factory=list)
    bare: dict[int, str] = field(default_factory=dict)
    buffers: set[int] = field(default_factory=set)
    sources: dict[int, Source] = field(default_factory=dict)


def reading_of(found: Recording, layer: str, role: Role, tensor: Tensor, dim: int) -> tuple[Reading, bool]:
    """Where a layer's input comes from, and whether any leaf reaches it."""
    width = 1 if role == "opaque" else tensor.shape[dim]
    leaves = _leaves_of(tensor) if tensor.requires_grad else []
    sources = [found.sources[id(leaf)] for leaf in leaves if id(leaf) in found.sources]
    bare = [leaf for leaf in leaves if id(leaf) in found.bare]
    reading = Reading(layer, role, width, [], [], [], [])
    if sources or bare:
        try:
            _trace_positions(found, reading, tensor, dim, sources, bare)
        except RuntimeError as error:
            if not any(words in str(error) for words in _NO_DERIVATIVE):
                raise
            every = [source.place(channel) for source in sources for channel in range(source.count)]
            reading = Reading(layer, role, width, [], every, [], [], NO_DERIVATIVE)
        told = reading.positions or reading.spread or reading.bare or reading.blocked
        if role == "mixing" and reading.places and not told:
            reading = replace(reading, blocked=NO_DERIVATIVE)
    return reading, bool(sources or bare)


def is_of_parts(found: Recording, reading: Reading, tensor: Tensor, dim: int) -> bool:
    """Whether a norm is over some of a layer's channels here and over others there, as of each head.

    Then it is none of a stream, and its own code says what meets. What comes from several channels in each
    place, as behind a gated unit, meets there.

    Args:
        reading: of the norm.
        tensor: that it was given.
        dim: of its channels.
    """

    def joins(reading: Reading) -> bool:
        together = (Counter(place[:2] for place in places) for _, places in reading.positions)
        return any(count > 1 for counts in together for count in counts.values())

    if tensor.dim() < 3 or not joins(reading):
        return False
    rows = tensor.movedim(dim, -1).flatten(0, -2)
    # the first and the last token may come from no layer
    some = (rows[place : place + 1] for place in sorted({0, min(1, len(rows) - 1), len(rows) - 1}))
    return not any(joins(reading_of(found, reading.layer, "between", row, 1)[0]) for row in some)


def _trace_positions(
    found: Recording,
    reading: Reading,
    tensor: Tensor,
    dim: int,
    sources: Sequence[Source],
    bare: Sequence[Tensor],
) -> None:
    """Fill in where a reading comes from. Raises RuntimeError where derivatives are wanting."""
    cotangent = torch.randn_like(tensor).requires_grad_()
    wanted = [*(source.values for source in sources), *bare]
    slopes = torch.autograd.grad(tensor, wanted, cotangent, create_graph=True, allow_unused=True)
    for leaf, slope in zip(bare, slopes[len(sources) :], strict=True):
        if slope is not None and bool(slope.any()):
            name = found.bare[id(leaf)]
            opaque = reading.role == "opaque"
            held = None if opaque else match_parameter(name, leaf, slope, cotangent, dim)
            if held is None and id(leaf) not in found.buffers:
                reading.bare.append(name)
            elif held is not None:
                reading.positions.extend(held)
                reading.places.extend(place for _, places in held for place in places)
    flows = []
    for source, slope in zip(sources, slopes[: len(sources)], strict=True):
        reaching = [] if slope is None else reaching_channels(source, slope)
        reading.places.extend(source.place(channel) for channel in reaching)
        if slope is not None and reaching:
            flows.append(Flow(source, slope))
    if reading.role != "opaque":
        matched, spread = match(tensor, dim, flows, cotangent)
        reading.positions.extend(matched)
        reading.spread.extend(spread)


def _leaves_of(tensor: Tensor) -> list[Tensor]:
    """The leaves that a tensor was computed from, by its graph."""
    if tensor.grad_fn is None:
        return [tensor]
    seen, queue, leaves = {tensor.grad_fn}, [tensor.grad_fn], dict[int, Tensor]()
    while queue:
        node = queue.pop()
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            leaves[id(leaf)] = leaf
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                queue.append(after)
    return list(leaves.values())
