"""vbdcompress inspect: what would be converted; touches nothing."""

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vbdcompress.cli.options import model_options, parse_arch_args
from vbdcompress.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor, nn

    from vbdcompress.conversion import Converted
    from vbdcompress.records import LayerSize
    from vbdcompress.surgery.groups import ChannelGroup


@click.command("inspect")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--mode",
    type=click.Choice(["weights", "channels", "both"]),
    default="channels",
    show_default=True,
    help="As for `run`; both is channels, then weights of what is left: its channels are shown.",
)
@click.option("--skip", multiple=True, metavar="NAME", help="Layer to leave whole, with all below it.")
@click.option("--prune-inputs", is_flag=True, help="Also input features and flattened features.")
@click.option("--input-shape", metavar="C,H,W", help="Shape of one input where the file does not say.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@model_options
def command(
    file: Path,
    mode: Any,
    skip: tuple[str, ...],
    prune_inputs: bool,
    input_shape: str | None,
    as_json: bool,
    arch: str | None,
    arch_args: tuple[str, ...],
    unsafe_pickle: bool,
) -> None:
    """Print the layers of the network in FILE, converted or left and why, and its channel groups.

    \b
    Example:
      vbdcompress inspect zoo/lenet5.pt --mode channels --prune-inputs
    """
    import torch

    from vbdcompress.conversion import convert
    from vbdcompress.count import measure_size
    from vbdcompress.loading import load

    mode = "channels" if mode == "both" else mode
    loaded = load(file, arch=arch, arguments=parse_arch_args(arch_args), unsafe_pickle=unsafe_pickle)
    shape = _parse_shape(input_shape) or (loaded.input.shape if loaded.input else None)
    if shape is None:
        raise ConfigError("inspect", "the file does not say the shape of its input.", "--input-shape 3,32,32")
    example = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    converted = convert(loaded.model, example, mode, skip=skip, prune_inputs=prune_inputs)
    layers, opened = _measure_layers(loaded.model, converted, example)
    macs = {row.name: row.macs for row in (*opened, *layers)}
    content = {
        "file": file.name,
        "architecture": loaded.architecture,
        "data": loaded.data,
        "input_shape": list(shape),
        "mode": mode,
        "size": asdict(measure_size(loaded.model, example)),
        "layers": [asdict(row) for row in layers],
        "table": [asdict(row) | {"macs": macs.get(row.name, 0)} for row in converted.table],
        "groups": [_describe_group(group) for group in converted.scan.groups],
    }
    if as_json:
        click.echo(json.dumps(content, indent=1))
    else:
        _print_tables(content)


def _measure_layers(
    model: "nn.Module", converted: "Converted", example: "Tensor"
) -> "tuple[tuple[LayerSize, ...], ...]":
    """The layers as they are, and as they are named where attention is to be cut, or weights are stored."""
    from vbdcompress.count import layer_sizes
    from vbdcompress.opening import Opened, open_layers_
    from vbdcompress.parametrized import store_weights_

    opened = copy.deepcopy(model)
    store_weights_(opened, converted.stored)
    names = [name for name, module in converted.model.named_modules() if isinstance(module, Opened)]
    open_layers_(opened, names)
    return layer_sizes(model, example), layer_sizes(opened, example)


def _describe_group(group: "ChannelGroup") -> dict[str, Any]:
    return {
        "name": group.name,
        "size": group.channels,
        "writers": [member.layer for member in group.writers],
        "readers": [member.layer for member in group.readers],
        "whole_because": group.whole_because,
    }


def _parse_shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    sizes = text.replace("x", ",").split(",")
    if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise ConfigError("inspect", f"--input-shape '{text}' is not like 3,32,32: whole numbers above 0.")
    return tuple(map(int, sizes))


def _print_tables(content: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    size = content["size"]
    told = (
        f": {content['architecture']}, {size['parameters']:,} parameters, "
        f"{size['macs']:,} MACs, input {tuple(content['input_shape'])}"
    )
    console.print(Text.assemble((content["file"], "bold"), told))
    layers = _table(
        f"Layers in {content['mode']} mode", "layer", "kind", "parameters", "MACs", "what and why"
    )
    for row in content["table"]:
        style = "green" if row["action"] == "converted" else "yellow"
        layers.add_row(
            Text(row["name"]),
            Text(row["kind"]),
            f"{row['parameters']:,}",
            f"{row['macs']:,}",
            Text.assemble((row["action"], style), f": {row['reason']}" if row["reason"] else ""),
        )
    console.print(layers, "")
    groups = _table("Channel groups", "group", "channels", "written by", "read by", "stays whole because")
    for row in content["groups"]:
        groups.add_row(
            Text(row["name"]),
            f"{row['size']:,}",
            Text("\n".join(row["writers"]) or "the input"),
            Text("\n".join(row["readers"])),
            Text(row["whole_because"] or ""),
        )
    console.print(groups)


def _table(title: str, *headings: str) -> "Table":
    """A table whose names are broken, never cut short: they are what a reader types after --skip."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in headings:
        number = heading in ("parameters", "MACs", "channels")
        table.add_column(heading, justify="right" if number else "left", overflow="fold", no_wrap=number)
    return table
