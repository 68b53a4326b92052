"""bench: MACs as torch counts them, memory that grows with the file, and every file in every setting."""

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from vbdcompress.cli.bench import command
from vbdcompress.count import measure_size
from vbdcompress.errors import ConfigError, ExportError
from vbdcompress.exporting.bench import bench, count_macs
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


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bench")
    torch.manual_seed(0)
    large = nn.Sequential(nn.Flatten(), nn.Linear(192, 40_000), nn.ReLU(), nn.Linear(40_000, 4))
    large[1].weight.data *= torch.rand(40_000, 192) < 0.02
    export_onnx(Mixed(), folder / "mixed.onnx", torch.randn(2, 3, 8, 8))
    export_onnx(large, folder / "large.onnx", torch.randn(2, 3, 8, 8), storage=Storage(True))
    return folder / "mixed.onnx", folder / "large.onnx"


def test_count_macs_agrees_with_torch_for_packed_files_too(files: tuple[Path, Path]) -> None:
    model = Mixed()
    assert count_macs(files[0], {}) == measure_size(model, torch.randn(2, 3, 8, 8)).macs
    assert count_macs(files[1], {}) == 192 * 40_000 + 40_000 * 4


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


def test_bench_measures_every_file_in_every_setting(files: tuple[Path, Path]) -> None:
    rows = bench(files, batch_sizes=(1, 3), threads=(1, 2), seconds=0.01)
    for row, path in zip(rows, files, strict=True):
        assert row.bytes == path.stat().st_size
        assert [(item.batch, item.threads) for item in row.timings] == [(1, 1), (3, 1), (1, 2), (3, 2)]
        assert all(0 < item.timing.median_ms <= item.timing.p95_ms for item in row.timings)
        assert all(item.timing.calls >= 20 for item in row.timings)
        assert row.load_ms > 0
    # the dense weight of the packed file stands in memory: 31 MB
    assert rows[1].peak_bytes > rows[0].peak_bytes + 25_000_000


def test_bench_prints_tables_and_json(files: tuple[Path, Path]) -> None:
    options = ["--batch", "1", "--threads", "1", "--seconds", "0.01"]
    shown = CliRunner().invoke(command, [*map(str, files), *options])
    assert shown.exit_code == 0, shown.output
    assert "1.00x" in shown.output
    told = CliRunner().invoke(command, [*map(str, files), *options, "--json"])
    content: list[dict[str, Any]] = json.loads(told.output)
    assert [item["file"] for item in content] == [str(file) for file in files]
    assert content[1]["macs"] > content[0]["macs"]


def test_bench_asks_for_what_it_can_not_know(tmp_path: Path) -> None:
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["words"], ["output"])],
        "words",
        [onnx.helper.make_tensor_value_info("words", onnx.TensorProto.INT32, ["batch", "length", 3])],
        [onnx.helper.make_tensor_value_info("output", onnx.TensorProto.INT32, ["batch", "length", 3])],
    )
    path = tmp_path / "words.onnx"
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8), path
    )
    with pytest.raises(ExportError, match="--dim length=SIZE"):
        bench([path], seconds=0.01)
    assert bench([path], batch_sizes=(2,), threads=(1,), dims={"length": 4}, seconds=0.01)
    with pytest.raises(
        ExportError, match=r"no input has a dimension 'lenght'; named are \['batch', 'length'\]"
    ):
        bench([path], dims={"lenght": 4}, seconds=0.01)
    with pytest.raises(ConfigError, match="NAME=SIZE"):
        CliRunner().invoke(command, [str(path), "--dim", "length"], catch_exceptions=False)
    with pytest.raises(ConfigError, match="does not exist"):
        CliRunner().invoke(command, [str(tmp_path / "none.onnx")], catch_exceptions=False)
