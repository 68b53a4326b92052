"""vbdcompress bench: what ONNX files cost to serve."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vbdcompress.errors import ConfigError

LETTERS = 26

if TYPE_CHECKING:
    from rich.table import Table

    from vbdcompress.exporting.bench import BenchRow


@click.command("bench")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--batch", "batches", multiple=True, type=click.IntRange(min=1), help="[default: 1, 8, 64]")
@click.option(
    "--threads", multiple=True, type=click.IntRange(0, 1024), help="0 takes all cores.  [default: 1, 0]"
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0.0, min_open=True),
    default=2.0,
    show_default=True,
    help="For each batch size and number of threads.",
)
@click.option("--dim", "dims", multiple=True, metavar="NAME=SIZE", help="Of a dimension that has a name.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    files: tuple[Path, ...],
    batches: tuple[int, ...],
    threads: tuple[int, ...],
    seconds: float,
    dims: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure bytes, MACs, time to load, memory and latency of FILES (or folders that `run` wrote).

    On random inputs, in turn in one run, so that a noisy machine is noisy for all. The first file is what
    the others are compared with. A file whose batch is fixed is measured at that one alone.

    \b
    Example:
      vbdcompress bench original.onnx exports/digits
    """
    from rich.console import Console

    from vbdcompress.exporting.bench import BATCH_SIZES, bench

    paths = [file / "model.onnx" if file.is_dir() else file for file in files]
    for path in paths:
        if not path.is_file():
            raise ConfigError("bench", f"file '{path}' does not exist.")
    rows = bench(
        paths,
        batch_sizes=batches or BATCH_SIZES,
        threads=threads or (1, 0),
        dims=_parse_dims(dims),
        seconds=seconds,
    )
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        _print(rows, Console())


def _parse_dims(given: tuple[str, ...]) -> dict[str, int]:
    dims = {}
    for item in given:
        name, _, size = item.partition("=")
        if not name or not size.isdecimal() or int(size) < 1:
            raise ConfigError("bench", f"--dim '{item}' is not NAME=SIZE, such as width=224.")
        dims[name] = int(size)
    return dims


def _print(rows: "tuple[BenchRow, ...]", console: Any) -> None:
    from rich.text import Text

    names = [chr(ord("A") + place) if place < LETTERS else str(place + 1) for place in range(len(rows))]
    console.print(_table_of_sizes(names, rows))
    console.print(_table_of_times(names, rows))
    told = ["speed: over A's at the same batch; of its MACs: that over the ratio of MACs"]
    batches = [sorted({item.batch for item in row.timings}) for row in rows]
    for name, own in zip(names, batches, strict=True):
        if len(own) == 1 and any(own != others for others in batches):
            told.append(f"{name}: batches of {own[0]} alone, which the file or --dim fixes")
    told += [
        f"{name}: MACs unknown, for these are not counted: {', '.join(row.uncounted)}"
        for name, row in zip(names, rows, strict=True)
        if row.uncounted
    ]
    console.print(Text("\n".join(told), style="dim"))


def _empty_table(*headings: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "file" else "right", overflow="fold")
    return table


def _table_of_sizes(names: list[str], rows: "tuple[BenchRow, ...]") -> "Table":
    from rich.text import Text

    from vbdcompress.reporting.formatting import format_bytes, format_count, format_ms

    table = _empty_table("", "file", "bytes", "MACs", "load", "memory")
    for name, row in zip(names, rows, strict=True):
        memory = "-" if row.peak_bytes is None else format_bytes(row.peak_bytes)
        figures = (format_bytes(row.bytes), format_count(row.macs), format_ms(row.load_ms), memory)
        table.add_row(name, Text(row.file), *figures)
    return table


def _table_of_times(names: list[str], rows: "tuple[BenchRow, ...]") -> "Table":
    from vbdcompress.reporting.formatting import format_ms

    table = _empty_table("threads", "batch", "file", "median", "95 %", "speed", "of its MACs")
    found = [{(item.threads, item.batch): item.timing for item in row.timings} for row in rows]
    # by threads, all of them last, then by batch
    settings = sorted({setting for own in found for setting in own}, key=lambda it: (it[0] == 0, *it))
    for threads, batch in settings:
        base = found[0].get((threads, batch))
        for name, row, own in zip(names, rows, found, strict=True):
            timing = own.get((threads, batch))
            if timing is None:
                continue
            speed = base.median_ms / timing.median_ms if base else None
            fewer = rows[0].macs / row.macs if rows[0].macs and row.macs and row is not rows[0] else None
            table.add_row(
                "all" if threads == 0 else str(threads),
                str(batch),
                name,
                format_ms(timing.median_ms),
                format_ms(timing.p95_ms),
                f"{speed:.2f}x" if speed else "",
                f"{speed / fewer:.2f}" if speed and fewer else "",
            )
        table.add_section()
    return table
