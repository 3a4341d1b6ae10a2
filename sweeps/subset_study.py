"""Which samples suffice: from the request to the units of work, and the smallest size by bisection.

    rules x sizes x budgets x seeds     trainings on subsets, judged on the test set
    rules x sizes x budgets             the same on the validation split, two seeds: it chooses the
                                        parameters of rules, and the rule `chosen`
    full                                all samples, for the study's epochs and to convergence

Map: `SubsetRequest`; `prepare_subsets`; `next_sizes` (of the bisection); `export_subsets`.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from sampimp.data import Dataset, scale_inputs
from sampimp.errors import ConfigError, DataError, MissingDataError
from sampimp.schema import ALL_SAMPLES, SUBSET_BUDGETS, digest
from sampimp.store.cube import open_cube
from sampimp.store.influence_layouts import INFLUENCE_FOLDER
from sampimp.store.location import Folder
from sampimp.store.plan import Plan, PlannedTrial, read_commits, require_plan
from sampimp.store.subset_choice import crossing
from sampimp.subsets.metagradient import SURROGATE_STEPS
from sampimp.subsets.rules import BASELINES, SelectionRule, parse_rule
from sampimp.subsets.training import CONVERGENCE
from sampimp.subsets.validation import validation_samples
from sampimp.sweeps.derived_study import DerivedStudy
from sampimp.sweeps.influence_study import measure_reverse_epoch
from sampimp.sweeps.run_choice import check_replayable, choose_runs
from sampimp.sweeps.subset_units import Comparison, SubsetUnits
from sampimp.sweeps.subset_work import SCORE_KINDS, write_scores
from sampimp.sweeps.work import Unit

ROUND_EPOCHS = 4.5
"""Time of a round of a search, in trainings of its surrogate (measured)."""

PRECISION = 1.1
"""Ratio of two sizes at which a bisection ends (arbitrary)."""


@dataclass(frozen=True, kw_only=True)
class SubsetRequest:
    """What to compare."""

    rules: tuple[str, ...]
    """As in `sampimp.subsets.rules`; random and balanced are always added."""
    sizes: tuple[float, ...]
    """Shares of the samples."""
    seeds: tuple[int, ...]
    runs: tuple[str, ...]
    """As for `sampimp.sweeps.run_choice.choose_runs`: the runs whose scores select."""
    model: str | None = None
    """The study's network, if it is a user's own."""
    parsed: tuple[SelectionRule, ...] = field(init=False)
    """The rules, with the baselines first; of scores:FILE the file's stem and digest."""
    files: dict[str, np.ndarray] = field(init=False)
    """The values of each file of scores, by its rule."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a rule, size or seed that cannot be."""
        rules, files = [], {}
        for rule in map(parse_rule, dict.fromkeys((*BASELINES, *self.rules))):
            if rule.name == "scores":
                values = _read_file(rule.argument)
                stem = re.sub(r"[^A-Za-z0-9]+", "_", Path(rule.argument).stem)
                rule = parse_rule(f"scores:{stem}-{digest(values)[:8]}")
                files[rule.spec] = values
            rules.append(rule)
        object.__setattr__(self, "parsed", tuple(rules))
        object.__setattr__(self, "files", files)
        wrong = [size for size in self.sizes if not 0 < size < 1]
        if wrong or not self.sizes or len(set(self.sizes)) < len(self.sizes):
            raise ConfigError(
                expected="sizes between 0 and 1, each once; all samples are always compared",
                got=", ".join(f"{size:g}" for size in (wrong or self.sizes)) or "none",
                where="option --sizes",
                todo="name shares of the samples, such as 0.05 0.1 0.3",
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ConfigError(
                expected="one or more seeds of 0 or above, each once",
                got=", ".join(map(str, self.seeds)) or "none",
                where="option --seeds",
                todo="name seeds such as 1 2 3 4 5",
            )

    def comparisons(self) -> list[Comparison]:
        """Return every rule at every size."""
        return [
            Comparison(rule=rule.spec, size=size) for size in self.sizes for rule in self.parsed
        ]


def prepare_subsets(
    folder: Folder, request: SubsetRequest, comparisons: Sequence[Comparison] | None = None
) -> DerivedStudy:
    """Check a request against its study; return the units of work.

    Parameters
    ----------
    folder
        The study's store.
    request
        What to compare.
    comparisons
        Which part of it, or other sizes. Default: every rule at every size.

    Raises
    ------
    UserError
        There is no study, a run is unknown or has diverged, a size is below one sample a class, or
        a rule's scores are missing.
    """
    plan = require_plan(folder)
    trials = plan.resolve(read_commits(folder))
    positions = choose_runs(plan, trials, request.runs)
    keys = list(dict.fromkeys(plan.trials()[position].dataset for position in positions))
    sources = check_replayable(folder, plan, keys, request.model)
    data = {key: scale_inputs(sources[key], plan.training.input_scaling) for key in keys}
    comparisons = request.comparisons() if comparisons is None else comparisons
    for key in keys:
        _check_sizes(plan, key, data[key], comparisons)
    scores = {
        (trials[position].config.dataset, rule.spec): _own_scores(
            folder, plan, trials[position], rule, request.files
        )
        for position in positions
        for rule in request.parsed
        if rule.score is not None and rule.score not in SCORE_KINDS
    }
    stored = {key: write_scores(folder, values) for key, values in scores.items()}
    units = SubsetUnits(
        folder,
        plan,
        positions,
        comparisons=comparisons,
        seeds=request.seeds,
        scores=stored,
    )

    @cache
    def epoch_seconds(key: str) -> float:
        return measure_reverse_epoch(plan, key, data[key], ())

    def step_seconds(unit: Unit) -> float:
        key, identity = plan.trials()[unit.config["position"]].dataset, unit.config["identity"]
        epochs = plan.training.epochs
        if identity["kind"] == "search":
            steps = len(data[key].train_labels) / plan.training.batch_size
            return ROUND_EPOCHS * min(epochs, SURROGATE_STEPS / steps) * epoch_seconds(key)
        by_budget = {"steps": 1.0, "epochs": identity["size"], "convergence": CONVERGENCE}
        mean = np.mean([by_budget[budget] for budget in identity["budgets"]])
        return float(mean) * epochs * epoch_seconds(key)

    return DerivedStudy(
        folder=folder,
        plan=plan,
        sources=sources,
        units=units,
        words=("units", "steps"),
        step_seconds=step_seconds,
    )


def _check_sizes(plan: Plan, key: str, data: Dataset, comparisons: Sequence[Comparison]) -> None:
    """Raise ConfigError for a size below one sample a class, or more than the split leaves."""
    count = len(data.train_labels)
    classes, left = (
        len(np.unique(data.train_labels)),
        count - len(validation_samples(data.train_labels)),
    )
    for size in dict.fromkeys(comparison.size for comparison in comparisons):
        if not classes <= round(size * count) <= left:
            raise ConfigError(
                expected=f"at least {classes} of the {count:,} samples, one for each class, and at "
                f"most {left:,}, those outside the validation split",
                got=f"a size of {size:g}: {round(size * count):,}",
                where=f"option --sizes, data set {plan.datasets[key].name}",
                todo=f"choose sizes from {classes / count:.2g} to {left / count:.2g}",
            )


def _own_scores(
    folder: Folder,
    plan: Plan,
    run: PlannedTrial,
    rule: SelectionRule,
    files: Mapping[str, np.ndarray],
) -> np.ndarray:
    """Return a rule's scores, (N,) float64, that are not among those of every run."""
    count = plan.datasets[run.config.dataset].sample_count
    if rule.spec in files:
        return _require_numbers(files[rule.spec], rule, count)
    name = "final_importance_total" if rule.name == "final-importance" else rule.argument
    node = open_cube(folder)[plan.node(run.config.dataset)].to_dataset()
    if name not in node:
        probes = name == "final_importance_total"
        raise MissingDataError(
            expected=f"the variable {name} of {run.label}",
            got="none in the cube",
            where=f"rule {rule.spec}",
            todo=f"run `sampimp influence {folder} --targets probe:64` first"
            if probes
            else "name one of the cube's variables",
        )
    values = node[name].sel(strategy=run.config.strategy, seed=run.config.seed)
    if values.dims != ("sample",):
        raise ConfigError(
            expected="a variable with one number for each sample of a run",
            got=f"dimensions {', '.join(map(str, values.dims))}",
            where=f"rule {rule.spec}",
            todo="reduce it yourself, and pass it as scores:FILE.npy",
        )
    return _require_numbers(np.asarray(values, np.float64), rule, count)


def _read_file(path: str) -> np.ndarray:
    try:
        if path.endswith(".npy"):
            values = np.load(path, allow_pickle=False)
        else:
            values = np.loadtxt(path, delimiter=",", ndmin=1)
        return np.asarray(values, np.float64)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            expected="an .npy file, or a text file with a number in each line",
            got=str(error).splitlines()[0],
            where=path,
            todo="write it with np.save(PATH, scores) or np.savetxt(PATH, scores)",
        ) from None


def _require_numbers(values: np.ndarray, rule: SelectionRule, count: int) -> np.ndarray:
    if values.shape != (count,):
        raise DataError(
            expected=f"{count:,} scores, one for each training sample, in their order",
            got=f"shape {values.shape}",
            where=f"rule {rule.spec}",
            todo="write one number for each sample, NaN where there is none",
        )
    return values


def next_sizes(folder: Folder, request: SubsetRequest, within: float) -> list[Comparison]:
    """Return the sizes that a bisection trains next, for each rule and budget; none at its end.

    The smallest size is searched whose mean error, and that of all larger ones, is at most that of
    all samples at the same budget plus `within`.

    Parameters
    ----------
    folder, request
        The study, and what was compared so far.
    within
        As a fraction of the test samples.
    """
    plan = require_plan(folder)
    trials = plan.resolve(read_commits(folder))
    found: dict[tuple[str, float], set[str]] = {}
    tree = open_cube(folder)
    for position in choose_runs(plan, trials, request.runs):
        config = trials[position].config
        node = tree[plan.node(config.dataset)].to_dataset()
        error = node.subset_error.sel(strategy=config.strategy, seed=config.seed)
        error = error.sel(training_seed=list(request.seeds)).mean("training_seed", skipna=False)
        labels = node.label.values
        least = len(np.unique(labels)) / len(labels)
        most = 1 - (len(validation_samples(labels)) + 1) / len(labels)
        for rule in request.parsed:
            for budget in SUBSET_BUDGETS[:2]:
                limit = float(error.sel(rule=ALL_SAMPLES, size=1.0, budget=budget)) + within
                curve = error.sel(rule=rule.spec, budget=budget)
                curve = curve.isel(size=curve.notnull().values | (curve["size"].values == 1.0))
                curve = curve.sel(size=curve["size"] < 1)
                size = _between(curve["size"].values, curve.values, limit, least, most)
                if size is not None:
                    found.setdefault((rule.spec, size), set()).add(budget)
    return [
        Comparison(
            rule=rule,
            size=size,
            budgets=tuple(b for b in SUBSET_BUDGETS if b in budgets),
            is_validated=False,
        )
        for (rule, size), budgets in found.items()
    ]


def _between(
    sizes: np.ndarray, errors: np.ndarray, limit: float, least: float, most: float
) -> float | None:
    """Return the size in the middle of those around the crossing; None if they are close."""
    place = crossing(sizes, errors, limit)
    low = least if place.above is None else place.above
    high = min(place.below, most)
    if high / low < PRECISION:
        return None
    middle = float(f"{np.sqrt(low * high):.2g}")
    return middle if low < middle < high else None


def export_subsets(folder: Folder, request: SubsetRequest) -> list[str]:
    """Write the indices of the selected samples of each rule and size; return the files' paths.

    Each is written as OUT/influence/selected/DATASET-RULE-SIZE.npy and .csv, of the first seed and
    the budget of equal steps.
    """
    plan = require_plan(folder)
    trials = plan.resolve(read_commits(folder))
    tree, paths = open_cube(folder), []
    for position in choose_runs(plan, trials, request.runs):
        config = trials[position].config
        node = tree[plan.node(config.dataset)].to_dataset()
        node = node.sel(strategy=config.strategy, seed=config.seed, budget="steps")
        node = node.sel(training_seed=request.seeds[0])
        for rule in (name for name in node["rule"].values if name != ALL_SAMPLES):
            for size in (size for size in node["size"].values if size < 1):
                mask = node.selected.sel(rule=rule, size=size).values
                if not mask.any():
                    continue
                indices = np.flatnonzero(mask)
                word = re.sub(r"[^A-Za-z0-9.-]+", "_", str(rule))
                name = f"{INFLUENCE_FOLDER}/selected/{config.dataset}-{word}-{size:g}"
                buffer = io.BytesIO()
                np.save(buffer, indices)
                folder.write_bytes(f"{name}.npy", buffer.getvalue())
                rows = zip(indices.tolist(), node.label.values[indices].tolist(), strict=True)
                lines = ["sample,label", *(f"{sample},{label}" for sample, label in rows)]
                folder.write_bytes(f"{name}.csv", ("\n".join(lines) + "\n").encode())
                paths.append(f"{folder}/{name}.npy")
    return paths
