"""Write zoo/coverage.md from the result files; nothing in its tables is typed by hand.

python zoo/coverage/write_page.py
"""

import json
from pathlib import Path
from typing import Any

import click
from jinja2 import Environment, StrictUndefined
from networks import NETWORKS

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "coverage.md"


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=HERE.parent / "coverage.md", help="File to write."
)
def main(out: Path) -> None:
    """Read all result files and render the template."""
    growth = HERE / "growth.json"
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = environment.from_string((HERE / "coverage.md.jinja").read_text(encoding="utf-8"))
    text = template.render(
        rows={mode: [_row(name, mode) for name in NETWORKS] for mode in ("channels", "weights")},
        growth=json.loads(growth.read_text(encoding="utf-8")) if growth.exists() else None,
    )
    out.write_text(text, encoding="utf-8")


def _read(name: str, mode: str) -> dict[str, Any] | None:
    path = HERE / "results" / f"{name.replace(':', '-')}-{mode}.json"
    found: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return found


def _row(name: str, mode: str) -> dict[str, Any]:
    """A row's cells as text, whatever happened to it."""
    content = _read(name, mode)
    row: dict[str, Any] = {
        "name": name.replace("torchvision:", ""),
        "failed": None,
        "whole": "",
        "rival": _rival(name),
    }
    if content is None:
        return row | {"failed": "not run yet"}
    if "failed" in content:
        return row | {"failed": _short(content["failed"])}
    whole = "; ".join(f"{number} x {_short(reason)}" for reason, number in content["whole"])
    return row | {
        "layers": f"{content['layers_touched']} of {content['layers']}",
        "parameters": f"{100 * content['parameter_share']:.1f} %",
        "macs": f"{100 * content['mac_share']:.1f} %",
        "step": content["step"],
        "exact": f"{content['difference']:.0e}",
        "onnx": f"{content['onnx_difference']:.0e}",
        "reload": "equal" if content["reload_difference"] == 0 else f"{content['reload_difference']:.0e}",
        "seconds": f"{content['convert_seconds']:.0f} + {content['slim_seconds']:.0f}",
        "whole": whole,
    }


def _rival(name: str) -> str:
    content = _read(name, "torch-pruning")
    if content is None:
        return "not run yet"
    if "failed" in content:
        return f"fails: {_short(content['failed'])}"
    return f"{100 * (1 - content['macs_left']):.0f} % of MACs gone"


def _short(text: str) -> str:
    """One line that fits a table's cell."""
    line = " ".join(text.replace("|", "/").split())
    return line if len(line) <= 140 else f"{line[:137]}..."


if __name__ == "__main__":
    main()
