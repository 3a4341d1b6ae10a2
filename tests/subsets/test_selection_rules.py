"""Rules that select subsets, against loops over the samples and against probabilities."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sampimp.errors import ConfigError, RecordError
from sampimp.subsets.rules import (
    BASELINES,
    STRATA,
    Pool,
    parse_rule,
    select,
)
from sampimp.subsets.validation import VALIDATION_SHARE, validation_samples

SCORED = (
    *("tau-high", "tau-low", "nll-high", "nll-low", "strata:0.1", "power:0.5"),
    *("final-importance", "scores:mine", "variable:mine"),
)
"""A rule of each kind that reads a score."""

RANDOM = ("random", "balanced", "strata", "power")
"""The rules that draw."""


def make_pool(samples=60, classes=4, seed=0, **scores):
    """Return a pool with every score; classes of different sizes."""
    rng = np.random.default_rng(seed)
    names = ("tau", "nll", "final-importance", "scores:mine", "variable:mine")
    labels = np.minimum(rng.geometric(0.4, samples) - 1, classes - 1)
    labels[:classes] = np.arange(classes)
    return Pool(
        labels=labels, scores={name: rng.exponential(size=samples) for name in names} | scores
    )


def equal_shares(sizes, count):
    """Return how many of each group are taken if one is taken of each in turn."""
    shares = [0] * len(sizes)
    for group in itertools.cycle(range(len(sizes))):
        if sum(shares) == count:
            return shares
        shares[group] += shares[group] < sizes[group]


@given(
    samples=st.integers(4, 80),
    classes=st.integers(1, 4),
    share=st.floats(0.01, 1),
    seed=st.integers(0, 99),
)
def test_every_rule_selects_as_many_samples_as_asked_each_once(samples, classes, share, seed):
    pool = make_pool(samples, classes, seed)
    for spec in (*BASELINES, *SCORED):
        room = parse_rule(spec).capacity(samples)
        count = max(1, int(share * room))
        chosen = select(spec, pool, count, seed)
        assert len(chosen) == count
        assert (np.diff(chosen) > 0).all()
        assert 0 <= chosen[0] <= chosen[-1] < samples
        np.testing.assert_array_equal(select(spec, pool, count, seed), chosen)


@given(classes=st.integers(1, 5), count=st.integers(1, 50), seed=st.integers(0, 99))
def test_balanced_takes_equally_many_of_each_class(classes, count, seed):
    pool = make_pool(50, classes, seed)
    sizes = np.bincount(pool.labels, minlength=classes)
    taken = np.bincount(pool.labels[select("balanced", pool, count, seed)], minlength=classes)
    assert taken.sum() == count
    # A class has fewer than another only if it has no more samples, or by one.
    for a, b in itertools.permutations(range(classes), 2):
        assert taken[a] == sizes[a] or taken[a] >= taken[b] - 1
    assert sorted(taken) == sorted(equal_shares(sizes, count)) or count < classes * sizes.min()


def test_a_small_class_is_whole_and_its_rest_goes_to_the_others():
    labels = np.repeat([0, 1, 2], [50, 3, 47])
    chosen = select("balanced", Pool(labels=labels, scores={}), 33, 0)
    assert np.bincount(labels[chosen]).tolist() == [15, 3, 15]


@pytest.mark.parametrize(
    ("high", "low", "score"),
    [("tau-high", "tau-low", "tau"), ("nll-high", "nll-low", "nll")],
)
def test_high_and_low_are_the_ends_of_the_sorted_scores(high, low, score):
    values = np.array([3.0, 1.0, 2.0, 1.0, 5.0, 3.0])
    pool = make_pool(6, 2, **{score: values})
    by_value = sorted(range(6), key=lambda sample: values[sample])  # stable, as are ties
    assert select(low, pool, 3, 0).tolist() == sorted(by_value[:3]) == [1, 2, 3]
    assert select(high, pool, 3, 7).tolist() == [0, 4, 5]


@pytest.mark.parametrize("spec", ["final-importance", "scores:mine", "variable:mine"])
def test_own_scores_select_the_highest(spec):
    pool = make_pool()
    values = pool.scores[spec]
    assert set(select(spec, pool, 7, 0)) == set(sorted(range(60), key=lambda i: -values[i])[:7])


@pytest.mark.parametrize("missing", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("spec", SCORED)
def test_a_score_that_is_not_finite_is_neither_high_nor_low(spec, missing):
    rule = parse_rule(spec)
    pool = make_pool()
    values = pool.scores[rule.score].copy()
    unscored = np.array([0, 13, 30, 59])
    values[unscored] = missing
    pool = make_pool(**{rule.score: values})
    room = rule.capacity(56)
    for count in (1, 20, room):
        assert not np.isin(unscored, select(spec, pool, count, 0)).any()
    with pytest.raises(RecordError, match=f"{room + 1:,} samples with a score") as error:
        select(spec, pool, room + 1, 0)
    assert spec in error.value.where


def test_strata_fill_bins_of_log_tau_equally_without_the_hardest():
    rng = np.random.default_rng(1)
    tau = np.exp(rng.normal(size=400))
    tau[:5] = 0.0  # in the lowest bin
    pool = make_pool(400, tau=tau)
    chosen = select("strata:0.2", pool, 120, 3)
    kept = sorted(range(400), key=lambda sample: tau[sample])[:320]
    assert set(chosen) <= set(kept)
    least = min(value for value in tau if value > 0)
    logs = {sample: math.log(max(tau[sample], least)) for sample in kept}
    low, high = min(logs.values()), max(logs.values())
    bins = {i: min(int((x - low) / (high - low) * STRATA), STRATA - 1) for i, x in logs.items()}
    sizes = sorted(list(bins.values()).count(number) for number in set(bins.values()))
    taken = [sum(bins[sample] == number for sample in chosen) for number in set(bins.values())]
    assert sorted(taken) == sorted(equal_shares(sizes, 120))


def test_fewer_samples_than_strata_come_from_the_fullest():
    tau = np.exp(np.concatenate([np.linspace(0, 1, 200), [3.0, 5.0]]))  # two bins of one sample
    pool = make_pool(202, tau=tau)
    drawn = [select("strata:0", pool, 10, seed) for seed in range(5)]
    assert all(samples.max() < 200 for samples in drawn)
    assert len({tuple(samples) for samples in drawn}) == 5


def test_strata_of_equal_scores_draw_at_random():
    pool = make_pool(30, tau=np.full(30, 2.0))
    first, second = (select("strata:0", pool, 10, seed) for seed in (1, 2))
    assert len(first) == len(second) == 10
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize("exponent", [0.25, 1.0])
def test_power_draws_in_proportion_to_a_power_of_tau(exponent):
    """Frequencies over 4,000 seeds; |z| < 4.5 for 5 samples fails by chance in 1 of 29,000."""
    tau = np.array([0.5, 1.0, 2.0, 4.0, 8.0])
    p = tau**exponent / (tau**exponent).sum()
    # In the set of two: drawn first, or second after another one.
    expected = [p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(5) if j != i) for i in range(5)]
    pool, draws = make_pool(5, 1, tau=tau), 4000
    counts = np.zeros(5)
    for seed in range(draws):
        counts[select(f"power:{exponent}", pool, 2, seed)] += 1
    spread = [math.sqrt(q * (1 - q) / draws) for q in expected]
    z = (counts / draws - expected) / spread
    assert np.abs(z).max() < 4.5


def test_power_takes_a_sample_of_importance_0_last():
    pool = make_pool(5, 1, tau=np.array([0.0, 1.0, 2.0, 3.0, 0.0]))
    for seed in range(20):
        assert select("power:1", pool, 3, seed).tolist() == [1, 2, 3]


@pytest.mark.parametrize("name", RANDOM)
def test_random_rules_differ_by_seed(name):
    spec = parse_rule(name).variants[-1]
    pool = make_pool()
    drawn = {tuple(select(spec, pool, 20, seed)) for seed in range(5)}
    assert len(drawn) == 5


def test_rules_without_chance_do_not_depend_on_the_seed():
    pool = make_pool()
    for spec in SCORED:
        if parse_rule(spec).name not in RANDOM:
            assert select(spec, pool, 20, 1).tolist() == select(spec, pool, 20, 2).tolist()


def test_a_part_of_a_pool_has_the_scores_of_its_samples():
    pool = make_pool()
    samples = np.array([2, 3, 10, 40])
    part = pool.part(samples)
    np.testing.assert_array_equal(part.labels, pool.labels[samples])
    np.testing.assert_array_equal(part.scores["tau"], pool.scores["tau"][samples])
    assert set(part.scores) == set(pool.scores)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("best", "a rule among random, balanced"),
        ("strata:1", "a share of 0 or more and below 1"),
        ("strata:-0.1", "a share of 0 or more"),
        ("strata:nan", "a share of 0 or more"),
        ("strata:much", "a share of 0 or more"),
        ("power:0", "power:A with A above 0"),
        ("power:inf", "power:A with A above 0"),
        ("scores", "scores:FILE"),
        ("variable:", "variable:NAME"),
        ("tau-high:3", "tau-high without a parameter"),
        ("random:", "random without a parameter"),
    ],
)
def test_a_rule_that_is_not_possible_is_named(spec, words):
    with pytest.raises(ConfigError, match=words) as error:
        parse_rule(spec)
    assert error.value.where


def test_variants_are_rules_with_a_parameter():
    assert parse_rule("strata").variants == ("strata:0", "strata:0.1", "strata:0.3")
    assert parse_rule("strata:0.2").variants == ("strata:0.2",)
    assert parse_rule("tau-high").variants == ("tau-high",)
    assert all(parse_rule(name).argument for name in parse_rule("power").variants)


@given(st.lists(st.integers(2, 40), min_size=1, max_size=5))
def test_the_validation_split_has_a_tenth_of_each_class(sizes):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    held_out = validation_samples(labels)
    assert (np.diff(held_out) > 0).all()
    expected = [max(1, round(VALIDATION_SHARE * size)) for size in sizes]
    assert np.bincount(labels[held_out], minlength=len(sizes)).tolist() == expected
