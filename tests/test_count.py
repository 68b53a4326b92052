"""MACs and sizes against counts by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vbdcompress.count import layer_sizes, measure_size, uncounted_ops, unused_parameters


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, groups=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(8 * 16, 10)

    def forward(self, x):
        return self.head(self.pool(self.depthwise(self.conv(x))).flatten(1))


def test_measure_size_counts_by_hand():
    model = Net()
    model.head.weight.data[:4] = 0
    size = measure_size(model, torch.randn(5, 3, 8, 8))
    parameters = 3 * 8 * 9 + 8 + 8 * 9 + 8 + 1280 + 10
    macs = 64 * 3 * 8 * 9 + 64 * 8 * 9 + 1280
    assert (size.parameters, size.nonzeros, size.macs) == (parameters, parameters - 4 * 128, macs)
    assert size.bytes == 4 * parameters


def test_layer_sizes_attributes_macs_to_the_innermost_layer():
    macs = {row.name: row.macs for row in layer_sizes(Net(), torch.randn(2, 3, 8, 8))}
    assert macs == {"conv": 64 * 216, "depthwise": 64 * 72, "head": 1280}


class LowRank(nn.Module):
    """A product of parameters, one of the input by it, and a layer whose weight is another's."""

    def __init__(self):
        super().__init__()
        self.u, self.v = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 6))
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.weight = self.one.weight

    def forward(self, x):
        return self.other(self.one(x @ (self.u @ self.v)))


def test_layer_sizes_add_up_without_what_a_call_does_once():
    model = LowRank()
    rows = layer_sizes(model, torch.randn(2, 6))
    size = measure_size(model, torch.randn(2, 6))
    assert [(row.name, row.macs) for row in rows] == [("", 36), ("one", 36), ("other", 36)]
    assert [row.parameters for row in rows] == [24, 42, 6]
    assert (sum(row.parameters for row in rows), sum(row.macs for row in rows)) == (
        size.parameters,
        size.macs,
    )


def test_measure_size_leaves_mode_and_hooks_as_they_were():
    model = Net().train()
    measure_size(model, torch.randn(2, 3, 8, 8))
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Sorts(nn.Module):
    def forward(self, x):
        return x.sort().values.cumsum(1)


def test_uncounted_ops_are_named():
    assert uncounted_ops(Net(), torch.randn(2, 3, 8, 8)) == ("aten.max_pool2d_with_indices",)
    assert uncounted_ops(nn.Embedding(5, 3), torch.tensor([1, 4])) == ()  # rows are looked up
    assert uncounted_ops(Sorts(), torch.randn(2, 3, 4)) == ("aten.cumsum", "aten.sort")
    assert uncounted_ops(nn.LSTM(4, 4), torch.randn(2, 3, 4)) == ()


class Attends(nn.Module):
    """Attention over as many tokens as come, and values of another width."""

    def forward(self, x):
        query, key, value = x[..., :4], x[..., 4:8], x[..., 8:]
        return F.scaled_dot_product_attention(query[:, :, :5], key, value)


@pytest.mark.parametrize("model", [Attends(), nn.TransformerEncoderLayer(14, 2, 32, batch_first=True)])
def test_attention_counts_the_same_whatever_computes_it(model):
    """The oracle is torch's counter, of attention as two products of matrices."""
    x = torch.randn(2, 9, 14) if isinstance(model, nn.TransformerEncoderLayer) else torch.randn(2, 3, 9, 14)
    found = measure_size(model, x).macs
    assert not [name for name in uncounted_ops(model, x) if "attention" in name]
    with sdpa_kernel(SDPBackend.MATH):
        expected = measure_size(model, x).macs
    assert found == expected
    if isinstance(model, Attends):
        assert found == 3 * 5 * 9 * (4 + 6)


class WithAuxiliaryHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head, self.auxiliary = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 9)

    def forward(self, x, scale=None):
        hidden = self.body(x).relu()
        if self.training:
            return self.head(hidden), self.auxiliary(hidden)
        return self.head(hidden) if scale is None else scale * self.head(hidden)


@pytest.mark.parametrize(
    "inputs", [torch.randn(2, 4), (torch.randn(2, 4), torch.tensor(2.0)), {"x": torch.randn(2, 4)}]
)
def test_unused_parameters_are_those_of_no_output(inputs):
    model = WithAuxiliaryHead().train()
    model.body.weight.requires_grad_(False)
    assert unused_parameters(model, inputs) == {"auxiliary.weight", "auxiliary.bias"}
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_network_without_gradients_uses_all_it_has():
    class Rounded(nn.Linear):
        def forward(self, x):
            return super().forward(x).argmax(1)

    assert unused_parameters(Rounded(4, 6), torch.randn(2, 4)) == frozenset()


def test_a_module_with_two_names_keeps_its_parameters():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.add_module("again", model[0])
    assert unused_parameters(model, torch.randn(2, 4)) == frozenset()
    assert isinstance(model[0].weight, nn.Parameter)
    assert len(list(model.parameters())) == 2
