"""What no gradient reaches is left: its posterior would follow the KL alone."""

import pytest
import torch
from torch import nn

from vbdcompress.conversion import convert
from vbdcompress.vbd.elbo import ELBO
from vbdcompress.vbd.posterior import find_posteriors


class Detaches(nn.Module):
    """One branch without gradient beside one with."""

    def __init__(self):
        super().__init__()
        self.frozen, self.body = nn.Linear(6, 8), nn.Linear(6, 8)
        self.mix, self.head = nn.Linear(8, 4), nn.Linear(12, 3)

    def forward(self, x):
        beside = self.mix(self.frozen(x).relu()).detach()
        return self.head(torch.cat([beside, self.body(x).relu()], 1))


class Routes(nn.Module):
    """Each batch goes to one of its two experts."""

    def __init__(self):
        super().__init__()
        self.experts, self.head = nn.ModuleList([nn.Linear(6, 8), nn.Linear(6, 8)]), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.experts[int(x.sum() > 0)](x).relu())


def test_layers_that_the_example_is_not_routed_to_are_converted():
    converted = convert(Routes(), torch.ones(2, 6), "weights")
    assert {row.name: row.action for row in converted.table}["experts.0.weight"] == "converted"


@pytest.mark.parametrize("mode", ["weights", "channels"])
def test_what_no_gradient_reaches_is_left(mode):
    model, example = Detaches().requires_grad_(False), torch.randn(4, 6)
    converted = convert(model, example, mode)
    rows = {row.name: row for row in converted.table}
    named = {row.name for row in converted.table if "no gradient reaches it" in row.reason}
    assert named == ({"frozen", "mix"} if mode == "weights" else {"mix"})
    assert rows["head"].action == "converted"
    elbo = ELBO(converted.model, nn.functional.cross_entropy, 4)
    elbo(example, torch.tensor([0, 1, 2, 0]), torch.tensor(0.0)).nll.backward()
    assert all(each.log_sigma2.grad.any() for each in find_posteriors(converted.model))


class HalfDetached(nn.Module):
    """Layers that keep the gradient from one of their parameters, and not from the other."""

    def __init__(self):
        super().__init__()
        self.fixed, self.free = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(6, 8))
        self.by_hand, self.head = nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = torch.cat([x @ self.fixed.detach(), x @ self.free], 1).relu()
        return self.head(nn.functional.linear(x, self.by_hand.weight.detach(), self.by_hand.bias).relu())


def test_a_parameter_that_no_gradient_reaches_is_left_beside_one_that_it_does():
    converted = convert(HalfDetached(), torch.randn(4, 6), "weights")
    told = {row.name: (row.action, "no gradient reaches it" in row.reason) for row in converted.table}
    assert told["fixed"] == told["by_hand.weight"] == ("left", True)
    assert told["free"] == ("converted", False)
    assert told["head"] == ("converted", False)
