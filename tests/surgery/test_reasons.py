"""What is said of a group that stays whole is what keeps it so, in words that help."""

import re

import pytest
import torch
from small_networks import EXAMPLE, Pattern, built, conv, pool
from torch import Tensor, nn

from vbdcompress.conversion import convert


class Summed(nn.RMSNorm):
    """By a formula that is not that of the class."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().mean(1, keepdim=True) * self.weight[:, None, None]


def normed(norm: nn.Module) -> nn.Module:
    def run(n: Pattern, x: Tensor) -> Tensor:
        return pool(n.b(n.norm(n.a(x)).relu()))

    return Pattern(run, a=conv(3, 6), norm=norm, b=conv(6, 5), head=nn.Identity())


def refusing() -> nn.Module:
    def run(n: Pattern, x: Tensor) -> Tensor:
        y = n.a(x).relu()
        if y.shape[1] != 6:
            raise ValueError
        return pool(n.c(n.b(y).relu()))

    return Pattern(run, a=conv(3, 6), b=conv(6, 4), c=conv(4, 5))


def splitting() -> nn.Module:
    def run(n: Pattern, x: Tensor) -> Tensor:
        one, other = n.a(x).split([2, 4], 1)
        return pool(n.c(n.b(torch.cat([other, one], 1)).relu()))

    return Pattern(run, a=conv(3, 6), b=conv(6, 4), c=conv(4, 5))


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: normed(Summed(6)), "behind it, with '0.norm.weight', mixes its channels"),
        (refusing, r"ValueError: raise ValueError \(run\)"),
        (splitting, "split_with_sizes.*a size is written in its code"),
    ],
    ids=["norm", "no words", "split"],
)
def test_a_reason_says_what_keeps_a_group_whole(build, told):
    model = built(lambda: nn.Sequential(build(), nn.Linear(5, 3)))
    groups = {group.name: group for group in convert(model, EXAMPLE.double()).scan.groups}
    assert re.search(told, groups["0.a"].whole_because or "")
