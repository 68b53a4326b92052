"""Numbers as a reader wants them: separators, sensible digits, honest words for a loss."""

from collections.abc import Mapping
from math import floor, log10
from typing import Any

MISSING = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def format_count(value: float | None) -> str:
    """1234567 -> '1,234,567'; None -> '–'."""
    return MISSING if value is None else f"{value:,.0f}"


def format_short(value: float) -> str:
    """For axes: 1500 -> '1.5k', 2000000 -> '2M'."""
    for scale, unit in _UNITS:
        if abs(value) >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"


def format_bytes(value: float | None) -> str:
    """Decimal units, three digits: 1066743 -> '1.07 MB'; None -> '–'."""
    if value is None:
        return MISSING
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= scale:
            return f"{_three_digits(value / scale)} {unit}"
    return f"{value:.0f} B"


def format_ratio(value: float | None) -> str:
    """before / after: 60.21 -> '60.2×', 157.4 -> '157×', 1.04 -> '1.04×'; None -> '–'."""
    if value is None:
        return MISSING
    digits = 0 if value >= 99.95 else 1 if value >= 1.995 else 2
    return f"{value:,.{digits}f}{TIMES}"


def format_change(value: float | None, better: str, worse: str) -> str:
    """before / after in words: 5.5 -> '5.5× smaller', 0.5 -> '2.0× larger', 1.004 -> 'under 1% smaller'."""
    if value is None or value <= 0:
        return MISSING
    if value == 1:
        return "unchanged"
    if 0.995 <= value < 1.005:
        return f"under 1% {better if value > 1 else worse}"
    return f"{format_ratio(value)} {better}" if value > 1 else f"{format_ratio(1 / value)} {worse}"


def format_percent(value: float | None) -> str:
    """A number in percent: 1.336 -> '1.34%'; None -> '–'."""
    return MISSING if value is None else f"{value:.2f}%"


def format_points(before: float | None, after: float | None) -> str:
    """The difference of two percentages: (0.89, 1.34) -> '+0.45 points'; '–' where one is None."""
    if before is None or after is None:
        return MISSING
    # rounded first, so that -0.001 does not become "-0.00"
    difference = round(after - before, 2)
    return "unchanged" if difference == 0 else f"{difference:+.2f} points"


def format_ms(value: float | None) -> str:
    """Milliseconds with three digits: 0.01234 -> '0.0123 ms'; None -> '–'."""
    return MISSING if value is None else f"{_three_digits(value)} ms"


def format_difference(value: float | None) -> str:
    """A small difference: 3.4e-07 -> '3.4e-7', 1e-4 -> '1e-4'; None -> '–'."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def format_threshold(threshold: float | None) -> str:
    """-1.5 -> '−1.5', with a minus sign as long as a plus; None -> 'none'."""
    return "none" if threshold is None else f"{threshold:g}".replace("-", "\N{MINUS SIGN}")


def format_seconds(value: float | None) -> str:
    """A duration: 71.3 -> '1 min 11 s', 5000 -> '1 h 23 min', 3.21 -> '3.2 s'; None -> '–'."""
    if value is None:
        return MISSING
    if value < 59.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _three_digits(value: float) -> str:
    """1.066 -> '1.07', 44.76 -> '44.8', 999.6 -> '1,000', 0.01234 -> '0.0123'."""
    if value == 0:
        return "0"
    return f"{value:,.{max(0, 2 - floor(log10(abs(value))))}f}"


def divide_sizes(before: float | None, after: float | None) -> float | None:
    """before / after, the compression ratio; None where either is missing or nothing is left."""
    return before / after if before is not None and after else None


def describe_objective(stage: Mapping[str, Any]) -> str:
    """What a stage was fitted on, by its name: an entry of the report's `stages`."""
    weighed = "" if stage.get("cost", "none") == "none" else f", KL weighed by {stage['cost']}"
    told = "ELBO" if stage["beta"] == 1 and not weighed else f"tempered ELBO, beta {stage['beta']:g}{weighed}"
    distillation = stage.get("distillation")
    if not distillation:
        return told
    share = "" if distillation["share"] == 1 else f"{100 * distillation['share']:g} % "
    return f"{told}, {share}on the original's outputs at temperature {distillation['temperature']:g}"
