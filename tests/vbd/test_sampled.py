"""Sampled weights in the layers that take them, against the plain layers."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vbdcompress.vbd.posterior import find_posteriors, set_threshold_
from vbdcompress.vbd.sampled import attach_sampled_, detach_sampled_


class Scale(nn.Module):
    """A bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, input: Tensor) -> Tensor:
        return input * self.scale


SEQUENCE = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(7))


def attend(module: nn.Module) -> Tensor:
    output: Tensor = module(SEQUENCE, SEQUENCE, SEQUENCE)[0]
    return output


def recur(module: nn.Module) -> Tensor:
    output: Tensor = module(SEQUENCE)[0]
    return output


def look_up(module: nn.Module) -> Tensor:
    output: Tensor = module(torch.tensor([[0, 2], [4, 4]]))
    return output


def scale(module: nn.Module) -> Tensor:
    output: Tensor = module(SEQUENCE)
    return output


RECURRENT = ["weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse"]
# name -> (module, where each parameter is and its name, how to call it)
CASES: dict[str, tuple[Callable[[], nn.Module], list[str], Callable[[nn.Module], Tensor]]] = {
    "attention": (lambda: nn.MultiheadAttention(4, 2), ["in_proj_weight", "out_proj.weight"], attend),
    "lstm": (lambda: nn.LSTM(4, 3, bidirectional=True), RECURRENT, recur),
    "gru": (lambda: nn.GRU(4, 3, num_layers=2), ["weight_ih_l0", "weight_hh_l1"], recur),
    "rnn": (lambda: nn.RNN(4, 3), ["weight_hh_l0"], recur),
    "embedding": (lambda: nn.Embedding(5, 4), ["weight"], look_up),
    "parameter": (Scale, ["scale"], scale),
}
CASES_BY_PLAIN = {type(make()): names for make, names, _ in CASES.values()}
Case = tuple[nn.Module, nn.Module, list[tuple[nn.Module, str]], Callable[[nn.Module], Tensor]]


def owners(module: nn.Module, names: list[str]) -> list[tuple[nn.Module, str]]:
    split = [name.rpartition(".") for name in names]
    return [(module.get_submodule(path), last) for path, _, last in split]


@pytest.fixture(params=CASES, ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """A plain module, the same one with sampled weights, these, and how to call either."""
    make, names, call = CASES[request.param]
    plain = make()
    sampled = copy.deepcopy(plain)
    where = owners(sampled, names)
    for owner, name in where:
        attach_sampled_(owner, name, -5.0)
    return plain, sampled, where, call


def test_forward_in_training_varies_with_each_weight(case: Case) -> None:
    _, sampled, where, call = case
    for chosen in where:
        for owner, name in where:
            owner.parametrizations[name][0].train((owner, name) == chosen)
        assert not torch.equal(call(sampled), call(sampled)), chosen[1]


def test_forward_in_eval_is_the_plain_module(case: Case) -> None:
    plain, sampled, _, call = case
    plain.eval(), sampled.eval()
    assert torch.equal(call(sampled), call(plain))
    with torch.no_grad():  # attention has a second, fused path for this
        assert torch.equal(call(sampled), call(plain))


def test_forward_in_eval_after_training_is_deterministic(case: Case) -> None:
    plain, sampled, _, call = case
    call(sampled)
    assert torch.equal(call(sampled.eval()), call(plain.eval()))


def test_weight_has_the_posteriors_moments(case: Case, assert_moments: Callable[..., None]) -> None:
    _, sampled, where, _ = case
    sampled.double()
    for owner, name in where:
        draws = torch.stack([getattr(owner, name).detach() for _ in range(2000)])
        theta = owner.parametrizations[name].original.detach()
        assert_moments(draws, theta, torch.full_like(theta, -5.0).exp())


@torch.no_grad()
def test_output_of_lstm_is_near_the_plain_one_on_average() -> None:
    plain = nn.LSTM(4, 3)
    sampled = copy.deepcopy(plain)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        attach_sampled_(sampled, name, -8.0)
    draws = torch.stack([recur(sampled) for _ in range(1000)])
    error = draws.std(0) / 1000**0.5
    # the mean of a non-linear function is off by its curvature, here below the noise of the mean
    assert ((draws.mean(0) - recur(plain)).abs() < 5 * error + 1e-3).all()
    assert (draws.std(0) > 0).all()


def test_forward_gives_gradients_to_theta_and_variance(case: Case) -> None:
    _, sampled, where, call = case
    call(sampled).square().sum().backward()
    for owner, name in where:
        part = owner.parametrizations[name]
        for parameter in (part.original, part[0].log_sigma2):
            assert parameter.grad is not None
            assert (parameter.grad != 0).any()


def test_forward_in_eval_masks_at_the_threshold() -> None:
    plain = nn.LSTM(4, 3)
    sampled = copy.deepcopy(plain)
    attach_sampled_(sampled, "weight_hh_l0", -3.0)
    sampled.parametrizations.weight_hh_l0[0].threshold = 0.0
    with torch.no_grad():
        plain.weight_hh_l0[plain.weight_hh_l0.square() <= torch.tensor(-3.0).exp()] = 0
    assert 0 < int((plain.weight_hh_l0 == 0).sum()) < 36
    assert torch.equal(recur(sampled.eval()), recur(plain.eval()))


def test_deepcopy_after_training_is_independent(case: Case) -> None:
    _, sampled, _, call = case
    call(sampled).sum().backward()
    twin = copy.deepcopy(sampled)
    before = call(sampled.eval()).clone()
    theirs = {id(parameter) for parameter in twin.parameters()}
    for posterior in find_posteriors(twin):
        assert {id(posterior.theta), id(posterior.log_sigma2)} <= theirs
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(call(sampled), before)
    assert not torch.equal(call(twin.eval()), before)


def test_detach_sampled_from_a_copy_leaves_the_original(case: Case) -> None:
    plain, sampled, where, call = case
    twin = copy.deepcopy(sampled)
    for name in CASES_BY_PLAIN[type(plain)]:
        for owner, last in owners(twin, [name]):
            detach_sampled_(owner, last)
    assert torch.equal(call(twin), call(plain))
    assert not torch.equal(call(sampled), call(sampled))
    for owner, last in where:
        detach_sampled_(owner, last)
    assert torch.equal(call(sampled), call(plain))


def test_posterior_follows_a_change_of_dtype(case: Case) -> None:
    _, sampled, where, _ = case
    sampled.double()
    for owner, name in where:
        theta = owner.parametrizations[name].original
        (posterior,) = (found for found in find_posteriors(owner) if found.theta is theta)
        assert posterior.theta.dtype == posterior.log_sigma2.dtype == torch.float64


@pytest.mark.parametrize("assign", [False, True])
def test_state_of_another_is_what_counts_once_it_is_loaded(case: Case, assign: bool) -> None:
    _, sampled, where, call = case
    other = copy.deepcopy(sampled)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter))
    sampled.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    for module in (sampled, other):
        set_threshold_(module.eval(), 0.0)
    assert torch.equal(call(sampled), call(other))
    for found, wanted in zip(find_posteriors(sampled), find_posteriors(other), strict=True):
        assert torch.equal(found.theta, wanted.theta)
    for owner, name in where:
        detach_sampled_(owner, name)
    assert torch.equal(call(sampled), call(other))


@pytest.mark.parametrize("used", [False, True])
def test_detach_sampled_restores_the_plain_module(case: Case, used: bool) -> None:
    plain, sampled, where, call = case
    if used:
        call(sampled)
    for owner, name in where:
        detach_sampled_(owner, name)
        assert not parametrize.is_parametrized(owner, name)
    assert [type(module) for module in sampled.modules()] == [type(module) for module in plain.modules()]
    assert list(sampled.state_dict()) == list(plain.state_dict())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in sampled.modules())
    assert torch.equal(call(sampled), call(plain))


def test_detach_sampled_leaves_a_module_that_trains(case: Case) -> None:
    _, sampled, where, call = case
    call(sampled)
    for owner, name in where:
        detach_sampled_(owner, name)
    before = call(sampled)
    optimizer = torch.optim.SGD([getattr(owner, name) for owner, name in where], lr=0.1)
    before.square().sum().backward()
    optimizer.step()
    assert not torch.equal(call(sampled), before)
    assert call(sampled).square().sum() < before.square().sum()


def test_detach_sampled_leaves_zeros_where_masked() -> None:
    module = nn.Embedding(6, 5)
    theta = module.weight.detach().clone()
    attach_sampled_(module, "weight", 0.0)
    module.parametrizations.weight[0].threshold = 0.0
    detach_sampled_(module, "weight")
    assert torch.equal(module.weight, theta * (theta.abs() > 1))
