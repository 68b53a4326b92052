"""vbdcompress report: render again."""

from pathlib import Path

import click

from vbdcompress.errors import LoadError


@click.command("report")
@click.argument("folder", type=click.Path(path_type=Path))
def command(folder: Path) -> None:
    """Print the summary of the run in FOLDER and write its report.html anew from report.json.

    \b
    Example:
      vbdcompress report exports/digits
    """
    from rich.console import Console

    from vbdcompress.reporting.html import MALFORMED
    from vbdcompress.reporting.terminal import print_summary
    from vbdcompress.reporting.write import read_report, write_report

    content = read_report(folder)
    try:
        write_report(content, folder)
        print_summary(content, Console())
    except MALFORMED as error:
        raise LoadError(
            f"file '{folder / 'report.json'}'",
            f"lacks what a report holds, or holds it otherwise: {type(error).__name__}: {error}",
        ) from error
    click.echo(f"Written: {folder / 'report.html'}")
