"""Weights that are tied, computed, or used without their layer: cut exactly, or left whole and why."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from vbdcompress.conversion import convert
from vbdcompress.errors import ConvertError
from vbdcompress.slimming import slim
from vbdcompress.vbd.posterior import find_posteriors, set_threshold_


class Tied(nn.Module):
    """Three hidden layers, of which two share one weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 9)
        self.second = nn.Linear(9, 9)
        self.third = nn.Linear(9, 9)
        self.third.weight = self.second.weight
        self.wide = nn.Linear(9, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        x = self.third(self.second(self.first(x).relu()).relu()).relu()
        return self.head(self.wide(x).relu())


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 9)
        self.second = weight_norm(nn.Linear(9, 9))
        self.wide = nn.Linear(9, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.wide(self.second(self.first(x).relu()).relu()).relu())


class Functional(nn.Module):
    """A layer whose weight is used without the layer being called."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 9)
        self.second = nn.Linear(9, 9)
        self.head = nn.Linear(9, 3)

    def forward(self, x):
        return self.head(F.linear(self.first(x).relu(), self.second.weight, self.second.bias).relu())


class Autoencoder(nn.Module):
    """The decoder is the encoder's weight, transposed; and a penalty is computed beside it."""

    def __init__(self):
        super().__init__()
        self.lead = nn.Linear(6, 5)
        self.first = nn.Linear(5, 9)
        self.encoder = nn.Linear(9, 7)
        self.wide = nn.Linear(9, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        hidden = self.encoder(self.first(self.lead(x).relu()).relu()).relu()
        decoded = F.linear(hidden, self.encoder.weight.T)
        return self.head(self.wide(decoded).relu()) + self.first.weight.sum()


class ByName(nn.Module):
    """Layers called with their input by name."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 9)
        self.norm = nn.BatchNorm1d(9)
        self.wide = nn.Linear(9, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        hidden = self.norm(input=self.first(input=x)).relu()
        return self.head(input=self.wide(input=hidden).relu())


class SometimesOpen(nn.Module):
    """What looks constant on many inputs is not: a second branch opens it for others."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 9)
        self.head = nn.Linear(9, 3)

    def forward(self, x):
        return self.head((self.first(x) + 2).relu() * (x[:, :1] > 0.5))


@torch.no_grad()
def masked_and_slim(model, mode, batch):
    torch.manual_seed(0)
    converted = convert(model.double().eval(), batch, mode)
    for posterior in find_posteriors(converted.model):
        off = torch.rand(posterior.theta.shape) < 0.4
        if posterior.kind == "weight":
            off |= (torch.rand(len(off)) < 0.4)[:, None]
        posterior.theta.mul_(1.3)
        posterior.log_sigma2[off] = 30.0
    set_threshold_(converted.model, 3.0)
    many = torch.randn(200, 6, dtype=torch.float64)
    slimmed = slim(converted, 3.0)
    return converted, slimmed, converted.model.eval()(many), slimmed.model(many)


CASES = [(build, mode) for build in (Tied, Normed, SometimesOpen, ByName) for mode in ("weights", "channels")]


@pytest.mark.parametrize(("build", "mode"), [*CASES, (Functional, "weights"), (Autoencoder, "channels")])
def test_slim_equals_masked_on_inputs_that_it_has_not_seen(build, mode):
    torch.manual_seed(0)
    batch = torch.randn(2, 6, dtype=torch.float64)
    batch[:, 0] = -1.0
    converted, slimmed, expected, found = masked_and_slim(build(), mode, batch)
    assert (expected - found).abs().max() <= 1e-10 * expected.abs().max()
    assert sum(p.numel() for p in slimmed.model.parameters()) <= sum(
        p.numel() for p in converted.undo().parameters()
    )


def test_find_groups_says_why_tied_and_computed_weights_stay_whole():
    batch = torch.randn(2, 6)
    tied = {g.name: g.whole_because for g in convert(Tied(), batch).scan.groups}
    assert "shares a parameter: second.weight, third.weight" in tied["second"]
    assert tied["wide"] is None
    normed = {g.name: g.whole_because for g in convert(Normed(), batch, skip=["second"]).scan.groups}
    assert "is computed from others" in normed["first"]
    assert normed["wide"] is None
    assert {g.name for g in convert(Normed(), batch).scan.removable} == {"first", "second", "wide"}
    tied = {g.name: g.whole_because for g in convert(Autoencoder(), batch).scan.groups}
    assert "changes the output" in tied["lead"]
    assert "can't run without" in tied["first"]
    assert tied["wide"] is None
    assert {g.name for g in convert(ByName(), batch).scan.removable} == {"first", "wide"}


def test_convert_samples_the_weight_of_a_layer_that_is_never_called():
    converted = convert(Functional(), torch.randn(2, 6), "weights")
    rows = {row.name: row for row in converted.table}
    assert rows["second.weight"].action == "converted"
    assert "drawn once a batch" in rows["second.weight"].reason
    converted.model.train()
    batch = torch.randn(4, 6)
    for posterior in find_posteriors(converted.model):
        posterior.log_sigma2.data.fill_(0.0 if posterior.name == "second.weight" else -40.0)
    with torch.no_grad():
        assert not torch.allclose(converted.model(batch), converted.model(batch))


def test_skip_leaves_a_layer_whole_in_weights_mode_too():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    converted = convert(model, torch.randn(2, 8), "weights", skip=["2"])
    for posterior in find_posteriors(converted.model):
        posterior.log_sigma2.data[torch.rand(posterior.theta.shape) < 0.8] = 30.0
        posterior.log_sigma2.data[:3] = 30.0
    assert slim(converted, 3.0).model[2].weight.shape == (16, 16)


def test_slim_adds_a_bias_in_the_dtype_of_its_layer():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 6)
            self.hidden = nn.Linear(6, 8)
            self.head = nn.Linear(8, 3, bias=False)

        def forward(self, tokens):
            return self.head(self.hidden(self.embed(tokens).mean(1)).relu())

    converted = convert(Words(), torch.randint(0, 7, (4, 5)), "weights")
    for posterior in find_posteriors(converted.model):
        if posterior.name == "hidden.weight":
            posterior.log_sigma2.data[:4] = 30.0
            converted.model.hidden.bias.data[:4] = 1.0
    slimmed = slim(converted, 3.0).model
    assert slimmed.head.bias.dtype == torch.float32
    assert slimmed.hidden.out_features == 4


def test_convert_of_one_layer_says_what_else_to_try():
    with pytest.raises(ConvertError, match="--mode weights"):
        convert(nn.Linear(8, 2), torch.randn(2, 8), "channels")
