"""Tensors of no layer, with an entry for each channel or without."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
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


def bare_matrix() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.einsum("nchw,dc->ndhw", m.a(x).relu(), m.matrix)
        return m.head(pool(m.b(y).relu()))

    model = Pattern(forward, a=conv(3, 6), b=conv(7, 5), head=nn.Linear(5, 4))
    model.matrix = nn.Parameter(torch.rand(7, 6))
    return model


# Network -> what of it can go, by the layers that write it
CASES: list[tuple[Callable[[], nn.Module], Groups]] = [
    (scale_of_two, {"a": 7, "b": 5, "c": 6}),
    (bare_parameter, {"a": 6, "b": 5}),
    (bare_matrix, {"a": "mixes its channels", "b": 5}),
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
