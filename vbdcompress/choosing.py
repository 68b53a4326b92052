"""choose: the network that a budget asks for, where bytes count those of the file that will be written."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from vbdcompress.budget import Budget, select_threshold
from vbdcompress.config import RunConfig
from vbdcompress.conversion import Converted
from vbdcompress.count import FLOAT_BYTES, measure_size
from vbdcompress.exporting.export import file_properties, write_onnx
from vbdcompress.exporting.packing import Storage, estimate_bytes
from vbdcompress.files import Scratch
from vbdcompress.inputs import Inputs, first
from vbdcompress.precision import first_codes
from vbdcompress.records import CurvePoint, Selection, Size
from vbdcompress.rounding import write_rounded_
from vbdcompress.slimming import Slim, posterior_sigma, slim
from vbdcompress.sources import Sources

# Points that are added to a curve next to a limit
REFINEMENTS = 6
# Above the largest threshold of the curve, where the network is still whole
STEP_TO_WHOLE = 4.0


class FileSize:
    """Bytes of the ONNX file that a run writes, as an estimate or of a file written to see.

    Args:
        config: how weights are stored.
        original: size of the network that came in, with its dense file's bytes.
        samples: [n, ...] of each input.
        sources: what the file says of itself comes from them.
    """

    def __init__(self, config: RunConfig, original: Size, samples: Inputs, sources: Sources) -> None:
        self.config, self.samples, self.sources = config, samples, sources
        # What the original's file needs beside its numbers
        self.graph_bytes = original.bytes - FLOAT_BYTES * original.parameters

    def estimate(self, size: Size) -> Size:
        """The size with bytes that are an estimate for the file, packed and in so many bits."""
        if not self.config.packs:
            return replace(size, bytes=self.graph_bytes + FLOAT_BYTES * size.parameters)
        return replace(size, bytes=estimate_bytes(size, self.graph_bytes, self.config.bits))

    def measure(self, model: nn.Module) -> Size:
        """Of a network, its bytes estimated."""
        return self.estimate(measure_size(model, first(self.samples, 2)))

    def write(self, model: nn.Module, sigma: Mapping[str, Tensor]) -> int:
        """Bytes of the file: it is written, checked and thrown away.

        Args:
            sigma: parameter -> standard deviation of each weight; says how few bits will do.
        """
        rounded, codes = copy.deepcopy(model), first_codes(model, self.config.bits, sigma)
        write_rounded_(rounded, codes)
        record = self.sources.record
        spec = replace(self.sources.input, embedded=self.config.embed_preprocessing)
        told = file_properties(spec, record.name, record.classes, 100.0, "validation")
        scratch, storage = Scratch(), Storage(self.config.packs, codes, told)
        return write_onnx(rounded, scratch.folder / "chosen.onnx", self.samples, spec, storage).bytes


@dataclass(frozen=True)
class Candidates:
    """What a fitted network may be cut to.

    Attributes:
        converted: fitted.
        curve: from the whole network down.
        round_to: channel counts are multiples of it.
        prepare: makes a cut network ready to be measured, in place.
        error: of a network on validation, percent.
        files: what they would be written as.
    """

    converted: Converted
    curve: Sequence[CurvePoint]
    round_to: int
    prepare: Callable[[nn.Module], None]
    error: Callable[[nn.Module], float]
    files: FileSize

    def cut(self, threshold: float) -> Slim:
        """The network cut at a threshold of log_alpha."""
        return slim(self.converted, threshold, round_to=self.round_to)


def choose(
    candidates: Candidates, budget: Budget, baseline_error: float
) -> tuple[tuple[CurvePoint, ...], Selection, Slim]:
    """The curve, the point on it that the budget asks for, and the network cut there.

    The curve's bytes are an estimate. Where the chosen point's file is larger than allowed, the
    measured bytes take the estimate's place and the choice is made again.

    Args:
        baseline_error: of the original on validation, percent.
    Raises:
        SlimError: see `select_threshold`.
    """
    points = refine(candidates, budget)
    while True:
        selection = select_threshold(points, budget, candidates.converted.mode, baseline_error)
        slimmed = candidates.cut(selection.threshold)
        bound = selection.limits.get("bytes")
        if bound is None:
            return tuple(points), selection, slimmed
        written = candidates.files.write(slimmed.model, posterior_sigma(candidates.converted, slimmed))
        for place, point in enumerate(points):
            if point.threshold == selection.threshold:
                points[place] = replace(point, size=replace(point.size, bytes=written))
        if written <= bound:
            return tuple(points), selection, slimmed


def refine(candidates: Candidates, budget: Budget) -> list[CurvePoint]:
    """The curve; under limits, with more points between what is too large and what fits."""
    points = list(candidates.curve)
    for _ in range(REFINEMENTS if budget.limits else 0):
        place = next((number for number, point in enumerate(points) if _fits(point.size, budget)), 0)
        if place == 0:  # the whole network fits, or nothing does
            break
        above, below = points[place - 1], points[place]
        start = above.threshold if math.isfinite(above.threshold) else below.threshold + STEP_TO_WHOLE
        threshold = (start + below.threshold) / 2
        model = candidates.cut(threshold).model
        size = candidates.files.measure(model)
        if size in (above.size, below.size):
            break
        candidates.prepare(model)
        points.insert(place, CurvePoint(threshold, candidates.error(model), size))
    return points


def _fits(size: Size, budget: Budget) -> bool:
    return all(getattr(size, key) <= bound for key, bound in budget.limits.items())
