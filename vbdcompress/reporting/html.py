"""report.html: one page without scripts or outside resources, rendered from the report's JSON alone."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError
from markupsafe import Markup

from vbdcompress.exporting.packing import SMALLEST
from vbdcompress.reporting import formatting
from vbdcompress.reporting.charts import (
    MAX_BARS,
    choose_bars,
    choose_curve_field,
    cut_error_axis,
    draw_bars,
    draw_curve,
    draw_latency,
    find_chosen,
)
from vbdcompress.reporting.fit_charts import choose_histograms, draw_error, draw_histogram, draw_objective

MAX_CURVE_ROWS = 11
# What is raised where a report lacks a field of the schema, or has it otherwise
MALFORMED = (UndefinedError, LookupError, TypeError, AttributeError, ValueError)
SECTION_ROWS = 30  # a longer table starts folded
FILTERS = {
    "count": formatting.format_count,
    "filesize": formatting.format_bytes,
    "ratio": formatting.format_ratio,
    "percent": formatting.format_percent,
    "ms": formatting.format_ms,
    "difference": formatting.format_difference,
    "duration": formatting.format_seconds,
    "threshold": formatting.format_threshold,
    "change": formatting.format_change,
}


def render_html(report: Mapping[str, Any]) -> str:
    """The report as one self-contained HTML page; the same report gives the same bytes.

    Args:
        report: the content of report.json (schema_version 1). Everything in it is escaped.
    Returns:
        the page; save as UTF-8.
    Raises:
        jinja2.UndefinedError, KeyError: a field of the schema is missing.
    """
    template = _templates().get_template("report.html")
    return template.render(
        report=report,
        source=report["source"] and hide_folder(report["source"]),
        stages=_prepare_stages(report),
        layers=_prepare_layers(report["layers"]),
        training=_prepare_training(report),
        latency_svg=Markup(draw_latency(report["latency"], "latency")),
        inputs=list_inputs(report),
        snippet=write_snippet(report) if report["export"] else "",
        section_rows=SECTION_ROWS,
        smallest_packed=SMALLEST,
    )


@cache
def _templates() -> Environment:
    """Compiled once in a process."""
    environment = Environment(
        loader=PackageLoader("vbdcompress.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS, setting=format_setting, shape=format_shape)
    environment.globals.update(points=formatting.format_points, divide=formatting.divide_sizes)
    return environment


def hide_folder(path: str) -> str:
    """A relative path as it is; of an absolute one only the name, which says nothing of the machine."""
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(path).is_absolute():
            return kind(path).name
    return path


def format_setting(value: Any) -> str:
    """An option's value for a reader: None -> '–', True -> 'yes', ['a', 'b'] -> 'a, b'."""
    if value is None or value in ("", [], {}):
        return formatting.MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(format_setting(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {format_setting(item)}" for name, item in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def format_shape(shape: Sequence[int] | None, any_size: Sequence[int] = ()) -> str:
    """[16, 1, 3, 3] -> '16×1×3×3'; None and [] -> '–'.

    Args:
        any_size: dimensions, counted from 1, that are written as 'any'.
    """
    lengths = ["any" if place in any_size else str(length) for place, length in enumerate(shape or (), 1)]
    return formatting.TIMES.join(lengths) or formatting.MISSING


def list_inputs(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Name, shape of one example and type of each input of model.onnx."""
    spec = report["input"]
    alone = {**spec, "dtype": "uint8" if spec.get("embedded") else "float32"}
    return report.get("inputs") or [alone]  # of a report that does not list them


def write_snippet(report: Mapping[str, Any]) -> str:
    """Python that feeds the ONNX file as the network was trained: a batch of one, normalised."""
    spec, inputs = report["input"], list_inputs(report)
    file = next((name for name in report["files"] if name.endswith(".onnx")), "model.onnx")
    embedded = spec.get("embedded")
    names = ["x"] if len(inputs) == 1 else [f"x{number}" for number in range(len(inputs))]
    images = {
        name: row
        for name, row in zip(names, inputs, strict=True)
        if len(inputs) == 1 or (row["shape"] == spec["shape"] and row["dtype"].startswith("float"))
    }
    told = "normalised as in training"
    if spec["mean"] and images:
        told = "pixels from 0 to 255" if embedded else "values scaled to [0, 1]"
    lines = ["import numpy as np, onnxruntime", "", f"# your batch, {told}"]
    for name, row in zip(names, inputs, strict=True):
        shape = ", ".join(str(length) for length in [1, *row["shape"]])
        lines.append(f"{name} = np.zeros(({shape}{',' if not row['shape'] else ''}), np.{row['dtype']})")
    if spec["mean"] and images and not embedded:
        for name in ("mean", "std"):
            values = ", ".join(f"{value:.6g}" for value in spec[name])
            lines.append(f"{name} = np.reshape([{values}], (-1{', 1' * (len(spec['shape']) - 1)}))")
        for name, row in images.items():
            lines.append(f"{name} = (({name} - mean) / std).astype(np.{row['dtype']})")
    lines.append(f"session = onnxruntime.InferenceSession({json.dumps(file)})")
    given = ", ".join(f"{json.dumps(row['name'])}: {name}" for name, row in zip(names, inputs, strict=True))
    called = [row["name"] for row in (report["export"] or {}).get("outputs", ())]  # older reports lack them
    if len(called) > 1:
        lines.append(f"outputs = dict(zip({json.dumps(called)}, session.run(None, {{{given}}})))")
        return "\n".join(lines)
    lines.append(f"output = session.run(None, {{{given}}})[0]")
    if report["data"] and report["data"]["classes"]:
        lines.append("best = output.argmax(axis=1)  # index of the class")
    return "\n".join(lines)


def _prepare_stages(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each stage its charts and the few rows of its curve that the page shows."""
    return [
        {
            **stage,
            "objective": formatting.describe_objective(stage),
            "curve_svg": Markup(draw_curve(stage, report["size"]["before"], f"curve{number}")),
            "curve_rows": _thin_curve(stage["curve"], stage["selection"]),
            "curve_field": choose_curve_field(stage["selection"]),
            "curve_note": _note_cut(stage),
            "histograms": _prepare_histograms(stage, number),
            "converted": sum(row["action"] == "converted" for row in stage["table"]),
        }
        for number, stage in enumerate(report["stages"])
    ]


def _thin_curve(curve: Sequence[Mapping[str, Any]], selection: Mapping[str, Any]) -> list[dict[str, Any]]:
    """At most about MAX_CURVE_ROWS points, evenly spread, always with both ends and the chosen one."""
    ordered = sorted(curve, key=lambda point: -point["size"]["nonzeros"])
    chosen = find_chosen(ordered, selection)
    step = max((len(ordered) - 1) / (MAX_CURVE_ROWS - 1), 1)
    wanted = {round(place * step) for place in range(MAX_CURVE_ROWS)}
    return [
        {**point, "is_chosen": point is chosen}
        for place, point in enumerate(ordered)
        if place in wanted or point is chosen
    ]


def _note_cut(stage: Mapping[str, Any]) -> str:
    if not stage["curve"]:
        return ""
    top = cut_error_axis(stage["curve"], stage["selection"])
    above = sum(point["error"] > top for point in stage["curve"])
    if not above:
        return ""
    points = "1 point lies" if above == 1 else f"{above} points lie"
    return f"{points} above {formatting.format_percent(top)} and outside the picture."


def _prepare_histograms(stage: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
    record, threshold = stage["log_alpha"], stage["selection"]["threshold"]
    return [
        {
            "name": layer["name"],
            "kind": layer["kind"],
            "total": sum(layer["counts"]),
            "svg": Markup(
                draw_histogram(
                    record["edges"], layer["counts"], threshold, layer["name"], f"alpha{number}-{place}"
                )
            ),
        }
        for place, layer in enumerate(choose_histograms(record["layers"]))
    ]


def _prepare_layers(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The two bar charts, and how many layers each leaves out."""
    charts = []
    for field in ("nonzeros", "macs"):
        sized = sum(bool(layer["before"][field]) for layer in layers)
        charts.append(
            {
                "field": field,
                "svg": Markup(draw_bars(layers, field, f"bars-{field}")),
                "sized": sized,
                "left_out": sized - len(choose_bars(layers, field)),
            }
        )
    return {"charts": [chart for chart in charts if chart["svg"]], "limit": MAX_BARS}


def _prepare_training(report: Mapping[str, Any]) -> dict[str, Any]:
    segments = [(stage["mode"], stage["epochs"]) for stage in report["stages"]]
    segments.append(("fine-tuning", report["finetune"]))
    segments = [(name, rows) for name, rows in segments if rows]
    baseline = report["errors"]["validation"]["before"] if report["errors"] else None
    return {
        "objective": Markup(draw_objective(segments, "objective")),
        "error": Markup(draw_error(segments, baseline, "error")),
        "masked": _say_masked(report["stages"]),
        "segments": [
            {"name": name, "epochs": len(rows), "seconds": sum(row["seconds"] for row in rows)}
            for name, rows in segments
        ],
    }


def _say_masked(stages: Sequence[Mapping[str, Any]]) -> str:
    """At which log alpha the network was masked for each epoch's error; a budget cuts elsewhere later."""
    told = []
    for stage in stages:
        at, cut = stage.get("logged_at"), stage["selection"]["threshold"]  # older reports do not say where
        if at is not None:
            later = "" if at == cut else f" (it was cut at {formatting.format_threshold(cut)} afterwards)"
            of = f" in {stage['mode']}" if len(stages) > 1 else ""
            told.append(f"{formatting.format_threshold(at)}{of}{later}")
    where = f" at a log alpha of {', '.join(told)}" if told else ""
    return f"After each epoch of a posterior, masked{where}."
