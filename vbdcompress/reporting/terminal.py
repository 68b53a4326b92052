"""The summary that the terminal shows at the end of a run."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vbdcompress.reporting.formatting import (
    TIMES,
    describe_objective,
    divide_sizes,
    format_bytes,
    format_change,
    format_count,
    format_difference,
    format_ms,
    format_percent,
    format_points,
)

_SIZES = (
    ("nonzero parameters", "nonzeros", "fewer", "more"),
    ("parameters", "parameters", "fewer", "more"),
    ("MACs of one example", "macs", "fewer", "more"),
    ("ONNX file", "bytes", "smaller", "larger"),
)
Row = tuple[str, str, str, str]


def print_summary(report: Mapping[str, Any], console: Console) -> None:
    """Print what the run made of the network: before, after, change; parity; warnings.

    Args:
        report: the content of report.json (schema_version 1).
        console: where to; one that can only write ASCII gets only ASCII from here.
    """
    table = Table(box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    table.title = Text(_fit_encoding(report["name"], console))
    table.add_column("")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    for rows in (_size_rows(report), _error_rows(report), _latency_rows(report)):
        for label, before, after, change in rows:
            cells = (label, before, after, change)
            texts = [Text(_fit_encoding(cell, console)) for cell in cells]
            texts[2].stylize("bold")
            texts[3].stylize(_choose_style(change))
            table.add_row(*texts)
        table.add_section()
    console.print(table)
    for stage in report["stages"]:
        explanation = _fit_encoding(stage["selection"]["explanation"], console)
        console.print(Text(f"{stage['mode']}: {explanation}; {describe_objective(stage)}", style="dim"))
    if report.get("rounding"):  # reports of before there was rounding lack it
        console.print(Text(_describe_rounding(report["rounding"]), style="dim"))
    if report.get("int8"):
        console.print(Text(_describe_int8(report["int8"]), style="dim"))
    if report["export"]:
        console.print(_describe_parity(report["export"]))
    for warning in report["warnings"]:
        console.print(Text.assemble(("warning: ", "bold yellow"), _fit_encoding(warning, console)))


def _size_rows(report: Mapping[str, Any]) -> Iterator[Row]:
    size = report["size"]
    for label, field, better, worse in _SIZES:
        show = format_bytes if field == "bytes" else format_count
        change = format_change(size["compression_ratio"][field], better, worse)
        yield label, show(size["before"][field]), show(size["after"][field]), change


def _error_rows(report: Mapping[str, Any]) -> Iterator[Row]:
    for split in ("test", "validation"):
        error = (report["errors"] or {}).get(split)
        if error is not None:
            before, after = error["before"], error["after"]
            points = format_points(before, after)
            yield f"{split} error", format_percent(before), format_percent(after), points


def _latency_rows(report: Mapping[str, Any]) -> Iterator[Row]:
    for row in report["latency"]:
        before, after = row["original_ms"], row["slim_ms"]
        change = format_change(divide_sizes(before, after), "faster", "slower")
        yield f"latency, batch {row['batch']}", format_ms(before), format_ms(after), change


def _choose_style(change: str) -> str:
    """Green for better, yellow for worse; the words say it too."""
    if change.endswith(("more", "larger", "slower")) or change.startswith("+"):
        return "yellow"
    return "green" if change.endswith(("fewer", "smaller", "faster", "points")) else "dim"


def _describe_int8(int8: Mapping[str, Any]) -> str:
    errors = ", ".join(f"{name} error {format_percent(error)}" for name, error in int8["errors"].items())
    times = ", ".join(
        f"{format_ms(row['int8_ms'])} against {format_ms(row['float_ms'])} at batch {row['batch']}"
        for row in int8["latency"]
    )
    return f"in 8-bit integers: {format_bytes(int8['bytes'])}, {errors}; {times}"


def _describe_rounding(rounding: Mapping[str, Any]) -> str:
    bits = sorted({row["bits"] for row in rounding["layers"]})
    if not bits:
        return "no weight was rounded: there is no matrix of them"
    error = rounding["validation_error"]
    told = f"{bits[0]} bits" if len(bits) == 1 else f"{bits[0]} to {bits[-1]} bits"
    before, after = format_percent(error["before"]), format_percent(error["after"])
    return f"weights in {told}: validation error {before} before, {after} after"


def _describe_parity(export: Mapping[str, Any]) -> Text:
    batches = " and ".join(str(size) for size in export["batch_sizes"])
    is_equal = export["max_difference"] <= export["tolerance"]
    verb, style = ("equals", "green") if is_equal else ("DIFFERS from", "bold red")
    return Text.assemble(
        (f"onnxruntime {verb} torch", style),
        f" to {format_difference(export['max_difference'])}",
        f" (allowed {format_difference(export['tolerance'])}), batches of {batches}",
    )


def _fit_encoding(text: str, console: Console) -> str:
    if not console.options.ascii_only:
        return text
    return text.replace(TIMES, "x").encode("ascii", "replace").decode()
