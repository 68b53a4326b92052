"""Names that clash, tensors that are shared: an exported program never becomes another function."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vbdcompress.compare import EXACT, relative_difference
from vbdcompress.conversion import convert
from vbdcompress.errors import LoadError
from vbdcompress.exported import from_exported, program
from vbdcompress.slimming import slim
from vbdcompress.vbd.posterior import find_posteriors, set_threshold_


class BiasApart(nn.Module):
    """A layer of the user's own that adds its bias by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.bias


class NamedAlike(nn.Module):
    """The weight `q_weight` beside the layer `q`."""

    def __init__(self) -> None:
        super().__init__()
        self.q_weight, self.q = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.q_weight) + self.q(F.linear(x, self.q_weight).relu())


class Tied(nn.Module):
    """Two layers of one weight, each with a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x).relu())
        return y


class Borrowed(nn.Module):
    """A product with another layer's bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.other = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.other(F.linear(x, self.weight, self.other.bias))
        return y


class Filter(nn.Module):
    """A product and a norm that nobody trains: their tensors are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(8, 8))
        self.norm = nn.Module()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.norm.register_buffer(name, torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        norm, y = self.norm, F.linear(x, self.weight)
        return F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.1)


class Row(nn.Module):
    """A product with one row."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.ParameterDict({"weight": torch.randn(8), "shift": torch.randn(8)})

    def forward(self, x: Tensor) -> Tensor:
        return x + F.linear(x, self.row["weight"])[:, None] + self.row["shift"]


KINDS = [BiasApart, NamedAlike, Tied, Borrowed, Filter, Row]


def network(kind: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), kind(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model.eval()


def export(model: nn.Module) -> ExportedProgram:
    return torch.export.export(model, (torch.randn(2, 5),), dynamic_shapes=({0: Dim("batch")},))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_network_is_the_program(kind: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(program, "_check_same", lambda *_: None)
    model, x = network(kind), torch.randn(6, 5)
    found = from_exported(export(model))
    torch.testing.assert_close(found(x), model(x))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in found.parameters()) == count


@torch.no_grad()
@pytest.mark.parametrize("mode", ["channels", "weights"])
@pytest.mark.parametrize("kind", KINDS)
def test_and_is_cut_exactly(kind: Any, mode: Any) -> None:
    x = torch.randn(6, 5, dtype=torch.float64)
    converted = convert(from_exported(export(network(kind))).double(), x, mode)
    for posterior in find_posteriors(converted.model):
        posterior.log_sigma2.flatten()[::3] = 60.0
    slimmed = slim(converted, 50.0).model
    set_threshold_(converted.model, 50.0)
    assert relative_difference([converted.model.eval()(x)], [slimmed(x)]) <= EXACT


def test_the_layers_of_one_weight_share_it() -> None:
    found = from_exported(export(network(Tied)))
    assert found.get_parameter("2.a.weight") is found.get_parameter("2.b.weight")
    assert found.get_parameter("2.a.bias") is not found.get_parameter("2.b.bias")


class Bare(nn.Module):
    """A matrix of the network's own, in no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.head = nn.Parameter(torch.randn(8, 5)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(F.linear(x, self.matrix).relu())
        return y


def test_a_matrix_of_the_network_s_own_gets_a_posterior() -> None:
    torch.manual_seed(0)
    model, x = Bare().eval(), torch.randn(2, 5)
    converted = convert(from_exported(export(model)), x, "weights")
    assert [row.name for row in converted.table if row.action == "converted"] == ["stored.matrix", "head"]
    torch.testing.assert_close(slim(converted, 50.0).model(x), model(x))


def test_but_not_where_torch_could_not_copy_the_graph_then() -> None:
    torch.manual_seed(0)
    model, x = torch.fx.symbolic_trace(Bare().eval()), torch.randn(2, 5)
    converted = convert(model, x, "weights")
    assert {row.name: row.action for row in converted.table} == {"matrix": "left", "head": "converted"}
    torch.testing.assert_close(slim(converted, 50.0).model(x), model(x))


def test_a_network_that_differs_from_its_program_is_refused(monkeypatch: Any) -> None:
    monkeypatch.setitem(program._BY_NAME, torch.ops.aten.relu.default, torch.abs)
    with pytest.raises(LoadError, match=r"(?s)differs by .* of its largest output"):
        from_exported(export(network(Tied)))


@torch.no_grad()
def test_a_norm_that_keeps_no_statistics_is_not_taken_for_training() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(8, track_running_stats=False)
    model, x = nn.Sequential(nn.Linear(5, 8), norm, nn.Linear(8, 3)).eval(), torch.randn(6, 5)
    torch.testing.assert_close(from_exported(export(model))(x), model(x))
