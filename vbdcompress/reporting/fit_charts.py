"""What the fit did, as charts: histograms of log_alpha, and the training curves.

Each goes from the report's plain JSON to an inline <svg>, "" where there is nothing to draw.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import nan
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from vbdcompress.reporting.axes import (
    BEFORE,
    BLUE,
    FAINT,
    GREEN,
    MUTED,
    ORANGE,
    add_legend,
    chart_style,
    choose_log_ticks,
    make_axes,
)
from vbdcompress.reporting.formatting import TIMES, format_percent, format_short
from vbdcompress.reporting.svg import render_svg

MAX_HISTOGRAMS = 16
HEADROOM = 1.15  # above the curves, for the stages' names


def choose_histograms(layers: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The layers whose histograms are shown: the MAX_HISTOGRAMS with most values, in order."""
    largest = sorted(layers, key=lambda layer: -sum(layer["counts"]))[:MAX_HISTOGRAMS]
    names = {id(layer) for layer in largest}
    return [layer for layer in layers if id(layer) in names]


def draw_histogram(
    edges: Sequence[float], counts: Sequence[int], threshold: float | None, name: str, key: str
) -> str:
    """How many values of log_alpha lie where, on a logarithmic scale, split at the threshold.

    Args:
        edges: of the bins, one more than counts.
        counts: in each bin.
        threshold: values from here on are removed; None removes nothing.
        name: of the layer.
        key: unique in the page.
    """
    if not sum(counts):
        return ""
    limit = edges[-1] + 1 if threshold is None else threshold
    with chart_style():
        figure, axes = make_axes(112, width=220, left=34, bottom=20, top=8, right=8)
        axes.set_yscale("log")
        axes.set_ylim(0.7, 1.6 * max(counts))
        axes.set_xlim(edges[0], edges[-1])
        is_removed = [(low + high) / 2 >= limit for low, high in pairwise(edges)]
        for color, wanted in ((BLUE, False), (BEFORE, True)):
            heights = [n if gone is wanted else 0 for n, gone in zip(counts, is_removed, strict=True)]
            # 0.1 stands for none: below the axis, which a logarithm of 0 is not
            axes.stairs([n or 0.1 for n in heights], edges, baseline=0.1, fill=True, color=color, linewidth=0)
        if threshold is not None:
            axes.axvline(threshold, color=ORANGE, linewidth=1.4)
        axes.set_xticks(*_histogram_ticks(edges))
        ticks = choose_log_ticks(1, max(counts), most=3)
        axes.set_yticks(ticks, [format_short(tick) for tick in ticks])
        axes.set_yticks([], minor=True)
        axes.grid(visible=True, axis="y")
        axes.tick_params(labelsize=10, pad=3)
        description = f"log_alpha of {name}: {sum(counts):,} values from {edges[0]:g} to {edges[-1]:g}."
        return render_svg(figure, key, f"log_alpha of {name}", description)


def _histogram_ticks(edges: Sequence[float]) -> tuple[list[float], list[str]]:
    step = 5 if edges[-1] - edges[0] > 12 else 2
    ticks = [float(x) for x in range(-100, 101, step) if edges[0] <= x <= edges[-1]]
    return ticks, [f"{x:g}".replace("-", "\N{MINUS SIGN}") for x in ticks]


Segments = Sequence[tuple[str, Sequence[Mapping[str, Any]]]]


def draw_objective(segments: Segments, key: str) -> str:
    """NLL and beta * KL over the epochs, nats for each example.

    Args:
        segments: (name, epoch rows) of each stage and of the fine-tuning, in order.
        key: unique in the page.
    """
    rows = [row for _, part in segments for row in part]
    if not rows:
        return ""
    series = {
        "NLL": (BLUE, [row["nll"] for row in rows]),
        f"beta {TIMES} KL": (ORANGE, [row["beta"] * row["kl"] for row in rows]),
    }
    positive = [value for _, values in series.values() for value in values if value > 0]
    is_log = bool(positive) and max(positive) > 30 * min(positive)
    with chart_style():
        figure, axes = make_axes(250, left=46, bottom=42, top=26)
        for name, (color, values) in series.items():
            # a logarithmic axis has no zero: beta is 0 in a warm-up's first epoch, KL in fine-tuning
            shown = [value if value > 0 or not is_log else nan for value in values]
            _plot_epochs(axes, segments, shown, color=color, label=name)
        if is_log:
            _scale_log(axes, min(positive), max(positive))
        else:
            axes.set_ylim(
                1.05 * min(0.0, *(row["nll"] for row in rows)), HEADROOM * max(positive, default=1.0)
            )
        axes.set_ylabel("nats for each example")
        _finish_epochs(axes, segments)
        description = f"NLL and beta times KL over {len(rows)} epochs; last NLL {rows[-1]['nll']:.3g} nats."
        return render_svg(figure, key, "Training objective", description)


def draw_error(segments: Segments, baseline: float | None, key: str) -> str:
    """Validation error over the epochs, with the original's.

    Args:
        segments: as for `draw_objective`.
        baseline: the original's validation error in percent.
        key: unique in the page.
    """
    rows = [row for _, part in segments for row in part]
    errors = [nan if row["error"] is None else row["error"] for row in rows]
    known = sorted(row["error"] for row in rows if row["error"] is not None)
    if not known:
        return ""
    with chart_style():
        figure, axes = make_axes(250, left=46, bottom=42, top=26)
        if baseline is not None:
            axes.axhline(baseline, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="original")
        _plot_epochs(axes, segments, errors, color=GREEN, label="in training")
        axes.set_ylim(0, HEADROOM * max(known[-1], baseline or 0.0, 0.1))
        axes.set_ylabel("validation error, %")
        _finish_epochs(axes, segments)
        description = f"Validation error over {len(rows)} epochs, from {format_percent(errors[0])} to " + (
            f"{format_percent(errors[-1])}; lowest {format_percent(known[0])}."
        )
        return render_svg(figure, key, "Validation error", description)


def _plot_epochs(axes: Axes, segments: Segments, values: Sequence[float], *, color: str, label: str) -> None:
    """One line for each stage, not joined: between two stages the network changes."""
    start = 0
    for place, (_, part) in enumerate(segments):
        end = start + len(part)
        # a line through one epoch can't be seen
        form = "-o" if len(part) < 3 else "-"
        name = label if place == 0 else None
        axes.plot(range(start + 1, end + 1), values[start:end], form, color=color, linewidth=1.8, label=name)
        start = end


def _scale_log(axes: Axes, low: float, high: float) -> None:
    axes.set_yscale("log")
    axes.set_ylim(low / 1.3, high * (high / low) ** 0.15)
    ticks = choose_log_ticks(low / 1.3, high * 1.3)
    axes.set_yticks(ticks, [format_short(tick) for tick in ticks])
    axes.set_yticks([], minor=True)


def _finish_epochs(axes: Axes, segments: Segments) -> None:
    """The axis of epochs, the stages divided and named."""
    total = sum(len(part) for _, part in segments)
    axes.set_xlim(0.5, max(total, 2) + 0.5)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    add_legend(axes)
    if len(segments) > 1:
        _name_segments(axes, segments, total)


def _name_segments(axes: Axes, segments: Segments, total: int) -> None:
    place: Any = {"transform": axes.get_xaxis_transform(), "va": "top", "fontsize": 10}
    start = 0.5
    for number, (name, part) in enumerate(segments):
        if number:
            axes.axvline(start, ymax=0.91, color=FAINT, linewidth=1)
        if number == len(segments) - 1 and len(part) < 0.2 * total:
            axes.text(total + 0.5, 0.995, name, ha="right", **place)  # too short to hold its name
        else:
            axes.text(start + 0.01 * total, 0.995, name, **place)
        start += len(part)
