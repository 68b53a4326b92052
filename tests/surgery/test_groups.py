"""Channel groups of small networks whose coupling is known by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
import torchvision
from small_networks import small_densenet, small_vgg
from torch import nn

from vbdcompress.surgery.verify import find_groups


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 5, 3)
        self.head = nn.Linear(5 * 4, 2)

    def forward(self, x):
        x = F.relu(self.norm(self.conv1(x)))
        return self.head(self.conv2(x).flatten(1))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.block = nn.Conv2d(6, 6, 1)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.block(x))


class Halves(nn.Module):
    """The two halves of one output are added: channel c and c + 4 must go together."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(3, 8, 1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        first, second = self.wide(x).chunk(2, 1)
        return self.head(first + second)


class SelfConcat(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.other = nn.Conv2d(3, 2, 1)
        self.head = nn.Conv2d(10, 2, 1)

    def forward(self, x):
        once = self.conv(x)
        return self.head(torch.cat([once, self.other(x), once], 1))


class Normed(nn.Module):
    """A norm of all channels at once mixes them; softmax over channels does too, and no module shows it."""

    def __init__(self, norm):
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.norm = nn.GroupNorm(1, 8) if norm else nn.Identity()
        self.second = nn.Linear(8, 6)
        self.third = nn.Linear(6, 2)

    def forward(self, x):
        x = self.norm(self.first(x))
        x = x if isinstance(self.norm, nn.GroupNorm) else x.softmax(-1)
        return self.third(F.relu(self.second(x)))


class FixedView(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4 * 16, 2)

    def forward(self, x):
        return self.head(self.conv(x).view(-1, 64))


def groups_of(model, *shape):
    torch.manual_seed(0)
    scan = find_groups(model, torch.randn(2, *shape), features=False)
    assert scan.failure is None
    return {group.name: group for group in scan.groups}


def test_find_groups_follows_a_chain():
    groups = groups_of(Chain(), 3, 6, 6)
    first, second = groups["conv1"], groups["conv2"]
    assert [m.layer for m in first.writers] == ["conv1"]
    assert [m.layer for m in first.readers] == ["conv2"]
    assert [m.layer for m in first.between] == ["norm"]
    assert second.readers[0].layer == "head"
    # flatten: channel c of [5, 2, 2] fills four neighbouring features
    assert second.readers[0].index.tolist() == np.repeat(np.arange(5), 4).tolist()
    assert "output of the network" in groups["head"].whole_because


def test_find_groups_joins_what_a_residual_sum_joins():
    groups = groups_of(Residual(), 3, 4, 4)
    joined = next(group for group in groups.values() if len(group.writers) == 2)
    assert {m.layer for m in joined.writers} == {"stem", "block"}
    assert {m.layer for m in joined.readers} == {"block", "head"}
    assert joined.whole_because is None


def test_find_groups_couples_channels_that_are_added():
    wide = groups_of(Halves(), 3, 4, 4)["wide"]
    assert wide.size == 4
    assert wide.writers[0].index.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert wide.readers[0].index.tolist() == [0, 1, 2, 3]


def test_find_groups_maps_every_copy_in_a_concat():
    groups = groups_of(SelfConcat(), 3, 4, 4)
    assert groups["conv"].readers[0].index.tolist() == [0, 1, 2, 3, -1, -1, 0, 1, 2, 3]
    assert groups["other"].readers[0].index.tolist() == [-1, -1, -1, -1, 0, 1, -1, -1, -1, -1]
    assert groups["conv"].whole_because is None


@pytest.mark.parametrize(("norm", "reason"), [(True, "GroupNorm"), (False, "mixes")])
def test_find_groups_leaves_mixed_channels_whole(norm, reason):
    groups = groups_of(Normed(norm), 5)
    assert reason in groups["first"].whole_because
    assert groups["second"].whole_because is None


def test_find_groups_leaves_a_fixed_size_whole_with_the_error_as_reason():
    groups = groups_of(FixedView(), 3, 4, 4)
    assert "can't run without some of its channels" in groups["conv"].whole_because


def test_find_groups_leaves_the_network_as_it_was():
    model = Chain().train()
    model.conv1.weight.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    find_groups(model, torch.randn(2, 3, 6, 6))
    assert model.training
    assert not model.conv1.weight.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "build", [torchvision.models.resnet18, torchvision.models.mobilenet_v2, small_densenet, small_vgg]
)
def test_find_groups_agrees_with_torch_pruning(build):
    """An independent oracle: which layer loses which positions when one output channel goes."""
    torch.manual_seed(0)
    model, example = build().eval(), torch.randn(2, 3, 64, 64)
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=example)
    names = {module: layer for layer, module in model.named_modules()}
    seen = 0
    for group in find_groups(model, example).removable[:12]:
        writer = group.writers[0]
        cut = tp.prune_conv_out_channels
        if isinstance(model.get_submodule(writer.layer), nn.Linear):
            cut = tp.prune_linear_out_channels
        expected = {}
        for dependency, indices in graph.get_pruning_group(
            model.get_submodule(writer.layer), cut, idxs=[group.size - 1]
        ):
            module = dependency.target.module
            if isinstance(module, nn.Linear | nn.Conv2d | nn.BatchNorm2d):
                depthwise = isinstance(module, nn.Conv2d) and module.groups > 1
                writes = dependency.handler in (tp.prune_conv_out_channels, tp.prune_linear_out_channels)
                role = "between" if depthwise or isinstance(module, nn.BatchNorm2d) else writes
                expected.setdefault((names[module], role), set()).update(indices)
        channel = np.array([writer.index[group.size - 1]])
        found = {
            (member.layer, role): set(member.positions(channel).tolist())
            for role, members in ((True, group.writers), (False, group.readers), ("between", group.between))
            for member in members
        }
        assert found == expected
        seen += len(found)
    assert seen > 20


def test_find_groups_says_why_a_network_can_not_be_followed():
    class OneType(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            if x.dtype != torch.float32:
                raise ValueError("takes float32 alone")
            return self.head(self.first(x))

    scan = find_groups(OneType(), torch.randn(2, 4))
    assert not scan.groups
    assert "can't be followed: ValueError: takes float32 alone" in (scan.failure or "")


def test_features_that_are_0_or_1_in_the_example_are_features():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    scan = find_groups(model, torch.randint(0, 2, (2, 6)).float(), features=True)
    assert [group.size for group in scan.removable if group.is_features] == [6]
