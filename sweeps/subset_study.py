"""Which samples suffice: from the request to the units of work.

    rules x sizes x budgets x seeds     trainings on subsets, judged on the test set
    rules x sizes x budgets             the same on the validation split, two seeds: it chooses the
                                        parameters of rules, and the rule `chosen`
    full                                all samples, for the study's epochs and to convergence

Map: `SubsetRequest`; `prepare_subsets`; `check_shares`, `check_sizes`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from functools import cache
from pathlib import Path

import numpy as np

from sampimp.data import scale_inputs
from sampimp.errors import ConfigError
from sampimp.schema import digest
from sampimp.store.location import Folder
from sampimp.store.plan import DatasetInfo, Plan, PlannedTrial, read_commits
from sampimp.store.plan_files import require_plan
from sampimp.store.score_files import write_scores
from sampimp.subsets.metagradient import SURROGATE_STEPS
from sampimp.subsets.rules import BASELINES, SelectionRule, parse_rule
from sampimp.subsets.training import CONVERGENCE
from sampimp.subsets.validation import validation_samples
from sampimp.sweeps.derived_study import DerivedStudy
from sampimp.sweeps.influence_study import measure_reverse_epoch
from sampimp.sweeps.run_choice import check_replayable, choose_runs
from sampimp.sweeps.subset_scores import own_scores, read_score_file, selectable_count
from sampimp.sweeps.subset_units import Comparison, SubsetUnits
from sampimp.sweeps.subset_work import pool_of
from sampimp.sweeps.work import Unit

ROUND_EPOCHS = 4.5
"""Time of a round of a search, in trainings of its surrogate (measured)."""


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
    option: str = "--sizes"
    """The option that the sizes come from, for messages."""
    parsed: tuple[SelectionRule, ...] = field(init=False)
    """The rules, with the baselines first; of scores:FILE the file's stem and digest."""
    files: dict[str, np.ndarray] = field(init=False)
    """The values of each file of scores, by its rule."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a rule, size or seed that cannot be."""
        rules, files = {}, {}
        joined = [rule for rule in self.rules if "," in rule.partition(":")[0]]
        if joined:
            raise ConfigError(
                expected="rules that are separated by spaces",
                got=joined[0],
                where="option --rules",
                todo=f"write --rules {joined[0].replace(',', ' ')}",
            )
        for rule in map(parse_rule, dict.fromkeys((*BASELINES, *self.rules))):
            if rule.name == "scores":
                values = read_score_file(rule.argument)
                stem = re.sub(r"[^A-Za-z0-9]+", "_", Path(rule.argument).stem)
                rule = parse_rule(f"scores:{stem}-{digest(values)[:8]}")
                files[rule.spec] = values
            rules[rule.spec] = rule  # once, if two files have the same scores
        object.__setattr__(self, "parsed", tuple(rules.values()))
        object.__setattr__(self, "files", files)
        check_shares(self.sizes, self.option)
        wrong_seeds = [seed for seed in self.seeds if not 0 <= seed < 2**63]
        if wrong_seeds or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(
                expected="one or more seeds of 0 or above, each once, and below 2^63",
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
    folder: Folder,
    request: SubsetRequest,
    comparisons: Sequence[Comparison] | None = None,
    *,
    stores_scores: bool = True,
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
    stores_scores
        Store the scores that rules read besides importance and NLL, from which workers select.

    Raises
    ------
    UserError
        There is no study, a run is unknown or has diverged, a size is below one sample a class, or
        a rule's scores are missing for too many samples.
    """
    plan = require_plan(folder)
    trials = plan.resolve(read_commits(folder))
    positions = choose_runs(plan, trials, request.runs)
    keys = list(dict.fromkeys(plan.trials()[position].dataset for position in positions))
    sources = check_replayable(folder, plan, keys, request.model)
    data = {key: scale_inputs(sources[key], plan.training.input_scaling) for key in keys}
    is_whole = comparisons is None
    comparisons = request.comparisons() if comparisons is None else comparisons
    pools = {key: pool_of("validation", data[key].train_labels) for key in keys}
    scores = {}
    for run in (trials[position] for position in positions):
        sizes = [each.size for each in comparisons if each.concerns(run)]
        info, labels = plan.datasets[run.config.dataset], data[run.config.dataset].train_labels
        check_sizes(sizes, info.name, labels, request.option)
        if is_whole:
            _check_distinct(request.sizes, info, request.option)
        for rule in request.parsed:
            if rule.reads_own:
                values = own_scores(folder, plan, run, rule, request.files)
                scores[run.label, rule.spec] = values
            values_of_rule = scores.get((run.label, rule.spec))
            room = selectable_count(rule, pools[run.config.dataset], values_of_rule)
            _check_room(rule, run, room, comparisons, plan)
    units = SubsetUnits(
        folder,
        plan,
        positions,
        comparisons=comparisons,
        seeds=request.seeds,
        scores={
            key: write_scores(folder, values) if stores_scores else digest(values)
            for key, values in scores.items()
        },
        selectable={key: len(pool) for key, pool in pools.items()},
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
        words=("units", "trainings"),
        step_seconds=step_seconds,
    )


def check_shares(sizes: Sequence[float], option: str) -> None:
    """Raise ConfigError unless sizes are shares of the samples, each once."""
    wrong = [size for size in sizes if not 0 < size < 1]
    wrong = wrong or sorted({size for size in sizes if sizes.count(size) > 1})
    if wrong or not sizes:
        raise ConfigError(
            expected="sizes between 0 and 1, each once; all samples are always compared",
            got=", ".join(map(str, wrong)) or "none",
            where=f"option {option}",
            todo="name shares of the samples, such as 0.05 0.1 0.3 (0.3 is 30 %)",
        )


def check_sizes(sizes: Sequence[float], name: str, labels: np.ndarray, option: str) -> None:
    """Raise ConfigError for a size below one sample a class, or more than the split leaves.

    Parameters
    ----------
    sizes
        Shares of the training samples.
    name, labels
        Of the data set, (N,).
    option
        Where the sizes come from, for messages.
    """
    count = len(labels)
    classes = len(np.unique(labels))
    left = count - len(validation_samples(labels))
    for size in dict.fromkeys(sizes):
        if not classes <= round(size * count) <= left:
            raise ConfigError(
                expected=f"at least {classes} of the {count:,} samples, one for each class, and at "
                f"most {left:,}, those outside the validation split",
                got=f"a size of {size}: {round(size * count):,}",
                where=f"option {option}, data set {name}",
                todo=f"choose sizes from {_two_digits(classes / count, ROUND_CEILING)} to "
                f"{_two_digits(left / count, ROUND_FLOOR)}",
            )


def _check_distinct(sizes: Sequence[float], dataset: DatasetInfo, option: str) -> None:
    """Raise ConfigError for two sizes that are the same number of samples."""
    by_count: dict[int, list[float]] = {}
    for size in sizes:
        by_count.setdefault(round(size * dataset.sample_count), []).append(size)
    for count, same in by_count.items():
        if len(same) > 1:
            raise ConfigError(
                expected="sizes that differ in their number of samples",
                got=f"{', '.join(map(str, same))}: {count:,} of {dataset.sample_count:,} each",
                where=f"option {option}, data set {dataset.name}",
                todo="name one of them",
            )


def _two_digits(share: float, rounding: str) -> str:
    """Return a share with two digits, rounded towards the sizes that are possible.

    Examples
    --------
    >>> _two_digits(582 / 640, ROUND_FLOOR), _two_digits(100 / 4300, ROUND_CEILING)
    ('0.9', '0.024')
    """
    return f"{float(Context(prec=2, rounding=rounding).create_decimal_from_float(share)):g}"


def _check_room(
    rule: SelectionRule,
    run: PlannedTrial,
    room: int,
    comparisons: Sequence[Comparison],
    plan: Plan,
) -> None:
    """Raise ConfigError for a size of which a rule has too few samples to select from."""
    samples = plan.datasets[run.config.dataset].sample_count
    if not room:
        raise ConfigError(
            expected=f"scores for {rule.spec}",
            got="none that is a finite number, outside the validation split",
            where=f"rule {rule.spec}, {run.label}",
            todo="give scores to more samples, or leave the rule out",
        )
    own = (each for each in comparisons if each.rule == rule.spec and each.concerns(run))
    for size in (each.size for each in own):
        if round(size * samples) > room:
            raise ConfigError(
                expected=f"a size of at most {room:,} samples, from which {rule.spec} can select "
                "outside the validation split",
                got=f"a size of {size:g}: {round(size * samples):,} of {samples:,}",
                where=f"rule {rule.spec}, {run.label}",
                todo="choose smaller sizes, or leave the rule out; samples whose score is NaN are "
                "not selected",
            )
