"""What came out, as charts: error against size, and the layers before and after.

Each goes from the report's plain JSON to an inline <svg>, "" where there is nothing to draw.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, log10
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from vbdcompress.reporting.axes import (
    BEFORE,
    BLUE,
    INK,
    MUTED,
    ORANGE,
    add_legend,
    chart_style,
    choose_log_ticks,
    make_axes,
    shorten_name,
)
from vbdcompress.reporting.formatting import (
    divide_sizes,
    format_percent,
    format_ratio,
    format_short,
    format_threshold,
)
from vbdcompress.reporting.svg import render_svg

MAX_BARS = 60
SIZE_NAMES = {
    "nonzeros": "nonzero parameters",
    "parameters": "parameters",
    "macs": "MACs of one example",
    "bytes": "bytes of the ONNX file",
}


def choose_curve_field(selection: Mapping[str, Any]) -> str:
    """The size on the curve's axis: what the budget bounds, else the nonzero parameters."""
    bounded = [name for name in SIZE_NAMES if (selection["limits"] or {}).get(name) is not None]
    return bounded[0] if bounded else "nonzeros"


def find_chosen(curve: Sequence[Mapping[str, Any]], selection: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The curve's point at the chosen threshold, else the nearest measured one that removes less."""
    chosen = _as_number(selection["threshold"])
    above = [point for point in curve if _as_number(point["threshold"]) >= chosen]
    return min(above, key=lambda point: _as_number(point["threshold"]), default=None)


def cut_error_axis(curve: Sequence[Mapping[str, Any]], selection: Mapping[str, Any]) -> float:
    """The highest error that the curve's axis shows: errors near chance would flatten the rest."""
    chosen = find_chosen(curve, selection)
    known = [selection["baseline_error"], chosen and chosen["error"]]
    top = max((error for error in known if error is not None), default=0.0)
    highest = max(float(point["error"]) for point in curve)
    return min(highest, max(3 * top, top + 5))


def draw_curve(stage: Mapping[str, Any], original: Mapping[str, Any], key: str) -> str:
    """Validation error against size, the chosen point and the original marked.

    Args:
        stage: an element of the report's "stages".
        original: the report's size before.
        key: unique in the page.
    """
    curve, selection = stage["curve"], stage["selection"]
    field = choose_curve_field(selection)
    # nothing left has no place on a logarithmic axis
    points = sorted((p for p in curve if p["size"][field] > 0), key=lambda p: p["size"][field])
    if not points:
        return ""
    chosen, baseline = find_chosen(points, selection), selection["baseline_error"]
    with chart_style():
        figure, axes = make_axes(292, left=40, bottom=58, top=26)
        if baseline is not None:
            axes.axhline(baseline, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            axes.plot([original[field]], [baseline], "D", color=MUTED, markersize=6, label="original")
        axes.plot(
            [point["size"][field] for point in points],
            [point["error"] for point in points],
            "-o",
            color=BLUE,
            markersize=3.5,
            linewidth=1.8,
            label="by threshold",
        )
        if chosen is not None:
            label = _name_chosen(chosen["threshold"], selection["threshold"])
            x, y = chosen["size"][field], chosen["error"]
            axes.plot([x], [y], "o", color=ORANGE, markersize=10, label=label)
        if (bound := (selection["limits"] or {}).get(field)) is not None:
            axes.axvline(bound, color=ORANGE, linewidth=1, linestyle=(0, (1, 2)))
        _scale_curve(axes, points, original[field], field)
        axes.set_ylim(0, 1.06 * max(cut_error_axis(curve, selection), 0.1))
        axes.set_ylabel("validation error, %")
        add_legend(axes)
        return render_svg(figure, key, "Error against size", _describe_curve(points, chosen, field))


def _scale_curve(axes: Axes, points: Sequence[Mapping[str, Any]], original: float, field: str) -> None:
    sizes = [point["size"][field] for point in points] + [original]
    low, high = min(sizes), max(sizes)
    margin = max((high / low) ** 0.05, 1.05)
    axes.set_xscale("log")
    axes.set_xlim(low / margin, high * margin)
    ticks = choose_log_ticks(low / margin, high * margin)
    axes.set_xticks(ticks, [format_short(tick) for tick in ticks])
    place: Any = {"textcoords": "offset points", "ha": "center", "va": "baseline", "color": MUTED}
    for tick in ticks:
        # a second text, not a second line: matplotlib centres lines by its own font's widths
        ratio = format_ratio(divide_sizes(original, tick))
        axes.annotate(ratio, (tick, 0), xycoords=("data", "axes fraction"), xytext=(0, -26), **place)
    axes.set_xticks([], minor=True)
    axes.set_xlabel(f"{SIZE_NAMES[field]}; how many times fewer", labelpad=18)


def _describe_curve(points: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any] | None, field: str) -> str:
    first, last = points[0], points[-1]
    text = (
        f"Validation error against {SIZE_NAMES[field]}: {format_percent(first['error'])} at "
        f"{first['size'][field]:,} to {format_percent(last['error'])} at {last['size'][field]:,}."
    )
    if chosen is not None:
        text += f" Chosen: {format_percent(chosen['error'])} at {chosen['size'][field]:,}."
    return text


def _name_chosen(measured: float | None, chosen: float | None) -> str:
    name = "nothing removed" if chosen is None else f"threshold {format_threshold(chosen)}"
    return f"chosen ({name}" + (")" if measured == chosen else f"; drawn at {format_threshold(measured)})")


def _as_number(threshold: float | None) -> float:
    """JSON has no infinity: null is the threshold that removes nothing."""
    return inf if threshold is None else threshold


def choose_bars(layers: Sequence[Mapping[str, Any]], field: str) -> list[Mapping[str, Any]]:
    """The layers that a bar chart shows: the MAX_BARS largest, in the network's order."""
    sized = [layer for layer in layers if layer["before"][field]]
    largest = sorted(sized, key=lambda layer: -layer["before"][field])[:MAX_BARS]
    names = {id(layer) for layer in largest}
    return [layer for layer in sized if id(layer) in names]


def draw_bars(layers: Sequence[Mapping[str, Any]], field: str, key: str) -> str:
    """A bar for each layer, before and after, on a logarithmic scale.

    Args:
        layers: the report's "layers".
        field: "nonzeros" or "macs".
        key: unique in the page.
    """
    shown = choose_bars(layers, field)
    if not shown:
        return ""
    before = [layer["before"][field] for layer in shown]
    after = [(layer["after"] or {}).get(field) or 0 for layer in shown]
    what = SIZE_NAMES[field]
    description = f"{what} of {len(shown)} layers, before and after; numbers in the table."
    rows = _Rows([shorten_name(layer["name"]) for layer in shown], before, after, ("before", "after"))
    return _draw_rows(rows, what, key, f"{what} by layer".capitalize(), description)


def draw_latency(latency: Sequence[Mapping[str, Any]], key: str) -> str:
    """A bar for each batch size, original and slim, on a logarithmic scale.

    Args:
        latency: the report's "latency".
        key: unique in the page.
    """
    if not latency:
        return ""
    names = [f"batch {row['batch']}" for row in latency]
    original, slim = ([row[name] for row in latency] for name in ("original_ms", "slim_ms"))
    description = "Median milliseconds of one call, original and slim; numbers in the table."
    rows = _Rows(names, original, slim, ("original", "slim"))
    return _draw_rows(rows, "milliseconds of one call", key, "Latency by batch size", description)


@dataclass(frozen=True)
class _Rows:
    """A pair of bars in each row: names of the rows, values, and what the two are called."""

    names: Sequence[str]
    before: Sequence[float]
    after: Sequence[float]
    labels: tuple[str, str]


def _draw_rows(rows: _Rows, label: str, key: str, title: str, description: str) -> str:
    low = min(value for value in (*rows.before, *rows.after) if value > 0)
    left, right, count = 10 ** (log10(low) - 0.25), 1.05 * max((*rows.before, *rows.after)), len(rows.names)
    with chart_style():
        step = 19
        margin = 14 + 5.6 * max(len(name) for name in rows.names)
        figure, axes = make_axes(step * count + 66, left=margin, bottom=40, top=26, right=44)
        axes.set_xscale("log")
        axes.set_xlim(left, right)
        axes.set_ylim(count - 0.4, -0.6)
        axes.add_patch(_make_bars(rows.before, left, 0.76, facecolor=BEFORE, label=rows.labels[0]))
        axes.add_patch(_make_bars(rows.after, left, 0.42, facecolor=BLUE, label=rows.labels[1]))
        for row, (old, new) in enumerate(zip(rows.before, rows.after, strict=True)):
            text = format_ratio(old / new) if new else "gone"
            axes.text(1.015, row, text, transform=axes.get_yaxis_transform(), va="center", fontsize=10)
        ticks = choose_log_ticks(left, right, most=5)
        axes.set_xticks(ticks, [format_short(tick) for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_yticks(range(count), rows.names, color=INK, fontsize=10)
        axes.grid(visible=True, axis="x")
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(label)
        add_legend(axes)
        return render_svg(figure, key, title, description)


def _join_boxes(boxes: Sequence[tuple[float, float, float, float]]) -> Path:
    """All boxes (left, bottom, right, top) as one path: one element in the page, not one for each."""
    vertices = [
        corner for x0, y0, x1, y1 in boxes for corner in ((x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0))
    ]
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(boxes)
    return Path(np.array(vertices, dtype=float).reshape(-1, 2), codes)


def _make_bars(values: Sequence[float], left: float, thickness: float, **style: Any) -> PathPatch:
    half = thickness / 2
    boxes = [(left, row - half, value, row + half) for row, value in enumerate(values) if value > 0]
    return PathPatch(_join_boxes(boxes), linewidth=0, **style)
