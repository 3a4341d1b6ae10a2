"""The contents of a report, before they are laid out as a page or a terminal summary.

Map: `Report`, `Section` (one node of the cube), `Drawn` (a figure), `StrategyRow`; `strategy_rows`,
`claim_rows` and `describe_runs` read a section's tables from its results (of sections 4 and 5, the
modules `method_table` and `subset_table`); `VERDICT_MARKS` (symbols and colours), `join_values` (a
list in words).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from sampimp.analysis.figures import strategy_name
from sampimp.analysis.report.sample_strip import SampleStrip

VERDICT_MARKS = {
    "holds": ("✓", "holds", "green"),
    "does not hold": ("✗", "fails", "red"),
    "not enough data": ("?", "open", "yellow"),
}
"""Verdict of a claim: its symbol, its CSS class on the page, its colour on the terminal."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A figure of the report: its files, or (in `caption`) the reason that there are none.

    `svg` is an element for the page.
    """

    number: str
    name: str
    title: str
    caption: str
    png: bytes = b""
    pdf: bytes = b""
    svg: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """The report on one node of the cube.

    Attributes
    ----------
    name
        Path of the node in the tree, such as `mnist` or `mnist/cnn`.
    facts
        What was run: (name, value).
    results
        Results of `analyse`, in memory.
    drawn
        The figures of the paper.
    drawn_influence
        The figures of section 4; none if no influence was computed.
    drawn_subsets
        The figures of section 5; none if no subset was trained on.
    strip
        The most and the least important samples; None without a complete run.
    """

    name: str
    facts: Sequence[tuple[str, str]]
    results: Mapping[str, xr.Dataset]
    drawn: Sequence[Drawn] = ()
    drawn_influence: Sequence[Drawn] = ()
    drawn_subsets: Sequence[Drawn] = ()
    strip: SampleStrip | None = None

    @property
    def figures(self) -> list[Drawn]:
        """All figures."""
        return [*self.drawn, *self.drawn_influence, *self.drawn_subsets]


@dataclass(frozen=True, kw_only=True)
class Report:
    """The path or URL of a report, and its contents."""

    path: str
    sections: Sequence[Section]
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StrategyRow:
    """A strategy's outcome: test error as a fraction, over the runs that reached the last epoch."""

    strategy: str
    mean: float
    error: float
    runs: int
    started: int
    diverged: int

    @property
    def words(self) -> str:
        """The test error with its standard error, in per cent."""
        if not np.isfinite(self.mean):
            return "—"
        if not np.isfinite(self.error):
            return f"{100 * self.mean:.2f} %"
        return f"{100 * self.mean:.2f} ± {100 * self.error:.2f} %"


def strategy_rows(results: Mapping[str, xr.Dataset]) -> list[StrategyRow]:
    """Return each strategy's test error after the last epoch, its runs and the diverged ones.

    Parameters
    ----------
    results
        Results of `analyse`; only `strategy_curves` is read.
    """
    curves = results.get("strategy_curves")
    if curves is None or "test_error" not in curves:
        return []
    rows = []
    for strategy in curves["strategy"].values:
        curve = curves.sel(strategy=strategy)
        last = curve.isel(epoch=-1)
        started = int(np.nanmax(curve["runs"].values, initial=0)) if "runs" in curve else 0
        rows.append(
            StrategyRow(
                strategy=str(strategy),
                mean=float(last["test_error"]),
                error=float(last["test_error_se"]) if "test_error_se" in curve else float("nan"),
                runs=int(np.nan_to_num(last["runs"].item())) if "runs" in curve else 0,
                started=started,
                diverged=int(curve["diverged"].item()) if "diverged" in curve else 0,
            )
        )
    return rows


def claim_rows(results: Mapping[str, xr.Dataset]) -> list[dict[str, str]]:
    """Return the claims as rows of text; `value` is the number without its interval.

    Parameters
    ----------
    results
        Results of `analyse`; only `claims` is read.
    """
    claims = results.get("claims")
    if claims is None:
        return []
    keys = ("section", "sentence", "short", "scope", "number", "finding", "rule", "verdict")
    rows = []
    for index in range(claims.sizes.get("claim", 0)):
        claim = claims.isel(claim=index)
        row = {key: str(claim[key].item()) if key in claim else "" for key in keys}
        row["scope"] = "" if row["scope"] in ("", "all") else f"about {row['scope']} only"
        value = float(claim["value"]) if "value" in claim else np.nan
        row["value"] = f"{value:.3g}" if np.isfinite(value) else "—"
        row["number"] = row["number"] if row["number"] not in ("", "none") else "—"
        rows.append(row)
    return rows


def describe_runs(
    cube: xr.Dataset, results: Mapping[str, xr.Dataset], planned: int | None = None
) -> list[tuple[str, str]]:
    """Return what was run, as text: (name, value).

    Parameters
    ----------
    cube
        One node of the cube.
    results
        Results of `analyse`.
    planned
        Number of trials in the plan, if known.
    """
    rows = strategy_rows(results)
    classes = len(cube.attrs.get("class_names", ())) or len(np.unique(cube["label"].values))
    diverged = sum(row.diverged for row in rows)
    if "trial" in cube:
        committed = int(np.count_nonzero(cube["trial"].values != ""))
    else:
        committed = sum(row.runs for row in rows) + diverged
    facts = [
        ("data set", str(cube.attrs.get("dataset", "not recorded"))),
        ("training samples", f"{cube.sizes['sample']:,} in {classes} classes"),
        ("layers", join_values(cube["layer"].values)),
        ("strategies", join_values(map(strategy_name, map(str, cube["strategy"].values)), 12)),
        ("seeds", join_values(np.atleast_1d(cube["seed"].values), 10)),
        ("epochs", f"{cube.sizes['epoch']:,}"),
        ("trials committed", f"{committed}" + (f" of {planned} planned" if planned else "")),
        ("of these diverged", str(diverged)),
    ]
    scale = cube["importance"].attrs
    names = ("learning_rate", "batch_size", "loss_reduction", "weight_decay", "optimizer")
    for key in (*names, "activation"):
        if key in scale:
            facts.append((key.replace("_", " "), str(scale[key])))
    if scale.get("optimizer") in ("Adam", "AdamW"):
        facts.append(
            (
                "note",
                "sums over the first epoch can depend on a few parameters in its first steps, in "
                "which Adam's update is almost the gradient's sign; compare epochs from the second "
                "on",
            )
        )
    return facts


def join_values(values: Iterable[Any], most: int = 8) -> str:
    """Return values separated by commas; of more than `most`, the first two, the last, the count.

    Examples
    --------
    >>> join_values([1, 2, 3]), join_values(range(20))
    ('1, 2, 3', '0, 1 … 19 (20)')
    """
    names = [str(value) for value in values]
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:2])} … {names[-1]} ({len(names)})"
