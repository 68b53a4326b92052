"""Tensors of no layer, with an entry for each channel or without."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import Groups, Pattern, assert_cut_exactly, assert_groups, built, conv, pool
from torch import Tensor, nn


def scale_of_two() -> nn.Module:
    """One parameter with an entry for each channel of two groups."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.cat([m.a(x), m.b(x)], 1).relu() * m.scale
        return m.head(pool(m.c(y).relu()))

    model = Pattern(forward, a=conv(3, 7), b=conv(3, 5), c=conv(12, 6), head=nn.Linear(6, 4))
    model.scale = nn.Parameter(torch.rand(1, 12, 1, 1))
    return model


def bare_parameter() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(pool(m.b(m.a(x).relu() * m.scale).relu()))

    model = Pattern(forward, a=conv(3, 6), b=conv(6, 5), head=nn.Linear(5, 4))
    model.scale = nn.Parameter(torch.rand(1, 6, 1, 1))
    return model


def faint_beside_strong() -> nn.Module:
    """A scale whose effect on one pixel is as small as rounding errors let it be seen."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).relu() * m.scale
        strength = x.new_ones(8, 8)
        strength[0, 0] = 1e-8
        return m.head(pool(m.b((1000 + strength) * y - 1000 * y).relu()))

    model = Pattern(forward, a=conv(3, 6), b=conv(6, 5), head=nn.Linear(5, 4))
    model.scale = nn.Parameter(torch.rand(1, 6, 1, 1))
    return model


def bare_matrix() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.einsum("nchw,dc->ndhw", m.a(x).relu(), m.matrix)
        return m.head(pool(m.b(y).relu()))

    model = Pattern(forward, a=conv(3, 6), b=conv(7, 5), head=nn.Linear(5, 4))
    model.matrix = nn.Parameter(torch.rand(7, 6))
    return model


def lists_of_parameters() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(pool(m.b((m.a(x) * m.scales[1] + m.shifts["a"]).relu()).relu()))

    scales = nn.ParameterList([torch.rand(3), torch.rand(6, 1, 1)])
    shifts = nn.ParameterDict({"a": torch.randn(1, 6, 1, 1)})
    layers = {"a": conv(3, 6), "b": conv(6, 5), "head": nn.Linear(5, 4)}
    return Pattern(forward, **layers, scales=scales, shifts=shifts)


class Held(Pattern):
    """A pattern that holds tensors of its own, by their names."""

    def hold(self, **buffers: Tensor) -> nn.Module:
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)
        return self


def buffers_by_channel() -> nn.Module:
    """A scale with zeros, a table of positions, and a filter for each channel."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = (m.a(x) * m.scale + m.table).relu()
        y = F.conv2d(y, m.blur, padding=1, groups=y.shape[1])
        return m.head(pool(m.b(y).relu()))

    scale = torch.tensor([0.5, 0.0, 1.0, 0.0, 2.0, -1.0]).view(1, 6, 1, 1)
    return Held(forward, a=conv(3, 6), b=conv(6, 5), head=nn.Linear(5, 4)).hold(
        scale=scale, table=torch.randn(6, 8, 8), blur=torch.rand(6, 1, 3, 3)
    )


class OwnNorm(nn.Module):
    """A batch norm that somebody wrote, which counts as it trains."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(width))
        self.register_buffer("history", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean((0, 2, 3)), 0.1)
        self.history += 1.0
        return x - self.mean[:, None, None]


def norm_of_its_own() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(pool(m.b(m.norm(m.a(x)).relu()).relu()))

    return Pattern(forward, a=conv(3, 6), norm=OwnNorm(6), b=conv(6, 5), head=nn.Linear(5, 4))


def slopes_by_head() -> nn.Module:
    """A fixed bias for each head of attention, and angles that are no channel's own."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).flatten(2).transpose(1, 2)
        q, k, v = (f(y).view(*y.shape[:2], -1, 3).transpose(1, 2) for f in (m.q, m.k, m.v))
        places = torch.arange(y.shape[1], dtype=y.dtype)
        bias = (places[None, :] - places[:, None]) * m.slopes[:, None, None] + m.mask
        y = F.scaled_dot_product_attention(q * m.angles.sin(), k * m.angles.sin(), v, attn_mask=bias)
        return m.head(m.out(y.transpose(1, 2).flatten(2)).relu().mean(1))

    layers = {name: nn.Linear(6, 12) for name in "qkv"}
    model = Held(forward, a=conv(3, 6, stride=2), **layers, out=nn.Linear(12, 7), head=nn.Linear(7, 4))
    mask = torch.zeros(16, 16).masked_fill(torch.ones(16, 16).triu(1).bool(), -torch.inf)
    return model.hold(slopes=torch.rand(4), angles=torch.rand(16, 3), mask=mask)


def buffer_of_numbers() -> nn.Module:
    """A buffer that the code takes out of torch, so that nothing can be followed through it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).relu() * float(m.numbers.numpy()[1])
        return m.head(pool(m.b(y).relu()))

    return Held(forward, a=conv(3, 6), b=conv(6, 5), head=nn.Linear(5, 4)).hold(numbers=torch.rand(6))


def fusion_weights() -> nn.Module:
    """A feature pyramid's: a weight for each of the maps that are added."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        share = m.share.softmax(0)
        return m.head(pool(m.c((share[0] * y + share[1] * m.b(y)).relu()).relu()))

    model = Pattern(forward, a=conv(3, 6), b=conv(6, 6), c=conv(6, 5), head=nn.Linear(5, 4))
    model.share = nn.Parameter(torch.rand(2))
    return model


def learned_adjacency() -> nn.Module:
    """A graph network's: places mix, channels do not."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.adjacency @ m.a(x.flatten(2).transpose(1, 2)).relu()
        return m.head((m.b(y) * m.places).relu().mean(1))

    model = Pattern(forward, a=nn.Linear(3, 6), b=nn.Linear(6, 5), head=nn.Linear(5, 4))
    model.adjacency, model.places = nn.Parameter(torch.rand(64, 64)), nn.Parameter(torch.rand(1, 64, 1))
    return model


# Network -> what of it can go, by the layers that write it
CASES: list[tuple[Callable[[], nn.Module], Groups]] = [
    (scale_of_two, {"a": 7, "b": 5, "c": 6}),
    (bare_parameter, {"a": 6, "b": 5}),
    (faint_beside_strong, {"a": 6, "b": 5}),
    (lists_of_parameters, {"a": 6, "b": 5}),
    (buffers_by_channel, {"a": 6, "b": 5}),
    (norm_of_its_own, {"a": 6, "b": 5}),
    (slopes_by_head, {"a": 6, "q": 4, "out": 7}),
    (buffer_of_numbers, {"a": 6, "b": 5}),
    (bare_matrix, {"a": "mixes its channels", "b": 5}),
    (fusion_weights, {"a": 6, "c": 5}),
    (learned_adjacency, {"a": 6, "b": 5}),
]
NAMES = [build.__name__ for build, _ in CASES]


@pytest.mark.parametrize("mode", ["channels", "weights"])
@pytest.mark.parametrize("build", [build for build, _ in CASES], ids=NAMES)
def test_slim_equals_masked(build: Callable[[], nn.Module], mode: Any) -> None:
    assert_cut_exactly(built(build), mode)


@pytest.mark.parametrize(("build", "expected"), CASES, ids=NAMES)
def test_find_groups_says_what_can_go_and_why_the_rest_stays(
    build: Callable[[], nn.Module], expected: Groups
) -> None:
    assert_groups(built(build), expected)
