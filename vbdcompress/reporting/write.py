"""Report files: report.json, and report.html rendered from it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vbdcompress.errors import LoadError
from vbdcompress.files import write_text
from vbdcompress.reporting.build import SCHEMA, SCHEMA_VERSION


def write_report(content: Mapping[str, Any], folder: Path) -> None:
    """Write report.json and report.html into a folder."""
    from vbdcompress.reporting.html import render_html  # matplotlib and jinja2 take a second to import

    write_text(folder / "report.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    write_text(folder / "report.html", render_html(content))


def read_report(folder: Path) -> dict[str, Any]:
    """The content of a folder's report.json. Raises LoadError where it is none of this version."""
    path = folder / "report.json"
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LoadError(f"file '{path}'", f"can't be read: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise LoadError(f"file '{path}'", "is not a report of vbdcompress.")
    if content.get("schema_version") != SCHEMA_VERSION:
        raise LoadError(
            f"file '{path}'",
            f"has schema version {content.get('schema_version')}, expected {SCHEMA_VERSION}.",
        )
    return content
