"""The report as one HTML page that loads nothing from elsewhere.

The layout is in the Jinja templates of `templates/`, which escape all text (autoescape), and in
`page.css`, which the page includes. This module prepares the values for them.

Map: `render_page`.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from sampimp.analysis.figures import strategy_name
from sampimp.analysis.influence_runs import INFLUENCE, RETRAIN
from sampimp.analysis.report.contents import (
    VERDICT_MARKS,
    Drawn,
    Section,
    claim_rows,
    join_values,
    strategy_rows,
)
from sampimp.analysis.report.method_table import method_table
from sampimp.analysis.report.subset_table import subset_tables
from sampimp.analysis.report.trial_facts import flatten
from sampimp.analysis.runs import PAPER
from sampimp.analysis.subset_runs import SUBSET
from sampimp.errors import require_package

LONGEST_OPEN_LIST = 30
"""A group of provenance with more entries is folded (arbitrary)."""


def render_page(sections: Sequence[Section], provenance: Mapping[str, Any], out: str) -> str:
    """Return the report as one self-contained HTML file.

    Parameters
    ----------
    sections
        One for each node of the cube.
    provenance
        Attributes of the tree, and facts about the trials.
    out
        Location of the study; it is shown, and used in the example that reads the cube.
    """
    require_package("jinja2", "report")
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sampimp.analysis.report"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    node = sections[0].name if sections else "mnist"
    example = environment.get_template("read_cube.py.j2").render(
        out=repr(str(out)),
        node=repr(node),
        result=repr(f"{str(out).rstrip('/')}/analysis/{node}/decomposition.zarr"),
    )
    return environment.get_template("page.html").render(
        names=join_values([section.name for section in sections]),
        paper=PAPER,
        sections=[_section_values(section) for section in sections],
        provenance=_provenance_groups(provenance, out),
        has_provenance=bool(provenance),
        longest_open_list=LONGEST_OPEN_LIST,
        example=example,
    )


def _section_values(section: Section) -> dict[str, Any]:
    """Return the values of one section for the templates."""
    claims = claim_rows(section.results)
    for claim in claims:
        claim["symbol"], claim["style"], _ = VERDICT_MARKS.get(claim["verdict"], ("", "open", ""))
    counts = ", ".join(
        f"{sum(claim['verdict'] == verdict for claim in claims)} {verdict}"
        for verdict in VERDICT_MARKS
    )
    return {
        "name": section.name,
        "anchor": _anchor(section.name),
        "facts": [*section.facts, *([("claims", counts)] if claims else [])],
        "strategies": [
            {"name": strategy_name(row.strategy), "row": row}
            for row in strategy_rows(section.results)
        ],
        "claims": claims,
        "figures": _figure_values(section.drawn),
        "influence_figures": _figure_values(section.drawn_influence),
        "methods": method_table(section.results),
        "influence_command": INFLUENCE,
        "retrain_command": RETRAIN,
        "subset_figures": _figure_values(section.drawn_subsets),
        "subsets": subset_tables(section.results),
        "claims_5": [claim for claim in claims if claim["section"] == "5"],
        "subset_command": SUBSET,
    }


def _figure_values(drawn: Sequence[Drawn]) -> list[dict[str, Any]]:
    """Return figures with their images as text."""
    return [
        {"figure": figure, "data": base64.b64encode(figure.png).decode("ascii")} for figure in drawn
    ]


def _anchor(name: str) -> str:
    """Return the HTML id of a section."""
    return "data-" + "".join(letter if letter.isalnum() else "-" for letter in name)


def _provenance_groups(
    provenance: Mapping[str, Any], out: str
) -> list[tuple[str, list[tuple[str, Any]]]]:
    """Return (title, entries) of each group; the first, of values outside all groups, untitled."""
    groups = {key: value for key, value in provenance.items() if isinstance(value, Mapping)}
    alone = {key: value for key, value in provenance.items() if key not in groups}
    entries = {"": {"study": out} | dict(flatten(alone))}
    entries |= {key.replace("_", " "): dict(flatten(value)) for key, value in groups.items()}
    return [(title, list(values.items())) for title, values in entries.items()]
