"""Weight-mode layers against torch's own layers whose weights are really sampled."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vbdcompress.gather import GatherLinear
from vbdcompress.vbd.layers import VBD_LAYERS, attach_posterior_, detach_posterior_
from vbdcompress.vbd.posterior import log_alpha_of


def make_gather_linear() -> nn.Module:
    layer = GatherLinear(3, 2)
    layer.register_buffer("input_index", torch.tensor([4, 0, 3]))
    return layer


# name -> (layer, shape of the input, further arguments of forward)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[Any, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (2, 4), ()),
    "linear_sequence": (lambda: nn.Linear(4, 3, bias=False), (2, 5, 4), ()),
    "gather_linear": (make_gather_linear, (4, 5), ()),
    "conv1d_reflect": (lambda: nn.Conv1d(2, 3, 3, padding=2, padding_mode="reflect"), (2, 2, 6), ()),
    "conv1d_groups_stride": (lambda: nn.Conv1d(4, 4, 3, stride=2, groups=2, dilation=2), (2, 4, 9), ()),
    "conv2d_zeros": (lambda: nn.Conv2d(2, 3, 3, padding=1, stride=2), (2, 2, 5, 5), ()),
    "conv2d_same": (lambda: nn.Conv2d(2, 2, (3, 5), padding="same", bias=False), (2, 2, 4, 5), ()),
    "conv2d_circular": (
        lambda: nn.Conv2d(1, 2, 3, padding=(1, 2), padding_mode="circular"),
        (2, 1, 4, 4),
        (),
    ),
    "conv2d_depthwise": (lambda: nn.Conv2d(3, 3, 3, groups=3, padding=1), (2, 3, 4, 4), ()),
    "conv3d_replicate": (
        lambda: nn.Conv3d(1, 2, 2, padding=1, padding_mode="replicate"),
        (2, 1, 3, 3, 3),
        (),
    ),
    "transpose1d_dilation": (lambda: nn.ConvTranspose1d(2, 2, 3, dilation=2, padding=1), (2, 2, 4), ()),
    "transpose1d_output_size": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2), (2, 2, 4), ([10],)),
    "transpose2d_groups": (
        lambda: nn.ConvTranspose2d(4, 4, 3, stride=2, groups=2, padding=1, output_padding=1),
        (2, 4, 3, 3),
        (),
    ),
    "transpose2d_output_size": (lambda: nn.ConvTranspose2d(2, 2, 2, stride=3), (2, 2, 2, 2), ([2, 2, 6, 7],)),
    "transpose3d": (lambda: nn.ConvTranspose3d(1, 2, 2, stride=2, bias=False), (2, 1, 2, 2, 2), ()),
}
Case = tuple[nn.Module, nn.Module, Tensor, tuple[Any, ...]]


@pytest.fixture(params=CASES, ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """A plain layer, the same one converted, an input and further arguments; in float64."""
    make, shape, args = CASES[request.param]
    plain = make().double()
    converted = copy.deepcopy(plain)
    attach_posterior_(converted, -2.0)
    nn.init.normal_(converted.log_sigma2, -2.0, 1.0)
    return plain, converted, torch.randn(shape, dtype=torch.float64), args


@torch.no_grad()
def test_moments_equal_monte_carlo_over_weights(case: Case, assert_moments: Callable[..., None]) -> None:
    plain, converted, input, args = case
    sigma = (0.5 * converted.log_sigma2).exp()
    draws = []
    for _ in range(2000):
        plain.weight.copy_(converted.weight + sigma * torch.randn_like(sigma))
        draws.append(plain(input, *args))
    assert_moments(torch.stack(draws), *converted.moments(input, *args))


def test_moments_equal_the_jacobian_of_the_plain_layer(case: Case) -> None:
    # The output is linear in w, so its variance is exactly the sum of (d out / d w)^2 sigma^2.
    plain, converted, input, args = case
    parameters = dict(plain.named_parameters())
    weight = parameters.pop("weight").detach()

    def run(value: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(plain, {**parameters, "weight": value}, (input, *args))
        return result

    jacobian = torch.autograd.functional.jacobian(run, weight).flatten(-weight.dim())
    expected = (jacobian.square() * converted.log_sigma2.detach().exp().flatten()).sum(-1)
    mean, variance = converted.moments(input, *args)
    torch.testing.assert_close(mean, run(weight), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(variance, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "conv2d_zeros", "transpose1d_dilation"])
@torch.no_grad()
def test_forward_draws_from_its_moments(name: str, assert_moments: Callable[..., None]) -> None:
    make, shape, _ = CASES[name]
    layer = make().double()
    attach_posterior_(layer, -1.0)
    example = torch.randn(1, *shape[1:], dtype=torch.float64)
    draws = layer(example.expand(4000, *shape[1:]))
    mean, variance = layer.moments(example)
    assert_moments(draws, mean[0], variance[0])
    # independent between examples: neighbours in the batch do not correlate
    noise = (draws - mean).flatten(1)
    product = (noise[:-1] * noise[1:]).mean(0) / variance.flatten(1)[0]
    assert product.abs().max() < 5 / 4000**0.5


def test_forward_differs_between_examples_and_calls(case: Case) -> None:
    _, converted, input, args = case
    twins = input[:1].expand_as(input)
    first, second = converted(twins, *args), converted(twins, *args)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, second)


def test_forward_in_eval_is_the_plain_layer(case: Case) -> None:
    plain, converted, input, args = case
    assert torch.equal(converted.eval()(input, *args), plain(input, *args))


def test_forward_in_eval_masks_at_the_threshold(case: Case) -> None:
    plain, converted, input, args = case
    log_alpha = log_alpha_of(converted.weight, converted.log_sigma2)
    converted.threshold = log_alpha.median().item()
    with torch.no_grad():
        plain.weight[log_alpha >= converted.threshold] = 0
    assert 0 < int((plain.weight == 0).sum()) < plain.weight.numel()
    assert torch.equal(converted.eval()(input, *args), plain(input, *args))


def test_forward_takes_what_the_plain_layer_takes_by_keyword() -> None:
    plain = nn.ConvTranspose2d(2, 2, 2, stride=3)
    converted = copy.deepcopy(plain).eval()
    attach_posterior_(converted, -8.0)
    input = torch.randn(1, 2, 2, 2)
    assert torch.equal(converted(input, output_size=[6, 7]), plain(input, output_size=[6, 7]))
    assert converted.train()(input=input, output_size=(5, 6)).shape == (1, 2, 5, 6)


def test_forward_gives_gradients_to_weight_and_variance(case: Case) -> None:
    _, converted, input, args = case
    converted(input, *args).square().sum().backward()
    for parameter in converted.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert (parameter.grad != 0).any()


def test_gradient_of_the_variance_equals_finite_differences() -> None:
    layer = nn.Linear(3, 2).double()
    attach_posterior_(layer, -2.0)
    input = torch.randn(4, 3, dtype=torch.float64)

    def run(log_sigma2: Tensor, weight: Tensor) -> Tensor:
        torch.manual_seed(5)
        tensors = {"log_sigma2": log_sigma2, "weight": weight, "bias": layer.bias.detach()}
        result: Tensor = torch.func.functional_call(layer, tensors, (input,))
        return result

    given = [tensor.detach().clone().requires_grad_() for tensor in (layer.log_sigma2, layer.weight)]
    assert torch.autograd.gradcheck(run, tuple(given))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forward_under_autocast_stays_finite(dtype: torch.dtype) -> None:
    # 400 squared overflows float16; a row of zeros has no variance; e^-30 underflows float16
    layer = nn.Linear(3, 2)
    attach_posterior_(layer, -2.0)
    with torch.no_grad():
        layer.log_sigma2[0] = -30.0
    input = torch.tensor([[400.0, -1.0, 0.1], [0.0, 0.0, 0.0]])
    with torch.autocast("cpu", dtype):
        draws = torch.stack([layer(input) for _ in range(500)])
    draws.float().square().mean().backward()
    assert draws.isfinite().all()
    assert draws.float()[:, 0, 1].std().item() == pytest.approx(400 * torch.e**-1, rel=0.2)
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def test_detach_posterior_restores_the_plain_layer(case: Case) -> None:
    plain, converted, input, args = case
    order = [name for name, _ in plain.named_parameters()]
    detach_posterior_(converted)
    assert type(converted) is type(plain)
    assert list(converted.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in converted.named_parameters()] == order
    assert vars(converted).keys() == vars(plain).keys()
    assert torch.equal(converted(input, *args), plain(input, *args))


def test_detach_posterior_leaves_zeros_where_masked() -> None:
    layer = nn.Linear(6, 5)
    attach_posterior_(layer, -3.0)
    weight = layer.weight
    layer.threshold = 0.0
    expected = layer.masked_theta().detach().clone()
    detach_posterior_(layer)
    assert layer.weight is weight
    assert torch.equal(layer.weight, expected)
    assert (layer.weight == 0).any()


def test_attach_posterior_keeps_the_parameter_and_hooks() -> None:
    layer = nn.Linear(3, 2)
    weight, seen = layer.weight, []
    layer.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    attach_posterior_(layer, -4.0)
    layer(torch.ones(2, 3))
    assert layer.weight is weight
    assert seen == [(2, 2)]
    assert torch.equal(layer.log_sigma2, torch.full((2, 3), -4.0))
    assert layer.load_state_dict(nn.Linear(3, 2).state_dict(), strict=False).missing_keys == ["log_sigma2"]


def test_vbd_layers_names_a_subclass_of_each() -> None:
    for plain, converted in VBD_LAYERS.items():
        assert issubclass(converted, plain)
