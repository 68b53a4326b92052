"""log_alpha, masks and the walk over a network's posteriors."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from vbdcompress.vbd.gates import ChannelGate, InputGate, attach_gate_
from vbdcompress.vbd.kl import PRIORS
from vbdcompress.vbd.layers import attach_posterior_
from vbdcompress.vbd.posterior import draw, find_posteriors, log_alpha_of, sample, set_threshold_
from vbdcompress.vbd.sampled import attach_sampled_

finite32 = st.floats(allow_nan=False, allow_infinity=False, width=32)


@pytest.mark.parametrize(("theta", "sigma"), [(0.5, 0.1), (-3.0, 2.0), (1e-3, 1.0)])
def test_log_alpha_of_is_the_log_of_the_ratio(theta: float, sigma: float) -> None:
    found = log_alpha_of(
        torch.tensor(theta, dtype=torch.float64), torch.tensor(2 * math.log(sigma), dtype=torch.float64)
    )
    assert found.item() == pytest.approx(math.log(sigma**2 / theta**2), rel=1e-12)


@given(theta=finite32, log_sigma2=st.floats(-1e4, 1e4, width=32))
@pytest.mark.parametrize("prior", list(PRIORS))
def test_log_alpha_of_and_kl_are_finite_with_gradients(prior: str, theta: float, log_sigma2: float) -> None:
    tensors = torch.tensor([[theta], [log_sigma2]]).unbind()
    for tensor in tensors:
        tensor.requires_grad_()
    kl = PRIORS[prior](log_alpha_of(*tensors))
    kl.sum().backward()
    assert kl.isfinite().all()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_log_alpha_of_is_computed_in_float32(dtype: torch.dtype) -> None:
    # 2e-4 squared is 0 in float16
    theta, log_sigma2 = torch.tensor(2e-4, dtype=dtype), torch.tensor(-4.0, dtype=dtype)
    found = log_alpha_of(theta, log_sigma2)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(-4.0 - 2 * math.log(2e-4), abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("variance", [0.0, -1e-3])
def test_draw_is_the_mean_with_no_slope_where_there_is_no_variance(
    dtype: torch.dtype, variance: float
) -> None:
    mean = torch.full((3,), 2.0, dtype=dtype, requires_grad=True)
    tensor = torch.full((3,), variance, dtype=dtype, requires_grad=True)
    drawn = draw(mean, tensor)
    drawn.sum().backward()
    torch.testing.assert_close(drawn.detach(), mean.detach(), atol=1e-6, rtol=0)
    assert tensor.grad is not None
    assert mean.grad is not None
    assert tensor.grad.tolist() == [0.0] * 3
    assert mean.grad.tolist() == [1.0] * 3


def test_draw_has_the_moments_asked_for(assert_moments: Callable[..., None]) -> None:
    mean = torch.tensor([0.5, -2.0, 0.0], dtype=torch.float64)
    variance = torch.tensor([4.5e-5, 1.0, 900.0], dtype=torch.float64)
    assert_moments(torch.stack([draw(mean, variance) for _ in range(4000)]), mean, variance)


def test_draw_keeps_the_order_in_memory_and_the_moments(assert_moments: Callable[..., None]) -> None:
    mean = torch.randn(2, 3, 4, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    variance = torch.rand(2, 3, 4, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    draws = [draw(mean, variance) for _ in range(4000)]
    assert draws[0].is_contiguous(memory_format=torch.channels_last)
    assert_moments(torch.stack(draws), mean, variance)


def test_draw_has_the_slopes_of_mean_plus_std_times_noise() -> None:
    mean, variance = torch.randn(50, 4, dtype=torch.float64), torch.rand(50, 4, dtype=torch.float64)
    results = []
    for of in (draw, lambda mean, variance: mean + variance.sqrt() * torch.randn_like(variance)):
        torch.manual_seed(3)
        tensors = [tensor.clone().requires_grad_() for tensor in (mean, variance)]
        drawn = of(*tensors)
        drawn.square().sum().backward()
        results.append((drawn.detach(), *(tensor.grad for tensor in tensors)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_sample_has_the_posteriors_moments(assert_moments: Callable[..., None]) -> None:
    theta = torch.tensor([0.5, -2.0, 0.0], dtype=torch.float64)
    log_sigma2 = torch.tensor([-4.0, 0.0, 1.0], dtype=torch.float64)
    draws = torch.stack([sample(theta, log_sigma2) for _ in range(4000)])
    assert_moments(draws, theta, log_sigma2.exp())


def make_mixed_network() -> nn.Module:
    """A weight layer used twice, a sampled weight, and a gate with two readers."""
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict(
        {
            "first": shared,
            "again": shared,
            "attention": nn.MultiheadAttention(4, 2),
            "left": nn.Linear(4, 2),
            "right": nn.Linear(4, 2),
        }
    )
    attach_posterior_(shared, -6.0)
    attach_sampled_(model["attention"], "in_proj_weight", -6.0)
    gate = ChannelGate(4, -6.0)
    attach_gate_(model["left"], InputGate([gate], torch.arange(4), -1))
    attach_gate_(model["right"], InputGate([gate], torch.arange(4), -1))
    return model


def test_find_posteriors_names_each_once() -> None:
    found = [(posterior.name, posterior.kind) for posterior in find_posteriors(make_mixed_network())]
    assert found == [
        ("first.weight", "weight"),
        ("attention.in_proj_weight", "weight"),
        ("left.input_gate.gates.0", "gate"),
    ]


def test_find_posteriors_names_the_root_as_its_state_dict_does() -> None:
    layer = nn.Linear(2, 2)
    attach_posterior_(layer, -6.0)
    assert [posterior.name for posterior in find_posteriors(layer)] == ["weight"]


def test_find_posteriors_gives_the_parameters_themselves() -> None:
    model = make_mixed_network()
    trained = {id(parameter) for parameter in model.parameters()}
    for posterior in find_posteriors(model):
        assert {id(posterior.theta), id(posterior.log_sigma2)} <= trained
        assert posterior.theta.shape == posterior.log_sigma2.shape
        expected = (posterior.log_sigma2.exp() / posterior.theta.square()).log()
        torch.testing.assert_close(posterior.log_alpha(), expected, rtol=1e-4, atol=1e-4)


def test_set_threshold_masks_at_and_above_it() -> None:
    layer = nn.Linear(3, 1, bias=False).eval()
    attach_posterior_(layer, 0.0)
    with torch.no_grad():  # log_alpha = -2 log|theta|: exactly 0, above it, below it
        layer.weight.copy_(torch.tensor([[1.0, 0.5, 2.0]]))
    assert layer(torch.ones(1, 3)).item() == 3.5
    set_threshold_(layer, 0.0)
    assert layer(torch.ones(1, 3)).item() == 2.0
    set_threshold_(layer, math.inf)
    assert layer(torch.ones(1, 3)).item() == 3.5


def test_set_threshold_reaches_every_kind() -> None:
    model = make_mixed_network()
    set_threshold_(model, 1.5)
    posteriors = find_posteriors(model)
    assert [posterior.holder.threshold for posterior in posteriors] == [1.5] * 3


def masked(theta: Tensor, log_sigma2: Tensor, threshold: float) -> Tensor:
    return theta * (log_sigma2.exp() / theta.square() < math.exp(threshold))


def test_masked_theta_keeps_what_is_below_the_threshold() -> None:
    layer = nn.Linear(20, 30).double()
    attach_posterior_(layer, -3.0)
    layer.threshold = 1.0
    expected = masked(layer.weight, layer.log_sigma2, 1.0)
    assert 0 < int((expected == 0).sum()) < expected.numel()
    assert torch.equal(layer.masked_theta(), expected)


@pytest.mark.parametrize(("round_to", "kept"), [(2, 2), (4, 6)])
def test_rounding_tells_no_equal_gates_apart(round_to: int, kept: int) -> None:
    gate = ChannelGate(6, 0.0)
    with torch.no_grad():  # log_alpha = log_sigma2: two are certain, three equal
        gate.log_sigma2.copy_(torch.tensor([1.0, -9.0, 1.0, -8.0, 1.0, 2.0]))
    set_threshold_(gate, 0.0, round_to)
    assert int(gate.masked_theta().count_nonzero()) == kept
