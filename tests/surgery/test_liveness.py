"""Dead channels and constants, against the uncut network in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vbdcompress.surgery.liveness import plan_removal_
from vbdcompress.surgery.slice import apply_plan_
from vbdcompress.surgery.verify import find_groups


class Net(nn.Module):
    def __init__(self, padding=0, bias=True, mode="zeros"):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 5, 3, padding=padding, bias=bias, padding_mode=mode)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = F.softplus(self.norm(self.conv1(x)))
        return self.head(self.conv2(x).relu().mean((2, 3)))


def cut(model, batch):
    """(output before, output after, plan)."""
    groups = find_groups(model, batch).removable
    with torch.no_grad():
        expected = model(batch)
        slim = copy.deepcopy(model)
        plan = plan_removal_(slim, groups, batch)
        apply_plan_(slim, plan)
        return expected, slim(batch), plan, slim


def make(**options):
    torch.manual_seed(0)
    model = Net(**options).double().eval()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    return model, torch.randn(4, 2, 8, 8, dtype=torch.float64)


def test_plan_removal_cuts_what_nothing_reads():
    model, batch = make()
    model.conv2.weight.data[:, [1, 4]] = 0
    expected, found, plan, slim = cut(model, batch)
    assert plan.cuts["conv1"].outputs == (0, 2, 3, 5)
    assert plan.cuts["norm"].outputs == (0, 2, 3, 5)
    assert plan.cuts["conv2"].inputs == (0, 2, 3, 5)
    assert slim.norm.running_mean.shape == (4,)
    assert torch.allclose(expected, found, rtol=1e-12)


@pytest.mark.parametrize("learns", [True, False])
def test_a_new_bias_is_frozen_where_its_layer_is(learns):
    model, batch = make(bias=False)
    model.conv1.weight.data[2], model.conv1.bias.data[2] = 0, 0.5
    model.conv2.requires_grad_(learns)
    _, _, plan, slim = cut(model, batch)
    assert plan.cuts["conv2"].new_bias
    assert slim.conv2.bias.requires_grad == learns
    fresh = make(bias=False)[0]
    fresh.conv2.requires_grad_(learns)
    apply_plan_(fresh, plan)
    assert fresh.conv2.bias.requires_grad == learns


class TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.next = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 2, 3)
        self.flat, self.head = nn.Linear(3 * 16, 4), nn.Linear(4 + 2, 2)

    def forward(self, x):
        x = self.conv(x).relu()
        return self.head(torch.cat([self.flat(x.flatten(1)), self.next(x).mean((2, 3))], 1))


def test_a_layer_of_which_every_feature_goes_keeps_one():
    torch.manual_seed(0)
    model, batch = TwoReaders().double().eval(), torch.randn(4, 1, 6, 6, dtype=torch.float64)
    model.flat.weight.data.zero_()
    model.next.weight.data[:, 0] = 0  # its features go with it
    groups = find_groups(model, batch, features=True).removable
    slim = copy.deepcopy(model)
    with torch.no_grad():
        plan = plan_removal_(slim, groups, batch)
        apply_plan_(slim, plan)
        assert slim.conv.out_channels == 2
        assert slim.flat.in_features == 1
        assert torch.allclose(slim(batch), model(batch), rtol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_plan_removal_folds_constants_into_the_next_bias(bias):
    model, batch = make(bias=bias)
    model.conv1.weight.data[[0, 3]] = 0  # norm and softplus make a constant that is not 0 of it
    expected, found, plan, slim = cut(model, batch)
    assert plan.cuts["conv1"].outputs == (1, 2, 4, 5)
    assert plan.cuts["conv2"].new_bias is not bias
    assert slim.conv2.bias is not None
    assert torch.allclose(expected, found, rtol=1e-12)


def test_plan_removal_keeps_a_constant_that_zero_padding_cuts_at_the_border():
    model, batch = make(padding=1)
    model.conv1.weight.data[0] = 0
    expected, found, plan, _ = cut(model, batch)
    assert "conv1" not in plan.cuts
    assert torch.equal(expected, found)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_plan_removal_folds_constants_under_padding_that_repeats_them(mode):
    model, batch = make(padding=1, mode=mode)
    model.conv1.weight.data[0] = 0
    expected, found, plan, _ = cut(model, batch)
    assert plan.cuts["conv1"].outputs == (1, 2, 3, 4, 5)
    assert torch.allclose(expected, found, rtol=1e-12)


def test_plan_removal_does_not_take_a_dead_relu_for_a_constant():
    model, batch = make()
    model.conv2.bias.data[2] = -1e6  # never fires on this batch, but its weights live
    _, _, plan, _ = cut(model, batch)
    assert "conv2" not in plan.cuts


def test_plan_removal_follows_death_upstream_and_downstream():
    model, batch = make()
    model.head.weight.data[:, 1:] = 0  # only channel 0 of conv2 is read
    model.conv2.weight.data[0, 2:] = 0  # which reads only channels 0 and 1 of conv1
    expected, found, plan, _ = cut(model, batch)
    assert plan.cuts["conv2"].outputs == (0,)
    assert plan.cuts["conv1"].outputs == (0, 1)
    assert torch.allclose(expected, found, rtol=1e-12)


def test_plan_removal_of_a_network_that_is_all_zero_ends_and_keeps_one_channel():
    model, batch = make()
    for parameter in model.parameters():
        parameter.data.zero_()
    expected, found, _, slim = cut(model, batch)
    assert slim.conv1.out_channels == slim.conv2.out_channels == 1
    assert torch.equal(expected, found)


class Branched(nn.Module):
    """Two branches side by side, one of three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 6, 3, padding=1)
        self.b = nn.Sequential(
            *(nn.Conv2d(2, 9, 3, padding=1), nn.ReLU(), nn.Conv2d(9, 8, 3, padding=1), nn.ReLU()),
            nn.Conv2d(8, 5, 3, padding=1),
        )
        self.head = nn.Linear(11, 3)

    def forward(self, x):
        return self.head(torch.cat([self.a(x), self.b(x)], 1).relu().mean((2, 3)))


class Joined(nn.Module):
    """The middle of a stream is written by one layer alone, of which something stays."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Conv2d(2, width, 3) for width in (4, 12, 4))
        self.whole = nn.Conv2d(2, 20, 3)
        self.norm, self.last, self.head = nn.GroupNorm(5, 20), nn.Conv2d(20, 5, 1), nn.Conv2d(5, 3, 1)

    def forward(self, x):
        y = self.norm(torch.cat([part(x) for part in self.parts], 1) + self.whole(x))
        return self.head(self.last(y).relu())


def test_a_layer_keeps_a_channel_where_its_group_keeps_others():
    torch.manual_seed(0)
    model = Joined().double()
    model.last.weight.data[:, 4:16] = 0.0  # all of the second part
    batch = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    assert [group.size for group in find_groups(model, batch).removable] == [5, 5]
    expected, found, _, slim = cut(model, batch)
    assert (expected - found).abs().max() < 1e-12
    assert [layer.out_channels for layer in (*slim.parts, slim.whole)] == [4, 4, 4, 12]


def test_a_branch_that_nothing_reads_goes_with_all_of_its_layers():
    torch.manual_seed(0)
    model = Branched().double().eval()
    model.head.weight.data[:, 6:] = 0
    expected, found, _, slim = cut(model, torch.randn(4, 2, 8, 8, dtype=torch.float64))
    assert [slim.b[place].out_channels for place in (0, 2, 4)] == [1, 1, 1]
    assert slim.a.out_channels == 6
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
