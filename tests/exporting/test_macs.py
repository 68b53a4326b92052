"""MACs of ONNX files, as torch counts them or as they are by hand."""

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from vbdcompress.count import measure_size
from vbdcompress.exporting.macs import count_macs
from vbdcompress.exporting.onnx_file import export_onnx
from vbdcompress.exporting.packing import Storage


class Mixed(nn.Module):
    """Every kind of layer whose MACs count: strided, grouped and transposed convolutions, products."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 12, 3, groups=4)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.tokens, self.head = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.grouped(self.first(x).relu()).relu()).relu()
        return self.head(self.tokens(y.flatten(2).transpose(1, 2)).relu().mean(1))


def test_count_macs_agrees_with_torch_for_packed_files_too(tmp_path: Path) -> None:
    model, samples = Mixed(), torch.randn(2, 3, 8, 8)
    export_onnx(model, tmp_path / "mixed.onnx", samples)
    assert count_macs(tmp_path / "mixed.onnx", {}) == measure_size(model, samples).macs
    sparse = nn.Sequential(nn.Flatten(), nn.Linear(192, 400), nn.ReLU(), nn.Linear(400, 4))
    sparse[1].weight.data *= torch.rand(400, 192) < 0.02
    check = export_onnx(sparse, tmp_path / "packed.onnx", samples, storage=Storage(True))
    assert check.packed
    assert count_macs(tmp_path / "packed.onnx", {}) == 192 * 400 + 400 * 4


class Recurrent(nn.Module):
    """Two layers that run in both directions, and a Linear behind them."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cells, self.head = kind(6, 8, 2, batch_first=True, bidirectional=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0].mean(1))


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_macs_of_recurrent_layers_are_those_of_their_steps(
    kind: type[nn.RNNBase], gates: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, samples = Recurrent(kind).eval(), torch.randn(3, 5, 6)
    by_hand = 5 * 2 * gates * 8 * ((6 + 8) + (16 + 8)) + 16 * 4
    assert measure_size(model, samples).macs == by_hand
    export_onnx(model, tmp_path / "cells.onnx", samples)
    assert count_macs(tmp_path / "cells.onnx", {}) == by_hand


def test_macs_of_a_fixed_batch_are_of_one_example(tmp_path: Path) -> None:
    model = Mixed()
    export_onnx(model, tmp_path / "any.onnx", torch.randn(2, 3, 8, 8))
    proto = onnx.load(tmp_path / "any.onnx")
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 8
    del proto.graph.value_info[:]
    onnx.save(proto, tmp_path / "fixed.onnx")
    assert count_macs(tmp_path / "fixed.onnx", {}) == measure_size(model, torch.randn(2, 3, 8, 8)).macs
