"""Colours, line styles and text settings of all figures.

A strategy has one colour, line style and marker in all figures (`strategy_style`), so that two
strategies differ without colour too. Layers and groups of samples, which have an order, run from
dark to light (`ordered_styles`); seeds and classes take `CATEGORIES` in turn.

Map: `RC_PARAMS` (matplotlib's settings), `Style`, `strategy_style`, `strategy_name`, `rule_style`,
`CATEGORIES`, `ordered_styles`; `encode` returns a figure as PNG or PDF.
"""

import io
import zlib
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

MOST_LINES = 8
"""More layers than this are drawn as a heat map: a ninth colour cannot be distinguished."""

MOST_CLASSES = 5
"""More classes than this are drawn as a heat map: their curves lie on top of each other."""

WIDTH = 10.0
"""Width of every figure in inches: at 1,000 CSS pixels a 10-point font reads as 14 pixels."""

IMPORTANCE_UNIT = "parameter²"

RC_PARAMS: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",  # part of matplotlib: the same figure on every machine
    "font.size": 10,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "legend.handlelength": 3.0,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "pdf.fonttype": 42,  # letters stay letters in the PDF
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


class Style(NamedTuple):
    """Appearance of one line: colour, line style and marker, each of which differs."""

    color: str
    linestyle: Any
    marker: str


# Okabe & Ito's palette without yellow, which is too light on white, and a grey and a wine (P. Tol).
_BLACK, _GREY, BLUE, _SKY = "#000000", "#808080", "#0072B2", "#56B4E9"

_GREEN, _ORANGE, VERMILLION, _PURPLE, _WINE = "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#882255"

DASHED, _DOTDASH = (0, (5, 2)), (0, (6, 2, 1, 2))

# Strategies that sort by NLL are blue to green, by overall importance red to orange. Low first is
# solid, the reverse is dashed, and samples spread over all batches ("mixed") are dash-dotted.
_STRATEGIES = {
    "shuffle": Style(_BLACK, "-", "o"),
    "shuffle_by_seed": Style(_GREY, DASHED, "s"),
    "rand": Style(_PURPLE, "-", "D"),
    "nlo": Style(BLUE, "-", "^"),
    "rnlo": Style(_SKY, DASHED, "v"),
    "nlm": Style(_GREEN, _DOTDASH, ">"),
    "sio": Style(VERMILLION, "-", "P"),
    "rsio": Style(_ORANGE, DASHED, "X"),
    "sim": Style(_WINE, _DOTDASH, "<"),
}

# Grey knows nothing of the samples, black is what the validation split chose. What sorts by overall
# importance is blue, by NLL purple; the high end is solid and the low end dashed.
_RULES = {
    "chosen": Style(_BLACK, "-", "o"),
    "random": Style(_GREY, (0, (1, 1.2)), "s"),
    "balanced": Style(_GREY, DASHED, "D"),
    "tau-high": Style(BLUE, "-", "^"),
    "tau-low": Style(_SKY, DASHED, "v"),
    "nll-high": Style(_PURPLE, "-", ">"),
    "nll-low": Style(_PURPLE, DASHED, "<"),
    "strata": Style(_GREEN, "-", "P"),
    "power": Style(_WINE, "-", "X"),
    "final-importance": Style(_ORANGE, "-", "p"),
    "metagradient": Style(_GREEN, _DOTDASH, "*"),
}

CATEGORIES = tuple(
    Style(color, linestyle, marker)
    for color, linestyle, marker in zip(
        (_BLACK, VERMILLION, BLUE, _ORANGE, _GREEN, _PURPLE, _SKY, _WINE, _GREY, BLUE),
        ("-", "-", "-", "-", "-", DASHED, DASHED, DASHED, DASHED, _DOTDASH),
        "os^DvP<X>p",
        strict=True,
    )
)

# Of rules in no table. Vermillion is the error of all samples.
_OWN_COLORS, _OWN_MARKERS = (BLUE, _ORANGE, _GREEN, _PURPLE, _SKY), "^v<>PXpD"


def strategy_style(name: str) -> Style:
    """Return the style of a strategy in all figures; any other name has a fixed style too.

    Examples
    --------
    >>> strategy_style("nlo")
    Style(color='#0072B2', linestyle='-', marker='^')
    >>> strategy_style("mine") == strategy_style("mine")
    True
    """
    return _STRATEGIES.get(name) or CATEGORIES[sum(name.encode()) % len(CATEGORIES)]


def strategy_name(name: str) -> str:
    """Return a strategy's name as the paper writes it.

    Examples
    --------
    >>> [strategy_name(name) for name in ("rand", "rnlo", "shuffle_by_seed")]
    ['Rand', 'RNLO', 'shuffle by seed']
    """
    if name == "rand":
        return "Rand"
    if name in _STRATEGIES and not name.startswith("shuffle"):
        return name.upper()
    return name.replace("_", " ")


def rule_style(name: str) -> Style:
    """Return the style of a rule that selects samples; any other name has a fixed style too.

    A rule with a parameter has the colour of the rule.

    Examples
    --------
    >>> rule_style("tau-high")
    Style(color='#0072B2', linestyle='-', marker='^')
    >>> rule_style("strata:0.1").color == rule_style("strata").color
    True
    >>> rule_style("strata:0.1") == rule_style("strata:0.3")
    False
    """
    if name in _RULES:
        return _RULES[name]
    rest, place = divmod(zlib.crc32(name.encode()), len(_OWN_MARKERS))
    known = _RULES.get(name.partition(":")[0])
    color = known.color if known else _OWN_COLORS[rest % len(_OWN_COLORS)]
    return Style(color, ("-", DASHED, _DOTDASH)[rest % 3], _OWN_MARKERS[place])


def ordered_styles(count: int, *, light: bool = False) -> list[Style]:
    """Return styles for ordered items (layers, groups), from dark to light."""
    colors = matplotlib.colormaps["viridis"](np.linspace(0.25 if light else 0.0, 0.82, count))
    linestyles = ("-", DASHED, _DOTDASH, (0, (1, 1.2)))
    return [
        Style(matplotlib.colors.to_hex(color), linestyles[index % 4], "os^DvP<X"[index % 8])
        for index, color in enumerate(colors)
    ]


def encode(figure: Figure, kind: str = "png", dpi: int = 150) -> bytes:
    """Return a figure as the bytes of a file.

    Parameters
    ----------
    figure
        A figure of this package.
    kind
        `png`, `pdf` or another format of matplotlib.
    dpi
        Dots per inch of raster parts; 150 gives a width of 1,500 pixels.

    Examples
    --------
    >>> encode(Figure())[1:4]
    b'PNG'
    """
    buffer = io.BytesIO()
    # Without a date in the PDF, the same results give the same bytes.
    metadata = {"CreationDate": None} if kind == "pdf" else None
    with matplotlib.rc_context(RC_PARAMS):
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=metadata)
    return buffer.getvalue()
