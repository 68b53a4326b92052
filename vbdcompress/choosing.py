"""choose: the network that a budget asks for, where bytes count those of the file that will be written."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vbdcompress.budget import Budget, select_threshold
from vbdcompress.config import RunConfig
from vbdcompress.conversion import Converted
from vbdcompress.count import FLOAT_BYTES, measure_size, unused_parameters
from vbdcompress.exporting.export import file_properties, write_onnx
from vbdcompress.exporting.packing import Storage, estimate_bytes
from vbdcompress.files import Scratch
from vbdcompress.inputs import Inputs, first
from vbdcompress.precision import first_codes
from vbdcompress.records import CurvePoint, Selection, Size
from vbdcompress.rounding import Rounded, roundable, write_rounded_
from vbdcompress.slimming import Slim, posterior_sigma, slim
from vbdcompress.sources import Sources
from vbdcompress.vbd.posterior import find_posteriors

# Networks that are tried next to a limit, each time that more is known of what files weigh
REFINEMENTS = 6
# Files after which that is known well
WELL_KNOWN = 4
# Fine-tuning moves weights between codes, and so a file's bytes
MOVED = 1.01
# Of the largest weight along the first dimension: what 8 bits don't round to 0
SMALLEST = 0.01
# Above the largest threshold of the curve, where the network is still whole
STEP_TO_WHOLE = 4.0


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
    while True:
        if len(written) < WELL_KNOWN:
            curve = refine(candidates, curve, budget, written)
        points = _corrected(curve, written)
        if "bytes" in budget.limits and not written and not any(_fits(one.size, budget) for one in points):
            written[points[-1].threshold] = _write(candidates, candidates.cut(points[-1].threshold))
            continue
        selection = select_threshold(points, budget, candidates.converted.mode, baseline_error)
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
    low = points[place].threshold if place < len(points) else _smallest_log_alpha(candidates.converted)
    high = points[place - 1].threshold
    high = high if math.isfinite(high) else low + STEP_TO_WHOLE
    if low >= high:
        return refined
    for _ in range(REFINEMENTS):
        middle = (low + high) / 2
        model = candidates.cut(middle).model
        size = candidates.files.measure(model)
        if all(size != point.size for point in refined):
            candidates.prepare(model)
            refined.append(CurvePoint(middle, candidates.error(model), size))
        if _fits(_times(size, ratio), budget):
            low = middle
        else:
            high = middle
    return sorted(refined, key=lambda point: -point.threshold)


def _smallest_log_alpha(converted: Converted) -> float:
    """Where a threshold takes all that has a posterior."""
    return min(float(each.log_alpha().detach().min()) for each in find_posteriors(converted.model))


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
