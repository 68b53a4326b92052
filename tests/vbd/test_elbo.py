"""The objective against sums by hand."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vbdcompress.errors import ConfigError, FitError
from vbdcompress.vbd.elbo import ELBO, beta_at
from vbdcompress.vbd.gates import ChannelGate, InputGate, attach_gate_
from vbdcompress.vbd.layers import attach_posterior_
from vbdcompress.vbd.sampled import attach_sampled_

INPUT = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
TARGET = torch.arange(6) % 3


def kl_by_hand(theta: Tensor, log_sigma2: Tensor) -> float:
    """0.5 log(1 + theta^2 / sigma^2), one weight at a time."""
    pairs = zip(theta.flatten().tolist(), log_sigma2.flatten().tolist(), strict=True)
    return sum(0.5 * math.log1p(weight**2 / math.exp(logvar)) for weight, logvar in pairs)


def test_kl_is_the_sum_over_every_kind_divided_by_num_data() -> None:
    model = nn.ModuleList([nn.Linear(5, 4), nn.Conv2d(2, 3, 3), nn.Embedding(3, 2), nn.Linear(4, 2)])
    attach_posterior_(model[0], -5.0)
    attach_posterior_(model[1], -3.0)
    attach_sampled_(model[2], "weight", -1.0)
    gate = ChannelGate(4, -2.0)
    attach_gate_(model[3], InputGate([gate], torch.arange(4), -1))
    tensors = [
        (model[0].weight, model[0].log_sigma2),
        (model[1].weight, model[1].log_sigma2),
        (model[2].parametrizations.weight.original, model[2].parametrizations.weight[0].log_sigma2),
        (gate.theta, gate.log_sigma2),
    ]
    expected = sum(kl_by_hand(*pair) for pair in tensors)
    assert ELBO(model, F.cross_entropy, 1).kl().item() == pytest.approx(expected, rel=1e-5)
    assert ELBO(model, F.cross_entropy, 250).kl().item() == pytest.approx(expected / 250, rel=1e-5)


def test_kl_counts_a_shared_module_once() -> None:
    shared = nn.Linear(4, 4)
    attach_posterior_(shared, -4.0)
    once, twice = nn.Sequential(shared), nn.Sequential(shared, nn.ReLU(), shared)
    expected = kl_by_hand(shared.weight, shared.log_sigma2)
    for model in (once, twice):
        assert ELBO(model, F.cross_entropy, 1).kl().item() == pytest.approx(expected, rel=1e-5)


def test_kl_of_another_prior_is_larger(make_network: Callable, convert: Callable) -> None:
    model = convert(make_network())
    assert ELBO(model, F.cross_entropy, 9, "vd").kl() > ELBO(model, F.cross_entropy, 9, "vbd").kl()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0, 12.0])
def test_forward_is_nll_plus_beta_kl(make_network: Callable, convert: Callable, beta: float) -> None:
    plain, model = make_network(), convert(make_network(), -50.0)
    terms = ELBO(model, F.cross_entropy, 60)(INPUT, TARGET, torch.tensor(beta))
    log_p = plain(INPUT).log_softmax(1)
    nll = -sum(log_p[row, int(label)].item() for row, label in enumerate(TARGET)) / 6
    kl = sum(kl_by_hand(layer.weight, layer.log_sigma2) for layer in (model[0], model[2])) / 60
    assert terms.nll.item() == pytest.approx(nll, rel=1e-5)
    assert terms.kl.item() == pytest.approx(kl, rel=1e-5)
    assert terms.objective.item() == pytest.approx(nll + beta * kl, rel=1e-5)


def test_forward_of_a_plain_network_is_the_plain_loss(make_network: Callable) -> None:
    model = make_network()
    terms = ELBO(model, F.cross_entropy, 60)(INPUT, TARGET, torch.tensor(1.0))
    assert terms.kl.item() == 0.0
    assert torch.equal(terms.objective, F.cross_entropy(model(INPUT), TARGET))


def test_a_loss_of_each_example_is_refused(make_network: Callable) -> None:
    elbo = ELBO(make_network(), partial(F.cross_entropy, reduction="none"), num_data=60)
    with pytest.raises(FitError, match=r"the loss gives \[6\], allowed is the mean"):
        elbo(INPUT, TARGET, torch.tensor(1.0))


def test_gradient_at_beta_zero_has_no_kl(make_network: Callable, convert: Callable) -> None:
    plain, model = make_network(), convert(make_network(), -60.0)
    ELBO(model, F.cross_entropy, 60)(INPUT, TARGET, torch.tensor(0.0)).objective.backward()
    F.cross_entropy(plain(INPUT), TARGET).backward()
    torch.testing.assert_close(model[0].weight.grad, plain[0].weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("epoch", "beta", "warmup", "expected"),
    [
        (0, 1.0, 5, 0.0),
        (1, 1.0, 5, 0.2),
        (5, 1.0, 5, 1.0),
        (9, 1.0, 5, 1.0),
        (2, 12.0, 4, 6.0),
        (0, 2.0, 0, 2.0),
    ],
)
def test_beta_at_rises_linearly(epoch: int, beta: float, warmup: int, expected: float) -> None:
    assert beta_at(epoch, beta, warmup) == pytest.approx(expected)


def test_elbo_refuses_a_prior_that_there_is_not(make_network: Callable) -> None:
    with pytest.raises(ConfigError, match="prior = 'log-uniform', allowed are 'vbd' and 'vd'"):
        ELBO(make_network(), F.cross_entropy, 9, "log-uniform")


def test_elbo_switches_the_network_and_not_a_loss_that_is_one(make_network: Callable) -> None:
    loss = nn.Sequential(nn.BatchNorm1d(3)).eval()
    elbo = ELBO(make_network(), lambda output, _: loss(output).sum(), 9)
    elbo.loss = loss
    assert elbo.train().training
    assert elbo.model.training
    assert not loss.training
    assert not elbo.eval().model.training


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (lambda output, target: F.cross_entropy(output, target).item(), "the loss gives a float"),
        (lambda output, target: (F.cross_entropy(output, target), output), "the loss gives a tuple"),
        (
            lambda output, target: F.cross_entropy(output, target).detach(),
            "no gradient comes through the loss",
        ),
    ],
)
def test_a_loss_that_teaches_nothing_is_refused(loss: Callable, told: str, make_network: Callable) -> None:
    elbo = ELBO(make_network(), loss, 6).train()
    with pytest.raises(FitError, match=told):
        elbo(INPUT, TARGET, torch.tensor(1.0))


def test_an_elbo_is_measured_without_gradients(make_network: Callable) -> None:
    elbo = ELBO(make_network(), F.cross_entropy, 6).train()
    with torch.no_grad():
        assert elbo(INPUT, TARGET, torch.tensor(1.0)).nll > 0
