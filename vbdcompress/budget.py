"""How much goes: the point on a curve that a budget asks for."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

from vbdcompress.config import RunConfig
from vbdcompress.errors import SlimError
from vbdcompress.records import TIE, CurvePoint, Selection, Size
from vbdcompress.reporting.build import StageRecord
from vbdcompress.slimming import DEFAULT_THRESHOLD, or_default

_SIZE_ADVICE = "Raise the limit, fit with a larger --beta, or use --mode channels for MACs."
LIMIT_NAMES = {"nonzeros": "parameters that are not zero", "macs": "MACs", "bytes": "bytes"}

# Points of validation error before fine-tuning, which makes good for less
MUCH_WORSE = 2.0


@dataclass(frozen=True)
class Budget:
    """What the choice of a threshold must keep to.

    Attributes:
        threshold: asked for outright; then the rest is empty.
        max_error_increase: points of validation error above the original's.
        limits: largest value of a field of `Size`.
        source: who chose the threshold.
        part: what the error allowed is of what the user allows, for messages.
    """

    threshold: float | None = None
    max_error_increase: float | None = None
    limits: Mapping[str, int] = field(default_factory=dict)
    source: str = "asked for"
    part: str = ""


def parse_limit(text: str | int, total: int) -> int:
    """A limit as an absolute number or as a share of the original: "10%" of total."""
    share = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", str(text))
    # Decimal: as floats 29 % of 100 are 28.999...
    return int(Decimal(share[1]) * total / 100) if share else int(text)


def make_budget(config: RunConfig, original: Size) -> Budget:
    """The configuration's budget with shares such as "10%" resolved against the original."""
    limits = {key: parse_limit(value, getattr(original, key)) for key, value in config.limits.items()}
    return Budget(config.threshold, config.max_error_increase, limits)


def round_budget(config: RunConfig, number: int, original: Size) -> Budget:
    """What the round of that number, from 0, must keep to; the last one to the whole budget.

    An earlier round keeps to its own threshold; without one to the MACs, and to half of the error budget: the
    other half is left to the last round, which also answers for parameters and bytes.
    """
    part = config.rounds[number]
    budget = make_budget(part, original)
    if number + 1 == len(config.rounds):
        return budget
    if part.threshold is not None:
        asked = part.threshold in (config.first.threshold, config.threshold)
        return Budget(part.threshold, source="asked for" if asked else "a first round's default")
    if not part.has_budget:
        return budget
    half = None if budget.max_error_increase is None else budget.max_error_increase / 2
    limits = {key: bound for key, bound in budget.limits.items() if key == "macs"}
    return Budget(None, half, limits, part=", the first round's half,")


def select_threshold(
    curve: Sequence[CurvePoint], budget: Budget, mode: str, baseline_error: float
) -> Selection:
    """The point on the curve that a budget asks for.

    Within all size limits: with an error budget, the smallest network that keeps it; without,
    the one with the lowest validation error (of equals the largest). With neither, the threshold
    asked for, or the default.

    Args:
        curve: from `measure_curve`.
        baseline_error: of the original on validation, percent.
    Raises:
        SlimError: no point keeps the budget; says how close the curve comes.
    """
    limits, increase = dict(budget.limits), budget.max_error_increase
    if not limits and increase is None:
        chosen = or_default(budget.threshold)
        where = budget.source if budget.threshold is not None else "the default"
        return Selection("threshold", chosen, baseline_error, {}, f"log_alpha >= {chosen:g}, {where}")
    fitting = [p for p in curve if all(getattr(p.size, key) <= bound for key, bound in limits.items())]
    if not fitting:
        raise SlimError("budget", _nearest_size(curve, limits), _SIZE_ADVICE)
    told = " and ".join(f"{LIMIT_NAMES[key]} <= {bound:,}" for key, bound in limits.items())
    if increase is None:
        best = min(fitting, key=lambda p: (p.error, -p.size.nonzeros))
        return Selection(
            "budget",
            best.threshold,
            baseline_error,
            limits,
            f"lowest validation error, and of equals the largest network, with {told}",
        )
    allowed = [p for p in fitting if p.error <= baseline_error + increase + TIE]
    if not allowed:
        nearest = min(p.error for p in fitting)
        raise SlimError(
            "budget",
            f"no threshold keeps validation error within {increase:g} points{budget.part} of "
            f"{baseline_error:.2f} %; the best within the limits has {nearest:.2f} %.",
            "Raise --max-error-increase (`run --resume` keeps the fit), fit longer or with a smaller --beta.",
        )
    best = min(allowed, key=lambda p: (p.size.macs if mode == "channels" else 0, p.size.nonzeros))
    told = f"{told} and " if told else ""
    told += f"validation error at most {increase:g} points above {baseline_error:.2f} %"
    return Selection("budget", best.threshold, baseline_error, limits, f"smallest network with {told}")


def warn_of_undecided(stage: StageRecord, config: RunConfig, number: int) -> list[str]:
    """A warning where limits took what was no noise yet, and the network was much worse for it.

    Args:
        number: of the round, from 0.
    """
    if not stage.selection.limits or config.max_error_increase is not None:  # that much error was allowed
        return []
    chosen = next(point for point in stage.curve if point.threshold == stage.selection.threshold)
    noise = [point for point in stage.curve if point.threshold >= DEFAULT_THRESHOLD][-1]
    if not chosen.error > noise.error + MUCH_WORSE or chosen.threshold >= noise.threshold:
        return []
    own = number + 1 < len(config.rounds) and config.first.beta is not None
    whole = "whole" if math.isinf(noise.threshold) else f"where it is cut at {noise.threshold:g}"
    told = f" in round {number + 1}" if len(config.rounds) > 1 else ""
    return [
        f"The limits took what was no noise yet{told}: cut at a log_alpha of {chosen.threshold:g}, the "
        f"network had {chosen.error:.2f} % validation error before fine-tuning, {noise.error:.2f} % {whole}. "
        f"Fit with a larger {'first.beta' if own else '--beta'} than {stage.beta:g}, or longer, or allow it "
        "more."
    ]


def _nearest_size(curve: Sequence[CurvePoint], limits: Mapping[str, int]) -> str:
    """How close the curve comes to limits that none of its points keeps."""
    nearest = min(curve, key=lambda p: max(getattr(p.size, key) / max(1, b) for key, b in limits.items()))
    found = ", ".join(
        f"{LIMIT_NAMES[key]} {'about ' if key == 'bytes' else ''}{getattr(nearest.size, key):,} "
        f"(limit {bound:,})"
        for key, bound in limits.items()
    )
    return f"no threshold keeps it; the nearest on the curve has {found}, at {nearest.error:.2f} % error."
