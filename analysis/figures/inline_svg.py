"""Figures as SVG inside a page: small, sharp at any size, in the colours of the page.

Letters stay letters, and coordinates have two decimals. A colour is a CSS variable whose default is
the figure's own colour (`var(--c0072b2,#0072b2)`), so that a page can give it another value in a
dark scheme: `dark_colors` returns such values. Rasterized parts (heat maps, many points, images)
are PNG inside the SVG. The same figure gives the same text.

Map: `inline_svg`, `dark_colors`, `dark_color`.
"""

import io
import re
from collections.abc import Iterable
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from sampimp.analysis.figures.style import RC_PARAMS

PAPER, INK = (0x14, 0x18, 0x1C), (0xE6, 0xE9, 0xEC)
"""Background and text of the dark scheme; `page.css` has the same."""

LEAST_LUMINANCE = 0.17
"""Of a colour on the dark background: a contrast of 3.7, above the 3 that WCAG asks of graphics."""

_SETTINGS = {**RC_PARAMS, "svg.fonttype": "none", "svg.hashsalt": "sampimp"}
_COLOR = re.compile(r"#([0-9a-f]{6})\b")
_REFERENCE = re.compile(r"#([\w.-]+)")
_DECIMALS = re.compile(r"(\.\d\d)\d+")


def inline_svg(figure: Figure, label: str, prefix: str) -> str:
    """Return a figure as an `svg` element for an HTML page.

    Parameters
    ----------
    figure
        A figure of this package, after its layout.
    label
        What it shows, for readers who do not see it.
    prefix
        Start of all ids in the element; unique in the page.

    Examples
    --------
    >>> text = inline_svg(Figure((2, 1)), "nothing <yet>", "fig1")
    >>> text[:69], "var(--cffffff,#ffffff)" in text
    ('<svg viewBox="0 0 144 72" role="img" aria-label="nothing &lt;yet&gt;"', True)
    """
    buffer = io.BytesIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context(_SETTINGS):
        figure.savefig(buffer, format="svg", dpi=150, metadata=metadata)
    root = ElementTree.fromstring(buffer.getvalue())
    size = root.get("viewBox", "")
    root.attrib.clear()
    root.attrib.update({"viewBox": size, "role": "img", "aria-label": label})
    if figure.get_figheight() > figure.get_figwidth():
        root.set("class", "tall")
    _simplify(root)
    _rename_ids(root, prefix)
    return ElementTree.tostring(root, encoding="unicode")


def _simplify(root: ElementTree.Element) -> None:
    """Shorten all elements; remove style sheets, which would apply to the whole page."""
    for parent in root.iter():
        for child in [child for child in parent if child.tag.endswith(("}style", "}metadata"))]:
            parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        if element.tag not in ("text", "tspan"):
            element.text = None
        element.tail = None
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            if short := _shorten(key, value):
                element.attrib[key.rpartition("}")[2]] = short


def _shorten(key: str, value: str) -> str:
    """Return an attribute's value in fewer letters; empty if it has no effect."""
    if key.endswith("href"):
        return "".join(value.split())
    if key == "style":
        rules = [rule.strip() for rule in value.split(";") if "font-family" not in rule]
        return _COLOR.sub(r"var(--c\1,#\1)", ";".join(rules).replace(": ", ":"))
    if key == "transform" and value.startswith("rotate(-0 "):
        return ""
    if key in ("d", "x", "y", "points"):
        return _DECIMALS.sub(r"\1", " ".join(value.split()))
    return value


def _rename_ids(root: ElementTree.Element, prefix: str) -> None:
    """Give ids that are referred to the prefix, and remove the others."""
    used: dict[str, str] = {}
    for element in root.iter():
        for key in ("href", "clip-path", "style", "mask"):
            value = element.get(key, "")
            if "#" in value and not value.startswith("data:"):
                for name in _REFERENCE.findall(_COLOR.sub("", value)):
                    used.setdefault(name, f"{prefix}-{len(used)}")
    for element in root.iter():
        if (name := element.attrib.pop("id", None)) in used:
            element.set("id", used[str(name)])
        for key in ("href", "clip-path", "style", "mask"):
            value = element.get(key, "")
            if "#" in value and not value.startswith("data:"):
                renamed = _REFERENCE.sub(
                    lambda match: f"#{used.get(match.group(1), match.group(1))}", value
                )
                element.set(key, renamed)


def dark_colors(texts: Iterable[str]) -> str:
    """Return CSS that gives every colour of SVG elements its value in the dark scheme.

    Examples
    --------
    >>> dark_colors(['style="fill:var(--cffffff,#ffffff)"', "var(--c000000,#000000)"])
    '--c000000:#e6e9ec;--cffffff:#14181c'
    """
    colors = {color for text in texts for color in re.findall(r"var\(--c([0-9a-f]{6}),", text)}
    return ";".join(f"--c{color}:{dark_color(color)}" for color in sorted(colors))


def dark_color(color: str) -> str:
    """Return a colour for the dark scheme: greys are inverted, dark colours mixed with white.

    Examples
    --------
    >>> dark_color("e69f00"), dark_color("440154")
    ('#e69f00', '#8d6497')
    """
    rgb = np.array([int(color[at : at + 2], 16) for at in (0, 2, 4)])
    if np.ptp(rgb) < 8:
        new = np.array(INK) + rgb.mean() / 255 * (np.array(PAPER) - np.array(INK))
    else:
        mixed = (rgb + share * (255 - rgb) for share in np.linspace(0, 1, 101))
        new = next(color for color in mixed if _luminance(color) >= LEAST_LUMINANCE)
    return "#" + "".join(f"{round(value):02x}" for value in new)


def _luminance(rgb: np.ndarray) -> float:
    """Return the relative luminance of WCAG."""
    linear = np.where(rgb / 255 <= 0.04045, rgb / 255 / 12.92, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))
