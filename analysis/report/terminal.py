"""The report as a summary on the terminal.

Map: `summary_table` (one section), `print_summary` (all sections and the report's path).
"""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sampimp.analysis.figures import strategy_name
from sampimp.analysis.report.contents import (
    VERDICT_MARKS,
    Report,
    Section,
    claim_rows,
    strategy_rows,
)


def summary_table(section: Section) -> Group:
    """Return a section's strategies and the verdict on each claim, as tables for a terminal.

    The tables fit into 80 columns: sentences wrap within their own column.

    Parameters
    ----------
    section
        A section of `write_report`'s `Report`.
    """
    strategies = Table(box=SIMPLE_HEAD, pad_edge=False)
    strategies.add_column("strategy")
    strategies.add_column("test error (mean ± s.e.)", justify="right")
    strategies.add_column("runs", justify="right")
    strategies.add_column("diverged", justify="right")
    for row in strategy_rows(section.results):
        strategies.add_row(
            Text(strategy_name(row.strategy)),
            row.words,
            str(row.runs),
            Text(str(row.diverged), style="bold red") if row.diverged else Text("—", style="dim"),
        )
    claims = Table(box=SIMPLE_HEAD, pad_edge=False)
    claims.add_column("§", no_wrap=True)
    claims.add_column("claim", ratio=1)
    claims.add_column("ours", justify="right", no_wrap=True)
    claims.add_column("verdict", no_wrap=True)
    for claim in claim_rows(section.results):
        symbol, _, color = VERDICT_MARKS.get(claim["verdict"], ("", "", "white"))
        claims.add_row(
            Text(claim["section"]),
            Text(claim["sentence"]),
            claim["value"],
            Text(f"{symbol} {claim['verdict']}", style=color),
        )
    parts: list[Any] = [Text(section.name, style="bold"), strategies]
    if claims.row_count:
        parts.append(claims)
    else:
        parts.append(Padding(Text("No claim could be judged yet.", style="dim"), (0, 0, 1, 0)))
    return Group(*parts)


def print_summary(report: Report, console: Console | None = None) -> None:
    """Print every section's strategies and verdicts, then the path of the report.

    Parameters
    ----------
    report
        The report that `write_report` returns.
    console
        Console to print to. Default: standard output.
    """
    console = console or Console()
    for section in report.sections:
        console.print(summary_table(section))
    # soft_wrap: a path that is broken into lines cannot be copied.
    console.print(Text.assemble(("Report: ", "bold"), report.path), soft_wrap=True)
