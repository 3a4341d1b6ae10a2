"""Trainings on subsets in the cube: errors by rule, size, budget and seed, and what was selected.

    rule     as the user named it; `full` (all samples); `chosen`, the rule that the validation
             split chose at a size and budget
    size     share of the samples; 1 for all
    budget   steps, epochs, convergence (of all samples)

Of a rule that reads scores of its own (a variable, final importance), only trainings by the scores
of the newest record are shown.

Map: `subset_variables`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np

from sampimp.schema import ALL_SAMPLES, INFLUENCE_VARIABLES, SUBSET_BUDGETS
from sampimp.store.influence_records import CommittedRecord
from sampimp.store.lazy_arrays import lazy_array, missing_table
from sampimp.store.subset_choice import CHOSEN, FALLBACK, best_rule
from sampimp.store.variables import StoredVariable

Place = tuple[str, float, str, int]
"""Rule, size, budget and seed of a training."""


@dataclass(frozen=True)
class _Training:
    """One stored training."""

    record: CommittedRecord
    number: int

    @property
    def variant(self) -> str:
        return str(self.record.commit["variants"][self.number // len(self.record.commit["seeds"])])

    def result(self, name: str) -> float:
        """Return its error or NLL."""
        return float(self.record.commit["curves"][name][self.number])


def subset_variables(
    table: Sequence[Sequence[Sequence[CommittedRecord]]],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the variables of subsets, and the coordinates rule, size, budget and training_seed.

    Parameters
    ----------
    table
        The records of trainings on subsets of each strategy (rows) and seed (columns).
    """
    cells = [[_Cell.of(records) for records in row] for row in table]
    places = [place for row in cells for cell in row for place in cell.tested]
    rules = sorted({rule for rule, *_ in places}, key=_rank)
    sizes = sorted({size for _, size, *_ in places})
    seeds = sorted({seed for *_, seed in places})
    judged = sorted({place[0] for row in cells for cell in row for place in cell.validated})
    shape = len(cells), len(cells[0]), len(rules), len(sizes), len(SUBSET_BUDGETS)
    results = {name: missing_table((*shape, len(seeds))) for name in ("error", "nll")}
    variants = np.full(shape, "", dtype=object)
    validation = missing_table((*shape[:2], len(judged), *shape[3:]))
    for i, row in enumerate(cells):
        for j, cell in enumerate(row):
            for (rule, size, budget, seed), training in cell.tested.items():
                at = rules.index(rule), sizes.index(size), SUBSET_BUDGETS.index(budget)
                for name, values in results.items():
                    values[(i, j, *at, seeds.index(seed))] = training.result(f"subset_{name}")
                variants[(i, j, *at)] = training.variant
            for (rule, size, budget), errors in cell.validated.items():
                if size in sizes:
                    at = judged.index(rule), sizes.index(size), SUBSET_BUDGETS.index(budget)
                    validation[(i, j, *at)] = np.nan_to_num(errors, nan=1.0).mean()
    dims = ("strategy", "seed", "rule", "size", "budget")
    diverged = sorted({label for row in cells for cell in row for label in cell.diverged()})
    records = [record for row in table for cell in row for record in cell]
    common = {"code": ", ".join(sorted({str(record.commit["code"]) for record in records}))}
    attrs = {**common, "diverged": diverged} if diverged else common
    variables: dict[str, Any] = {
        f"subset_{name}": (
            (*dims, "training_seed"),
            values,
            _described(f"subset_{name}", attrs),
        )
        for name, values in results.items()
    }
    variables["subset_variant"] = (
        dims,
        variants.astype(str),
        {"long_name": "rule with the parameter, or the rule, that the validation split chose"},
    )
    variables["validation_error"] = (
        ("strategy", "seed", "variant", "size", "budget"),
        validation,
        {
            "units": "1",
            "long_name": "fraction of the validation samples misclassified, mean over seeds",
            **common,
        },
    )
    order = [
        (rule, size, budget, seed)
        for rule in rules
        for size in sizes
        for budget in SUBSET_BUDGETS
        for seed in seeds
    ]
    samples = records[0].layout.sizes["sample"]
    masks = [[cell.masks(order, samples) for cell in row] for row in cells]
    chunk = (1, records[0].layout.chunk("selected")[-1])
    flat = lazy_array(masks, "selected", (len(order), samples), chunk, "bool")
    array = da.reshape(flat, (*shape, len(seeds), samples))
    variables["selected"] = (
        (*dims, "training_seed", "sample"),
        array,
        _described("selected", common),
    )
    coords = {
        "rule": ("rule", rules),
        "size": ("size", sizes),
        "budget": ("budget", list(SUBSET_BUDGETS)),
        "training_seed": ("training_seed", seeds),
        "variant": ("variant", judged),
    }
    return variables, coords


@dataclass(frozen=True)
class _Cell:
    """The trainings of one run's subsets."""

    tested: Mapping[Place, _Training]
    validated: Mapping[tuple[str, float, str], np.ndarray]
    """Validation errors over seeds."""
    judges: int = 0
    """Number of validation samples."""

    @classmethod
    def of(cls, records: Sequence[CommittedRecord]) -> "_Cell":
        tested: dict[Place, _Training] = {}
        validated: dict[tuple[str, float, str], np.ndarray] = {}
        judges = 0
        for record in _with_newest_scores(records):
            commit = record.commit
            if commit["judged_on"] == "test":
                tested |= dict(_trainings(record))
                continue
            judges = commit["judges"]
            errors = np.reshape(commit["curves"]["subset_error"], (len(commit["budgets"]), -1))
            for budget, by_seed in zip(commit["budgets"], errors.astype(float), strict=True):
                validated[commit["rule"], commit["size"], budget] = by_seed
        for (rule, size, budget, seed), training in list(tested.items()):
            if rule == ALL_SAMPLES and budget == "steps":  # the same training, by either budget
                tested[rule, size, "epochs", seed] = training
        cell = cls(tested, validated, judges)
        return cls({**tested, **cell._chosen()}, validated, judges)

    def _chosen(self) -> dict[Place, _Training]:
        """Return the trainings of the rule that the validation split chose."""
        chosen: dict[Place, _Training] = {}
        by_rule: dict[tuple[float, str], dict[str, list[int]]] = {}
        for rule, size, budget, seed in self.tested:
            if rule != ALL_SAMPLES:
                by_rule.setdefault((size, budget), {}).setdefault(rule, []).append(seed)
        for (size, budget), seeds in by_rule.items():
            errors = {}
            for rule in sorted(seeds, key=_rank):  # of equals, the first one is chosen
                variant = self.tested[rule, size, budget, seeds[rule][0]].variant
                if (variant, size, budget) in self.validated:
                    errors[rule] = self.validated[variant, size, budget]
            if FALLBACK in errors and len(errors) == len(seeds):
                best = best_rule(errors, self.judges)
                chosen |= {
                    (CHOSEN, size, budget, seed): self.tested[best, size, budget, seed]
                    for seed in seeds[best]
                }
        return chosen

    def diverged(self) -> Iterator[str]:
        """Yield a name for each training that diverged."""
        for (rule, size, budget, seed), training in self.tested.items():
            is_copy = rule == CHOSEN or (rule == ALL_SAMPLES and budget == "epochs")
            if np.isnan(training.result("subset_nll")) and not is_copy:
                commit = training.record.commit
                yield (
                    f"{commit['strategy']}:{commit['seed']}, rule {rule}, size {size:g}, "
                    f"{budget}, seed {seed}"
                )

    def masks(self, order: Sequence[Place], samples: int) -> "_Masks | None":
        """Return what every training selected; None if there is no training."""
        if not self.tested:
            return None
        homes = tuple(
            None
            if (training := self.tested.get(place)) is None
            else (training.record.array("selected"), training.number)
            for place in order
        )
        return _Masks(homes, samples)


def _with_newest_scores(records: Sequence[CommittedRecord]) -> list[CommittedRecord]:
    """Return the records without those of scores that a rule had before."""
    scored = [record.commit for record in records if record.commit["scores"] is not None]
    newest = {c["rule"]: c["scores"] for c in sorted(scored, key=lambda commit: commit["time"])}
    return [
        record for record in records if record.commit["scores"] == newest.get(record.commit["rule"])
    ]


def _trainings(record: CommittedRecord) -> Iterator[tuple[Place, _Training]]:
    commit = record.commit
    for i, budget in enumerate(commit["budgets"]):
        for j, seed in enumerate(commit["seeds"]):
            place = commit["rule"], commit["size"], budget, seed
            yield place, _Training(record, i * len(commit["seeds"]) + j)


@dataclass(frozen=True)
class _Masks:
    """`selected` of all trainings, one at each position."""

    homes: tuple[tuple[StoredVariable, int] | None, ...]
    samples: int

    def read(self, position: int, columns: slice = slice(None)) -> np.ndarray:
        home = self.homes[position]
        if home is None:
            return np.zeros(len(range(self.samples)[columns]), bool)
        return home[0].read(home[1], columns)

    @property
    def content(self) -> Any:
        return [home and [home[0].content, home[1]] for home in self.homes]


def _rank(rule: str) -> tuple[int, str]:
    """Put all samples and the chosen rule first, then the baselines."""
    first = (ALL_SAMPLES, CHOSEN, "random", "balanced")
    return (first.index(rule) if rule in first else len(first)), rule


def _described(name: str, attrs: Mapping[str, Any]) -> dict[str, Any]:
    described = INFLUENCE_VARIABLES[name]
    return {"units": described.units, "long_name": described.long_name, **attrs}
