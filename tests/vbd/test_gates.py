"""Channel gates: their draws, which channel each reader multiplies, and undoing them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vbdcompress.vbd.gates import ChannelGate, InputGate, attach_gate_, detach_gate_


def make_gate(theta: list[float], log_sigma2: float = -2.0) -> ChannelGate:
    gate = ChannelGate(len(theta), log_sigma2)
    with torch.no_grad():
        gate.theta.copy_(torch.tensor(theta))
    return gate


def test_channel_gate_starts_at_one() -> None:
    gate = ChannelGate(3, -4.0).eval()
    assert torch.equal(gate.values(5), torch.ones(1, 3))
    assert torch.equal(gate.log_sigma2, torch.full((3,), -4.0))


@torch.no_grad()
def test_channel_gate_draws_have_the_posteriors_moments(assert_moments: Callable[..., None]) -> None:
    gate = make_gate([1.0, -0.5, 0.0], -1.0).double()
    draws = gate.values(5000)
    assert draws.shape == (5000, 3)
    assert_moments(draws, gate.theta, gate.log_sigma2.exp())
    noise = (draws - gate.theta) / (0.5 * gate.log_sigma2).exp()
    between_channels = noise.T @ noise / 5000 - torch.eye(3)
    assert between_channels.abs().max() < 5 * (2 / 5000) ** 0.5
    assert (noise[:-1] * noise[1:]).mean(0).abs().max() < 5 / 5000**0.5  # between examples


def test_channel_gate_in_eval_masks_at_the_threshold() -> None:
    gate = make_gate([2.0, 1.0, 0.1], 0.0).eval()
    gate.threshold = 0.0
    assert torch.equal(gate.values(7), torch.tensor([[2.0, 0.0, 0.0]]))


READERS: dict[str, tuple[Callable[[], nn.Module], int, Tensor]] = {
    "linear": (lambda: nn.Linear(4, 3), -1, torch.randn(5, 4)),
    "linear_sequence": (lambda: nn.Linear(4, 3), -1, torch.randn(5, 6, 4)),
    "linear_four_dims": (lambda: nn.Linear(4, 3), -1, torch.randn(2, 3, 5, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 2, 2), 1, torch.randn(5, 4, 4)),
    "conv2d": (lambda: nn.Conv2d(4, 2, 3), 1, torch.randn(5, 4, 4, 4)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(4, 2, 2), 1, torch.randn(2, 4, 2, 2, 2)),
}


@pytest.mark.parametrize("reader", READERS)
def test_input_gate_in_eval_scales_the_readers_weight_columns(reader: str) -> None:
    make, dim, input = READERS[reader]
    plain = make().double()
    gated = copy.deepcopy(plain)
    gates = [make_gate([2.0, -1.0]), make_gate([0.5])]
    # feature 0 reads the second gate, 1 and 3 the first one's channels, 2 has no gate
    attach_gate_(gated, InputGate(gates, torch.tensor([2, 0, 3, 1]), dim).double())
    factors = torch.tensor([0.5, 2.0, 1.0, -1.0], dtype=torch.float64)
    with torch.no_grad():
        axis = 0 if isinstance(plain, nn.ConvTranspose3d) else 1
        shape = [1] * plain.weight.dim()
        shape[axis] = 4
        plain.weight.mul_(factors.view(shape))
    torch.testing.assert_close(gated.eval()(input.double()), plain(input.double()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reader", READERS)
def test_input_gate_draws_for_each_example_and_channel(reader: str) -> None:
    _, dim, input = READERS[reader]
    gate = InputGate([ChannelGate(4, -2.0)], torch.arange(4), dim)
    factors = gate(torch.ones_like(input)).detach().transpose(1, dim)
    per_channel = factors.flatten(2) if factors.dim() > 2 else factors[:, :, None]
    # constant over positions, different between any two examples and any two channels
    torch.testing.assert_close(per_channel, per_channel[:, :, :1].expand_as(per_channel))
    assert len(per_channel[:, :, 0].unique()) == len(input) * 4


def test_input_gate_takes_one_example_without_a_batch() -> None:
    gate = InputGate([make_gate([2.0, 3.0])], torch.arange(2), -1)
    assert gate(torch.ones(2)).shape == (2,)
    assert torch.equal(gate.eval()(torch.ones(2)), torch.tensor([2.0, 3.0]))


def test_input_gate_repeats_a_channel_for_each_of_its_features() -> None:
    gate = InputGate([ChannelGate(2, 0.0)], torch.tensor([0, 0, 0, 1, 1, 2]), -1)
    values = gate(torch.ones(3, 6))
    assert torch.equal(values[:, 0], values[:, 2])
    assert torch.equal(values[:, 3], values[:, 4])
    assert (values[:, 0] != values[:, 3]).all()
    assert torch.equal(values[:, 5], torch.ones(3))


def test_input_gate_multiplies_several_gates_of_one_feature() -> None:
    channels, features = make_gate([2.0, 0.0]), make_gate([0.5, 3.0, 7.0, 1.0])
    index = torch.tensor([[0, 0, 1, 1], [2, 3, 4, 6]])  # its channel's gate, then its own or none
    gate = InputGate([channels, features], index, -1)
    assert torch.equal(gate.eval()(torch.ones(1, 4)), torch.tensor([[1.0, 6.0, 0.0, 0.0]]))
    draws = gate.train()(torch.ones(5, 4))
    assert draws.shape == (5, 4)
    draws.sum().backward()
    assert (channels.theta.grad != 0).all()
    assert torch.equal(features.theta.grad != 0, torch.tensor([True, True, True, False]))


def test_input_gate_gives_each_reader_a_draw_of_its_own() -> None:
    gate = ChannelGate(3, 0.0)
    readers = [InputGate([gate], torch.arange(3), -1) for _ in range(2)]
    first, second = (reader(torch.ones(2, 3)) for reader in readers)
    assert not torch.equal(first, second)


def test_input_gate_gives_gradients_to_its_gates() -> None:
    gate = ChannelGate(3, -1.0)
    layer = nn.Linear(3, 2)
    attach_gate_(layer, InputGate([gate], torch.arange(3), -1))
    layer(torch.randn(4, 3)).square().sum().backward()
    for parameter in (gate.theta, gate.log_sigma2):
        assert parameter.grad is not None
        assert (parameter.grad != 0).all()


def test_deepcopy_has_gates_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    gate = ChannelGate(3, -2.0)
    for layer in model:
        attach_gate_(layer, InputGate([gate], torch.arange(3), -1))
    twin = copy.deepcopy(model).eval()
    input = torch.randn(4, 3)
    before = model.eval()(input)
    with torch.no_grad():
        twin[0].input_gate.gates[0].theta.zero_()
    assert torch.equal(model(input), before)
    assert torch.equal(twin(input), twin[1].bias.expand(4, 2))  # both readers share the copied gate
    with torch.no_grad():
        gate.theta.mul_(3.0)
    assert not torch.equal(model(input), before)


@pytest.mark.parametrize("reader", READERS)
def test_detach_gate_restores_the_layer(reader: str) -> None:
    make, dim, input = READERS[reader]
    plain = make()
    gated = copy.deepcopy(plain)
    calls: list[int] = []
    kept = gated.register_forward_pre_hook(lambda module, args: calls.append(1))
    gate = InputGate([make_gate([2.0, 3.0, 0.0, 1.0])], torch.arange(4), dim)
    attach_gate_(gated, gate)
    assert not torch.equal(gated(input), plain(input))
    assert detach_gate_(gated) is gate
    assert torch.equal(gated(input), plain(input))
    assert len(calls) == 2  # the user's own hook is still there
    kept.remove()
    assert not gated._forward_pre_hooks
    assert list(gated.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize(
    "index",
    [
        [0, 1, 2],  # all of the first gate
        [3, 4],  # all of the second
        [0, 0, 1, 1, 2, 2],  # two features for each channel
        [2, 1, 0],
        [0, 1, 2, 3, 4, 5],  # both, and an input that has none
        [0, 1],
        [0, 0, 1, 2],
        [[0, 0, 1, 1, 2, 2], [3, 4, 3, 4, 5, 5]],
    ],
)
def test_input_gate_equals_a_gather_of_all_gates(index: list[Any]) -> None:
    gates = [make_gate([2.0, 3.0, 5.0]), make_gate([7.0, 11.0])]
    wanted = torch.tensor(index)
    gate = InputGate(gates, wanted, -1)
    torch.manual_seed(1)
    found = gate.values(6)
    weights = torch.randn(found.shape)
    (found * weights).sum().backward()
    slopes = [own.theta.grad for own in gates]
    torch.manual_seed(1)
    drawn = torch.cat([*(own.values(6) for own in gates), torch.ones(6, 1)], 1)
    expected = drawn[:, wanted] if wanted.dim() == 1 else drawn[:, wanted[0]] * drawn[:, wanted[1]]
    torch.testing.assert_close(found, expected)
    by_gather = torch.autograd.grad(
        (expected * weights).sum(), [own.theta for own in gates], materialize_grads=True
    )
    for slope, other in zip(slopes, by_gather, strict=True):
        torch.testing.assert_close(torch.zeros_like(other) if slope is None else slope, other)
