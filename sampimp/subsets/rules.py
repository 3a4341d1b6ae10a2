"""Rules that select a subset of the training samples: who is kept.

    random               drawn at random
    balanced             drawn at random, equally many of each class
    tau-high, tau-low    the most, or the least, important samples (overall importance tau)
    nll-high, nll-low    those of the highest, or the lowest, NLL at the end of training
    strata, strata:0.1   equally many from each bin of log tau, without the hardest 10 %
    power, power:0.25    drawn at random, with p proportional to tau^0.25
    final-importance     those that moved the final parameters most
    metagradient         found by exchange, see `sampimp.subsets.metagradient`
    scores:FILE          the highest of your own scores, one number for each sample
    variable:NAME        the highest of a variable of the cube

`strata` and `power` without a number take the one with the lowest error on a validation split. A
rule never sees a test label. A sample whose score is NaN or infinite is neither high nor low: it
is not selected.

Map: `SELECTION_RULES` (the registry), `SelectionRule` and `parse_rule`; `Pool` (what a rule may
see), `select`.

References
----------
Gao & Jojic (2017), section 5. Zheng et al. (2023), Coverage-centric coreset selection, for strata.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from sampimp.config import check_choice
from sampimp.errors import ConfigError, RecordError

BASELINES = ("random", "balanced")
"""The rules that every comparison has."""

RECORDED_SCORES = ("tau", "nll")
"""The scores that every recorded run has."""

STRATA = 50
"""Bins of log tau (that of Zheng et al.)."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Samples to select from, and what a rule may know of them.

    Attributes
    ----------
    labels
        Class of each sample, (N,).
    scores
        Scores by name (`RuleKind.score`), each (N,).
    """

    labels: np.ndarray
    scores: Mapping[str, np.ndarray]

    def part(self, samples: np.ndarray) -> "Pool":
        """Return the pool of some of the samples, by position."""
        scores = {name: values[samples] for name, values in self.scores.items()}
        return Pool(labels=self.labels[samples], scores=scores)


@dataclass(frozen=True, kw_only=True)
class SelectionRule:
    """A rule with its parameter.

    Examples
    --------
    >>> parse_rule("power:0.25")
    SelectionRule(spec='power:0.25', name='power', argument='0.25')
    >>> parse_rule("power:0.250") == parse_rule("power:0.25"), parse_rule("power:").spec
    (True, 'power')
    """

    spec: str
    """Its name, with its parameter written in one way."""
    name: str
    """Its entry in `SELECTION_RULES`."""
    argument: str
    """What follows the colon: a parameter, a file, or a variable."""

    @property
    def kind(self) -> "RuleKind":
        """Its entry in `SELECTION_RULES`."""
        return SELECTION_RULES[self.name]

    @property
    def score(self) -> str | None:
        """Name of the score that it reads; None if it reads none."""
        return self.spec if self.kind.is_own else self.kind.score

    @property
    def reads_own(self) -> bool:
        """Whether its score is none that every recorded run has (importance, NLL)."""
        return self.score is not None and self.score not in RECORDED_SCORES

    @property
    def variants(self) -> tuple[str, ...]:
        """The rules with a parameter among which a validation split chooses; else itself."""
        if self.argument or not self.kind.parameters:
            return (self.spec,)
        return tuple(f"{self.name}:{value:g}" for value in self.kind.parameters)

    def capacity(self, samples: int) -> int:
        """Return how many of so many samples, all with a score, it can select at most.

        Examples
        --------
        >>> parse_rule("strata:0.1").capacity(50), parse_rule("strata").capacity(50)
        (45, 50)
        """
        cut = float(self.argument or 0) if self.name == "strata" else 0.0
        return samples - int(cut * samples)


Select = Callable[[SelectionRule, Pool, int, np.random.Generator], np.ndarray]
"""From a rule, a pool, a number of samples and a generator to the selected positions."""


@dataclass(frozen=True, kw_only=True)
class RuleKind:
    """An entry of the registry."""

    select: Select | None
    """None where the selection is a search with a record of its own."""
    score: str | None = None
    """tau, nll or final-importance; None where the rule reads no score."""
    parameters: tuple[float, ...] = ()
    """Parameters among which a validation split chooses, if the user names none."""
    is_own: bool = False
    """Whether its argument names the user's own score."""

    @property
    def is_searched(self) -> bool:
        """Whether the selection is a search with a record of its own."""
        return self.select is None


def _random(
    rule: SelectionRule, pool: Pool, count: int, generator: np.random.Generator
) -> np.ndarray:
    return generator.choice(len(pool.labels), count, replace=False)


def _balanced(
    rule: SelectionRule, pool: Pool, count: int, generator: np.random.Generator
) -> np.ndarray:
    order = generator.permutation(len(pool.labels))
    groups = [order[pool.labels[order] == label] for label in np.unique(pool.labels)]
    return _equally(groups, count)


def _equally(groups: list[np.ndarray], count: int) -> np.ndarray:
    """Return the first samples of each group, as equally many as the groups' sizes permit.

    Examples
    --------
    >>> _equally([np.arange(9), np.array([20]), np.arange(30, 39)], 6)
    array([ 0,  1,  2, 20, 30, 31])
    """
    shares = np.zeros(len(groups), int)
    sizes = np.array([len(group) for group in groups])
    while (left := count - shares.sum()) > 0:
        open_groups = np.flatnonzero(shares < sizes)
        each = max(1, left // len(open_groups))
        for group in open_groups[:left]:
            shares[group] += min(each, sizes[group] - shares[group])
    return np.concatenate([g[:share] for g, share in zip(groups, shares, strict=True)])


def _highest(
    rule: SelectionRule, pool: Pool, count: int, generator: np.random.Generator
) -> np.ndarray:
    return _first(rule, -_score(rule, pool), count)


def _lowest(
    rule: SelectionRule, pool: Pool, count: int, generator: np.random.Generator
) -> np.ndarray:
    return _first(rule, _score(rule, pool), count)


def _first(rule: SelectionRule, values: np.ndarray, count: int) -> np.ndarray:
    """Return the positions of the lowest values; equal ones keep the samples' order."""
    _require_scored(rule, ~np.isnan(values), count)
    return np.argsort(values, kind="stable")[:count]  # NaN is last


def _score(rule: SelectionRule, pool: Pool) -> np.ndarray:
    """Return the score that a rule reads, NaN where it is not finite."""
    assert rule.score is not None
    values = pool.scores[rule.score]
    return np.where(np.isfinite(values), values, np.nan)


def _strata(
    rule: SelectionRule, pool: Pool, count: int, generator: np.random.Generator
) -> np.ndarray:
    tau = _score(rule, pool)
    scored = np.flatnonzero(~np.isnan(tau))
    kept = scored[np.argsort(tau[scored], kind="stable")[: rule.capacity(len(scored))]]
    _require_scored(rule, np.isin(np.arange(len(tau)), kept), count)
    positive = tau[kept][tau[kept] > 0]
    logarithm = np.log(np.maximum(tau[kept], positive.min() if len(positive) else 1.0))
    edges = np.linspace(logarithm.min(), logarithm.max(), STRATA + 1)[1:-1]
    bins = np.searchsorted(edges, logarithm, side="right")
    order = generator.permutation(len(kept))
    groups = [kept[order[bins[order] == number]] for number in np.unique(bins)]
    # The largest first: a remainder of less than one for each bin goes to them, as in Zheng et al.
    return _equally(sorted(groups, key=len, reverse=True), count)


def _power(
    rule: SelectionRule, pool: Pool, count: int, generator: np.random.Generator
) -> np.ndarray:
    tau = _score(rule, pool)
    _require_scored(rule, ~np.isnan(tau), count)
    # Gumbel noise on log p and the highest ones: a draw without replacement, one after the other.
    with np.errstate(divide="ignore"):
        keys = float(rule.argument) * np.log(tau) + generator.gumbel(size=len(tau))
    return np.argsort(-keys, kind="stable")[:count]


def _require_scored(rule: SelectionRule, usable_N: np.ndarray, count: int) -> None:
    if usable_N.sum() < count:
        raise RecordError(
            expected=f"{count:,} samples with a score to select from",
            got=f"{usable_N.sum():,} of {len(usable_N):,} in its range",
            where=f"rule {rule.spec}",
            todo="choose a smaller size, or complete the scores: NaN is neither high nor low",
        )


SELECTION_RULES: Mapping[str, RuleKind] = {
    "random": RuleKind(select=_random),
    "balanced": RuleKind(select=_balanced),
    "tau-high": RuleKind(select=_highest, score="tau"),
    "tau-low": RuleKind(select=_lowest, score="tau"),
    "nll-high": RuleKind(select=_highest, score="nll"),
    "nll-low": RuleKind(select=_lowest, score="nll"),
    "strata": RuleKind(select=_strata, score="tau", parameters=(0.0, 0.1, 0.3)),
    "power": RuleKind(select=_power, score="tau", parameters=(0.125, 0.25, 0.5, 1.0)),
    "final-importance": RuleKind(select=_highest, score="final-importance"),
    "metagradient": RuleKind(select=None),
    "scores": RuleKind(select=_highest, is_own=True),
    "variable": RuleKind(select=_highest, is_own=True),
}
"""Every rule by its name."""


def parse_rule(spec: str) -> SelectionRule:
    """Return the rule that a user names.

    Raises
    ------
    ConfigError
        There is no such rule, or its parameter is none.
    """
    name, _, argument = spec.partition(":")
    kind = SELECTION_RULES[check_choice(name, tuple(SELECTION_RULES), "rule")]
    if kind.is_own:
        valid, expected = bool(argument), "scores:FILE or variable:NAME"
    elif kind.parameters:
        valid = not argument or _is_parameter(name, argument)
        expected = "strata:CUT with a share of 0 or more and below 1, or power:A with A above 0"
    else:
        valid, expected = ":" not in spec, f"{name} without a parameter"
    if not valid:
        raise ConfigError(
            expected=expected, got=repr(spec), where="option --rules", todo=f"write {expected}"
        )
    if kind.parameters and argument:
        argument = f"{float(argument):.12g}"
    spec = f"{name}:{argument}" if argument else name
    return SelectionRule(spec=spec, name=name, argument=argument)


def _is_parameter(name: str, text: str) -> bool:
    try:
        value = float(text)
    except ValueError:
        return False
    return 0 <= value < 1 if name == "strata" else 0 < value < np.inf


def select(spec: str, pool: Pool, count: int, seed: int) -> np.ndarray:
    """Return the positions in the pool that a rule selects, sorted, (count,).

    Parameters
    ----------
    spec
        A rule that is no search; `strata` and `power` with their parameter.
    pool
        The samples.
    count
        How many are selected, at most all of the pool.
    seed
        Seed of random rules. Rules of the same seed draw alike.

    Raises
    ------
    RecordError
        Too few samples have a score.

    Examples
    --------
    >>> pool = Pool(labels=np.array([0, 0, 1, 1]), scores={"tau": np.array([1, np.nan, 3, 2])})
    >>> select("tau-high", pool, 2, seed=0), select("tau-low", pool, 2, seed=0)
    (array([2, 3]), array([0, 3]))
    >>> pool.labels[select("balanced", pool, 2, seed=0)]
    array([0, 1])
    """
    rule = parse_rule(spec)
    assert rule.kind.select is not None
    return np.sort(rule.kind.select(rule, pool, count, np.random.default_rng([count, seed])))
