"""Which channels a tensor's positions come from, decoded from directional derivatives."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vbdcompress.surgery.components import components
from vbdcompress.surgery.flows import SEVERAL, Flow, Place, Source, labels_met

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
        meeting += [(flow, found) for found in components(tensor, dim, flow, left, cotangent)]
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


def _match_single(
    flows: Sequence[Flow], cotangent: Tensor, dim: int, among: Sequence[int]
) -> tuple[Matched, list[int]]:
    """Positions that come from one channel, and the others that come from any."""
    count = sum(flow.source.count for flow in flows)
    met = labels_met(flows, torch.arange(1, count + 1), cotangent, dim)
    places = [flow.source.place(number) for flow in flows for number in range(flow.source.count)]
    matched: Matched = [([position], [places[met[position] - 1]]) for position in among if met[position] > 0]
    return matched, [position for position in among if met[position] == SEVERAL]
