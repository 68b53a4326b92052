"""torch.export's programs: the layers come back, and the network goes the whole way."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vbdcompress import compress, load, load_slim
from vbdcompress.conversion import convert
from vbdcompress.errors import LoadError
from vbdcompress.exported import from_exported
from vbdcompress.slimming import slim
from vbdcompress.vbd.posterior import find_posteriors, set_threshold_


class Network(nn.Module):
    """Convolutions of every kind, a norm, a parameter, a layer used twice and one of a functional weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 6, 3, padding="same", bias=False), nn.BatchNorm2d(6))
        self.grouped = nn.Conv2d(6, 8, 3, stride=2, groups=2)
        self.twice = nn.Conv2d(8, 8, 1)
        self.scale = nn.Parameter(torch.rand(8))
        self.hidden = nn.Linear(8, 9)
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.stem(x), inplace=True)
        y = self.twice(self.twice(self.grouped(y).relu()).relu()).relu()
        y = F.dropout(y.mean((2, 3)) * self.scale, training=self.training)
        return self.head(F.hardswish(self.hidden(y)))


def exported(dynamic: bool = True) -> tuple[nn.Module, ExportedProgram]:
    torch.manual_seed(0)
    model = Network().eval()
    model.stem[1].running_mean.normal_()
    shapes: Any = ({0: Dim("batch")},) if dynamic else None
    return model, torch.export.export(model, (torch.randn(2, 1, 8, 8),), dynamic_shapes=shapes)


@torch.no_grad()
def test_layers_come_back_under_their_names() -> None:
    model, program = exported()
    found = from_exported(program)
    x = torch.randn(5, 1, 8, 8)
    assert torch.equal(found(x), model(x))
    assert dict(found.named_parameters()).keys() == dict(model.named_parameters()).keys()
    layers = {name: type(module) for name, module in model.named_modules() if not list(module.children())}
    assert {name: type(module) for name, module in found.named_modules() if name in layers} == layers


@pytest.mark.parametrize("mode", ["channels", "weights"])
def test_a_program_is_cut_exactly(mode: Any) -> None:
    _, program = exported()
    model = from_exported(program).double()
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    converted = convert(model, x, mode)
    for posterior in find_posteriors(converted.model):
        posterior.log_sigma2.data.flatten()[::3] = 60.0
    slimmed = slim(converted, 50.0).model
    set_threshold_(converted.model, 50.0)
    with torch.no_grad():
        expected = converted.model.eval()(x)
        assert (slimmed(x) - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert [group.name for group in converted.scan.removable] == ["stem.0", "grouped", "hidden"]


def test_compress_takes_a_program(tmp_path: Path) -> None:
    _, program = exported()
    batches = [(torch.randn(10, 1, 8, 8), torch.arange(10) % 3) for _ in range(3)]
    options: dict[str, Any] = {"epochs": 1, "finetune_epochs": 1, "device": "cpu", "threshold": -10.0}
    result = compress(program, batches, validation=batches, test=batches, **options)
    assert result.report["size"]["after"]["parameters"] < result.report["size"]["before"]["parameters"]
    result.export(tmp_path)
    assert (tmp_path / "model.onnx").exists()
    again, x = load_slim(tmp_path / "slim.safetensors", program), torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(x), result.model(x))


def test_a_fixed_batch_is_refused_with_what_to_do() -> None:
    _, program = exported(dynamic=False)
    with pytest.raises(LoadError, match=r"(?s)batches of 2 alone.*Dim"):
        from_exported(program)


def test_a_program_without_layers_is_refused() -> None:
    class Bare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    shapes: Any = ({0: Dim("batch")},)
    program = torch.export.export(Bare(), (torch.randn(2, 3),), dynamic_shapes=shapes)
    with pytest.raises(LoadError, match="no Linear or convolution"):
        from_exported(program)


def test_a_pt2_file_is_read_only_when_trusted(tmp_path: Path) -> None:
    model, program = exported()
    path = tmp_path / "network.pt2"
    torch.export.save(program, path)
    with pytest.raises(LoadError, match=r"(?s)can run code.*--unsafe-pickle"):
        load(path)
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(load(path, unsafe_pickle=True).model(x), model(x))
    path.write_bytes(b"no program")
    with pytest.raises(LoadError, match=r"no torch\.export program"):
        load(path, unsafe_pickle=True)


@torch.no_grad()
def test_a_weight_that_is_used_in_two_ways_is_no_layer_s() -> None:
    class TwoWays(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c, self.head = nn.Linear(5, 5), nn.Conv2d(1, 2, 3, padding=1), nn.Linear(5, 3)

        def forward(self, x: Tensor, image: Tensor) -> Tensor:
            y = self.a(x) + F.linear(x, self.a.weight)
            wide = F.conv2d(image, self.c.weight, self.c.bias, padding=2, dilation=2)
            return self.head(y) + (self.c(image) + wide).sum((1, 2, 3))[:, None]

    torch.manual_seed(0)
    model, given = TwoWays().eval(), (torch.randn(2, 5), torch.randn(2, 1, 6, 6))
    batch = Dim("batch")
    program = torch.export.export(model, given, dynamic_shapes=({0: batch}, {0: batch}))
    torch.testing.assert_close(from_exported(program)(*given), model(*given))


@pytest.mark.parametrize(
    "layer", [nn.Dropout(0.5), nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True)]
)
def test_a_program_exported_in_training_mode_is_refused(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Unflatten(1, (3, 1)), nn.Linear(1, 4), layer).train()
    shapes: Any = ({0: Dim("batch")},)
    program = torch.export.export(model, (torch.randn(2, 4),), dynamic_shapes=shapes)
    with pytest.raises(LoadError, match=r"(?s)training mode.*model\.eval"):
        from_exported(program)
