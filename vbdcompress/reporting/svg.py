"""A matplotlib figure as a small inline <svg> element that fits into a page beside others."""

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import floor, log10
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.path import Path

# two charts stand side by side on a desk, one fills a phone with text that can still be read
WIDTH = 440

INK, MUTED, FAINT, GRID = "#1c2733", "#5b6876", "#b4bec8", "#e6eaee"
BEFORE = "#c3ccd5"
BLUE, ORANGE, GREEN = "#0b6cb0", "#c8500a", "#00805f"  # Okabe and Ito's, darkened for white paper

# Any: matplotlib types every key by its name
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the reader's own font
    "svg.hashsalt": "vbdcompress",  # without a salt every run draws other ids
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib; the page's style sheet overrides it
    "font.size": 11,
    "text.color": INK,
    "text.parse_math": False,  # a layer may be called "a$b$"
    "axes.edgecolor": FAINT,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 11,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "path.simplify": True,
}


@contextmanager
def chart_style() -> Iterator[None]:
    """matplotlib's settings for our charts, put back afterwards. Draw and render inside it."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # a user's matplotlibrc must not change the report
        matplotlib.rcParams.update(_STYLE)
        # matplotlib measures with its own font; the browser draws, and has the glyphs
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
        yield


def make_axes(
    height: float,
    *,
    width: float = WIDTH,
    left: float,
    bottom: float,
    top: float,
    right: float = 12,
) -> tuple[Figure, Axes]:
    """A figure with one pair of axes; all lengths in units of the svg (a font of 11 is 11 high)."""
    figure = Figure(figsize=(width / 72, height / 72))
    size = ((width - left - right) / width, (height - bottom - top) / height)
    axes = figure.add_axes((left / width, bottom / height, *size))
    axes.grid(visible=True, axis="y")
    return figure, axes


def add_legend(axes: Axes) -> None:
    """What the colours mean, in one line above the axes."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=4,
        borderaxespad=0.2,
        handlelength=1.4,
        handletextpad=0.5,
        columnspacing=1.4,
    )


def choose_log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers in [low, high], at most `most` of them, for a logarithmic axis."""
    exponents = range(floor(log10(low)), floor(log10(high)) + 1)
    ticks: list[float] = []
    for step, factors in ((1, range(1, 10)), (1, (1, 2, 5)), (1, (1, 3)), (1, (1,)), (2, (1,)), (3, (1,))):
        every = exponents[::step]
        ticks = [factor * 10.0**power for power in every for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= most:
            break
    return ticks


def join_boxes(boxes: Sequence[tuple[float, float, float, float]]) -> Path:
    """All boxes (left, bottom, right, top) as one path: one element in the page, not one for each."""
    vertices = [
        corner for x0, y0, x1, y1 in boxes for corner in ((x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0))
    ]
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(boxes)
    return Path(np.array(vertices, dtype=float).reshape(-1, 2), codes)


def shorten_name(name: str, most: int = 24) -> str:
    """A long dotted name with its middle left out: both ends say where it is."""
    if len(name) <= most:
        return name
    half = (most - 1) // 2
    return f"{name[:half]}…{name[-half:]}"


def render_svg(figure: Figure, key: str, title: str, description: str) -> str:
    """The figure as an <svg> element.

    Args:
        figure: drawn inside `chart_style`.
        key: unique in the page; every id that the figure needs begins with it.
        title: the chart's name, its <title>.
        description: what it shows, for readers that don't see it (aria-label).
    Returns:
        markup; all text in it is escaped.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    root = ET.fromstring(buffer.getvalue())
    _strip(root, key)
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": description,
        "class": "chart",
        "data-chart": key,
    }
    name = ET.Element("title")
    name.text = title
    root.insert(0, name)
    return ET.tostring(root, encoding="unicode")


def _strip(root: ET.Element, key: str) -> None:
    """Remove what a page does not need, and make the ids unique to `key`. In place."""
    parents = [(parent, child) for parent in root.iter() for child in parent]
    for parent, child in parents:
        # matplotlib's <style> is "* {...}", which inline would hold for the whole page
        if child.tag.endswith(("}metadata", "}style")):
            parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        element.tail = None
        if element.text is not None and not element.text.strip():
            element.text = None
    used = set(re.findall(r"#([\w-]+)", " ".join(_references(root))))
    for element in root.iter():
        _rename_ids(element, used, key)
        for name in ("d", "x", "y", "width", "height", "transform"):
            if name in element.attrib:
                element.attrib[name] = _round(element.attrib[name])


def _references(root: ET.Element) -> Iterator[str]:
    for element in root.iter():
        for name in ("href", "clip-path"):
            if name in element.attrib:
                yield element.attrib[name]


def _rename_ids(element: ET.Element, used: set[str], key: str) -> None:
    identity = element.attrib.pop("id", None)
    if identity in used:
        element.attrib["id"] = f"{key}-{identity}"
    for name in ("href", "clip-path"):
        if name in element.attrib:
            element.attrib[name] = element.attrib[name].replace("#", f"#{key}-")


def _round(value: str) -> str:
    """Coordinates to a tenth, and matplotlib's line breaks to spaces: half the bytes, same picture."""
    rounded = re.sub(r"-?\d+\.\d+", lambda match: f"{float(match[0]):.1f}".removesuffix(".0"), value)
    return " ".join(rounded.split())
