"""bench: memory that grows with the file, and every file in every setting."""

import contextlib
import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from vbdcompress.cli.bench import command
from vbdcompress.errors import ConfigError, ExportError
from vbdcompress.exporting import latency, peak_memory
from vbdcompress.exporting.bench import bench
from vbdcompress.exporting.onnx_file import export_onnx
from vbdcompress.exporting.packing import Storage


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bench")
    torch.manual_seed(0)
    small = nn.Sequential(nn.Flatten(), nn.Linear(192, 16))
    large = nn.Sequential(nn.Flatten(), nn.Linear(192, 40_000), nn.ReLU(), nn.Linear(40_000, 4))
    large[1].weight.data *= torch.rand(40_000, 192) < 0.02
    export_onnx(small, folder / "small.onnx", torch.randn(2, 3, 8, 8))
    export_onnx(large, folder / "large.onnx", torch.randn(2, 3, 8, 8), storage=Storage(True))
    return folder / "small.onnx", folder / "large.onnx"


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
        ExportError, match=r"no input has an open dimension 'lenght'; open are \['batch', 'length'\]"
    ):
        bench([path], dims={"lenght": 4}, seconds=0.01)
    with pytest.raises(ConfigError, match="NAME=SIZE"):
        CliRunner().invoke(command, [str(path), "--dim", "length"], catch_exceptions=False)
    with pytest.raises(ConfigError, match="does not exist"):
        CliRunner().invoke(command, [str(tmp_path / "none.onnx")], catch_exceptions=False)


def test_a_dimension_without_a_name_is_called_by_its_place(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, 3, None])
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None, 3, None])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "relu", [value], [output])
    path, opsets = tmp_path / "unnamed.onnx", [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    with pytest.raises(ExportError, match=r"--dim x\.2=SIZE"):
        bench([path], seconds=0.01)
    (row,) = bench([path], batch_sizes=(2,), threads=(1,), dims={"x.2": 4}, seconds=0.01)
    assert row.timings[0].batch == 2


@pytest.fixture(scope="module")
def external(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What torch.onnx.export writes if nobody asks otherwise: weights of a size in a file beside it."""
    path = tmp_path_factory.mktemp("external") / "original.onnx"
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 400), nn.ReLU(), nn.Linear(400, 4)).eval()
    batch = torch.export.Dim("batch", min=2)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (torch.randn(2, 3, 8, 8),), path, dynamo=True, dynamic_shapes=({0: batch},), verbose=False
        )
    assert sorted(item.name for item in path.parent.iterdir()) == ["original.onnx", "original.onnx.data"]
    return path


def test_bench_measures_files_whose_weights_lie_beside_them(external: Path, tmp_path: Path) -> None:
    (row,) = bench([external], batch_sizes=(2,), threads=(1,), seconds=0.01)
    assert row.bytes == sum(item.stat().st_size for item in external.parent.iterdir())
    assert row.bytes > 4 * 192 * 400
    assert row.macs == 192 * 400 + 400 * 4
    # one file of weights for each: they count alike
    proto, apart = onnx.load(external), tmp_path / "apart.onnx"
    onnx.save(proto, apart, save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=100)
    assert len(list(tmp_path.iterdir())) == 4
    (row,) = bench([apart], batch_sizes=(2,), threads=(1,), seconds=0.01)
    assert row.bytes == sum(item.stat().st_size for item in tmp_path.iterdir())


def fix_batch(source: Path, path: Path, size: int) -> Path:
    """The same file for batches of one size alone."""
    proto = onnx.load(source)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = size
    del proto.graph.value_info[:]
    onnx.save(proto, path)
    return path


def test_bench_names_the_batch_that_was_run(files: tuple[Path, Path], tmp_path: Path) -> None:
    fixed = [fix_batch(files[0], tmp_path / f"{size}.onnx", size) for size in (1, 4)]
    rows = bench([files[0], *fixed], batch_sizes=(1, 3), threads=(1,), seconds=0.01)
    assert [[item.batch for item in row.timings] for row in rows] == [[1, 3], [1], [4]]
    assert len({row.macs for row in rows}) == 1
    name = onnx.load(files[0]).graph.input[0].type.tensor_type.shape.dim[0].dim_param
    (row,) = bench(files[:1], batch_sizes=(1, 3), threads=(1,), dims={name: 4}, seconds=0.01)
    assert [item.batch for item in row.timings] == [4]


def test_bench_compares_equal_batches_alone(files: tuple[Path, Path], tmp_path: Path) -> None:
    fixed = fix_batch(files[0], tmp_path / "4.onnx", 4)
    options = ["--batch", "1", "--batch", "4", "--threads", "1", "--seconds", "0.01"]
    shown = CliRunner().invoke(command, [str(fixed), str(files[0]), *options])
    assert shown.exit_code == 0, shown.output
    cells = [line.split() for line in shown.output.splitlines()]
    times = [row for row in cells if len(row) > 3 and row[0] == "1" and row[2] in ("A", "B")]
    assert [(row[1], row[2]) for row in times] == [("1", "B"), ("4", "A"), ("4", "B")]
    assert ["x" in " ".join(row) for row in times] == [False, True, True]
    assert "A: batches of 4 alone" in shown.output


def test_bench_says_at_which_batch_a_file_fails(tmp_path: Path) -> None:
    """Traced with a batch of 4 that went into a Reshape, though the input leaves it open."""
    shape = onnx.numpy_helper.from_array(np.array([4, -1], dtype=np.int64), "shape")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Reshape", ["x", "shape"], ["output"])],
        "baked",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 3, 5])],
        [onnx.helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, None)],
        [shape],
    )
    path = tmp_path / "baked.onnx"
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    with pytest.raises(ExportError, match=r"(?s)baked\.onnx.*a batch of 1: .*--batch"):
        bench([path], batch_sizes=(4, 1), seconds=0.01)
    (row,) = bench([path], batch_sizes=(4,), threads=(1,), seconds=0.01)
    assert [item.batch for item in row.timings] == [4]


def test_bench_shows_macs_as_unknown_or_none(files: tuple[Path, Path], tmp_path: Path) -> None:
    made = {}
    for name, node in {
        "unknown": onnx.helper.make_node("FusedMatMul", ["x", "x"], ["output"], "", domain="com.microsoft"),
        "none": onnx.helper.make_node("Relu", ["x"], ["output"]),
    }.items():
        given, output = (
            onnx.helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, ["batch", 3, 3])
            for value in ("x", "output")
        )
        opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("com.microsoft", 1)]
        graph = onnx.helper.make_graph([node], name, [given], [output])
        made[name] = tmp_path / f"{name}.onnx"
        onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), made[name])
    options = ["--batch", "1", "--threads", "1", "--seconds", "0.01"]
    for first in made.values():
        shown = CliRunner().invoke(command, [str(first), *map(str, (*made.values(), files[0])), *options])
        assert shown.exit_code == 0, shown.output
        assert "B: MACs unknown, for these are not counted: FusedMatMul" in shown.output
        assert "C: MACs unknown" not in shown.output


def test_memory_is_not_known_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak_memory, "STATUS", Path("nowhere"))
    assert peak_memory._resident("VmHWM") > 0
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert peak_memory._resident("VmHWM") is None


def test_calls_that_take_long_are_made_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(latency, "MOST_SECONDS", 0.0)
    timings = latency.time_in_turn([lambda: done.append("a"), lambda: done.append("b")], seconds=5.0)
    assert [timing.calls for timing in timings] == [3, 3]
    assert done == ["a", "b"] * 4
