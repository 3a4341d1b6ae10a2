"""The units of work of subsets: trainings by rule and size, and the searches that they wait for.

    search       metagradient, for a size; once for each split
    validation   every rule, or each of its parameters, judged on the validation split
    test         every rule, with the parameter that the validation split chose, and all samples

Trainings of a rule and size are one unit: a step for each budget and seed. What is stored already
is left out.

Map: `SubsetUnits`; `Comparison` (what is compared), `trained_before`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sampimp.schema import ALL_SAMPLES, SUBSET_BUDGETS
from sampimp.store.influence_records import derived_commits
from sampimp.store.integrity import record_digest
from sampimp.store.location import Folder
from sampimp.store.plan import Plan, PlannedTrial, read_commits
from sampimp.store.subset_choice import best_variant
from sampimp.subsets.metagradient import ROUNDS
from sampimp.subsets.rules import SelectionRule, parse_rule
from sampimp.subsets.validation import VALIDATION_SEEDS
from sampimp.sweeps.derived_units import DerivedUnits
from sampimp.sweeps.work import Unit

SPLITS = ("validation", "test")
"""What trainings are judged on."""

Done = set[tuple[Any, ...]]
"""Split, rule, digest of scores, size, budget and seed of each training that is stored."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A rule at a size, with the budgets that it is trained with."""

    rule: str
    size: float
    budgets: tuple[str, ...] = SUBSET_BUDGETS[:2]
    is_validated: bool = True
    """Whether the validation split judges it in any case, so that it can be chosen."""
    run: str | None = None
    """Label of the run whose scores select; None: each run of the request."""

    def concerns(self, run: PlannedTrial) -> bool:
        """Return whether it is to be trained by the scores of a run."""
        return self.run in (None, run.label)


def trained_before(
    commits: Mapping[str, Mapping[str, Any]], run: PlannedTrial
) -> tuple[Done, dict[tuple[Any, ...], np.ndarray]]:
    """Return the trainings of a run that are stored, and the validation errors among them.

    The errors are by variant, digest of scores, size and budget: an array over seeds.
    """
    done: Done = set()
    errors: dict[tuple[Any, ...], np.ndarray] = {}
    if run.commit is None:
        return done, errors
    of_run = {"kind": "subset", "trial": run.trial_id, "record": record_digest(run.commit)}
    for commit in commits.values():
        if not of_run.items() <= commit.items():
            continue
        by_budget = np.reshape(commit["curves"]["subset_error"], (len(commit["budgets"]), -1))
        for budget, values in zip(commit["budgets"], by_budget, strict=True):
            key = commit["rule"], commit["scores"], commit["size"], budget
            done |= {(commit["judged_on"], *key, seed) for seed in commit["seeds"]}
            if commit["judged_on"] == "validation":
                errors[key] = values.astype(float)
    return done, errors


class SubsetUnits(DerivedUnits):
    """The units of work of one command on subsets.

    Parameters
    ----------
    folder, plan, positions
        As for `DerivedUnits`.
    comparisons
        What is compared.
    seeds
        Of the trainings that are judged on the test set.
    scores
        Digest of a rule's own scores, by label of the run and rule.
    selectable
        Samples outside of the validation split, by data set: a parameter that selects from fewer
        than a size needs is no candidate.
    """

    def __init__(
        self,
        folder: Folder,
        plan: Plan,
        positions: Sequence[int],
        *,
        comparisons: Sequence[Comparison],
        seeds: Sequence[int],
        scores: Mapping[tuple[str, str], str],
        selectable: Mapping[str, int],
    ) -> None:
        super().__init__(folder, plan, positions)
        self._comparisons, self._seeds, self._scores = comparisons, tuple(seeds), scores
        self._selectable = selectable
        trials = plan.resolve(read_commits(folder))
        commits = derived_commits(folder, plan, trials)
        self._before = {
            position: trained_before(commits, trials[position])[0] for position in positions
        }

    def units_of(
        self, position: int, run: PlannedTrial, commits: Mapping[str, Mapping[str, Any]]
    ) -> Iterator[Unit]:
        """Yield searches, all samples, what the validation split judges, what the test set judges.

        A unit waits for its search, or for the validation of its rule's parameters. All samples
        take the longest, and wait for nothing.
        """
        comparisons = [each for each in self._comparisons if each.concerns(run)]
        searches: dict[tuple[float, str], Unit] = {}
        for comparison in comparisons:
            if self._rule(comparison).kind.is_searched:
                for split in SPLITS if comparison.is_validated else ("test",):
                    unit = self._search(position, run, commits, comparison.size, split)
                    searches.setdefault((comparison.size, split), unit)
        yield from searches.values()
        full = Comparison(rule=ALL_SAMPLES, size=1.0, budgets=("steps", "convergence"))
        names = [ALL_SAMPLES] * len(full.budgets)
        yield from self._trainings(position, run, commits, full, names, "test", searches)
        validated = trained_before(commits, run)[1]
        for judged in self._judged(run, comparisons):
            names = [judged.rule] * len(judged.budgets)
            yield from self._trainings(
                position, run, commits, judged, names, "validation", searches
            )
        for comparison in comparisons:
            best = self._variants(run, comparison, validated)
            yield from self._trainings(position, run, commits, comparison, best, "test", searches)

    @staticmethod
    def _rule(comparison: Comparison) -> SelectionRule:
        return parse_rule(comparison.rule)

    def _candidates(self, run: PlannedTrial, comparison: Comparison) -> list[str]:
        """Return the variants of a rule that can select as many samples as its size has."""
        count = self.count(run, comparison.size)
        samples = self._selectable[run.config.dataset]
        variants = self._rule(comparison).variants
        return [name for name in variants if parse_rule(name).capacity(samples) >= count]

    def _judged(self, run: PlannedTrial, comparisons: Sequence[Comparison]) -> list[Comparison]:
        """Return what the validation split judges, each variant and size once."""
        budgets: dict[tuple[str, float], set[str]] = {}
        for comparison in comparisons:
            names = self._candidates(run, comparison)
            for name in names if comparison.is_validated or len(names) > 1 else ():
                budgets.setdefault((name, comparison.size), set()).update(comparison.budgets)
        return [
            Comparison(rule=name, size=size, budgets=tuple(b for b in SUBSET_BUDGETS if b in each))
            for (name, size), each in budgets.items()
        ]

    def _variants(
        self,
        run: PlannedTrial,
        comparison: Comparison,
        validated: Mapping[tuple[Any, ...], np.ndarray],
    ) -> list[str]:
        """Return a rule's variant for each budget; empty while they are not validated."""
        names = self._candidates(run, comparison)
        if len(names) == 1:
            return [names[0]] * len(comparison.budgets)
        scores = self._scores.get((run.label, comparison.rule))
        chosen = []
        for budget in comparison.budgets:
            errors = {
                name: validated[name, scores, comparison.size, budget]
                for name in names
                if (name, scores, comparison.size, budget) in validated
            }
            if len(errors) < len(names):
                return []
            chosen.append(best_variant(errors))
        return chosen

    def count(self, run: PlannedTrial, size: float) -> int:
        """Return the number of samples of a size."""
        return round(size * self.plan.datasets[run.config.dataset].sample_count)

    def _search(
        self,
        position: int,
        run: PlannedTrial,
        commits: Mapping[str, Mapping[str, Any]],
        size: float,
        split: str,
    ) -> Unit:
        parts = {"judged_on": split, "count": self.count(run, size), "rounds": ROUNDS}
        return self.unit(
            run,
            position,
            "search",
            f"{size:g}" + "-validation" * (split == "validation"),
            parts,
            commits,
            steps=ROUNDS,
            config={},
            unblocks=True,
        )

    def _trainings(
        self,
        position: int,
        run: PlannedTrial,
        commits: Mapping[str, Mapping[str, Any]],
        comparison: Comparison,
        variants: Sequence[str],
        split: str,
        searches: Mapping[tuple[float, str], Unit],
    ) -> Iterator[Unit]:
        """Yield the unit of the trainings that are not stored yet, if there are any."""
        validates, name = split == "validation", comparison.rule
        scores = self._scores.get((run.label, name))
        wanted = VALIDATION_SEEDS if validates else self._seeds
        before = self._before[position]
        missing = {
            budget: [
                seed
                for seed in wanted
                if (split, name, scores, comparison.size, budget, seed) not in before
            ]
            for budget in comparison.budgets
        }
        budgets = [budget for budget, seeds in missing.items() if seeds]
        seeds = [seed for seed in wanted if any(seed in each for each in missing.values())]
        if not budgets:
            return
        if variants:
            by_budget = dict(zip(comparison.budgets, variants, strict=True))
            variants = [by_budget[budget] for budget in budgets]
        search = searches.get((comparison.size, split)) if self._searches(name) else None
        info = self.plan.datasets[run.config.dataset]
        held_out = info.sample_count - self._selectable[run.config.dataset]
        parts = {
            "judged_on": split,
            "judges": held_out if validates else info.test_count,
            "rule": name,
            "variants": list(variants),
            "size": comparison.size,
            "count": self.count(run, comparison.size),
            "budgets": budgets,
            "seeds": seeds,
            "scores": scores,
            "search": search.folder.rpartition("/")[2] if search and search.folder else None,
        }
        word = name if scores is None else f"{parse_rule(name).name}-{scores[:8]}"
        yield self.unit(
            run,
            position,
            "subset",
            f"{word.replace(':', '')}-{comparison.size:g}" + "-validation" * validates,
            parts,
            commits,
            steps=len(budgets) * len(seeds),
            config={},
            ready=bool(variants) and (search is None or search.commit is not None),
            unblocks=validates,
        )

    @staticmethod
    def _searches(name: str) -> bool:
        return name != ALL_SAMPLES and parse_rule(name).kind.is_searched

    def checkpoint_bytes(self, unit: Unit) -> int:
        """Return 0: a checkpoint is the number of a training, or the indices of a subset."""
        return 0
