"""The report as one HTML page that loads nothing from elsewhere.

The layout is in the Jinja templates of `templates/`, which escape all text (autoescape), and in
`page.css`, which the page includes. This module prepares the values for them. Text is shown without
the paths of the machine (`page_text.hide_paths`).

Map: `render_page`.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from sampimp.analysis.figures import dark_colors, strategy_name
from sampimp.analysis.influence_runs import INFLUENCE, RETRAIN
from sampimp.analysis.report.contents import (
    VERDICT_MARKS,
    Section,
    claim_rows,
    join_values,
    strategy_rows,
)
from sampimp.analysis.report.findings import count_verdicts, write_findings
from sampimp.analysis.report.method_table import method_table
from sampimp.analysis.report.page_text import anchor, hide_paths
from sampimp.analysis.report.sample_strip import RankedSample, SampleStrip, write_share
from sampimp.analysis.report.strategy_dots import place_dots
from sampimp.analysis.report.subset_table import subset_tables
from sampimp.analysis.report.trial_facts import flatten
from sampimp.analysis.runs import PAPER
from sampimp.analysis.subset_runs import SUBSET
from sampimp.errors import require_package

LONGEST_OPEN_LIST = 30
"""A group of provenance with more entries is folded (arbitrary)."""

EXPLORER = "explore/index.html"
"""The explorer of the study, relative to the page."""


def render_page(
    sections: Sequence[Section], provenance: Mapping[str, Any], *, has_explorer: bool = False
) -> str:
    """Return the report as one self-contained HTML file.

    Parameters
    ----------
    sections
        One for each node of the cube.
    provenance
        Attributes of the tree, and facts about the trials.
    has_explorer
        Link to the explorer and to samples in it; else its command is shown.
    """
    require_package("jinja2", "report")
    import jinja2

    def finalize(value: Any) -> Any:
        """Return a value as a template shows it: markup as it is, text without paths."""
        return value if hasattr(value, "__html__") else hide_paths(str(value))

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sampimp.analysis.report"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=finalize,
    )
    node = sections[0].name if sections else "mnist"
    example = environment.get_template("read_cube.py.j2").render(
        node=repr(node), result=repr(f"OUT/analysis/{node}/decomposition.zarr")
    )
    return environment.get_template("page.html").render(
        names=join_values([section.name for section in sections]),
        paper=PAPER,
        sections=[_section_values(section, has_explorer) for section in sections],
        provenance=_provenance_groups(provenance),
        has_provenance=bool(provenance),
        longest_open_list=LONGEST_OPEN_LIST,
        explorer=EXPLORER if has_explorer else "",
        dark_colors=dark_colors(figure.svg for section in sections for figure in section.figures),
        example=example,
    )


def _section_values(section: Section, has_explorer: bool) -> dict[str, Any]:
    """Return the values of one section for the templates."""
    claims: list[dict[str, Any]] = [dict(claim) for claim in claim_rows(section.results)]
    for number, claim in enumerate(claims, 1):
        claim["symbol"], claim["style"], _ = VERDICT_MARKS.get(claim["verdict"], ("", "open", ""))
        claim["anchor"] = f"{anchor(section.name)}-claim-{number}"
    return {
        "name": section.name,
        "anchor": anchor(section.name),
        "facts": [*section.facts, *([("claims", count_verdicts(claims))] if claims else [])],
        "status": _status(dict(section.facts)),
        "findings": write_findings(claims),
        "strip": _strip_values(section, section.strip, has_explorer) if section.strip else {},
        "plot": place_dots(strategy_rows(section.results)),
        "strategy_name": strategy_name,
        "claims": claims,
        "figures": section.drawn,
        "influence_figures": section.drawn_influence,
        "methods": method_table(section.results),
        "influence_command": INFLUENCE,
        "retrain_command": RETRAIN,
        "subset_figures": section.drawn_subsets,
        "subsets": subset_tables(section.results),
        "claims_5": [claim for claim in claims if claim["section"] == "5"],
        "subset_command": SUBSET,
    }


def _status(facts: Mapping[str, str]) -> str:
    """Return in one line how much was run."""
    keys = ("training samples", "epochs", "trials committed", "of these diverged")
    return " · ".join(f"{key}: {facts[key]}" for key in keys if key in facts)


def _strip_values(section: Section, strip: SampleStrip, has_explorer: bool) -> dict[str, Any]:
    """Return the two ends of the ranking, with a link of each sample."""

    def describe(sample: RankedSample) -> dict[str, Any]:
        share = write_share(sample.share)
        link = f"{EXPLORER}#node={quote(section.name, safe='')}&select={sample.position}"
        return {
            "label": sample.label,
            "share": share,
            "title": f"sample {sample.position}, class {sample.label}"
            + (f", {sample.file}: " if sample.file else ": ")
            + (f"{share} % of the importance" if share != "—" else "no importance"),
            "row": sample.row,
            "position": sample.position,
            "link": link if has_explorer else "",
        }

    return {
        "run": strip.run,
        "ends": [
            (
                words,
                write_share(sum(sample.share for sample in samples)),
                [describe(sample) for sample in samples],
            )
            for words, samples in (("most", strip.most), ("least", strip.least))
        ],
        "sprite": base64.b64encode(strip.sprite).decode("ascii"),
        "columns": max(1, len(strip.most)),
        "aspect": f"{strip.width} / {strip.height}",
        "is_small": strip.width <= 40,
    }


def _provenance_groups(
    provenance: Mapping[str, Any],
) -> list[tuple[str, list[tuple[str, Any]]]]:
    """Return (title, entries) of each group; the first, of values outside all groups, untitled."""
    groups = {key: value for key, value in provenance.items() if isinstance(value, Mapping)}
    alone = {key: value for key, value in provenance.items() if key not in (*groups, "study")}
    entries = {"": dict(flatten(alone))}
    entries |= {key.replace("_", " "): dict(flatten(value)) for key, value in groups.items()}
    return [(title, list(values.items())) for title, values in entries.items() if values]
