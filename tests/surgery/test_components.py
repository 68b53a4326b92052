"""Positions in which several channels meet: found as they are, whatever they look like."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vbdcompress.surgery import components as module
from vbdcompress.surgery.components import components
from vbdcompress.surgery.flows import Flow, Source

Meeting = list[tuple[list[int], list[int]]]


def attend(widths: list[int]) -> Callable[[Tensor], Tensor]:
    """Heads of such widths behind [n, tokens, 3 times the sum of these], queries first."""

    def compute(x: Tensor) -> Tensor:
        heads = zip(*(part.split(widths, -1) for part in x.chunk(3, -1)), strict=True)
        return torch.cat([F.softmax(q @ k.mT, -1) @ v for q, k, v in heads], -1)

    return compute


def interleave(x: Tensor) -> Tensor:
    """Four heads one after the other, each with its queries, keys and values."""
    q, k, v = x.unflatten(-1, (4, 3, 2)).permute(3, 0, 2, 1, 4)
    return (F.softmax(q @ k.mT, -1) @ v).transpose(1, 2).flatten(2)


def average_of_strides(x: Tensor) -> Tensor:
    """Channels 0, 4, 8 and so on meet in one position."""
    return torch.sin(x.unflatten(-1, (-1, 4)).mean(-2))


def average_of_neighbours(x: Tensor) -> Tensor:
    """Each position is of two channels, and each channel but the outer two is in two positions: all meet."""
    return x[..., 1:] * x[..., :-1]


def pairs_and_chains(x: Tensor) -> Tensor:
    """Pairs at the distance of two, of which the last four positions are one chain, as no pair is."""
    pairs = (x.unflatten(-1, (-1, 2)) ** 2).sum(-1, keepdim=True).expand(*x.shape[:-1], -1, 2).flatten(-2)
    chain = torch.cat([pairs[..., :-4], pairs[..., -4:] + x[..., -4:].roll(1, -1)], -1)
    return chain


def pairs_that_need_less(x: Tensor) -> Tensor:
    """Pairs at the distance of two; in the last ones each position is of one channel alone."""
    pairs = (x.unflatten(-1, (-1, 2)) ** 2).sum(-1, keepdim=True).expand(*x.shape[:-1], -1, 2).flatten(-2)
    return torch.cat([pairs[..., :-4], x[..., -4:] ** 2], -1)


def pairs_of_one(x: Tensor) -> Tensor:
    """Pairs at the distance of two; the last ones are of the first channel of two alone."""
    pairs = x.unflatten(-1, (-1, 2)) ** 2
    used = torch.cat([pairs[..., :-2, :].sum(-1), pairs[..., -2:, 0]], -1)
    return used.unsqueeze(-1).expand(pairs.shape).flatten(-2)


def oracle(compute: Callable[[Tensor], Tensor], x: Tensor) -> Meeting:
    """Connected parts of the positions and channels that depend on each other, from the whole Jacobian."""
    jacobian = torch.autograd.functional.jacobian(compute, x).abs()
    depends = jacobian.sum((0, 1, 3, 4)) > 0
    left, found = set(range(len(depends))), []
    while left:
        positions = {min(left)}
        while True:
            channels = depends[sorted(positions)].any(0)
            more = set(torch.nonzero(depends[:, channels].any(1)).flatten().tolist())
            if more == positions:
                break
            positions = more
        found.append((sorted(positions), torch.nonzero(channels).flatten().tolist()))
        left -= positions
    return found


def find(compute: Callable[[Tensor], Tensor], x: Tensor) -> Meeting:
    leaf = x.clone().requires_grad_()
    tensor = compute(leaf)
    cotangent = torch.randn_like(tensor).requires_grad_()
    (slope,) = torch.autograd.grad(tensor, leaf, cotangent, create_graph=True)
    flow = Flow(Source("writes", "layer", leaf, 2), slope)
    found = components(tensor, 2, flow, range(tensor.shape[2]), cotangent)
    return [(positions, [channel for _, _, channel in places]) for positions, places in found]


@pytest.mark.parametrize(
    ("compute", "width"),
    [
        (attend([3] * 8), 72),
        (attend([2, 2, 3, 1, 1, 1, 1]), 33),
        (attend([2, 2, 2, 2, 4, 4]), 48),
        (interleave, 24),
        (average_of_strides, 20),
        (average_of_neighbours, 9),
        (pairs_and_chains, 14),
        (pairs_that_need_less, 16),
        (pairs_of_one, 16),
    ],
)
def test_components_are_those_of_the_jacobian(compute: Callable[[Tensor], Tensor], width: int) -> None:
    x = torch.rand(2, 3, width, dtype=torch.float64) + 0.5
    expected = oracle(compute, x)
    assert sorted(find(compute, x)) == expected


def test_the_third_head_and_those_behind_it_are_seen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, around = list[int](), module._Look.around

    def count(self: module._Look, position: int) -> module._Component:
        looks.append(position)
        return around(self, position)

    monkeypatch.setattr(module._Look, "around", count)
    found = find(attend([4] * 12), torch.rand(2, 3, 144, dtype=torch.float64))
    assert (len(found), looks) == (12, [0, 4])
