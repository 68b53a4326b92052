"""choose: the network that a budget asks for, where bytes count those of the file that will be written."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from vbdcompress.budget import LIMIT_NAMES, Budget, select_threshold
from vbdcompress.config import RunConfig
from vbdcompress.conversion import Converted
from vbdcompress.count import FLOAT_BYTES, measure_size, unused_parameters
from vbdcompress.errors import SlimError
from vbdcompress.exporting.export import file_properties, write_onnx
from vbdcompress.exporting.packing import Storage, estimate_bytes
from vbdcompress.files import Scratch
from vbdcompress.inputs import Inputs, first
from vbdcompress.precision import first_codes
from vbdcompress.records import TIE, CurvePoint, Selection, Size
from vbdcompress.rounding import Rounded, roundable, write_rounded_
from vbdcompress.slimming import Slim, posterior_sigma, slim
from vbdcompress.sources import Sources
from vbdcompress.thresholds import Thresholds

# Of a limit: a network so large need not grow
FILLED = 0.95
# Files after which their weight is known well, and the most that are written
WELL_KNOWN, MOST_FILES = 4, 16
# Fine-tuning moves weights between codes, and so a file's bytes
MOVED = 1.01
# Of the largest weight along the first dimension: what 8 bits don't round to 0
SMALLEST = 0.01


class FileSize:
    """Bytes of the ONNX file that a run writes, as an estimate or of a file written to see.

    Args:
        config: how weights are stored.
        original: the network that came in.
        file_bytes: of its dense file.
        samples: [n, ...] of each input.
        sources: what the file says of itself comes from them.
        others: inputs of other shapes, which the file takes as well.
    """

    def __init__(
        self,
        config: RunConfig,
        original: nn.Module,
        file_bytes: int,
        samples: Inputs,
        sources: Sources,
        others: Sequence[Inputs] = (),
    ) -> None:
        self.config, self.samples, self.sources, self.others = config, samples, sources, others
        self.unused = unused_parameters(original, first(samples, 2))
        # What the original's file needs beside its numbers; less than nothing where norms are folded
        self.graph_bytes = max(0, file_bytes - FLOAT_BYTES * self._count_used(original))

    def measure(self, model: nn.Module) -> Size:
        """Of a network; its bytes are an estimate for the file, packed or not, in so many bits."""
        size = measure_size(model, first(self.samples, 2))
        dense = FLOAT_BYTES * self._count_used(model)
        packed = estimate_bytes(model, self.config.bits, self.unused) if self.config.packs else dense
        return replace(size, bytes=self.graph_bytes + packed)

    def _count_used(self, model: nn.Module) -> int:
        return sum(each.numel() for name, each in model.named_parameters() if name not in self.unused)

    def write(self, model: nn.Module, codes: Mapping[str, Rounded]) -> int:
        """Bytes of the file: it is written, checked and thrown away.

        Args:
            codes: parameter -> how its weights are stored; others as they are.
        """
        rounded = copy.deepcopy(model)
        write_rounded_(rounded, codes)
        record = self.sources.record
        spec = self.sources.input
        known = (record.name, record.classes, record.split, (100.0, "validation"))
        told = file_properties(spec, self.samples, *known)
        scratch, storage = Scratch(), Storage(self.config.packs, codes, told)
        return write_onnx(
            rounded, scratch.folder / "chosen.onnx", self.samples, spec, storage, self.others
        ).bytes


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
        known: threshold -> size, of those that were cut already.
    """

    converted: Converted
    curve: Sequence[CurvePoint]
    round_to: int
    prepare: Callable[[nn.Module], None]
    error: Callable[[nn.Module], float]
    files: FileSize
    known: dict[float, Size] = field(default_factory=dict)

    def cut(self, threshold: float) -> Slim:
        """The network cut at a threshold of log_alpha."""
        return slim(self.converted, threshold, round_to=self.round_to)


def check_limits(converted: Converted, files: FileSize, budget: Budget, round_to: int) -> None:
    """Raise SlimError where no fit could keep the limits: not even what is left where all goes that can."""
    limits = {key: bound for key, bound in budget.limits.items() if key != "bytes"}
    if not limits:
        return
    size = files.measure(slim(converted, -math.inf, round_to=round_to).model)
    if _fits(size, replace(budget, limits=limits)):
        return
    found = ", ".join(f"{LIMIT_NAMES[key]} {getattr(size, key):,} (limit {limits[key]:,})" for key in limits)
    advice = "Raise the limit" + (f", or ask for less than round_to = {round_to}." if round_to > 1 else ".")
    raise SlimError("budget", f"no cut keeps it: where all goes that can, the network has {found}.", advice)


def choose(
    candidates: Candidates, budget: Budget, baseline_error: float
) -> tuple[tuple[CurvePoint, ...], Selection]:
    """The curve, and the point on it that the budget asks for.

    The curve's bytes are estimates. Where they are bounded, the file of the chosen point is written: its
    bytes take the estimate's place and correct those of the other points, and the choice is made again,
    until it falls on a point whose file was seen to fit.

    Args:
        baseline_error: of the original on validation, percent.
    Raises:
        SlimError: see `select_threshold`.
    """
    curve, written = list(candidates.curve), dict[float, int]()
    candidates = replace(candidates, known={point.threshold: point.size for point in curve})
    while True:
        points = _corrected(curve, written)
        if len(written) < WELL_KNOWN or not _is_filled(points, budget):
            curve = refine(candidates, curve, budget, written)
            points = _corrected(curve, written)
        last = points[-1].threshold
        if "bytes" in budget.limits and not _any_fits(points, budget) and last not in written:
            written[last] = _write(candidates, candidates.cut(last))
            continue
        if budget.max_error_increase is not None:
            curve = refine_error(candidates, curve, budget, written, baseline_error)
            points = _corrected(curve, written)
        tried = [point for point in points if len(written) < MOST_FILES or point.threshold in written]
        selection = select_threshold(tried, budget, candidates.converted.mode, baseline_error)
        if "bytes" not in budget.limits or selection.threshold in written:
            return tuple(points), selection
        written[selection.threshold] = _write(candidates, candidates.cut(selection.threshold))


def refine(
    candidates: Candidates, curve: Sequence[CurvePoint], budget: Budget, written: Mapping[float, int]
) -> list[CurvePoint]:
    """The curve; under limits, with more points between what is too large and what fits.

    Where nothing on the curve fits, they go on below it, down to the smallest log_alpha.

    Args:
        written: threshold -> bytes, of the points whose file was written.
    """
    refined, points = list(curve), _corrected(curve, written)
    place = next((number for number, point in enumerate(points) if _fits(point.size, budget)), len(points))
    if not budget.limits or place == 0:  # the whole network fits
        return refined
    known = min(place, len(points) - 1)
    ratio = points[known].size.bytes / max(1, refined[known].size.bytes)
    low = points[place].threshold if place < len(points) else -math.inf
    between = Thresholds(candidates.converted, low, points[place - 1].threshold)
    middle = between.middle() if place < len(points) else between.smallest()
    while middle is not None:
        size = _add(refined, candidates, middle).size
        if _fits(_times(size, ratio), budget):
            between.raise_to(middle)
            if _fills(_times(size, ratio), budget):
                break
        else:
            between.lower_to(middle)
        middle = between.middle()
    return sorted(refined, key=lambda point: -point.threshold)


def refine_error(
    candidates: Candidates,
    curve: Sequence[CurvePoint],
    budget: Budget,
    written: Mapping[float, int],
    baseline_error: float,
) -> list[CurvePoint]:
    """The curve with more points between the smallest network that keeps the error budget and the next."""
    refined, points = list(curve), _corrected(curve, written)
    assert budget.max_error_increase is not None
    allowed = baseline_error + budget.max_error_increase + TIE
    kept = [number for number, point in enumerate(points) if point.error <= allowed]
    if not kept or kept[-1] + 1 == len(points):
        return refined
    between = Thresholds(candidates.converted, points[kept[-1] + 1].threshold, points[kept[-1]].threshold)
    while (middle := between.middle()) is not None:
        point = _add(refined, candidates, middle)
        if point.error <= allowed:
            between.lower_to(middle)
        else:
            between.raise_to(middle)
    return sorted(refined, key=lambda point: -point.threshold)


def _add(curve: list[CurvePoint], candidates: Candidates, threshold: float) -> CurvePoint:
    """The point at a threshold, cut and measured unless that was done, on the curve from now on."""
    model = None
    if threshold not in candidates.known:
        model = candidates.cut(threshold).model
        candidates.known[threshold] = candidates.files.measure(model)
    size = candidates.known[threshold]
    found = next((point for point in curve if point.size == size), None)
    if found is None:
        model = candidates.cut(threshold).model if model is None else model
        candidates.prepare(model)
        found = CurvePoint(threshold, candidates.error(model), size)
        curve.append(found)
    return found


def _write(candidates: Candidates, slimmed: Slim) -> int:
    config = candidates.files.config
    model = copy.deepcopy(slimmed.model)
    for weight in roundable(model).values():
        _grow_(weight.tensor)
    codes = first_codes(model, config.bits, posterior_sigma(candidates.converted, slimmed))
    bytes_now = candidates.files.write(model, codes)
    return bytes_now if config.bits == "32" else round(MOVED * bytes_now)


@torch.no_grad()
def _grow_(weight: Tensor) -> None:
    """Let no weight but a zero be so small that rounding makes it one: fine-tuning may not leave it there."""
    least = SMALLEST * weight.abs().amax(tuple(range(1, weight.dim())), keepdim=True)
    weight.copy_(torch.where(weight == 0, weight, weight.sign() * weight.abs().maximum(least)))


def _corrected(curve: Sequence[CurvePoint], written: Mapping[float, int]) -> list[CurvePoint]:
    """Each point with the bytes of its file, or with its estimate times the nearest file's error."""
    known = [place for place, point in enumerate(curve) if point.threshold in written]
    if not known:
        return list(curve)
    points = []
    for place, point in enumerate(curve):
        nearest = curve[min(known, key=lambda other, place=place: abs(other - place))]  # type: ignore[misc]
        ratio = written[nearest.threshold] / max(1, nearest.size.bytes)
        points.append(replace(point, size=_times(point.size, ratio)))
    return points


def _times(size: Size, ratio: float) -> Size:
    return replace(size, bytes=round(ratio * size.bytes))


def _fits(size: Size, budget: Budget) -> bool:
    return all(getattr(size, key) <= bound for key, bound in budget.limits.items())


def _fills(size: Size, budget: Budget) -> bool:
    """Whether it comes near a limit."""
    return any(getattr(size, key) >= FILLED * bound for key, bound in budget.limits.items())


def _is_filled(points: Sequence[CurvePoint], budget: Budget) -> bool:
    """Whether a network fits and comes near a limit, so that no other need be looked for."""
    return any(_fits(point.size, budget) and _fills(point.size, budget) for point in points)


def _any_fits(points: Sequence[CurvePoint], budget: Budget) -> bool:
    return any(_fits(point.size, budget) for point in points)
