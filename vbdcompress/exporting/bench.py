"""What ONNX files cost to serve: bytes, MACs, time to load, memory, and latency, file beside file."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from vbdcompress.errors import ExportError
from vbdcompress.exporting import peak_memory
from vbdcompress.exporting.latency import Timing, time_in_turn
from vbdcompress.exporting.onnx_file import open_session

Feeds = dict[str, npt.NDArray[Any]]
BATCH_SIZES = (1, 8, 64)
LOADS = 5
# onnxruntime's names of types
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


@dataclass(frozen=True)
class BenchTiming:
    """Latency of one file at one batch size and number of threads (0: all cores)."""

    batch: int
    threads: int
    timing: Timing


@dataclass(frozen=True)
class BenchRow:
    """One file.

    Attributes:
        file: its path.
        bytes: of the file.
        macs: multiply-accumulates of one example in convolutions, matrix products and recurrent layers.
        load_ms: median time to make a session.
        peak_bytes: memory that a fresh process needs more to load it and run the largest batch.
        timings: latency, in the order in which it was measured.
    """

    file: str
    bytes: int
    macs: int
    load_ms: float
    peak_bytes: int
    timings: tuple[BenchTiming, ...]


def bench(
    files: Sequence[Path],
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    threads: Sequence[int] = (1, 0),
    dims: Mapping[str, int] | None = None,
    seconds: float = 2.0,
) -> tuple[BenchRow, ...]:
    """Measure files on random inputs, in turn in one run: A B A B.

    Args:
        files: ONNX files.
        batch_sizes: a file whose batch is fixed is measured at that one.
        threads: of onnxruntime; 0 takes all cores.
        dims: values of named dimensions other than the first.
        seconds: for each batch size and number of threads.
    Raises:
        ExportError: a file can't be loaded or run, or has a dimension that nobody gave, or none of a name
            that was given.
    """
    loads: list[list[float]] = [[] for _ in files]
    for _ in range(LOADS):
        for path, taken in zip(files, loads, strict=True):
            start = time.perf_counter()
            open_session(path)
            taken.append(1000 * (time.perf_counter() - start))
    found: list[list[BenchTiming]] = [[] for _ in files]
    for count in threads:
        sessions = [open_session(path, count) for path in files]
        _check_dims(sessions, dims or {})
        for batch in batch_sizes:
            feeds = [make_feeds(session, batch, dims or {}) for session in sessions]
            pairs = zip(sessions, feeds, strict=True)
            timings = time_in_turn([partial(session.run, None, fed) for session, fed in pairs], seconds)
            for own, timing in zip(found, timings, strict=True):
                own.append(BenchTiming(batch, count, timing))
    return tuple(
        BenchRow(
            str(path),
            path.stat().st_size,
            count_macs(path, dims or {}),
            median(taken),
            _peak_bytes(path, make_feeds(open_session(path), max(batch_sizes), dims or {})),
            tuple(timings),
        )
        for path, taken, timings in zip(files, loads, found, strict=True)
    )


def _check_dims(sessions: Sequence[onnxruntime.InferenceSession], dims: Mapping[str, int]) -> None:
    """Raise ExportError for a dimension that no input has."""
    shapes = [item.shape for session in sessions for item in session.get_inputs()]
    named = {dim for shape in shapes for dim in shape if isinstance(dim, str)}
    for name in dims:
        if name not in named:
            raise ExportError("--dim", f"no input has a dimension '{name}'; named are {sorted(named)}.")


def make_feeds(session: onnxruntime.InferenceSession, batch: int, dims: Mapping[str, int]) -> Feeds:
    """Random inputs for a session: normal numbers, zeros where it takes integers."""
    generator = np.random.default_rng(0)
    feeds: Feeds = {}
    for item in session.get_inputs():
        shape = []
        for place, dim in enumerate(item.shape):
            size = dim if isinstance(dim, int) else dims.get(str(dim), batch if place == 0 else None)
            if size is None:
                raise ExportError(
                    f"input '{item.name}'", f"has a dimension '{dim}' of any size.", f"--dim {dim}=SIZE"
                )
            shape.append(size)
        if item.type not in _DTYPES:
            raise ExportError(f"input '{item.name}'", f"is a {item.type}, which bench has no values for.")
        kind = _DTYPES[item.type]
        drawn = generator.standard_normal(shape) if np.issubdtype(kind, np.floating) else np.zeros(shape)
        feeds[item.name] = drawn.astype(kind)
    return feeds


def _peak_bytes(path: Path, feeds: Feeds) -> int:
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.npz"
        np.savez(inputs, **feeds)  # type: ignore[arg-type]
        command = [sys.executable, peak_memory.__file__, str(path), str(inputs)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise ExportError(f"file '{path}'", f"fails in a process of its own: {ended.stderr.strip()[-200:]}")
    return int(ended.stdout)


def count_macs(path: Path, dims: Mapping[str, int]) -> int:
    """Multiply-accumulates of one example in convolutions, matrix products and recurrent layers.

    Of the graph as onnxruntime sees it once constants are folded: packed weights have shapes then. What
    the rest has comes from a run, for shapes that the graph itself computes can't be inferred.
    """
    with tempfile.TemporaryDirectory() as folder:
        folded = Path(folder) / "folded.onnx"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(folded)
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        proto = onnx.load(folded)
    nodes = [node for node in proto.graph.node if node.op_type in _COUNTED]
    feeds = make_feeds(open_session(path), 1, dims)
    shapes = {item.name: list(item.dims) for item in proto.graph.initializer}
    shapes |= {name: list(value.shape) for name, value in feeds.items()}
    used = {name for node in nodes for name in (*node.input[:3], node.output[0]) if name}
    asked = sorted(used - shapes.keys())
    if asked:
        del proto.graph.output[:]
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in asked)
        found = open_session(proto.SerializeToString()).run(asked, feeds)
        shapes |= {name: list(value.shape) for name, value in zip(asked, found, strict=True)}
    shaped = ([shapes.get(name, []) for name in (*node.input, node.output[0])] for node in nodes)
    total = sum(_macs(node, found) for node, found in zip(nodes, shaped, strict=True))
    batch = next((value.shape[0] for value in feeds.values() if value.ndim), 1)  # 1 unless it is fixed
    return total // batch


_RECURRENT = ("LSTM", "GRU", "RNN")
_COUNTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", *_RECURRENT)


def _macs(node: onnx.NodeProto, shapes: Sequence[list[int]]) -> int:
    """Of one node, given the shapes of its inputs and of its first output."""
    first, second, output = shapes[0], shapes[1], shapes[-1]
    if node.op_type in _RECURRENT:  # every step, [steps, batch, ...], reads all weights of both kinds
        return first[0] * first[1] * (prod(second) + prod(shapes[2]))
    if node.op_type == "ConvTranspose":
        return prod(first) * prod(second[1:])
    if node.op_type == "Conv":
        return prod(output) * prod(second[1:])
    if node.op_type == "Gemm":
        transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        return prod(output) * first[0 if transposed else 1]
    return prod(output) * first[-1]
