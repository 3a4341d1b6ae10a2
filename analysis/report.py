"""The report of a study: every analysis, all figures and one page that needs nothing but itself.

`write_report` opens the cube, lets `sampimp.analysis.analyse.analyse` compute what it allows for
each data
set, and writes under `OUT/analysis/NODE/` the results (Zarr, one a result) and the figures (PNG and
PDF), and last `OUT/analysis/report.html`. What cannot be computed (parameters not stored, too few
seeds, a study still running) is said in its place. `OUT` is a folder or an `s3://` URL: `_Writer`
is the one place that writes.

    python -m sampimp.analysis.report OUT [--scheduler threads|distributed|ray]

Map: `write_report` (all of it), `Report` and `Section` (what it found), `FIGURES` and
`draw_figures` (which figure from which result), `render_page` (the HTML), `summary_table` and
`print_summary` (the terminal), `main` (the command line).
"""

import base64
import html
import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import numpy as np
import tyro
import xarray as xr
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sampimp.analysis import figures
from sampimp.analysis.analyse import analyse
from sampimp.analysis.runs import short_name
from sampimp.analysis.schedulers import Scheduler, use_scheduler
from sampimp.errors import RecordError, UserError
from sampimp.store.cube import open_cube
from sampimp.store.location import Folder
from sampimp.store.plan import read_commits, read_plan
from sampimp.store.zarr_arrays import zarr_store

__all__ = [
    "FIGURES",
    "Drawn",
    "Report",
    "Section",
    "describe_runs",
    "draw_figures",
    "find_cubes",
    "main",
    "print_summary",
    "render_page",
    "strategy_rows",
    "summary_table",
    "write_report",
]

PAPER = 'Gao & Jojic, "Sample Importance in Training Deep Neural Networks" (2017)'

VERDICTS = {
    "holds": ("✓", "holds", "green"),
    "does not hold": ("✗", "fails", "red"),
    "not enough data": ("?", "open", "yellow"),
}
"""Verdict of a claim: its symbol, its style on the page, its colour on the terminal."""

PER_TRIAL = (
    *("curves", "dataset", "digests", "diverged_epoch", "epochs", "fingerprint", "order_seed"),
    *("plan", "reference", "seconds", "seed", "strategy"),
)
"""What trial.json and COMMIT.json say of one trial alone, or the cube says already."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one figure comes from one result.

    Attributes
    ----------
    number
        The figure's number in the paper.
    name
        Of its files.
    title
        The question that it answers.
    result
        The key of `sampimp.analysis.analyse.analyse`'s dictionary.
    needs
        Variables without which there is nothing to see.
    caption
        What is seen; the method is added from the result's attributes.
    missing
        What has to be there for it, said where it is not.
    optional
        True for a figure that is passed over in silence where its result is not there.
    """

    number: str
    name: str
    title: str
    result: str
    needs: tuple[str, ...]
    caption: str
    missing: str
    optional: bool = False


FIGURES = (
    Plan(
        number="1",
        name="fig01_stability",
        title="Are the same samples important whatever the initialisation?",
        result="stability",
        needs=("rank_correlation",),
        caption="Rank correlation of sample importance between two initialisations, epoch by "
        "epoch, for all layers together (above) and for each layer (below). Left, the "
        "initialisations see one and the same sequence of batches; right, each has its own.",
        missing="two seeds of a reference strategy (shuffle or shuffle_by_seed)",
    ),
    Plan(
        number="1b",
        name="fig01b_snapshot_stability",
        title="The same, of all samples at the end of an epoch",
        result="snapshot_stability",
        needs=("rank_correlation",),
        caption="As Fig. 1, for snapshot importance: every sample at the parameters of the end of "
        "an epoch, instead of each at the step that used it.",
        missing="snapshot importance",
        optional=True,
    ),
    Plan(
        number="2",
        name="fig02_decomposition",
        title="When, in which layer and for which class does the learning happen?",
        result="decomposition",
        needs=("importance_by_layer", "importance_by_class"),
        caption="Importance of all samples summed, by epoch and layer (above) and by class "
        "within a layer (below). An axis is logarithmic where its values span a factor of ten.",
        missing="a complete run of shuffle",
    ),
    Plan(
        number="3",
        name="fig03_groups",
        title="How unequally is importance shared out?",
        result="importance_groups",
        needs=("importance_by_group", "share", "share_by_layer"),
        caption="Samples ranked by overall importance: the top 10 %, the next 10 % and the other "
        "80 %. Above, what each group contributes by epoch and layer; below, the share of the "
        "importance that it holds in all layers together and in each.",
        missing="a complete run of shuffle, seed 1",
    ),
    Plan(
        number="4",
        name="fig04_nll",
        title="Are hard samples important samples?",
        result="importance_against_nll",
        needs=("rank_correlation", "overall_importance", "final_nll"),
        caption="Left, the rank correlation of an epoch's sample importance with the negative "
        "log-likelihood (NLL). Right, each sample's importance over the whole run against its NLL "
        "after the last epoch; both axes are logarithmic.",
        missing="a complete run of shuffle, seed 1, with its NLL",
    ),
    Plan(
        number="5",
        name="fig05_clusters",
        title="Which kinds of samples are there within one class?",
        result="clusters",
        needs=("profile", "size", "nll_quantile"),
        caption="Samples of one class clustered by when and where they were important, a row a "
        "cluster: samples nearest to its centre, its importance by epoch (across) and layer "
        "(down), and the NLL of its samples after the last epoch.",
        missing="a complete run of shuffle, seed 1, and more samples in a class than clusters",
    ),
    Plan(
        number="7",
        name="fig07_curves",
        title="Does the order of the batches matter?",
        result="strategy_curves",
        needs=("train_error", "test_error"),
        caption="Error on the training samples (left) and on the test samples (right), mean over "
        "the initialisations with one standard error. Red crosses mark where a run diverged.",
        missing="at least one epoch of a run",
    ),
    Plan(
        number="8",
        name="fig08_paths",
        title="Do the strategies take the network to different places?",
        result="parameter_paths",
        needs=("path", "explained_variance_ratio"),
        caption="All parameters of the network after every epoch, projected on their principal "
        "components. All strategies start from one initialisation (ring); large markers are ends.",
        missing="the parameters of the runs (stored unless switched off)",
    ),
    Plan(
        number="9",
        name="fig09_class_nll",
        title="What does each strategy do to each class?",
        result="strategy_curves",
        needs=("class_nll", "train_error", "test_error"),
        caption="A block a strategy, all on the same scales: error curves (above) and the mean NLL "
        "of each class of training samples (below), mean over the initialisations.",
        missing="at least one epoch of a run, with its NLL",
    ),
    Plan(
        number="10",
        name="fig10_histogram",
        title="How is overall importance distributed?",
        result="importance_histogram",
        needs=("count", "bin_edge"),
        caption="Number of samples by importance over the whole run. The horizontal axis is "
        "logarithmic; lines mark the share of samples that lie below.",
        missing="a complete run of shuffle, seed 1",
    ),
)
"""Every figure of the paper; 5 and 6 are one kind, of a class of MNIST and of CIFAR-10."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A figure of the report: its files, or the reason that there are none."""

    number: str
    name: str
    title: str
    caption: str
    png: bytes = b""
    pdf: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Section:
    """What was found about one node of the cube.

    Attributes
    ----------
    name
        Its path in the tree, such as `mnist` or `mnist/cnn`.
    facts
        What was run, as words: (name, value).
    results
        Of `sampimp.analysis.analyse.analyse`, in memory.
    drawn
        The figures.
    """

    name: str
    facts: Sequence[tuple[str, str]]
    results: Mapping[str, xr.Dataset]
    drawn: Sequence[Drawn] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """Where the report is and what it says."""

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
        With the path or URL of the page; `print_summary` shows it on a terminal.

    Raises
    ------
    UserError
        If there is no study at `out`, nothing of it is recorded yet, or it cannot be written to.
    """
    say = progress or (lambda _: None)
    say("opening the cube")
    tree = open_cube(out)
    cubes = find_cubes(tree)
    if not cubes:
        raise RecordError(
            "a study with at least one recorded epoch",
            "none that holds `importance`",
            str(out),
            "let the study run on (the same command continues it), then ask for the report again",
        )
    writer = _Writer(out)
    planned = _count_planned(out)
    sections = []
    for name, cube in cubes.items():
        say(f"{name}: analysing")
        with warnings.catch_warnings():
            # The mean of no runs at all is NaN, which is what is meant.
            warnings.filterwarnings("ignore", "Mean of empty|Degrees of freedom|invalid value")
            found = {key: result.compute() for key, result in analyse(cube).items()}
        for key, result in found.items():
            writer.write_dataset(f"{name}/{key}.zarr", result)
        drawn = draw_figures(cube, found, partial(_say_of, say, name))
        for figure in drawn:
            if figure.png:
                writer.write_bytes(f"{name}/{figure.name}.png", figure.png)
                writer.write_bytes(f"{name}/{figure.name}.pdf", figure.pdf)
        sections.append(
            Section(
                name=name,
                facts=describe_runs(cube, found, planned.get(name)),
                results=found,
                drawn=drawn,
            )
        )
    say("writing the page")
    provenance = {**_plain(tree.attrs), **_describe_trials(out)}
    page = render_page(sections, provenance, out)
    path = writer.write_bytes("report.html", page.encode())
    return Report(path=path, sections=sections, provenance=provenance)


def _say_of(say: Callable[[str], None], name: str, words: str) -> None:
    say(f"{name}: {words}")


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


class _Writer:
    """The one place that writes: `OUT/analysis` in a folder or a bucket."""

    def __init__(self, out: str) -> None:
        self._folder = Folder.of(out) / "analysis"
        self._folder.check_writable()  # now, and not after an hour's analysis

    def write_bytes(self, path: str, data: bytes) -> str:
        """Write a file and return its full path or URL."""
        self._folder.write_bytes(path, data)
        return str(self._folder / path)

    def write_dataset(self, path: str, dataset: xr.Dataset) -> None:
        """Write a result as a Zarr group, in place of an earlier one."""
        plain = dataset.copy()
        plain.attrs = _plain(dataset.attrs)
        for variable in plain.variables.values():
            variable.encoding = {}
        with warnings.catch_warnings():
            # Zarr 3.1 says of text that its type is not in the specification of version 3 yet.
            warnings.filterwarnings("ignore", ".*specification.*")
            # Removed first: mode="w" leaves empty folders, which Zarr then warns of one by one.
            (self._folder / path).remove()
            plain.to_zarr(zarr_store(self._folder), group=path, mode="w", consolidated=False)


def draw_figures(
    cube: xr.Dataset,
    results: Mapping[str, xr.Dataset],
    say: Callable[[str], None] = lambda _: None,
) -> list[Drawn]:
    """Draw what the results allow, and say of the others what they would need.

    Parameters
    ----------
    cube
        The node that the results are of: for its images and the names of its classes.
    results
        Of `sampimp.analysis.analyse.analyse`.
    say
        Called before each figure.

    Returns
    -------
    list of Drawn
        In the order of `FIGURES`.
    """
    drawn = []
    why = _left_out(results)
    for plan in FIGURES:
        result = results.get(plan.result)
        number, name = plan.number, plan.name
        if number == "5" and short_name(cube).startswith("cifar"):
            number, name = "6", "fig06_clusters"
        if result is None or not _drawable(result, plan.needs):
            if not plan.optional:
                caption = f"Not enough data for this figure. It needs {plan.missing}."
                if plan.result in why:
                    caption += f" The analysis says: {why[plan.result]}."
                drawn.append(Drawn(number=number, name=name, title=plan.title, caption=caption))
            continue
        say(f"drawing figure {number}")
        figure = _draw(plan, result, cube)
        png = figures.encode(figure, "png")
        figure.set_layout_engine("none")  # laid out by now: the PDF need not do it again
        drawn.append(
            Drawn(
                number=number,
                name=name,
                title=plan.title,
                caption=_caption(plan, result),
                png=png,
                pdf=figures.encode(figure, "pdf"),
            )
        )
    return drawn


def _left_out(results: Mapping[str, xr.Dataset]) -> dict[str, str]:
    """Return why results are missing, by key, in the words of `analyse`."""
    lines = results["claims"].attrs.get("left_out", "") if "claims" in results else ""
    pairs = (line.partition(": ") for line in str(lines).splitlines())
    return {key: reason.rstrip(".") for key, _, reason in pairs}


def _draw(plan: Plan, result: xr.Dataset, cube: xr.Dataset) -> Figure:
    names = [str(name) for name in cube.attrs.get("class_names", ())]
    match plan.number:
        case "1" | "1b":
            return figures.draw_stability(result)
        case "2":
            return figures.draw_decomposition(result, names)
        case "3":
            return figures.draw_groups(result)
        case "4":
            return figures.draw_importance_against_nll(result)
        case "5":
            return figures.draw_clusters(result, _images(cube, result))
        case "7":
            return figures.draw_curves(result)
        case "8":
            return figures.draw_paths(result)
        case "9":
            return figures.draw_class_nll(result, names)
        case _:
            return figures.draw_histogram(result)


def _drawable(result: xr.Dataset, needs: Sequence[str]) -> bool:
    """Tell whether the variables are there and each has something finite to show."""
    return all(
        name in result and bool(np.isfinite(result[name].values.astype(float)).any())
        for name in needs
    )


def _caption(plan: Plan, result: xr.Dataset) -> str:
    """Say what is seen, of what, how it was computed, and where the paper has it."""
    parts = [plan.caption]
    if "class_name" in result.attrs:
        parts.append(f"Class: {result.attrs['class_name']}.")
    for title, key in (("Method", "method"), ("Source", "source")):
        if key in result.attrs:
            parts.append(f"{title}: {str(result.attrs[key]).rstrip('.')}.")
    return " ".join(parts)


def _images(cube: xr.Dataset, clusters: xr.Dataset) -> xr.DataArray | None:
    """Read the images of the clusters' representatives; white where a cluster has too few."""
    if "image" not in cube or "representative" not in clusters:
        return None
    chosen = clusters["representative"].transpose("cluster", "rank").values
    there = np.isfinite(chosen) & (chosen >= 0)
    samples = np.unique(chosen[there]).astype(int)
    if not samples.size:
        return None
    image = cube["image"].transpose("sample", "row", "column", "channel")
    # The samples are read sorted and once: a lazy image is one read a chunk.
    read = (image.sel if "sample" in image.coords else image.isel)(sample=samples).values
    pictures = np.full((*chosen.shape, *read.shape[1:]), 255, np.uint8)
    pictures[there] = read[np.searchsorted(samples, chosen[there].astype(int))]
    return xr.DataArray(pictures, dims=("cluster", "rank", "row", "column", "channel"))


def strategy_rows(results: Mapping[str, xr.Dataset]) -> list[StrategyRow]:
    """Return each strategy's test error after the last epoch, its runs and the diverged ones.

    Parameters
    ----------
    results
        Of `sampimp.analysis.analyse.analyse`; `strategy_curves` is read.
    """
    curves = results.get("strategy_curves")
    if curves is None or "test_error" not in curves:
        return []
    rows = []
    for strategy in curves["strategy"].values:
        here = curves.sel(strategy=strategy)
        last = here.isel(epoch=-1)
        started = int(np.nanmax(here["runs"].values, initial=0)) if "runs" in here else 0
        rows.append(
            StrategyRow(
                strategy=str(strategy),
                mean=float(last["test_error"]),
                error=float(last["test_error_se"]) if "test_error_se" in here else float("nan"),
                runs=int(np.nan_to_num(last["runs"].item())) if "runs" in here else 0,
                started=started,
                diverged=int(here["diverged"].item()) if "diverged" in here else 0,
            )
        )
    return rows


def describe_runs(
    cube: xr.Dataset, results: Mapping[str, xr.Dataset], planned: int | None = None
) -> list[tuple[str, str]]:
    """Return what was run, as words: (name, value).

    Parameters
    ----------
    cube
        One node of the cube.
    results
        Of `sampimp.analysis.analyse.analyse`.
    planned
        Trials of the plan, where it is known.
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
        ("layers", _list(cube["layer"].values)),
        ("strategies", _list(map(figures.strategy_name, map(str, cube["strategy"].values)), 12)),
        ("seeds", _list(np.atleast_1d(cube["seed"].values), 10)),
        ("epochs", f"{cube.sizes['epoch']:,}"),
        ("trials committed", f"{committed}" + (f" of {planned} planned" if planned else "")),
        ("of these diverged", str(diverged)),
    ]
    scale = cube["importance"].attrs
    for key in ("learning_rate", "batch_size", "loss_reduction", "weight_decay", "optimizer"):
        if key in scale:
            facts.append((key.replace("_", " "), str(scale[key])))
    if scale.get("optimizer") in ("Adam", "AdamW"):
        facts.append(
            (
                "mind",
                "the first epoch's sums can hang on a few parameters of its first steps, at which "
                "Adam is almost a sign; compare epochs from the second on",
            )
        )
    return facts


def _count_planned(out: str) -> Counter[str]:
    """Return how many trials the plan has for each data set."""
    plan = read_plan(Folder.of(out))
    return Counter(trial.dataset for trial in plan.trials()) if plan else Counter()


def _describe_trials(out: str) -> dict[str, Any]:
    """Return what the committed trials say of machine and versions, and each one's fingerprint."""
    folder = Folder.of(out) / "trials"
    commits = read_commits(Folder.of(out))
    with ThreadPoolExecutor(16) as pool:  # an object store answers in tens of milliseconds
        words = pool.map(lambda trial: folder.read_json(f"{trial}/trial.json") or {}, commits)
        plans = dict(zip(commits, words, strict=True))
    told: dict[str, dict[str, Any]] = {}
    fingerprints = {}
    for trial, commit in sorted(commits.items()):
        seconds = sum(commit.get("seconds", ()))
        entry = [str(commit.get("fingerprint", "")), f"{commit.get('epochs', '?')} epochs"]
        if commit.get("diverged_epoch") is not None:
            entry.append(f"diverged in epoch {commit['diverged_epoch']}")
        fingerprints[trial] = ", ".join([*entry, f"{seconds:.0f} s"])
        whole = {**plans[trial], **commit}
        identity = {key: value for key, value in whole.items() if key not in PER_TRIAL}
        for key, value in _flatten(identity):
            told.setdefault(key, {})[str(value)] = value
    # Most is said alike by all trials; what differs is listed, once each.
    groups: dict[str, Any] = {}
    for key, values in told.items():
        group, _, rest = key.partition(".")
        place = (group, rest) if rest else ("trials", group)
        groups.setdefault(place[0], {})[place[1]] = _list(values, 12)
    if fingerprints:
        groups["fingerprints"] = fingerprints
    return groups


def _list(values: Iterable[Any], most: int = 8) -> str:
    """Return values as words, the middle left out if there are many."""
    names = [str(value) for value in values]
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:2])} … {names[-1]} ({len(names)})"


def _claims(results: Mapping[str, xr.Dataset]) -> list[dict[str, str]]:
    """Return the claims as rows of text; `value` is the number without its interval."""
    claims = results.get("claims")
    if claims is None:
        return []
    keys = ("section", "sentence", "scope", "number", "rule", "verdict")
    rows = []
    for index in range(claims.sizes.get("claim", 0)):
        one = claims.isel(claim=index)
        row = {key: str(one[key].item()) if key in one else "" for key in keys}
        row["scope"] = "" if row["scope"] in ("", "all") else f"about {row['scope']} only"
        value = float(one["value"]) if "value" in one else np.nan
        row["value"] = f"{value:.3g}" if np.isfinite(value) else "—"
        row["number"] = row["number"] if row["number"] not in ("", "none") else "—"
        rows.append(row)
    return rows


def _plain(value: Any) -> Any:
    """Return attributes as plain values that JSON can hold; JSON inside a string is opened."""
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


STYLE = """
:root { --ink:#1d232a; --soft:#5b6570; --line:#dfe4e9; --tint:#f5f7f9; --link:#0b5c9e; }
* { box-sizing:border-box; }
html { -webkit-text-size-adjust:100%; }
body { margin:0; color:var(--ink); background:#fff; line-height:1.55;
  font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",Arial,sans-serif; }
main { max-width:1060px; margin:0 auto; padding:2.5rem 1.25rem 4rem; }
h1 { font-size:2rem; line-height:1.2; margin:0 0 .3rem; }
h2 { font-size:1.5rem; margin:3rem 0 .8rem; padding-top:1.2rem; border-top:2px solid var(--ink); }
h3 { font-size:1.12rem; margin:2.2rem 0 .6rem; }
h4 { margin:1.4rem 0 .4rem; font-size:1rem; }
p, ul { max-width:46rem; margin:.5rem 0; }
a { color:var(--link); }
.lead, .note, figcaption, caption { color:var(--soft); }
.lead { font-size:1.08rem; }
nav { margin:1.4rem 0; display:flex; flex-wrap:wrap; gap:.3rem 1.2rem; }
.cards { display:grid; grid-template-columns:repeat(auto-fit,minmax(20rem,1fr)); gap:1rem;
  margin:1.5rem 0; }
.card { border:1px solid var(--line); border-radius:8px; padding:1rem 1.2rem;
  background:var(--tint); }
.card h3 { margin:0 0 .5rem; }
dl { display:grid; grid-template-columns:minmax(8rem,max-content) 1fr; gap:.15rem 1rem; margin:0; }
dt { color:var(--soft); } dd { margin:0; overflow-wrap:anywhere; }
table { border-collapse:collapse; width:100%; margin:.8rem 0; font-size:.95rem; }
caption { text-align:left; padding:.2rem 0 .5rem; font-size:.92rem; }
th, td { text-align:left; vertical-align:top; padding:.5rem .7rem;
  border-bottom:1px solid var(--line); }
thead th { border-bottom:2px solid var(--ink); white-space:nowrap; }
td.number, th.number { text-align:right; font-variant-numeric:tabular-nums; white-space:nowrap; }
table.narrow { max-width:46rem; }
.small { font-size:.85rem; color:var(--soft); display:block; }
.verdict { white-space:nowrap; font-weight:600; border-radius:99px; padding:.1rem .65rem;
  display:inline-block; border:1px solid; }
.holds { color:#00563e; background:#e3f5ee; } .fails { color:#8a2f00; background:#fdebe1; }
.open { color:#4d555d; background:#eef0f2; }
figure { margin:1.6rem 0 2.6rem; } figure img { width:100%; height:auto; display:block; }
figcaption { max-width:52rem; font-size:.93rem; margin-top:.6rem; }
.absent { border:1px dashed #b9c1c9; border-radius:8px; padding:1rem 1.2rem; color:var(--soft); }
pre { background:var(--tint); border:1px solid var(--line); border-radius:8px; padding:1rem;
  overflow-x:auto; font-size:.88rem; line-height:1.5; }
code { font-family:ui-monospace,"DejaVu Sans Mono",Menlo,monospace; font-size:.88em;
  overflow-wrap:anywhere; }
details { margin:.6rem 0; } summary { cursor:pointer; }
.wide { overflow-x:auto; }
@media (max-width:640px) {
  main { padding:1.2rem .9rem; } h1 { font-size:1.6rem; }
  .cards { grid-template-columns:1fr; } dl { grid-template-columns:minmax(6rem,40%) 1fr; }
  table.stack thead { display:none; } table.stack td { display:block; border:0; padding:.2rem 0; }
  table.stack tr { display:block; border-bottom:1px solid var(--line); padding:.7rem 0; }
}
@media print {
  body { font-size:10.5pt; } main { max-width:none; padding:0; } nav { display:none; }
  h2 { break-before:page; border:0; } h2.first { break-before:auto; }
  tr, .card, figure { break-inside:avoid; } h3 { break-after:avoid; }
  figure img { max-height:22cm; object-fit:contain; object-position:left; }
}
"""


def render_page(sections: Sequence[Section], provenance: Mapping[str, Any], out: str) -> str:
    """Return the report as one HTML file that asks for nothing from outside.

    Parameters
    ----------
    sections
        One for each node of the cube.
    provenance
        The tree's attributes.
    out
        Where the study is; shown, and used in the snippet that reads the cube.
    """
    links = "".join(f'<a href="#{_slug(one.name)}">{_text(one.name)}</a>' for one in sections)
    names = _list([one.name for one in sections])
    body = [
        "<header><h1>Sample importance: the study</h1>",
        f'<p class="lead">Which training samples shaped the network, in which layer, and when? '
        f"The study of {_text(PAPER)} on {_text(names)}, with our numbers and a verdict on each of "
        "the paper's claims.</p></header>",
        f'<nav>{links}<a href="#provenance">Provenance</a><a href="#words">Words and units</a>'
        '<a href="#cube">Reading the cube</a></nav>',
        '<div class="cards">',
        *(_render_card(section) for section in sections),
        "</div>",
        *(_render_section(section, first=not index) for index, section in enumerate(sections)),
        _render_provenance(provenance, out),
        WORDS,
        _render_snippet(sections, out),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # A page without an icon would be asked for one when it is served.
        '<link rel="icon" href="data:,">'
        f"<title>Sample importance: {_text(names)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{chr(10).join(body)}\n</main></body></html>\n"
    )


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _slug(name: str) -> str:
    return "data-" + "".join(letter if letter.isalnum() else "-" for letter in name)


def _render_card(section: Section) -> str:
    rows = "".join(f"<dt>{_text(key)}</dt><dd>{_text(value)}</dd>" for key, value in section.facts)
    claims = _claims(section.results)
    counts = ", ".join(
        f"{sum(row['verdict'] == verdict for row in claims)} {verdict}" for verdict in VERDICTS
    )
    found = f"<dt>claims</dt><dd>{_text(counts)}</dd>" if claims else ""
    return f'<div class="card"><h3>{_text(section.name)}</h3><dl>{rows}{found}</dl></div>'


def _render_section(section: Section, *, first: bool) -> str:
    mark = ' class="first"' if first else ""
    return "\n".join(
        [
            f'<section><h2 id="{_slug(section.name)}"{mark}>{_text(section.name)}</h2>',
            "<h3>Strategies</h3>",
            _render_strategies(section),
            "<h3>The paper's claims</h3>",
            _render_claims(section),
            *(_render_figure(section.name, drawn) for drawn in section.drawn),
            "</section>",
        ]
    )


def _render_strategies(section: Section) -> str:
    rows = strategy_rows(section.results)
    if not rows:
        return '<p class="absent">No strategy has finished an epoch yet.</p>'
    lines = "".join(
        f"<tr><td>{_text(figures.strategy_name(row.strategy))}</td>"
        f'<td class="number">{_text(row.words)}</td><td class="number">{row.runs}</td>'
        f'<td class="number">{row.diverged or "—"}</td></tr>'
        for row in rows
    )
    return (
        '<div class="wide"><table class="narrow"><caption>Error on the test samples after the last '
        "epoch, mean ± standard error over the runs that reached it. A diverged run is not in the "
        "mean, and it is not run again: that it diverges is the finding.</caption>"
        '<thead><tr><th>Strategy</th><th class="number">Test error</th>'
        '<th class="number">Runs</th><th class="number">Diverged</th></tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _render_claims(section: Section) -> str:
    rows = _claims(section.results)
    if not rows:
        return '<p class="absent">No claim could be judged: not enough has been run.</p>'
    lines = []
    for row in rows:
        symbol, style, _ = VERDICTS.get(row["verdict"], ("", "open", ""))
        scope = f'<span class="small">{_text(row["scope"])}</span>' if row["scope"] else ""
        lines.append(
            f"<tr><td>{_text(row['section'])}</td><td>{_text(row['sentence'])}{scope}</td>"
            f"<td>{_text(row['number'])}</td>"
            f'<td><span class="verdict {style}">{symbol} {_text(row["verdict"])}</span></td>'
            f'<td><span class="small">{_text(row["rule"])}</span></td></tr>'
        )
    return (
        '<div class="wide"><table class="stack"><caption>Each claim with our number and its 95 % '
        "interval, the verdict, and the rule that decides it: where the interval straddles the "
        "threshold, there is not enough data.</caption>"
        "<thead><tr><th>§</th><th>Claim</th><th>Our number</th><th>Verdict</th><th>Rule</th></tr>"
        f"</thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _render_figure(section: str, drawn: Drawn) -> str:
    title = f"<h3>Fig. {_text(drawn.number)}: {_text(drawn.title)}</h3>"
    if not drawn.png:
        return f'{title}<p class="absent">{_text(drawn.caption)}</p>'
    data = base64.b64encode(drawn.png).decode("ascii")
    return (
        f'{title}<figure><img alt="{_text(drawn.title)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{_text(drawn.caption)} File: <code>analysis/{_text(section)}/"
        f"{_text(drawn.name)}.pdf</code></figcaption></figure>"
    )


def _render_provenance(provenance: Mapping[str, Any], out: str) -> str:
    parts = ['<section><h2 id="provenance">Provenance</h2>']
    groups = {key: value for key, value in provenance.items() if isinstance(value, Mapping)}
    alone = {key: value for key, value in provenance.items() if key not in groups}
    parts.append(_definitions({"study": out} | dict(_flatten(alone))))
    for key, value in groups.items():
        flat = dict(_flatten(value))
        title = _text(key.replace("_", " "))
        if len(flat) > 30:
            parts.append(
                f"<details><summary>{title} ({len(flat)} entries)</summary>"
                f"{_definitions(flat)}</details>"
            )
        else:
            parts.append(f"<h4>{title}</h4>{_definitions(flat)}")
    if not provenance:
        parts.append('<p class="absent">The cube carries no provenance.</p>')
    return "\n".join([*parts, "</section>"])


def _definitions(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<dt>{_text(key)}</dt><dd><code>{_text(value)}</code></dd>"
        for key, value in values.items()
    )
    return f"<dl>{rows}</dl>"


def _flatten(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """Return nested mappings as dotted names; a list of plain values stays one value."""
    if isinstance(value, Mapping) and value:
        return [
            pair
            for key, item in value.items()
            for pair in _flatten(item, f"{name}.{key}" if name else str(key))
        ]
    if isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        return [
            pair for index, item in enumerate(value) for pair in _flatten(item, f"{name}[{index}]")
        ]
    if isinstance(value, list):
        return [(name, ", ".join(map(str, value)))]
    return [(name, value)]


WORDS = """<section><h2 id="words">Words and units</h2>
<p><b>Importance</b> of a sample, in a layer and at an epoch: how far one training step moves the
layer's parameters because of this sample, squared (unit: parameter²). Summed over the layers it is
<b>model importance</b>, and over the epochs as well <b>overall importance</b>. It is taken at the
very step that used the sample, once an epoch.</p>
<p><b>NLL</b>: negative log-likelihood in nats, of every training sample at the end of each
epoch.</p>
<p><b>Strategies.</b> <i>shuffle</i> draws new batches every epoch, in one and the same sequence for
all initialisations; <i>shuffle by seed</i> gives each its own. The other seven fix the batches for
the whole run: <i>Rand</i> at random; <i>NLO</i> sorted by final NLL, low first; <i>RNLO</i> the
same batches in reverse; <i>NLM</i> spreads the sorted samples over all batches; <i>SIO</i>,
<i>RSIO</i> and <i>SIM</i> do the same by overall importance.</p></section>"""


def _render_snippet(sections: Sequence[Section], out: str) -> str:
    node = sections[0].name if sections else "mnist"
    code = f"""import sampimp
import xarray as xr
from sampimp.store.location import Folder
from sampimp.store.zarr_arrays import zarr_store

tree = sampimp.open_cube({str(out)!r})   # lazy: nothing is read yet
cube = tree[{node!r}]
print(cube)

# importance of every sample in the reference run, all layers and epochs together
beta = cube["importance"].sel(strategy="shuffle", seed=1)
tau = beta.sum(["layer", "epoch"], skipna=False).compute()
print(tau.sortby(tau, ascending=False)[:10])   # the ten most important samples

# a result of this report, in a folder or a bucket
result = Folder.of({f"{str(out).rstrip('/')}/analysis/{node}/decomposition.zarr"!r})
print(xr.open_zarr(zarr_store(result), consolidated=False))
"""
    return (
        '<section><h2 id="cube">Reading the cube</h2><p>Everything above comes from one labelled '
        "cube: strategy, seed, epoch, layer, sample. A trial that is missing, unfinished or past "
        f"its divergence reads as NaN.</p><pre><code>{_text(code)}</code></pre></section>"
    )


def summary_table(section: Section) -> Group:
    """Return a section for a terminal: its strategies and the verdict on each claim.

    Nothing is wider than 80 columns asks for: sentences wrap within their own column.

    Parameters
    ----------
    section
        Of `write_report`'s `Report`.
    """
    strategies = Table(box=SIMPLE_HEAD, pad_edge=False)
    strategies.add_column("strategy")
    strategies.add_column("test error (mean ± s.e.)", justify="right")
    strategies.add_column("runs", justify="right")
    strategies.add_column("diverged", justify="right")
    for row in strategy_rows(section.results):
        strategies.add_row(
            Text(figures.strategy_name(row.strategy)),
            row.words,
            str(row.runs),
            Text(str(row.diverged), style="bold red") if row.diverged else Text("—", style="dim"),
        )
    claims = Table(box=SIMPLE_HEAD, pad_edge=False)
    claims.add_column("§", no_wrap=True)
    claims.add_column("claim", ratio=1)
    claims.add_column("ours", justify="right", no_wrap=True)
    claims.add_column("verdict", no_wrap=True)
    for claim in _claims(section.results):
        symbol, _, color = VERDICTS.get(claim["verdict"], ("", "", "white"))
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
    """Print every section's strategies and verdicts, then where the report is.

    Parameters
    ----------
    report
        Of `write_report`.
    console
        Where to; standard output by default.
    """
    console = console or Console()
    for section in report.sections:
        console.print(summary_table(section))
    # soft_wrap: a path that is cut into lines cannot be copied.
    console.print(Text.assemble(("Report: ", "bold"), report.path), soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, or 2 for a mistake that can be mended."""

    def report(
        out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
        /,
        scheduler: Scheduler = "threads",
        scheduler_address: str | None = None,
    ) -> tuple[str, Scheduler, str | None]:
        """Analyse a study and write its results, figures and report.html.

        Parameters
        ----------
        out
            The study's folder or s3:// URL; all is written into its folder `analysis`.
        scheduler
            Where dask computes; its results are the same.
        scheduler_address
            Of a cluster that runs; else DASK_SCHEDULER_ADDRESS or RAY_ADDRESS, else one is started.
        """
        return out, scheduler, scheduler_address

    out, scheduler, address = tyro.cli(
        report, prog="python -m sampimp.analysis.report", args=arguments
    )
    notes = Console(stderr=True)
    try:
        with use_scheduler(scheduler, address), notes.status("") as status:
            found = write_report(out, progress=status.update)
    except UserError as error:
        notes.print(Text(str(error)), soft_wrap=True)
        return 2
    print_summary(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
