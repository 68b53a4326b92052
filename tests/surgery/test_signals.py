"""Signals of one channel that work on all channels of others: the others go, the signal stays."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_networks import Groups, Pattern, assert_cut_exactly, assert_groups, built, conv, pool
from torch import Tensor, nn

SPREAD = "its one channel works on all channels of others"


def attention_gate() -> nn.Module:
    """Where to look in a skip connection, from both of its sides, as in an attention U-Net."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y, z = m.a(x).relu(), m.b(x).relu()
        where = m.norm(m.map((m.from_y(y) + m.from_z(z)).relu())).sigmoid()
        return m.head(pool(m.c(torch.cat([y * where, z], 1)).relu()))

    return Pattern(
        forward,
        a=conv(3, 8),
        b=conv(3, 6),
        from_y=conv(8, 5, 1),
        from_z=conv(6, 5, 1),
        map=conv(5, 1, 1),
        norm=nn.BatchNorm2d(1),
        c=conv(14, 6),
        head=nn.Linear(6, 4),
    )


def map_of_the_input() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(pool(m.b(m.a(x).relu() * m.map(x).sigmoid() + m.shift(x)).relu()))

    return Pattern(
        forward, a=conv(3, 8), map=conv(3, 1), shift=conv(3, 1), b=conv(8, 6), head=nn.Linear(6, 4)
    )


def pooling_by_attention() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).relu().flatten(2).transpose(1, 2)
        weights = m.score(m.hidden(y).tanh()).softmax(1)
        return m.head(m.fc((y * weights).sum(1)).relu())

    return Pattern(
        forward,
        a=conv(3, 8),
        hidden=nn.Linear(8, 6),
        score=nn.Linear(6, 1),
        fc=nn.Linear(8, 7),
        head=nn.Linear(7, 4),
    )


def map_of_all_channels() -> nn.Module:
    """CBAM: the map is read off the mean over channels, which is another one without some of them."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        scale = m.up(m.down(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        y = y * scale
        where = m.map(torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1)).sigmoid()
        return m.head(pool(m.c(m.b(y * where).relu()).relu()))

    return Pattern(
        forward,
        a=conv(3, 8),
        down=conv(8, 4, 1),
        up=conv(4, 8, 1),
        map=conv(2, 1, 7),
        b=conv(8, 6),
        c=conv(6, 5),
        head=nn.Linear(5, 4),
    )


def map_beside_channels() -> nn.Module:
    """The map is also read as a channel of its own."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y, where = m.a(x).relu(), m.map(x).sigmoid()
        return m.head(pool(m.b(torch.cat([y * where, where], 1)).relu()))

    return Pattern(forward, a=conv(3, 8), map=conv(3, 1), b=conv(9, 6), head=nn.Linear(6, 4))


# Network -> what of it can go, by the layers that write it
CASES: list[tuple[Callable[[], nn.Module], Groups]] = [
    (attention_gate, {"a": 8, "b": 6, "from_y": 5, "map": SPREAD, "c": 6}),
    (map_of_the_input, {"a": 8, "map": SPREAD, "shift": SPREAD, "b": 6}),
    (pooling_by_attention, {"a": 8, "hidden": 6, "score": SPREAD, "fc": 7}),
    (map_of_all_channels, {"a": "mixes its channels", "down": 4, "b": 6, "c": 5, "map": SPREAD}),
    (map_beside_channels, {"a": 8, "map": SPREAD, "b": 6}),
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
