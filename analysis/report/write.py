"""The writing of a report: results, figures and page, into `OUT/analysis` of a folder or bucket.

Map: `write_report`, `find_cubes`.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from sampimp.analysis.influence_runs import has_influence
from sampimp.analysis.report.contents import Drawn, Report, Section, describe_runs
from sampimp.analysis.report.drawing import FIGURES, draw_figures
from sampimp.analysis.report.figure_plan import FigurePlan
from sampimp.analysis.report.influence_figures import INFLUENCE_FIGURES
from sampimp.analysis.report.page import render_page
from sampimp.analysis.report.page_text import anchor
from sampimp.analysis.report.sample_rows import row_reader
from sampimp.analysis.report.sample_strip import SampleStrip, rank_samples
from sampimp.analysis.report.subset_figures import SUBSET_FIGURES
from sampimp.analysis.report.trial_facts import count_planned, describe_trials
from sampimp.analysis.results.analyse import analyse
from sampimp.analysis.subset_runs import has_subsets
from sampimp.errors import RecordError, require_package
from sampimp.store.cube import open_cube
from sampimp.store.location import Folder
from sampimp.store.manifests import remove_manifest, write_manifest
from sampimp.store.zarr_arrays import zarr_store


def write_report(out: str, *, progress: Callable[[str], None] | None = None) -> Report:
    """Analyse a study, and write results, figures and page into it.

    Parameters
    ----------
    out
        The study's folder or `s3://` URL.
    progress
        Called with a few words before each step.

    Returns
    -------
    Report
        With the path or URL of the page; `print_summary` prints it on a terminal.

    Raises
    ------
    UserError
        There is no study at `out`, it has no recorded epoch yet, `out` cannot be written to, or a
        package of the extra `report` is not installed.
    """
    for package in ("jinja2", "scipy", "sklearn"):  # before the analysis, which may take an hour
        require_package(package, "report")
    report_progress = progress or (lambda _: None)
    report_progress("opening the cube")
    tree = open_cube(out)
    cubes = find_cubes(tree)
    if not cubes:
        raise RecordError(
            "a study with at least one recorded epoch",
            "none that holds `importance`",
            str(out),
            "let the study run on (the same command continues it), then ask for the report again",
        )
    folder = _AnalysisFolder(out)
    planned = count_planned(out)
    sections = []
    for name, cube in cubes.items():
        strip = rank_samples(cube, row_reader(out, name))
        sections.append(
            _write_section(name, cube, planned.get(name), strip, folder, report_progress)
        )
    report_progress("writing the page")
    facts = describe_trials(out)
    has_explorer = "index.html" in (Folder.of(out) / "analysis" / "explore").files()
    attributes = {key: value for key, value in _plain(tree.attrs).items() if key not in facts}
    provenance = {**attributes, **facts}
    page = render_page(sections, provenance, has_explorer=has_explorer)
    path = folder.write_bytes("report.html", page.encode())
    write_manifest(Folder.of(out), "analysis")
    return Report(path=path, sections=sections, provenance=provenance)


def _write_section(
    name: str,
    cube: xr.Dataset,
    planned: int | None,
    strip: SampleStrip | None,
    folder: "_AnalysisFolder",
    report_progress: Callable[[str], None],
) -> Section:
    """Compute and write the results and figures of one node, and return its section."""
    report_progress(f"{name}: analysing")
    with warnings.catch_warnings():
        # The mean over no runs is NaN, as intended.
        warnings.filterwarnings("ignore", "Mean of empty|Degrees of freedom|invalid value")
        results = {key: result.compute() for key, result in analyse(cube).items()}
    for key, result in results.items():
        folder.write_dataset(f"{name}/{key}.zarr", result)

    def report_drawing(words: str) -> None:
        report_progress(f"{name}: {words}")

    def draw(plans: Sequence[FigurePlan]) -> list[Drawn]:
        return draw_figures(cube, results, report_drawing, plans, anchor(name))

    drawn = draw(FIGURES)
    drawn_influence = draw(INFLUENCE_FIGURES) if has_influence(cube) else []
    drawn_subsets = draw(SUBSET_FIGURES) if has_subsets(cube) else []
    section = Section(
        name=name,
        facts=describe_runs(cube, results, planned),
        results=results,
        drawn=drawn,
        drawn_influence=drawn_influence,
        drawn_subsets=drawn_subsets,
        strip=strip,
    )
    for figure in section.figures:
        if figure.png:
            folder.write_bytes(f"{name}/{figure.name}.png", figure.png)
            folder.write_bytes(f"{name}/{figure.name}.pdf", figure.pdf)
    return section


def find_cubes(tree: xr.DataTree) -> dict[str, xr.Dataset]:
    """Return the nodes that hold `importance`, by their path.

    Examples
    --------
    >>> cube = xr.Dataset({"importance": ("sample", [1.0])})
    >>> list(find_cubes(xr.DataTree.from_dict({"/mnist": cube, "/mnist/cnn": cube})))
    ['mnist', 'mnist/cnn']
    """
    return {
        node.path.strip("/") or "study": node.to_dataset()
        for node in tree.subtree
        if "importance" in node.data_vars
    }


class _AnalysisFolder:
    """`OUT/analysis` of a folder or bucket, checked to be writable."""

    def __init__(self, out: str) -> None:
        self._folder = Folder.of(out) / "analysis"
        self._folder.check_writable()  # before the analysis, which may take an hour
        remove_manifest(Folder.of(out), "analysis")

    def write_bytes(self, path: str, data: bytes) -> str:
        """Write a file and return its full path or URL."""
        self._folder.write_bytes(path, data, durable=False)  # `write_manifest` waits for the disk
        return str(self._folder / path)

    def write_dataset(self, path: str, dataset: xr.Dataset) -> None:
        """Write a result as a Zarr group, replacing an earlier one."""
        plain = dataset.copy()
        plain.attrs = _plain(dataset.attrs)
        for variable in plain.variables.values():
            variable.encoding = {}
        with warnings.catch_warnings():
            # Zarr 3.1 warns that its text type is not yet in the specification of version 3.
            warnings.filterwarnings("ignore", ".*specification.*")
            # Removed first: mode="w" leaves empty folders, and Zarr warns of each of them.
            (self._folder / path).remove()
            plain.to_zarr(zarr_store(self._folder), group=path, mode="w", consolidated=False)


def _plain(value: Any) -> Any:
    """Return attributes as values that JSON can hold, with JSON inside a string decoded."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, str) and value[:1] in ("{", "["):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value if isinstance(value, str | int | float | bool | None) else str(value)
