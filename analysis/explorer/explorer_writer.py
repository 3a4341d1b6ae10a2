"""The writing of an explorer of samples, into a study or a folder elsewhere.

Map: `write_explorer`, `Explorer`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from sampimp.analysis.explorer.choice import MEGABYTES, Choice
from sampimp.analysis.explorer.explored_study import check_runs, choose_histories, open_study
from sampimp.analysis.explorer.explorer_folder import (
    PAGE_FILE,
    ExplorerFolder,
    read_application,
    read_asked,
)
from sampimp.analysis.explorer.node_parts import NodeParts, measure_node
from sampimp.analysis.explorer.thinning import choose_thinning
from sampimp.errors import require_package
from sampimp.schema import __version__
from sampimp.store.location import Folder
from sampimp.store.plan_files import require_plan

FORMAT = 1
"""Version of the data that the page reads."""
EXPLORE = "analysis/explore"
"""Where an explorer is, in a study."""


class Explorer(NamedTuple):
    """What was written."""

    folder: Folder
    bytes: int
    """Size of the folder."""
    changes: int
    """Number of files that were written or removed."""
    runs: int
    """Number of runs that it shows."""
    planned: int
    histories: int
    """Number of runs whose course over the epochs it shows."""
    notes: list[str]
    """What was left out, in sentences."""
    damaged: list[str]
    """What could not be read."""

    @property
    def page(self) -> str:
        """Path or URL of the page."""
        return str(self.folder / PAGE_FILE)


def write_explorer(
    out: str,
    *,
    to: str | None = None,
    runs: Sequence[str] = (),
    nodes: Sequence[str] = (),
    megabytes: float = MEGABYTES,
    keep: bool = False,
    has_report: bool | None = None,
    progress: Callable[[str], None] | None = None,
) -> Explorer:
    """Write the explorer of a study, or bring it up to date.

    Parameters
    ----------
    out
        The study's folder or `s3://` URL.
    to
        Folder of the explorer; by default `analysis/explore` in the study.
    runs
        Names of the runs whose histories are written, as "shuffle-seed1" or "shuffle:1", or "all".
        Default: the first committed run, with shuffle, seed 1 before the others.
    nodes
        Nodes of the cube; by default all.
    megabytes
        Size that the folder stays below: epochs of histories are left out first, then samples.
    keep
        Whether an explorer that is there keeps the runs, nodes and size that it was asked for.
    has_report
        Whether the page refers to the report of the study; by default, if there is one.
    progress
        Called with a few words before each step.

    Returns
    -------
    Explorer
        The path of the page, and what was written and left out.

    Raises
    ------
    UserError
        There is no study at `out`, a run or node is not in it, or the folder cannot be written to.
    """
    for package in ("PIL.Image", "scipy"):
        require_package(package, "report")
    show_progress = progress or (lambda _: None)
    show_progress("opening the cube")
    home = Folder.of(out)
    folder = home / EXPLORE if to is None else Folder.of(to)
    named = tuple(name.replace(":", "-seed") for name in runs)  # as other commands name them
    choice = Choice(named, tuple(nodes), float(megabytes))
    if keep and (asked := read_asked(folder)) is not None:
        choice = Choice.of(asked, require_plan(home))
    study = open_study(out, choice.nodes)
    runs, megabytes = choice.runs, choice.megabytes
    check_runs(study, runs)
    files = ExplorerFolder(folder, home if to is None else None)
    histories = [choose_histories(node, runs) for node in study.nodes]
    expected = [
        sum("all" in runs or name in runs for name in node.planned) if runs else 1
        for node in study.nodes
    ]
    show_progress("choosing what is shown")
    sizes = [
        measure_node(node, count, chosen)
        for node, count, chosen in zip(study.nodes, expected, histories, strict=True)
    ]
    page_bytes = sum(map(len, read_application().values()))
    thinning = choose_thinning(sizes, megabytes - page_bytes / 1e6)
    entries = []
    for node, chosen in zip(study.nodes, histories, strict=True):
        parts = NodeParts(node, files, thinning, show_progress)
        notes = [*thinning.notes(megabytes), *parts.notes()]
        entries.append(parts.write(chosen) | {"notes": notes, "damaged": parts.damaged})
    if has_report is None:
        has_report = "report.html" in (home / "analysis").files()
    show_progress("writing the page")
    names = ", ".join(node.name for node in study.nodes)
    files.finish(
        {
            "kind": "study",
            "format": FORMAT,
            "version": __version__,
            "title": f"sample importance of {names}",
            "root": study.root,
            "written": study.time,
            "asked": choice._asdict(),
            "report": "../report.html" if has_report and to is None else None,
            "nodes": entries,
        }
    )
    return Explorer(
        folder=folder,
        bytes=folder.size(),
        changes=files.changes,
        runs=sum(len(node.runs) for node in study.nodes),
        planned=sum(len(node.planned) for node in study.nodes),
        histories=sum(map(len, histories)),
        notes=list(dict.fromkeys(note for entry in entries for note in entry["notes"])),
        damaged=[words for entry in entries for words in entry["damaged"]],
    )
