"""vbdcompress zoo: what there is to start from."""

from pathlib import Path

import click

from vbdcompress.errors import ConfigError

DEFAULT_FOLDER = Path("zoo")


@click.command("zoo", short_help="List architectures, data sets and networks at hand.")
@click.argument("folder", type=click.Path(path_type=Path), default=DEFAULT_FOLDER)
def command(folder: Path) -> None:
    """List the architectures and data sets known by name, and the checkpoints in FOLDER.

    \b
    Example:
      vbdcompress zoo
    """
    from rich.console import Console
    from rich.table import Table

    from vbdcompress.architectures import ARCHITECTURES
    from vbdcompress.data.sources import NAMED_SETS
    from vbdcompress.loading import load

    console = Console()
    console.print("[bold]Architectures[/bold]: " + ", ".join(sorted(ARCHITECTURES)), highlight=False)
    console.print(
        "  and torchvision:NAME, timm:NAME, package.module:function, file.py:function", highlight=False
    )
    console.print("[bold]Data sets[/bold]: " + ", ".join(NAMED_SETS), highlight=False)
    console.print("  and a folder of class folders, or an .npz of images and labels", highlight=False)
    if folder != DEFAULT_FOLDER and not folder.is_dir():
        raise ConfigError("zoo", f"'{folder}' is no folder.")
    files = sorted(folder.glob("*.pt"))
    if not files:
        console.print(f"No checkpoints in '{folder}'.", highlight=False)
        return
    table = Table(title=f"Networks in {folder}", title_justify="left")
    for heading in ("file", "architecture", "data", "parameters", "test error"):
        table.add_column(heading, justify="left" if heading in ("file", "architecture", "data") else "right")
    for file in files:
        loaded = load(file)
        error = (loaded.training or {}).get("test_error")
        count = sum(parameter.numel() for parameter in loaded.model.parameters())
        shown = "" if error is None else f"{error:.2f} %"
        table.add_row(file.name, loaded.architecture, loaded.data, f"{count:,}", shown)
    console.print(table)
