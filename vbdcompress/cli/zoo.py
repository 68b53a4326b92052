"""vbdcompress zoo: what there is to start from."""

from pathlib import Path

import click

from vbdcompress.errors import ConfigError, LoadError

DEFAULT_FOLDER = Path("zoo")


@click.command("zoo")
@click.argument("folder", type=click.Path(path_type=Path), default=DEFAULT_FOLDER)
def command(folder: Path) -> None:
    """List the architectures and data sets known by name, and the checkpoints in FOLDER.

    A .pt file there that is no checkpoint of `vbdcompress train` is listed with the reason.

    \b
    Example:
      vbdcompress zoo
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

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
        console.print(Text(f"No checkpoints in '{folder}'."))
        return
    table = Table(title=Text(f"Networks in {folder}"), title_justify="left")
    for heading in ("file", "architecture", "data", "parameters", "test error"):
        number = heading in ("parameters", "test error")
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    for file in files:
        try:
            loaded = load(file)
        except LoadError as error:
            table.add_row(Text(file.name), Text(error.found, style="yellow"))
            continue
        test_error = (loaded.training or {}).get("test_error")
        count = sum(parameter.numel() for parameter in loaded.model.parameters())
        shown = "" if test_error is None else f"{test_error:.2f} %"
        words = (Text(str(word or "")) for word in (file.name, loaded.architecture, loaded.data))
        table.add_row(*words, f"{count:,}", shown)
    console.print(table)
