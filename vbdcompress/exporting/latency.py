"""onnxruntime latency of several files, taken in turn so that a noisy machine is noisy for all."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vbdcompress.exporting.onnx_file import open_session, run_session
from vbdcompress.inputs import Inputs, resize
from vbdcompress.records import Latency

SECONDS_A_BATCH_SIZE = 2.0
MIN_CALLS, MAX_CALLS = 20, 500
# Large networks: fewer calls of each where even MIN_CALLS take longer
MOST_SECONDS, FEWEST_CALLS = 30.0, 3
BATCH_SIZES = 1, 64


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median and 95th percentile over some calls."""

    median_ms: float
    p95_ms: float
    calls: int


def time_in_turn(
    calls: Sequence[Callable[[], object]], seconds: float = SECONDS_A_BATCH_SIZE
) -> tuple[Timing, ...]:
    """Time some calls, A B A B in one run, after one of each that is not counted.

    Args:
        calls: what is timed.
        seconds: for all together; each is made between MIN_CALLS and MAX_CALLS times, or FEWEST_CALLS and
            more where these take MOST_SECONDS.
    """
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    start = time.perf_counter()
    while _goes_on(len(times[0]), time.perf_counter() - start, seconds):
        for call, taken in zip(calls, times, strict=True):
            called = time.perf_counter()
            call()
            taken.append(1000 * (time.perf_counter() - called))
    return tuple(
        Timing(statistics.median(taken), statistics.quantiles(taken, n=20)[-1], len(taken)) for taken in times
    )


def _goes_on(done: int, passed: float, seconds: float) -> bool:
    if done < FEWEST_CALLS:
        return True
    return passed < (MOST_SECONDS if done < MIN_CALLS else seconds) and done < MAX_CALLS


def measure_latency(original: tuple[Path, Inputs], slim: tuple[Path, Inputs]) -> tuple[Latency, ...]:
    """Median milliseconds of one call of each file, in turn.

    Args:
        original, slim: an ONNX file and real inputs for it, [n, ...]; repeated up to the batch size.
    """
    pairs = [(open_session(path), samples) for path, samples in (original, slim)]
    rows = []
    for size in BATCH_SIZES:
        calls = [partial(run_session, session, resize(samples, size)) for session, samples in pairs]
        timings = time_in_turn(calls)
        rows.append(Latency(size, timings[0].median_ms, timings[1].median_ms, timings[0].calls))
    return tuple(rows)
