"""onnxruntime latency of two files, taken in turn so that a noisy machine is noisy for both."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from vbdcompress.exporting.onnx_file import open_session, run_session
from vbdcompress.inputs import Inputs, resize
from vbdcompress.records import Latency

SECONDS_A_BATCH_SIZE = 2.0
MIN_CALLS, MAX_CALLS = 20, 500


def measure_latency(
    original: Path, slim: Path, samples: Inputs, batch_sizes: Sequence[int] = (1, 64)
) -> tuple[Latency, ...]:
    """Median milliseconds of one call of each file, A B A B in one run.

    Args:
        original, slim: ONNX files with the same input.
        samples: [n, ...] real inputs; repeated up to the batch size.
        batch_sizes: to measure.
    """
    sessions = [open_session(original), open_session(slim)]
    rows = []
    for size in batch_sizes:
        batch = resize(samples, size)
        times: list[list[float]] = [[], []]
        for session in sessions:
            run_session(session, batch)
        end = time.perf_counter() + SECONDS_A_BATCH_SIZE
        while len(times[0]) < MIN_CALLS or (time.perf_counter() < end and len(times[0]) < MAX_CALLS):
            for session, taken in zip(sessions, times, strict=True):
                start = time.perf_counter()
                run_session(session, batch)
                taken.append(1000 * (time.perf_counter() - start))
        medians = [statistics.median(taken) for taken in times]
        rows.append(Latency(size, medians[0], medians[1], len(times[0])))
    return tuple(rows)
