"""convert: what is swapped, what is left and why; attention, recurrent and tied parameters."""

import dataclasses

import pytest
import torch
from torch import nn

from vbdcompress.conversion import convert
from vbdcompress.count import measure_size
from vbdcompress.errors import ConfigError, ConvertError
from vbdcompress.slimming import slim
from vbdcompress.vbd.layers import VBDConv2d, VBDLinear
from vbdcompress.vbd.posterior import find_posteriors, set_threshold_


class Sequence(nn.Module):
    """Embedding, LSTM, attention, a bare parameter, a position table and LayerNorm."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.position = nn.Parameter(torch.randn(1, 5, 8))
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mix = nn.Parameter(torch.randn(8, 8))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens):
        x = self.embed(tokens) + self.position
        x = self.lstm(x)[0] @ self.mix
        x = self.norm(x + self.attention(x, x, x)[0])
        return self.head(x.mean(1))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.again = self.layer
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.again(self.layer(x).relu()).relu())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).relu())


def rows_of(converted):
    return {row.name: row for row in converted.table}


def test_convert_covers_every_parameter_of_a_sequence_network():
    model, tokens = Sequence(), torch.randint(0, 11, (4, 5))
    converted = convert(model, tokens, "weights")
    rows = rows_of(converted)
    done = {name for name, row in rows.items() if row.action == "converted"}
    assert {"embed.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "mix", "head"} <= done
    assert {"attention.q", "attention.k", "attention.v", "attention.out"} <= done
    assert "positions" in rows["position"].reason
    assert "normalisation" in rows["norm.weight"].reason
    assert "vector" in rows["lstm.bias_ih_l0"].reason
    listed = sum(row.parameters for row in converted.table)
    assert listed == sum(parameter.numel() for parameter in model.parameters())


def test_convert_undo_restores_a_sequence_network():
    model, tokens = Sequence().double().eval(), torch.randint(0, 11, (4, 5))
    restored = convert(model, tokens, "weights").undo()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), restored(tokens), rtol=1e-13, atol=1e-13)
    before, after = model.state_dict(), restored.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if "attention" not in name)
    opened = torch.cat([after[f"attention.{name}.weight"] for name in "qkv"])
    assert torch.equal(opened, before["attention.in_proj_weight"])


def test_convert_then_slim_masks_a_sequence_network_exactly():
    model, tokens = Sequence().double().eval(), torch.randint(0, 11, (4, 5))
    converted = convert(model, tokens, "weights")
    for posterior in find_posteriors(converted.model):
        posterior.log_sigma2.data[torch.rand(posterior.theta.shape) < 0.3] = 30.0
    set_threshold_(converted.model, 3.0)
    slimmed = slim(converted, 3.0)
    assert int((slimmed.model.lstm.weight_hh_l0 == 0).sum()) > 0
    with torch.no_grad():
        expected, found = converted.model.eval()(tokens), slimmed.model(tokens)
    assert (expected - found).abs().max() < 1e-10 * expected.abs().max()


def test_convert_leaves_the_original_alone_and_converts_a_shared_module_once():
    model, batch = Shared(), torch.randn(3, 6)
    converted = convert(model, batch, "weights")
    assert type(model.layer) is nn.Linear
    assert type(converted.model.layer) is VBDLinear
    assert converted.model.layer is converted.model.again
    assert [p.name for p in find_posteriors(converted.model)] == ["layer.weight", "head.weight"]


def test_convert_leaves_a_parameter_under_two_names_and_says_which():
    rows = rows_of(convert(Tied(), torch.randn(3, 6), "weights"))
    assert rows["first.weight"].action == "left"
    assert rows["first.weight"].reason == "shared with second.weight"
    assert rows["head"].action == "converted"


def chain():
    return nn.Sequential(*(nn.Conv2d(width, width + 1, 3) for width in range(1, 6)))


def test_convert_skips_a_layer_in_weights_mode():
    converted = convert(chain(), torch.randn(2, 1, 12, 12), "weights", skip=["2"])
    assert [type(layer) is VBDConv2d for layer in converted.model] == [True, True, False, True, True]
    assert rows_of(converted)["2"].reason == "skipped as asked"


def test_convert_leaves_inputs_and_outputs_of_a_skipped_layer_in_channels_mode():
    converted = convert(chain(), torch.randn(2, 1, 12, 12), "channels", skip=["2"])
    whole = {group.name: group.whole_because for group in converted.scan.groups}
    assert whole["0"] is None
    assert whole["3"] is None
    assert whole["1"] == whole["2"] == "'2' is skipped as asked"
    assert {p.name for p in find_posteriors(converted.model)} == {"0", "3"}


@pytest.mark.parametrize("name", ["1", "2"])
def test_convert_skips_what_stands_between_two_layers(name):
    depthwise, norm = nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)
    rest = (nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 3))
    model = nn.Sequential(nn.Conv2d(1, 4, 3), depthwise, norm, nn.ReLU(), *rest)
    converted = convert(model, torch.randn(2, 1, 12, 12), "channels", skip=[name])
    whole = {group.name: group.whole_because for group in converted.scan.groups}
    assert whole["0"] == f"'{name}' is skipped as asked"
    assert whole["4"] is None


def test_convert_multiplies_a_channel_s_gate_and_its_features_own():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    converted = convert(model, torch.randn(2, 1, 4, 4), "channels", prune_inputs=True)
    gates = {p.name: p.theta.data for p in find_posteriors(converted.model)}
    gates["0"][1] = 2.0
    gates["3 (inputs)"][[5, 6]] = torch.tensor([3.0, 7.0])
    expected = torch.ones(16)
    expected[4:8] = torch.tensor([2.0, 6.0, 14.0, 2.0])
    assert torch.equal(converted.model.eval()[3].input_gate.values(1)[0], expected)


def test_convert_gates_follow_the_device_and_dtype_of_nothing_but_the_network():
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    converted = convert(model, torch.randn(2, 5), "channels")
    with torch.no_grad():
        assert torch.equal(model.eval()(torch.ones(1, 5)), converted.model.eval()(torch.ones(1, 5)))
    assert [p.kind for p in find_posteriors(converted.model)] == ["gate"]


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (nn.Sequential(nn.LazyConv2d(4, 3)), torch.randn(1, 1, 8, 8), "has no weights yet"),
        (nn.Sequential(nn.Linear(5, 2)), torch.randn(2, 7), "fails on a batch of shape"),
        (nn.Sequential(nn.ReLU()), torch.randn(2, 7), "no parameters"),
        (nn.Linear(5, 2).double(), torch.randn(2, 5), r"float32 and torch.float64: make both float32"),
        (nn.Bilinear(5, 5, 2), torch.randn(2, 5), r"(?s)missing 1 .*compress\(model, loader\)"),
        ("network.pt", torch.randn(2, 5), r"is a str, allowed is an nn.Module"),
    ],
)
def test_convert_refuses_what_it_cannot_convert(model, example, message):
    with pytest.raises(ConvertError, match=message):
        convert(model, example, "weights")


@pytest.mark.parametrize("option", ["mode", "cost"])
def test_convert_refuses_what_there_is_not(option):
    allowed = {"mode": "'weights' and 'channels'", "cost": "'none', 'params', 'macs'"}[option]
    with pytest.raises(ConfigError, match=f"{option} = 'what', allowed are {allowed}"):
        convert(nn.Sequential(nn.Linear(5, 2)), torch.randn(2, 5), **{option: "what"})


def test_convert_refuses_nan_and_names_the_parameter():
    model = nn.Sequential(nn.Linear(5, 2))
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ConvertError, match=r"'0\.weight' holds 1 NaN"):
        convert(model, torch.randn(2, 5), "weights")


def test_convert_refuses_to_skip_what_is_not_there():
    with pytest.raises(ConvertError, match="no layer is named 'heads'"):
        convert(nn.Sequential(nn.Linear(5, 2)), torch.randn(2, 5), "weights", skip=["heads"])


class Branches(nn.Module):
    """Two convolutions with batch norm, one of them depthwise, and a head: layers of very different cost."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.mixed = nn.Conv2d(8, 16, 1, bias=False)
        self.head = nn.Linear(16, 4, bias=False)

    def forward(self, x):
        x = self.depthwise(torch.relu(self.norm(self.stem(x))))
        return self.head(torch.relu(self.mixed(x)).mean((2, 3)))


@pytest.mark.parametrize(("cost", "field"), [("params", "parameters"), ("macs", "macs")])
def test_cost_is_what_cutting_one_channel_saves(cost, field):
    network, example = Branches(), torch.randn(2, 3, 10, 10)
    converted = convert(network, example, cost=cost)
    whole = getattr(measure_size(network, example), field)
    saved, costs, sizes = [], [], []
    for posterior in find_posteriors(converted.model):
        with torch.no_grad():
            posterior.log_sigma2[0] = 50.0
        saved.append(whole - getattr(measure_size(slim(converted, 40.0).model, example), field))
        with torch.no_grad():
            posterior.log_sigma2[0] = -4.0
        costs.append(posterior.cost)
        sizes.append(posterior.theta.numel())
    assert costs[0] / costs[1] == pytest.approx(saved[0] / saved[1], rel=1e-6)
    assert sum(c * n for c, n in zip(costs, sizes, strict=True)) == pytest.approx(sum(sizes))
    assert costs[0] != pytest.approx(costs[1], rel=0.1)


def test_cost_of_both_is_the_mean_of_the_two():
    network, example = Branches(), torch.randn(2, 3, 10, 10)
    params, macs, both = (
        [p.cost for p in find_posteriors(convert(network, example, cost=cost).model)]
        for cost in ("params", "macs", "params+macs")
    )
    assert both == pytest.approx([(one + other) / 2 for one, other in zip(params, macs, strict=True)])


def test_without_a_cost_every_channel_weighs_the_same():
    converted = convert(Branches(), torch.randn(2, 3, 10, 10))
    assert [posterior.cost for posterior in find_posteriors(converted.model)] == [1.0, 1.0]


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_convert_takes_the_network_out_of_its_wrapping(wrap):
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    converted = convert(wrap(plain), torch.randn(2, 6))
    assert [row.name for row in converted.table] == ["0", "2"]
    assert type(converted.model) is nn.Sequential


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
def test_convert_refuses_torchscript_and_says_what_to_give():
    scripted = torch.jit.trace(nn.Linear(6, 3), torch.randn(2, 6))
    with pytest.raises(ConvertError, match=r"(?s)TorchScript.*nn\.Module that it was made from"):
        convert(scripted, torch.randn(2, 6))


def test_convert_leaves_parameters_whose_names_torch_keeps():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)
            self.keys = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return self.layer(x) @ self.keys

    rows = {row.name: row for row in convert(Named(), torch.randn(2, 6), "weights").table}
    assert rows["keys"].action == "left"
    assert "parametrizations keep" in rows["keys"].reason


def test_convert_follows_outputs_in_a_dataclass():
    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor
        parts: list

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            hidden = self.first(x).relu()
            return Output(self.head(hidden), [x])

    converted = convert(Wrapped(), torch.randn(2, 6))
    assert [(group.name, group.size) for group in converted.scan.removable] == [("first", 8)]
    reasons = {group.name: group.whole_because for group in converted.scan.groups}
    assert "output of the network" in reasons["head"]
