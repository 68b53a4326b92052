"""Clipping and stopped gradients: channels are followed through what networks make of them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vbdcompress.conversion import convert


class Between(nn.Module):
    """Two layers with a function of each channel between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.between, self.b = nn.Linear(6, 8), between, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.b(self.between(self.a(x)))
        return output


def through_numpy(y: Tensor) -> Tensor:
    return y * float(y.detach().numpy().shape[0])


BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "straight_through": lambda y: y + (y.round() - y).detach(),
    "sign": lambda y: y - y.detach() + y.sign().detach(),
    "leaving": through_numpy,
    "frozen": lambda y: y * (1 + y.detach().requires_grad_(False)),
    "acos": lambda y: (0.2 * y).clamp(-0.999, 0.999).acos(),
    "root": lambda y: (1 - (0.2 * y).clamp(-0.99, 0.99) ** 2).sqrt(),
    "logit": lambda y: y.sigmoid().clamp(1e-3, 1 - 1e-3).logit(),
    "large": lambda y: (300 * y - 2000).relu() + y.clamp_min(-3),
    "positive": lambda y: y.relu().sqrt(),
    "no slope at 0": lambda y: (y * (torch.arange(len(y))[:, None] % 2)).square().sqrt(),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_each_channel_goes_alone(name: str) -> None:
    torch.manual_seed(0)
    converted = convert(Between(BETWEEN[name]), torch.randn(2, 6), mode="channels")
    (group,) = converted.scan.removable
    assert group.size == 8
    assert [member.layer for member in group.readers] == ["b"]


LARGER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "max": torch.max,
    "named": lambda one, other: torch.min(input=one, other=other),
    "method": lambda one, other: one.max(other),
}


class Larger(nn.Module):
    """The larger of what two layers write, as maxout networks take it."""

    def __init__(self, of: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.of = of
        self.one, self.other, self.head = nn.Linear(6, 200), nn.Linear(6, 200), nn.Linear(200, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.of(self.one(x), self.other(x)))
        return output


@pytest.mark.parametrize("name", LARGER)
def test_both_of_two_are_followed_whichever_is_larger_on_the_example(name: str) -> None:
    torch.manual_seed(0)
    (group,) = convert(Larger(LARGER[name]), torch.randn(1, 6)).scan.removable
    assert (group.size, {member.layer for member in group.writers}) == (200, {"one", "other"})
