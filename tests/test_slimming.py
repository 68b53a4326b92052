"""Slimming's curve, its multiples of channels, and what weights it takes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vbdcompress.conversion import convert
from vbdcompress.errors import ConfigError
from vbdcompress.slimming import measure_curve, slim
from vbdcompress.vbd.elbo import ELBO
from vbdcompress.vbd.posterior import find_posteriors, set_threshold_


def test_round_to_keeps_multiples_and_the_most_certain_channels():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 30, 3),
        nn.ReLU(),
        nn.Conv2d(30, 21, 3),
        nn.ReLU(),
        nn.Conv2d(21, 5, 3),
        nn.Flatten(),
        nn.Linear(20, 3),
    )
    converted = convert(model, torch.randn(2, 3, 8, 8))
    gates = {posterior.name: posterior for posterior in find_posteriors(converted.model)}
    for gate, gone in zip(gates.values(), (17, 20, 3), strict=True):
        gate.log_sigma2.data = torch.randn_like(gate.theta) - 20.0
        gate.log_sigma2.data[torch.randperm(len(gate.theta))[:gone]] += 40.0
    plain, rounded = slim(converted, 0.0), slim(converted, 0.0, round_to=8)
    assert [plain.model[n].out_channels for n in (0, 2, 4)] == [13, 1, 2]
    assert [rounded.model[n].out_channels for n in (0, 2, 4)] == [16, 8, 5]  # of 5 all stay
    certain = gates["0"].log_alpha().argsort()[:16].sort().values
    assert rounded.plan.cuts["0"].outputs == tuple(certain.tolist())
    assert [group.kept for group in rounded.groups][:2] == [16, 8]


def test_a_round_of_weights_keeps_multiples_of_channels_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 21), nn.ReLU(), nn.Linear(21, 13), nn.ReLU(), nn.Linear(13, 3))
    converted = convert(model, torch.randn(4, 6), "weights")
    for posterior in find_posteriors(converted.model):
        posterior.log_sigma2.data.fill_(-20.0)
    for posterior, gone in zip(find_posteriors(converted.model), (10, 2, 0), strict=True):
        posterior.log_sigma2.data[:gone] = 20.0  # all that writes a channel
    plain, rounded = slim(converted, 0.0), slim(converted, 0.0, round_to=8)
    assert [plain.model[n].out_features for n in (0, 2)] == [11, 11]
    assert [rounded.model[n].out_features for n in (0, 2)] == [16, 13]
    nonzeros = [sum(int((p != 0).sum()) for p in each.model.parameters()) for each in (plain, rounded)]
    assert nonzeros[0] == nonzeros[1]
    assert [group.kept for group in rounded.groups] == [16, 13, 3]


class Beside(nn.Module):
    """Two layers that one reads side by side."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(10, 14), nn.Linear(10, 9)
        self.both, self.last = nn.Linear(23, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.last(self.both(torch.cat([self.left(x).sigmoid(), self.right(x).sigmoid()], 1)).relu())


@pytest.mark.parametrize("seed", range(6))
def test_features_keep_multiples_beside_the_channels_that_go(seed):
    torch.manual_seed(seed)
    converted = convert(Beside(), torch.randn(2, 10), "weights", prune_inputs=True)
    for posterior in find_posteriors(converted.model):
        rows, alone = torch.rand(len(posterior.theta)) < 0.5, torch.rand(posterior.theta.shape) < 0.3
        posterior.log_sigma2.data = torch.where(rows[:, None] | alone, 40.0, -20.0)
    cut = slim(converted, 0.0, round_to=8).model
    arriving = cut.left.out_features + cut.right.out_features
    assert cut.both.in_features in {8, 16, arriving}


class MakesFloats(nn.Module):
    """Makes tensors in float32, by default and by name, and keeps one that is no buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.turn = torch.eye(5).flip(0)
        self.scale = torch.linspace(0.5, 2.0, 6).numpy()

    def forward(self, inputs):
        hidden = self.first(inputs * torch.from_numpy(self.scale)).relu()
        hidden = torch.baddbmm(hidden, torch.full((len(inputs), 5, 5), 0.1), hidden)
        hidden = (self.turn @ hidden).float().softmax(1, dtype=torch.float32)
        found = torch.zeros(len(inputs), 5, 3, dtype=torch.float32)
        found[..., :3] = self.last(hidden.to(torch.float32))
        return found


class NamesItsType(nn.Module):
    """Says float32 by the name of a class of tensors, which no dtype in the call tells."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, inputs):
        return self.last(self.first(inputs).relu().type("torch.FloatTensor"))


@pytest.mark.parametrize("network", [MakesFloats, NamesItsType])
@pytest.mark.parametrize("mode", ["weights", "channels"])
def test_a_network_that_makes_tensors_in_float32_is_cut(mode, network):
    torch.manual_seed(0)
    model, batch = network(), torch.randn(4, 5, 6)
    converted = convert(model, batch, mode)
    for posterior in find_posteriors(converted.model):
        rows = len(posterior.theta)
        posterior.log_sigma2.data = torch.randn_like(posterior.theta) - 10.0
        if rows == 16:
            posterior.log_sigma2.data[:5] = 40.0
    slimmed = slim(converted, 0.0)
    assert slimmed.model.last.in_features == 11
    assert {parameter.dtype for parameter in slimmed.model.parameters()} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(slimmed.model(batch), converted.plain(0.0)(batch))


def test_measure_curve_shrinks_with_the_threshold_and_starts_whole():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    batch = torch.randn(4, 6)
    converted = convert(model, batch, "weights")
    for posterior in find_posteriors(converted.model):
        posterior.log_sigma2.data.normal_(0, 3)
    prepared = []
    with torch.no_grad():
        curve = measure_curve(converted, lambda m: float(m(batch).abs().sum()), prepare=prepared.append)
    assert curve[0].threshold == float("inf")
    assert curve[0].size.nonzeros == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        assert curve[0].error == pytest.approx(float(model(batch).abs().sum()), rel=1e-6)
    nonzeros = [point.size.nonzeros for point in curve if point.threshold >= 0]
    assert nonzeros == sorted(nonzeros, reverse=True)
    assert curve[-1].size.nonzeros < 0.2 * curve[0].size.nonzeros
    assert len(prepared) == len(curve) > 5
    assert len({point.size for point in curve}) == len(curve)


def test_measure_curve_has_the_threshold_that_was_asked_for():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    converted = convert(model, torch.randn(4, 6), "channels")
    curve = measure_curve(converted, lambda _: 0.0, prepare=lambda _: None, asked=2.3)
    # all gates start at log_alpha = -4: every threshold above that keeps the whole network
    assert [point.threshold for point in curve] == [2.3, -4.0]


@pytest.mark.parametrize("mode", ["channels", "weights"])
def test_measure_curve_cuts_once_where_thresholds_take_the_same(mode, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3))
    converted = convert(model, torch.randn(4, 6), mode)
    for posterior in find_posteriors(converted.model):
        posterior.theta.data.normal_().sign_()
        posterior.log_sigma2.data.copy_(torch.tensor([-9.0, 2.2])[torch.randint(0, 2, posterior.theta.shape)])
    cuts = []

    def counting(*arguments, **options):
        cuts.append(arguments[1])
        return slim(*arguments, **options)

    monkeypatch.setattr("vbdcompress.slimming.slim", counting)
    curve = measure_curve(converted, lambda _: 0.0, prepare=lambda _: None)
    assert cuts == [float("inf"), 2.0]
    assert [point.threshold for point in curve] == cuts
    for threshold in (6.0, 2.5, 2.0, -4.0):  # each cut on its own
        point = [point for point in curve if point.threshold >= threshold][-1]
        left = slim(converted, threshold).model
        assert point.size.parameters == sum(each.numel() for each in left.parameters())
        assert point.size.nonzeros == sum(int(each.count_nonzero()) for each in left.parameters())


def test_measure_curve_decides_ties_as_slim_does():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3)), torch.randn(2, 6)
    converted = convert(model, inputs, "weights")
    for posterior in find_posteriors(converted.model):  # log_alpha is 1.5, but for rounding
        posterior.log_sigma2.data.copy_(1.5 + 2 * posterior.theta.detach().abs().log())
    curve = measure_curve(converted, lambda _: 0.0, prepare=lambda _: None, asked=1.2)
    for point in curve:
        left = slim(converted, point.threshold).model
        assert point.size.nonzeros == sum(int(each.count_nonzero()) for each in left.parameters())


@pytest.mark.parametrize("options", [{"threshold": float("nan")}, {"round_to": 0}])
def test_slim_refuses_what_is_no_threshold(options: dict[str, Any]) -> None:
    converted = convert(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(2, 4))
    with pytest.raises(ConfigError, match="allowed are a number, and 1 or more"):
        slim(converted, **options)


class Spectral(nn.Module):
    """Complex weights between Linear layers, as Fourier operators have them."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(0.1 * torch.randn(8, 8, dtype=torch.cfloat))
        self.register_buffer("scale", torch.ones(8, dtype=torch.cfloat))
        self.stem, self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 8] -> [batch, 3]."""
        modes = torch.fft.fft(torch.relu(self.stem(x))) * self.scale @ self.mixing
        logits: Tensor = self.head(torch.relu(self.hidden(torch.fft.ifft(modes).real)))
        return logits


@pytest.mark.parametrize("mode", ["weights", "channels"])
def test_slim_keeps_complex_weights_as_they_are(mode: Any) -> None:
    torch.manual_seed(0)
    converted = convert(Spectral().eval(), torch.randn(4, 8), mode)
    for posterior in find_posteriors(converted.model):
        posterior.log_sigma2.data.fill_(-30.0)
        posterior.log_sigma2.data[:3] = 60.0
    cut = slim(converted, 3.0).model
    assert cut.mixing.dtype == cut.scale.dtype == torch.complex64
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in Spectral().parameters())
    assert cut(torch.randn(5, 8)).shape == (5, 3)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_slim_takes_weights_that_a_hook_computes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(5, 6)), nn.ReLU(), nn.Linear(6, 3))
    converted = convert(model, torch.randn(4, 5), "weights")
    terms = ELBO(converted.model.train(), F.cross_entropy, 10)(torch.randn(4, 5), torch.arange(4) % 3, 1.0)
    terms.objective.backward()  # the hook's weight is of this step's graph
    for posterior in find_posteriors(converted.model):
        posterior.log_sigma2.data.fill_(-30.0)
        posterior.log_sigma2.data[:, 0] = 60.0
    cut = slim(converted, 3.0).model
    inputs = torch.randn(5, 5)
    set_threshold_(converted.model.eval(), 3.0)
    with torch.no_grad():
        torch.testing.assert_close(cut(inputs), converted.model(inputs))
    assert not cut[0].weight_v[:, 0].any()
