"""Stacked recurrent layers in the open are those of torch; their gates act on weights, for one call."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from vbdcompress.attention import HeadAttention
from vbdcompress.compare import flatten_output, relative_difference
from vbdcompress.conversion import convert
from vbdcompress.exporting.export import export
from vbdcompress.exporting.slim_file import load_slim
from vbdcompress.opening import open_layers_
from vbdcompress.recurrent import StackedRecurrent, recurrent_parameters
from vbdcompress.slimming import slim
from vbdcompress.vbd.gates import ChannelGate, RecurrentGate, attach_gate_, detach_gate_
from vbdcompress.vbd.posterior import find_posteriors

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


class Built(nn.Module):
    """Makes its layer's first states like a weight, or asks for its type or what it gives."""

    def __init__(self, how: str, layers: int = 2) -> None:
        super().__init__()
        self.stem, self.rnn, self.head = nn.Linear(5, 6), nn.LSTM(6, 8, layers), nn.Linear(8, 3)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        """[time, batch, 5] -> [batch, 3]."""
        y = self.stem(x)
        if self.how == "weights":
            start = self.rnn.weight_hh_l0.new_zeros(self.rnn.num_layers, x.shape[1], 8)
            return self.head(self.rnn(y, (start, start))[0][-1])  # type: ignore[no-any-return]
        state = self.rnn(y)[1]
        if self.how == "type" and isinstance(self.rnn, nn.LSTM):
            state = state[0]
        return self.head((state[0] if isinstance(state, tuple) else state)[-1])  # type: ignore[no-any-return]


def difference(one: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return relative_difference([one.eval()(x)], [other.eval()(x)])


@pytest.mark.parametrize("how", ["weights", "plain"])
def test_layers_are_opened_where_the_code_does_not_tell_them_apart(how: str) -> None:
    torch.manual_seed(0)
    model, x = Built(how), torch.randn(7, 4, 5)
    converted = convert(model, x)
    assert isinstance(converted.model.rnn, StackedRecurrent)
    assert difference(model, converted.undo(), x) < 1e-5


class Asks(nn.Module):
    """Gives another output where its layer is of another type."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attention = nn.Linear(5, 6), nn.MultiheadAttention(6, 2)
        self.rnn, self.head = nn.LSTM(6, 8, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[time, batch, 5] -> [batch, 3]."""
        y = self.stem(x)
        y = self.rnn(y + self.attention(y, y, y)[0])[0][-1]
        return self.head(y if type(self.rnn) is nn.LSTM else 2 * y)  # type: ignore[no-any-return]


def test_a_state_whose_form_hangs_on_the_type_keeps_its_layer_closed() -> None:
    torch.manual_seed(0)
    model, x = Built("type"), torch.randn(7, 4, 5)
    assert difference(model, convert(model, x).undo(), x) < 1e-5


def test_what_the_code_tells_apart_stays_closed_and_the_rest_is_opened() -> None:
    torch.manual_seed(0)
    model, x = Asks(), torch.randn(7, 4, 5)
    converted = convert(model, x)
    assert type(converted.model.rnn) is nn.LSTM
    assert isinstance(converted.model.attention, HeadAttention)
    assert difference(model, converted.undo(), x) < 1e-5
    # of the closed layer the inputs may still go
    assert {group.name for group in converted.scan.removable} >= {"attention.q"}


@pytest.mark.parametrize("kind", ["lstm", "attention"])
def test_what_has_hooks_stays_closed(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Asks(), torch.randn(7, 4, 5)
    hooked = model.rnn if kind == "lstm" else model.attention
    hooked.register_forward_hook(lambda module, given, output: (output[0].relu(), *output[1:]))
    converted = convert(model, x, "weights")
    assert isinstance(getattr(converted.model, "rnn" if kind == "lstm" else "attention"), type(hooked))
    assert difference(model, converted.undo(), x) < 1e-5


@pytest.mark.parametrize("skip", [[], ["rnn"]])
def test_a_computed_recurrent_weight_leaves_other_layers_removable(skip: list[str]) -> None:
    torch.manual_seed(0)
    model, x = Built("plain", 1), torch.randn(7, 4, 5)
    model.stem = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6))
    parametrizations.weight_norm(model.rnn, "weight_hh_l0")
    converted = convert(model, x, skip=skip)
    assert "stem.0" in {group.name for group in converted.scan.removable}


@pytest.mark.parametrize("width", [3, 5, 8])
def test_a_first_layer_s_state_is_not_lost_where_the_last_one_keeps_more(width: int) -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.rnn = nn.Linear(5, 6), nn.LSTM(6, width, 2, batch_first=True)
            self.head = nn.Linear(2 * width, 3)

        def forward(self, x: Tensor) -> Tensor:
            output, state = self.rnn(self.stem(x))
            return self.head(torch.cat([output[:, -1], state[0][0]], 1))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    converted = convert(First(), torch.randn(4, 7, 5))
    for posterior in find_posteriors(converted.model):
        if posterior.name == "rnn.layers.0":
            posterior.log_sigma2.data[0] = 60.0
    cut, x = slim(converted, 50.0).model, torch.randn(3, 9, 5)
    assert difference(converted.plain(50.0), cut, x) < 1e-5


def test_a_weight_to_skip_keeps_its_layer_whole() -> None:
    torch.manual_seed(0)
    skip = ["stem.weight", "rnn.weight_hh_l0"]
    converted = convert(Built("plain", 1), torch.randn(7, 4, 5), "weights", skip=skip)
    assert not converted.scan.removable


class Shared(nn.Module):
    """One layer that is applied twice, under two names."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList([build()] * 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        for block in self.blocks:
            given = [hidden] * (3 if isinstance(block, nn.MultiheadAttention | HeadAttention) else 1)
            hidden = hidden + block(*given)[0]
        output: Tensor = self.head(hidden.mean(1))
        return output


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.GRU(8, 8, num_layers=2, batch_first=True),
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
    ],
    ids=["GRU", "attention"],
)
@pytest.mark.parametrize("mode", ["channels", "weights"])
def test_a_layer_under_two_names_stays_one(build: Callable[[], nn.Module], mode: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, original = torch.randn(4, 5, 6), Shared(build)
    before = sum(each.numel() for each in original.parameters())
    slimmed = slim(convert(original, x, mode), 50.0)
    assert slimmed.model.blocks[0] is slimmed.model.blocks[1]
    assert sum(each.numel() for each in slimmed.model.parameters()) <= before
    export(slimmed.model, tmp_path, x, plans=[slimmed.plan])
    loaded = load_slim(tmp_path / "slim.safetensors", model=Shared(build))
    assert loaded.blocks[0] is loaded.blocks[1]
    with torch.no_grad():
        assert torch.equal(loaded(x), slimmed.model.eval()(x))
