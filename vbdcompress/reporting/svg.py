"""A matplotlib figure as a small inline <svg> element that fits into a page beside others."""

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator

from matplotlib.figure import Figure

# matplotlib writes these everywhere; the page's style sheet, or the default, says the same
_NEEDLESS_STYLES = ("font-family:", "stroke-linecap:", "stroke-dashoffset: 0", "text-anchor: start")
_NEEDLESS_TRANSFORM = re.compile(r"rotate\(-?0 [-\d. ]+\)")


def render_svg(figure: Figure, key: str, title: str, description: str) -> str:
    """The figure as an <svg> element.

    Args:
        figure: drawn inside `chart_style`, which still holds.
        key: unique in the page; every id that the figure needs begins with it.
        title: the chart's name, its <title>.
        description: what it shows, for readers that don't see it (aria-label).
    Returns:
        markup; all text in it is escaped.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    root = ET.fromstring(buffer.getvalue())
    _strip_names(root)
    _shrink(root)
    used = set(re.findall(r"#([\w-]+)", " ".join(_references(root))))
    for element in root.iter():
        _rename_ids(element, used, key)
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": description,
        "class": "chart",
        "data-chart": key,
    }
    name = ET.Element("title")
    name.text = title
    root.insert(0, name)
    return ET.tostring(root, encoding="unicode")


def _strip_names(root: ET.Element) -> None:
    """Remove namespaces, which inline SVG does not have, and white space between elements. In place."""
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        element.tail = None
        if element.text is not None and not element.text.strip():
            element.text = None


def _shrink(element: ET.Element) -> None:
    """Remove what draws nothing, groups that say nothing, and needless digits. In place."""
    kept: list[ET.Element] = []
    for child in element:
        # matplotlib's <style> is "* {...}", which inline would hold for the whole page
        if child.tag in ("metadata", "style"):
            continue
        _shrink(child)
        _shorten_attributes(child)
        if child.tag == "g" and not set(child.attrib) - {"id"}:
            kept.extend(child)
        elif not _draws_nothing(child):
            kept.append(child)
    element[:] = kept


def _draws_nothing(element: ET.Element) -> bool:
    is_empty = element.tag in ("g", "defs") and len(element) == 0
    return is_empty or (element.tag == "path" and element.attrib.get("style") == "fill: none")


def _shorten_attributes(element: ET.Element) -> None:
    for name in ("d", "x", "y", "width", "height", "transform"):
        if name in element.attrib:
            element.attrib[name] = _round(element.attrib[name])
    if _NEEDLESS_TRANSFORM.fullmatch(element.attrib.get("transform", "")):
        del element.attrib["transform"]
    if "style" in element.attrib:
        parts = element.attrib["style"].split("; ")
        element.attrib["style"] = "; ".join(part for part in parts if not part.startswith(_NEEDLESS_STYLES))


def _references(root: ET.Element) -> Iterator[str]:
    for element in root.iter():
        for name in ("href", "clip-path"):
            if name in element.attrib:
                yield element.attrib[name]


def _rename_ids(element: ET.Element, used: set[str], key: str) -> None:
    identity = element.attrib.pop("id", None)
    if identity in used:
        element.attrib["id"] = f"{key}-{identity}"
    for name in ("href", "clip-path"):
        if name in element.attrib:
            element.attrib[name] = element.attrib[name].replace("#", f"#{key}-")


def _round(value: str) -> str:
    """Coordinates to a tenth, and matplotlib's line breaks to spaces: half the bytes, same picture."""
    rounded = re.sub(r"-?\d+\.\d+", lambda match: f"{float(match[0]):.1f}".removesuffix(".0"), value)
    return " ".join(rounded.split())
