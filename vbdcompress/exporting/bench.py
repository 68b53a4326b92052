"""What ONNX files cost to serve: bytes, MACs, time to load, memory, and latency, file beside file."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import onnx
import onnxruntime

from vbdcompress.errors import ExportError
from vbdcompress.exporting import peak_memory
from vbdcompress.exporting.feeds import Feeds, batch_of, make_feeds, names_of_dims, run_feeds
from vbdcompress.exporting.latency import Timing, time_in_turn
from vbdcompress.exporting.macs import count_macs
from vbdcompress.exporting.onnx_file import open_session

BATCH_SIZES = (1, 8, 64)
LOADS = 5


@dataclass(frozen=True)
class BenchTiming:
    """Latency of one file at one batch size, as it was fed, and number of threads (0: all cores)."""

    batch: int
    threads: int
    timing: Timing


@dataclass(frozen=True)
class BenchRow:
    """One file.

    Attributes:
        file: its path.
        bytes: of the file and of those beside it that hold its weights.
        macs: multiply-accumulates of one example; None where it has products that are not counted.
        uncounted: the operators of these.
        load_ms: median time to make a session.
        peak_bytes: memory that a fresh process needs more to load it and run the largest of its batches; None
            where the system does not say.
        timings: latency, in the order in which it was measured.
    """

    file: str
    bytes: int
    macs: int | None
    uncounted: tuple[str, ...]
    load_ms: float
    peak_bytes: int | None
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
        batch_sizes: a file whose batch is fixed, in itself or by `dims`, is measured at that one alone.
        threads: of onnxruntime; 0 takes all cores.
        dims: values of named dimensions; of the first, too, where every batch is to be that large.
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
        by_batch = _feeds_by_batch(sessions, batch_sizes, dims or {})
        for feeds in by_batch.values():
            for place, fed in feeds.items():
                run_feeds(sessions[place], files[place], fed)  # before any is timed
        for batch, feeds in by_batch.items():
            calls = [partial(sessions[place].run, None, fed) for place, fed in feeds.items()]
            for place, timing in zip(feeds, time_in_turn(calls, seconds), strict=True):
                found[place].append(BenchTiming(batch, count, timing))
    macs = [count_macs(path, dims or {}, min(batch_sizes)) for path in files]
    return tuple(
        BenchRow(
            str(path),
            _bytes_of(path),
            counted.macs,
            counted.uncounted,
            median(taken),
            _peak_bytes(path, make_feeds(open_session(path), max(batch_sizes), dims or {})),
            tuple(timings),
        )
        for path, counted, taken, timings in zip(files, macs, loads, found, strict=True)
    )


def _feeds_by_batch(
    sessions: Sequence[onnxruntime.InferenceSession], batch_sizes: Sequence[int], dims: Mapping[str, int]
) -> dict[int, dict[int, Feeds]]:
    """Batch as it is fed -> place of a session -> its feeds: a session whose batch is fixed has that one."""
    found: dict[int, dict[int, Feeds]] = {}
    for asked in batch_sizes:
        for place, session in enumerate(sessions):
            feeds = make_feeds(session, asked, dims)
            found.setdefault(batch_of(session, feeds), {})[place] = feeds
    return found


def _check_dims(sessions: Sequence[onnxruntime.InferenceSession], dims: Mapping[str, int]) -> None:
    """Raise ExportError for a dimension that no input has."""
    items = [item for session in sessions for item in session.get_inputs()]
    named = {
        name
        for item in items
        for name, dim in zip(names_of_dims(item), item.shape, strict=True)
        if not isinstance(dim, int)
    }
    for name in dims:
        if name not in named:
            raise ExportError("--dim", f"no input has an open dimension '{name}'; open are {sorted(named)}.")


def _bytes_of(path: Path) -> int:
    """Of a file, and of every other file that its tensors point into, each once."""
    graph = onnx.load(path, load_external_data=False).graph
    beside: set[Path] = {
        (path.parent / entry.value).resolve()
        for tensor in _tensors(graph)
        if onnx.external_data_helper.uses_external_data(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return path.stat().st_size + sum(file.stat().st_size for file in beside)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """All constants, those of branches and loops too."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


def _peak_bytes(path: Path, feeds: Feeds) -> int | None:
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.npz"
        np.savez(inputs, **feeds)  # type: ignore[arg-type]
        command = [sys.executable, peak_memory.__file__, str(path), str(inputs)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise ExportError(f"file '{path}'", f"fails in a process of its own: {ended.stderr.strip()[-200:]}")
    return int(ended.stdout) if ended.stdout else None
