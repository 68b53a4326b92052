"""vbdcompress report: render again."""

from pathlib import Path

import click


@click.command("report", short_help="Render a folder's report again.")
@click.argument("folder", type=click.Path(path_type=Path))
def command(folder: Path) -> None:
    """Print the summary of the run in FOLDER and write its report.html anew from report.json.

    \b
    Example:
      vbdcompress report exports/digits
    """
    from rich.console import Console

    from vbdcompress.reporting.terminal import print_summary
    from vbdcompress.reporting.write import read_report, write_report

    content = read_report(folder)
    write_report(content, folder)
    print_summary(content, Console())
    click.echo(f"Written: {folder / 'report.html'}")
