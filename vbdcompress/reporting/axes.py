"""What all charts share: matplotlib's settings, the palette, axes, ticks, the legend."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import floor, log10
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    tenths: list[Sequence[float]] = [[n / 10 for n in range(10, 100, step)] for step in (1, 5, 10)]
    grids = [(1, grid) for grid in (*tenths, (1, 2, 5), (1, 3))] + [(step, (1,)) for step in range(1, 7)]
    for step, factors in grids:
        ticks = [factor * 10.0**power for power in exponents[::step] for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= most:
            break
    return ticks


def shorten_name(name: str, most: int = 24) -> str:
    """A long dotted name with its middle left out: both ends say where it is."""
    if len(name) <= most:
        return name
    half = (most - 1) // 2
    return f"{name[:half]}…{name[-half:]}"
