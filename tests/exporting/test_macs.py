"""MACs of ONNX files, as torch counts them or as they are by hand."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
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
    assert count_macs(tmp_path / "mixed.onnx", {}).macs == measure_size(model, samples).macs
    sparse = nn.Sequential(nn.Flatten(), nn.Linear(192, 400), nn.ReLU(), nn.Linear(400, 4))
    sparse[1].weight.data *= torch.rand(400, 192) < 0.02
    check = export_onnx(sparse, tmp_path / "packed.onnx", samples, storage=Storage(True))
    assert check.packed
    assert count_macs(tmp_path / "packed.onnx", {}).macs == 192 * 400 + 400 * 4


class Recurrent(nn.Module):
    """Two layers that run in both directions, and a Linear behind them."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cells, self.head = kind(6, 8, 2, batch_first=True, bidirectional=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0].mean(1))


@pytest.mark.parametrize(
    ("kind", "gates"), [(nn.LSTM, 4), pytest.param(nn.GRU, 3, marks=pytest.mark.slow), (nn.RNN, 1)]
)
def test_macs_of_recurrent_layers_are_those_of_their_steps(
    kind: type[nn.RNNBase], gates: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, samples = Recurrent(kind).eval(), torch.randn(3, 5, 6)
    by_hand = 5 * 2 * gates * 8 * ((6 + 8) + (16 + 8)) + 16 * 4
    assert measure_size(model, samples).macs == by_hand
    export_onnx(model, tmp_path / "cells.onnx", samples)
    assert count_macs(tmp_path / "cells.onnx", {}).macs == by_hand


def test_macs_of_a_fixed_batch_are_of_one_example(tmp_path: Path) -> None:
    model = Mixed()
    export_onnx(model, tmp_path / "any.onnx", torch.randn(2, 3, 8, 8))
    proto = onnx.load(tmp_path / "any.onnx")
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 8
    del proto.graph.value_info[:]
    onnx.save(proto, tmp_path / "fixed.onnx")
    assert count_macs(tmp_path / "fixed.onnx", {}).macs == measure_size(model, torch.randn(2, 3, 8, 8)).macs


class Plain(nn.Module):
    """A convolution and two products."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tokens, self.head = nn.Conv2d(3, 8, 3, stride=2), nn.Linear(9, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tokens(self.first(x).relu().flatten(2)).relu())


class Once(CalibrationDataReader):  # type: ignore[misc]
    """One batch to calibrate on."""

    def __init__(self, batch: Tensor) -> None:
        self.batches = iter([{"input": batch.numpy()}])

    def get_next(self) -> Any:
        return next(self.batches, None)


@pytest.mark.parametrize(
    ("kind", "operators"),
    [
        ("dynamic", {"ConvInteger", "MatMulInteger"}),
        ("QOperator", {"QLinearConv", "QLinearMatMul"}),
        ("QDQ", {"Conv", "MatMul"}),
    ],
)
def test_macs_of_a_quantised_file_are_those_of_its_network(
    kind: str, operators: set[str], tmp_path: Path
) -> None:
    model, samples = Plain(), torch.randn(2, 3, 8, 8)
    plain, quantised = tmp_path / "plain.onnx", tmp_path / "quantised.onnx"
    export_onnx(model, plain, samples)
    if kind == "dynamic":
        # onnxruntime 1.20 has no ConvInteger of signed weights
        quantize_dynamic(plain, quantised, weight_type=QuantType.QUInt8)
    else:
        quantize_static(plain, quantised, Once(samples), quant_format=QuantFormat[kind])
    assert operators <= {node.op_type for node in onnx.load(quantised).graph.node}
    assert count_macs(quantised, {}).macs == measure_size(model, samples).macs


def save_graph(path: Path, nodes: list[onnx.NodeProto], shapes: dict[str, list[Any]]) -> Path:
    """A file of float32 inputs of these shapes, whose output is "output"."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "graph", inputs, [output])
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


@pytest.mark.parametrize(
    ("equation", "shapes", "macs"),
    [
        ("bij,bjk->bik", [[1, 3, 5], [1, 5, 7]], 3 * 5 * 7),
        ("bhqd, bhkd -> bhqk", [[1, 2, 3, 4], [1, 2, 5, 4]], 2 * 3 * 5 * 4),
        ("...ij,jk", [[1, 6, 3, 5], [5, 7]], 6 * 3 * 5 * 7),
        ("bi,bj,bk->b", [[1, 3], [1, 5], [1, 7]], 3 * 5 * 7),
        ("bij->bji", [[1, 3, 5]], 0),
    ],
)
def test_macs_of_einsum_are_all_its_letters(
    equation: str, shapes: list[list[int]], macs: int, tmp_path: Path
) -> None:
    names = [f"x{number}" for number in range(len(shapes))]
    node = helper.make_node("Einsum", names, ["output"], equation=equation)
    path = save_graph(tmp_path / "einsum.onnx", [node], dict(zip(names, shapes, strict=True)))
    assert count_macs(path, {}).macs == macs


def test_products_that_are_not_counted_are_named(tmp_path: Path) -> None:
    fused = helper.make_node("FusedMatMul", ["x", "x"], ["y"], domain="com.microsoft", transB=1)
    body = helper.make_graph(
        [helper.make_node("MatMul", ["x", "y"], ["z"])],
        "branch",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
    )
    asked = helper.make_node("ReduceMax", ["y"], ["most"], keepdims=0)
    flag = helper.make_node("Cast", ["most"], ["flag"], to=TensorProto.BOOL)
    either = helper.make_node("If", ["flag"], ["output"], then_branch=body, else_branch=body)
    path = save_graph(tmp_path / "fused.onnx", [fused, asked, flag, either], {"x": [3, 3]})
    found = count_macs(path, {})
    assert (found.macs, found.uncounted) == (None, ("FusedMatMul", "MatMul in If"))
