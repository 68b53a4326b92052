"""The charts' geometry, read back from the SVG: does a mark stand where its number says?"""

import re
import xml.etree.ElementTree as ET
from math import log10

import pytest

from vbdcompress.reporting.axes import BEFORE, BLUE, MUTED, ORANGE, choose_log_ticks, shorten_name
from vbdcompress.reporting.charts import (
    choose_curve_field,
    cut_error_axis,
    draw_bars,
    draw_curve,
    find_chosen,
)
from vbdcompress.reporting.fit_charts import draw_error, draw_histogram, draw_objective


def paths(svg, color, kind="fill"):
    """The corners of each path drawn in a colour inside the axes; the legend's are not clipped."""
    found = [
        element.attrib["d"]
        for element in ET.fromstring(svg).iter("path")
        if "clip-path" in element.attrib and f"{kind}: {color}" in element.attrib["style"]
    ]
    return [[tuple(map(float, pair)) for pair in re.findall(r"(-?[\d.]+) (-?[\d.]+)", d)] for d in found]


def marks(svg, color):
    """Where the markers of a colour stand inside the axes."""
    return [
        (float(mark.attrib["x"]), float(mark.attrib["y"]))
        for group in ET.fromstring(svg).iter("g")
        if "clip-path" in group.attrib
        for mark in group.iter("use")
        if f"fill: {color}" in mark.attrib["style"]
    ]


def texts(svg):
    return [element.text for element in ET.fromstring(svg).iter("text")]


def layer(name, before, after):
    return {"name": name, "before": {"nonzeros": before}, "after": {"nonzeros": after}}


def test_draw_bars_lengths_are_logarithms():
    svg = draw_bars([layer("a", 10, 1), layer("b", 1000, 10), layer("c", 10_000, 0)], "nonzeros", "k")
    (before,), (after,) = paths(svg, BEFORE)[:1], paths(svg, BLUE)[:1]
    right = sorted({x for x, _ in before} - {min(x for x, _ in before)})
    assert len(right) == 3
    decade = right[2] - right[1]
    assert right[1] - right[0] == pytest.approx(2 * decade, abs=0.3)
    # two bars: nothing is left of c
    assert sorted({x for x, _ in after})[1:] == pytest.approx([right[0] - decade, right[0]], abs=0.2)
    assert [
        text
        for text in texts(svg)
        if text in {"10.0\N{MULTIPLICATION SIGN}", "100\N{MULTIPLICATION SIGN}", "gone"}
    ] == ["10.0\N{MULTIPLICATION SIGN}", "100\N{MULTIPLICATION SIGN}", "gone"]


def test_draw_curve_marks_the_chosen_point_and_the_original(report):
    """Two points give the scale of each axis; the other marks must lie on it."""
    stage, before = report["stages"][0], report["size"]["before"]
    points = sorted(stage["curve"], key=lambda point: point["size"]["nonzeros"])
    svg = draw_curve(stage, before, "k")
    along, chosen, original = marks(svg, BLUE), marks(svg, ORANGE), marks(svg, MUTED)
    last, first = (points[-1], along[-1]), (points[-4], along[-4])

    def expect(nonzeros, error):
        scale = [
            (last[1][axis] - first[1][axis]) / (values[0] - values[1])
            for axis, values in enumerate(
                zip(*((log10(p["size"]["nonzeros"]), p["error"]) for p, _ in (last, first)), strict=True)
            )
        ]
        x = last[1][0] + scale[0] * (log10(nonzeros) - log10(last[0]["size"]["nonzeros"]))
        return pytest.approx((x, last[1][1] + scale[1] * (error - last[0]["error"])), abs=2.5)

    (picked,) = [point for point in points if point["threshold"] == 3.0]
    assert [expect(picked["size"]["nonzeros"], picked["error"])] == chosen
    assert [expect(before["nonzeros"], 0.74)] == original
    assert chosen[0] in along


def test_draw_histogram_splits_at_the_threshold():
    edges = [-4.0, -2.0, 0.0, 2.0, 4.0]
    svg = draw_histogram(edges, [5, 10, 20, 40], 2.0, "w", "k")
    (kept,), (gone,) = paths(svg, BLUE), paths(svg, BEFORE)
    (line,) = paths(svg, ORANGE, "stroke")
    heights = {x: min(y for x_, y in kept if x_ == x) for x, _ in kept}
    tallest = min(heights.values())
    assert max(x for x, y in kept if y == tallest) == pytest.approx(line[0][0], abs=0.2)
    assert min(x for x, y in gone if y < line[0][1] - 1) == pytest.approx(line[0][0], abs=0.2)


def test_draw_histogram_without_threshold_keeps_all():
    svg = draw_histogram([0.0, 1.0, 2.0], [3, 4], None, "w", "k")
    assert paths(svg, ORANGE, "stroke") == []
    (gone,) = paths(svg, BEFORE)
    bottom = max(y for _, y in gone)
    assert all(y == bottom for _, y in gone)


def test_draw_histogram_of_no_values_is_empty():
    assert draw_histogram([0.0, 1.0], [0], 0.5, "w", "k") == ""


def make_rows(errors, kl=1.0):
    return [{"epoch": i + 1, "nll": 0.5, "kl": kl, "beta": 1.0, "error": e} for i, e in enumerate(errors)]


def test_draw_error_breaks_the_line_between_stages():
    segments = [("weights", make_rows([3.0, 2.0, 1.5])), ("fine-tuning", make_rows([1.4, 1.3, 1.2]))]
    svg = draw_error(segments, 1.0, "k")
    lines = [path for path in paths(svg, "#00805f", "stroke") if len(path) == 3]
    assert len(lines) == 2
    assert lines[0][-1][0] < lines[1][0][0]
    assert {"weights", "fine-tuning", "original"} <= set(texts(svg))


def test_draw_error_with_gaps_draws_what_is_known():
    assert "<path" in draw_error([("weights", make_rows([None, 2.0, 1.0]))], None, "k")
    assert draw_error([("weights", make_rows([None, None]))], 1.0, "k") == ""


def test_draw_objective_leaves_zeros_out_of_a_logarithmic_axis():
    rows = make_rows([1.0] * 4)
    for row, kl in zip(rows, (0.0, 90.0, 60.0, 30.0), strict=True):
        row["kl"] = kl
    (line,) = [
        path for path in paths(draw_objective([("weights", rows)], "k"), ORANGE, "stroke") if len(path) > 2
    ]
    assert len(line) == 3


def test_draw_objective_takes_a_negative_loss():
    rows = make_rows([1.0] * 3, kl=0.1)
    rows[2]["nll"] = -2.0
    (line,) = [
        path for path in paths(draw_objective([("weights", rows)], "k"), BLUE, "stroke") if len(path) > 2
    ]
    assert line[2][1] > line[1][1]


@pytest.mark.parametrize(
    ("low", "high"), [(1, 10), (1050, 1150), (3, 5e9), (0.02, 0.9), (90, 110), (1, 2), (700, 70_000)]
)
def test_choose_log_ticks_are_few_round_and_inside(low, high):
    ticks = choose_log_ticks(low, high)
    assert 1 <= len(ticks) <= 6
    assert all(low <= tick <= high for tick in ticks)
    assert all(float(f"{tick:.1e}") == pytest.approx(tick) for tick in ticks)


def test_find_chosen_takes_the_nearest_point_that_removes_less():
    curve = [{"threshold": None}, {"threshold": 4.0}, {"threshold": 2.0}]
    assert find_chosen(curve, {"threshold": 2.0})["threshold"] == 2.0
    assert find_chosen(curve, {"threshold": 2.5})["threshold"] == 4.0
    assert find_chosen(curve, {"threshold": 9.0})["threshold"] is None
    assert find_chosen(curve, {"threshold": None})["threshold"] is None
    assert find_chosen([], {"threshold": 2.0}) is None


def test_choose_curve_field_follows_the_budget():
    assert choose_curve_field({"limits": {}}) == "nonzeros"
    assert choose_curve_field({"limits": {"macs": 100}}) == "macs"


def test_cut_error_axis_keeps_the_interesting_part():
    curve = [{"threshold": 3.0, "error": 2.0}, {"threshold": 1.0, "error": 90.0}]
    assert cut_error_axis(curve, {"threshold": 3.0, "baseline_error": 1.0}) == 7.0
    assert cut_error_axis(curve[:1], {"threshold": 3.0, "baseline_error": 1.0}) == 2.0


def test_shorten_name_keeps_both_ends():
    assert shorten_name("features.3", 24) == "features.3"
    short = shorten_name("encoder.layers.11.self_attention.in_proj_weight", 24)
    assert len(short) <= 24
    assert short.startswith("encoder.la")
    assert short.endswith("roj_weight")
