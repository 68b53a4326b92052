"""Convolutions in groups, by channel, beside squeeze-and-excite, and used twice."""

from collections.abc import Callable
from typing import Any

import pytest
from small_networks import Groups, Pattern, assert_cut_exactly, assert_groups, built, conv, pool
from torch import Tensor, nn


def grouped() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(pool(m.c(m.b(m.a(x).relu()).relu()).relu()))

    return Pattern(forward, a=conv(3, 8), b=conv(8, 12, groups=4), c=conv(12, 6), head=nn.Linear(6, 4))


def shares_of_groups() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm(m.b(m.a(x).relu())).relu()
        return m.head(pool(m.up(y).relu()))

    return Pattern(
        forward,
        a=conv(3, 8),
        b=conv(8, 6, groups=2),
        norm=nn.BatchNorm2d(6),
        up=nn.ConvTranspose2d(6, 10, 2, stride=2, groups=2),
        head=nn.Linear(10, 4),
    )


def grouped_transposed() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(pool(m.c(m.up(m.a(x).relu()).relu()).relu()))

    return Pattern(
        forward,
        a=conv(3, 8),
        up=nn.ConvTranspose2d(8, 12, 2, stride=2, groups=4),
        c=conv(12, 5),
        head=nn.Linear(5, 4),
    )


def depthwise() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(pool(m.c(m.norm(m.b(m.a(x).relu())).relu()).relu()))

    return Pattern(
        forward,
        a=conv(3, 8),
        b=conv(8, 8, groups=8),
        norm=nn.BatchNorm2d(8),
        c=conv(8, 6, 1),
        head=nn.Linear(6, 4),
    )


def squeeze_excite() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.b(m.a(x).relu()).relu()
        scale = m.up(m.down(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return m.head(pool(m.c(y * scale).relu()))

    return Pattern(
        forward,
        a=conv(3, 8),
        b=conv(8, 8, groups=8),
        down=conv(8, 4, 1),
        up=conv(4, 8, 1),
        c=conv(8, 6),
        head=nn.Linear(6, 4),
    )


def squeeze_excite_grouped() -> nn.Module:
    model = squeeze_excite()
    model.b = conv(8, 8, groups=2)
    return model


def used_twice() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.b(m.b(m.a(x).relu()).relu()).relu()
        return m.head(pool(m.c(y).relu()))

    return Pattern(forward, a=conv(3, 6), b=conv(6, 6), c=conv(6, 5), head=nn.Linear(5, 4))


# Network -> what of it can go, by the layers that write it
CASES: list[tuple[Callable[[], nn.Module], Groups]] = [
    (grouped, {"a": 4, "c": 6}),  # whole groups of `b` go
    (shares_of_groups, {"a": 4, "b": 3, "up": 5}),  # each of 2 groups loses as many
    (grouped_transposed, {"a": 4, "c": 5}),
    (depthwise, {"a": 8, "c": 6}),
    (squeeze_excite, {"a": 8, "down": 4, "c": 6}),
    (squeeze_excite_grouped, {"a": 4, "b": 4, "down": 4}),
    (used_twice, {"a": 6, "c": 5}),
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
