"""Stacked recurrent layers in the open are those of torch; their gates act on weights, for one call."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from vbdcompress.compare import flatten_output
from vbdcompress.opening import open_layers_
from vbdcompress.recurrent import StackedRecurrent, recurrent_parameters
from vbdcompress.vbd.gates import ChannelGate, RecurrentGate, attach_gate_, detach_gate_

KINDS = (nn.LSTM, nn.GRU, nn.RNN)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"batch_first": True, "bidirectional": True, "dropout": 0.4},
    {"bias": False, "bidirectional": True},
]


def opened(original: nn.Module) -> nn.Module:
    model = nn.Sequential(copy.deepcopy(original))
    open_layers_(model)
    return model[0]


def assert_equal(found: Any, expected: Any) -> None:
    pairs = list(zip(flatten_output(found), flatten_output(expected), strict=True))
    assert len(pairs) > 1
    for one, other in pairs:
        assert one.shape == other.shape
        assert torch.equal(one, other) or (one - other).abs().max() <= 1e-12


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_stacked_recurrent_equals_torchs(kind: Any, options: dict[str, Any]) -> None:
    original = kind(4, 5, num_layers=3, **options).double().eval()
    stacked = opened(original)
    assert isinstance(stacked, StackedRecurrent)
    x = torch.randn(6, 6, 4, dtype=torch.float64)
    assert_equal(stacked(x), original(x))
    state = torch.randn(3 * (2 if options.get("bidirectional") else 1), 6, 5, dtype=torch.float64)
    given = (state, state.flip(1)) if kind is nn.LSTM else state
    assert_equal(stacked(x, given), original(x, given))
    assert_equal(stacked(x[0]), original(x[0]))
    lengths = torch.tensor([6, 6, 4, 3, 2, 1])
    packed = pack_padded_sequence(x, lengths, options.get("batch_first", False))
    found, expected = stacked(packed), original(packed)
    assert isinstance(found[0], PackedSequence)
    assert_equal((found[0].data, found[1]), (expected[0].data, expected[1]))


def test_stacked_recurrent_drops_out_between_its_layers_as_torchs_does() -> None:
    original = nn.GRU(4, 5, num_layers=2, dropout=0.5).double()
    stacked, x = opened(original), torch.randn(6, 3, 4, dtype=torch.float64)
    torch.manual_seed(3)
    expected = original(x)
    torch.manual_seed(3)
    assert_equal(stacked(x), expected)
    assert not torch.equal(stacked(x)[0], original.eval()(x)[0])


@pytest.mark.parametrize("module", [nn.LSTM(4, 5), nn.LSTM(4, 5, 2, proj_size=3), nn.GRUCell(4, 5)])
def test_what_has_one_layer_or_projections_stays(module: nn.Module) -> None:
    assert type(opened(module)) is type(module)


def gated(plain: nn.Module) -> tuple[nn.Module, RecurrentGate]:
    """The layer with a gate on each input, but for the second, and on each unit."""
    layer = copy.deepcopy(plain)
    gates = [ChannelGate(4, -2.0), ChannelGate(5, -2.0)]
    for gate in gates:
        gate.theta.data.copy_(torch.linspace(-1, 2, len(gate.theta)))
    index = torch.cat([torch.tensor([0, 9, 2, 3]), torch.arange(4, 9)])
    input_gate = RecurrentGate(gates, index, -1).to(torch.float64)
    attach_gate_(layer, input_gate)
    return layer, input_gate


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_recurrent_gate_in_eval_scales_weights(kind: Any, options: dict[str, Any]) -> None:
    plain = kind(4, 5, **options | {"dropout": 0.0}).double().eval()
    layer, gate = gated(plain)
    x = torch.randn(7, 6, 4, dtype=torch.float64)
    found = layer.eval()(x)
    inputs, units = torch.linspace(-1, 2, 4).double(), torch.linspace(-1, 2, 5).double()
    inputs[1] = 1.0
    scaled = copy.deepcopy(plain)
    with torch.no_grad():
        for name in recurrent_parameters(scaled):
            if name.startswith("weight"):
                getattr(scaled, name).mul_(inputs if name.startswith("weight_ih") else units)
    assert_equal(found, scaled(x))
    assert detach_gate_(layer) is gate
    assert_equal(layer(x), plain(x))
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_recurrent_gate_in_training_draws_and_leaves_nothing_behind() -> None:
    layer, gate = gated(nn.LSTM(4, 5).double())
    x = torch.randn(7, 6, 4, dtype=torch.float64)
    first, second = layer(x)[0], layer(x)[0]
    assert not torch.equal(first, second)
    second.square().sum().backward()
    for parameter in (*layer.parameters(), *gate.parameters()):
        assert parameter.grad is not None
        assert bool((parameter.grad != 0).any())
    held = {id(parameter) for parameter in layer.parameters()}
    assert all(id(weight) in held for weight in layer._flat_weights)
    with pytest.raises(RuntimeError):
        layer(torch.randn(7, 6, 3, dtype=torch.float64))
    assert all(id(weight) in held for weight in layer._flat_weights)
    copy.deepcopy(layer)


def test_recurrent_gate_noise_on_units_has_the_posteriors_moments(assert_moments: Any) -> None:
    layer, gate = gated(nn.RNN(4, 5).double())
    seen: list[Tensor] = []
    weight = layer.weight_hh_l0.detach().clone()
    for _ in range(2000):
        gate.gate_input(layer, (torch.zeros(2, 3, 4, dtype=torch.float64),), {})
        seen.append((layer._flat_weights[1] / weight)[0].detach())
        gate.let_go(layer, (), None)
    units = gate.gates[1]
    assert_moments(torch.stack(seen), units.theta, units.log_sigma2.exp())
