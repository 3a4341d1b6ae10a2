"""Status of a study: a grid of its trials per data set, then details of single trials.

python sweeps/status.py OUT               from the store alone, while the study runs or later
python sweeps/status.py OUT --verify      also compare every byte with its digest
python sweeps/status.py OUT --withdraw    and take damaged trials out, to be trained again

`sampimp status` is the same command. Its exit codes: 0 if nothing is wrong, 1 if something is
damaged or cannot be read, 2 for a mistake that the user can correct, 3 if trials failed and nothing
is damaged. A study that is unfinished and has no failed trial has exit code 0.

Map: `main`, `show_status`; `describe`, `print_grid` and `describe_records`, the parts of its
output. The states come from `sampimp.sweeps.inspection`, and damage from
`sampimp.sweeps.verification`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sampimp.errors import UserError, printable
from sampimp.store.location import Folder
from sampimp.store.plan_files import require_plan
from sampimp.sweeps.door import run_door
from sampimp.sweeps.inspection import (
    STATES,
    RecordStatus,
    Status,
    inspect,
    inspect_records,
)
from sampimp.sweeps.quantities import format_bytes, format_count
from sampimp.sweeps.verification import Findings, verify_study, withdraw_damaged

SYMBOLS: Mapping[str, tuple[str, str, str]] = {
    "done": ("✓", "+", "green"),
    "diverged": ("∞", "~", "magenta"),
    "running": ("▶", ">", "cyan"),
    "stopped": ("■", "=", "yellow"),
    "failed": ("✗", "x", "bold red"),
    "waiting": ("·", ".", "dim"),
    "blocked": ("○", "o", "yellow"),
    "unreadable": ("?", "?", "bold red"),
}
"""Of each state its symbol, its symbol where the terminal has ASCII only, and its style."""

LABELS = 6
"""Trials named in a line; the grid has all of them (arbitrary)."""

FAILED = 3
"""Exit code of a study with failed trials."""

_HELP = """Show the status of a study, read from its store alone.

Examples:
  {prog} results/digits              the state of each trial
  {prog} s3://bucket/mnist --verify  also read and check every byte

Exit code:
  0  nothing is wrong; the study may be unfinished
  1  a file of a trial cannot be read; something is damaged, or is another study than
     --root says (--verify)
  2  a mistake that you can correct
  3  trials failed, and nothing is damaged
  130  interrupted by Ctrl-C, 143 by SIGTERM"""


def describe(folder: Folder, statuses: Sequence[Status], console: Console) -> None:
    """Print the counts, a grid per data set, and a line for each state that has details."""
    counts = Counter(status.state for status in statuses)
    words = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    console.print(str(folder), markup=False, highlight=False)
    console.print(f"{format_count(len(statuses), 'trials')}: {words}", highlight=False)
    for dataset in dict.fromkeys(status.trial.config.dataset for status in statuses):
        console.print()
        here = [status for status in statuses if status.trial.config.dataset == dataset]
        print_grid(dataset, here, console)
    legend = Text("  ").join(
        Text.assemble(_symbol(state, console), f" {state}") for state in STATES if counts[state]
    )
    console.print()
    console.print(legend)
    for state in STATES:
        detailed = [status for status in statuses if status.state == state and status.detail]
        for detail, labels in _grouped(detailed).items():
            more = f" and {len(labels) - LABELS} more" if labels[LABELS:] else ""
            words = f"{', '.join(labels[:LABELS])}{more} {detail}"
            line = printable(f"  {state:<10} {words}")
            console.print(line, markup=False, highlight=False)
    if counts["failed"]:
        console.print("The traceback of a failure is in trials/ID/errors/ATTEMPT.json.")


def describe_records(records: Sequence[RecordStatus], console: Console) -> None:
    """Print how many records of influence, retraining and subsets there are, and the unfinished."""
    if not records:
        return
    kinds = Counter(record.kind for record in records)
    states = Counter(record.state for record in records)
    console.print()
    console.print(
        f"{len(records)} records of influence, retraining and subsets "
        f"({', '.join(f'{count} {kind}' for kind, count in kinds.items())}): "
        f"{', '.join(f'{count} {state}' for state, count in states.items())}",
        highlight=False,
    )
    for record in records:
        if record.detail:
            words = printable(f"  {record.state:<10} {record.name} {record.detail}")
            console.print(words, markup=False, highlight=False)
    if states["failed"]:
        console.print("The traceback of a failure is in influence/ID/errors/ATTEMPT.json.")


def print_grid(dataset: str, statuses: Sequence[Status], console: Console) -> None:
    """Print a symbol for each trial of a data set: a row per strategy, a column per seed.

    Seeds that do not fit in the width of the terminal continue in a second grid below.
    """
    states = {
        (status.trial.config.strategy, status.trial.config.seed): status.state
        for status in statuses
    }
    strategies = list(dict.fromkeys(strategy for strategy, _ in states))
    seeds = sorted({seed for _, seed in states})
    first = max(map(len, (*strategies, dataset)))
    column = max(len(str(seed)) for seed in seeds) + 1
    fitting = max(1, (console.width - first - 1) // column)
    for start in range(0, len(seeds), fitting):
        shown = seeds[start : start + fitting]
        grid = Table(box=None, padding=(0, 0, 0, 1), pad_edge=False, header_style="bold")
        grid.add_column(Text(dataset), width=first, no_wrap=True)
        for seed in shown:
            grid.add_column(str(seed), justify="right", width=column - 1, no_wrap=True)
        for strategy in strategies:
            row = (states.get((strategy, seed)) for seed in shown)
            grid.add_row(strategy, *(_symbol(state, console) if state else "" for state in row))
        console.print(grid)


def _symbol(state: str, console: Console) -> Text:
    symbol, ascii_symbol, style = SYMBOLS[state]
    return Text(ascii_symbol if console.options.ascii_only else symbol, style=style)


def _grouped(statuses: Sequence[Status]) -> dict[str, list[str]]:
    """Return the labels of trials by their detail: all that one reference blocks, for instance."""
    groups: dict[str, list[str]] = {}
    for status in statuses:
        groups.setdefault(status.detail, []).append(status.trial.label)
    return groups


def show_status(
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    /,
    verify: bool = False,
    withdraw: bool = False,
    root: str | None = None,
    workers: Annotated[int, tyro.conf.arg(metavar="N")] = 4,
    done_file: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    size: bool = False,
) -> int:
    """Show the status of a study, read from its store alone; return the exit code.

    Parameters
    ----------
    out
        The study's folder or s3:// URL.
    verify
        Also read every byte and compare it with its digest. Nothing is written into the study.
    withdraw
        Verify, and take what is damaged out of the study, as far as it can be made again: the
        same commands then make it again.
    root
        Verify, and compare the root of the study with this one, which was published.
    workers
        Number of files that are read at a time (--verify).
    done_file
        A file outside of the study that lists what was verified: with it, an interrupted
        verification continues (--verify).
    size
        Also add up the size of the study, which lists each of its files.
    """
    console = Console(soft_wrap=True)
    folder = Folder.of(out)
    plan = require_plan(folder)
    statuses = inspect(folder, plan)
    records = inspect_records(folder, plan)
    describe(folder, statuses, console)
    describe_records(records, console)
    if size:
        with console.status("Adding up its size"):
            text = format_bytes(folder.size())
        console.print(text, highlight=False)
    if verify or withdraw or root:
        findings = verify_study(folder, plan, console, workers=workers, done_file=done_file)
        if findings.damaged and withdraw:
            withdraw_damaged(folder, findings, console)
        elif findings.damaged:
            console.print("--withdraw takes out of the study what can be made again.")
        if findings.damaged or not _is_root(findings, root, console):
            return 1
    states = {status.state for status in statuses} | {record.state for record in records}
    if "unreadable" in states:
        return 1
    return FAILED if "failed" in states else 0


def _is_root(findings: Findings, root: str | None, console: Console) -> bool:
    """Return whether the root is the one that was published; print it if it is not."""
    if root is None or root == findings.root:
        return True
    console.print(f"[bold]It is another study[/], or was changed: expected {root}.")
    return False


def main(arguments: list[str], prog: str = "status.py") -> int:
    """Run the command line; return its exit code, which `--help` lists."""
    try:
        command = tyro.conf.configure(tyro.conf.FlagCreatePairsOff)(show_status)
        return tyro.cli(command, args=arguments, prog=prog, description=_HELP.format(prog=prog))
    except UserError as error:
        Console(stderr=True, soft_wrap=True).print(str(error), style="red", markup=False)
        return 2


if __name__ == "__main__":
    run_door(main)
