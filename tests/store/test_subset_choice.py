"""Choices among rules by validation errors, and where an error crosses a limit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sampimp.store.subset_choice import best_rule, best_variant, crossing

BALANCED = np.array([0.10, 0.12])


def test_the_variant_with_the_lowest_mean_is_chosen_and_the_first_of_equals():
    errors = {"a": np.array([0.3, 0.1]), "b": np.array([0.1, 0.2]), "c": np.array([0.2, 0.1])}
    assert best_variant(errors) == "b"
    assert best_variant({"c": errors["c"], "b": errors["b"]}) == "c"


def test_a_diverged_training_counts_as_an_error_of_1():
    errors = {"diverged": np.array([0.0, np.nan]), "poor": np.array([0.45, 0.5])}
    assert best_variant(errors) == "poor"
    assert best_rule({"balanced": np.array([np.nan, np.nan]), **errors}, 10) == "poor"


@pytest.mark.parametrize(
    ("errors", "judges", "chosen"),
    [
        ([0.05, 0.06], 100, "other"),  # by 0.055, with a standard error of 0.039
        ([0.08, 0.10], 100, "balanced"),  # by 0.02, with 0.043
        ([0.08, 0.10], 1000, "other"),  # by 0.02, with 0.014
        ([0.10, 0.12], 10**6, "balanced"),  # equal
        ([0.30, 0.40], 1000, "balanced"),
    ],
)
def test_a_rule_is_chosen_if_it_is_clearly_better_than_balanced(errors, judges, chosen):
    errors = {"balanced": BALANCED, "other": np.array(errors)}
    assert best_rule(errors, judges) == chosen


def test_a_rule_equal_to_balanced_is_seldom_chosen():
    """Both err on the same samples with probability 0.07, each on others with 0.03."""
    generator = np.random.default_rng(0)
    drawn = generator.random((2000, 2, 3, 150)) < np.array([0.07, 0.03, 0.03])[:, None]
    by_seed = drawn[:, :, [0, 1]].any(2), drawn[:, :, [0, 2]].any(2)
    errors = [wrong.mean(-1) for wrong in by_seed]
    chosen = [
        best_rule({"balanced": balanced, "other": other}, 150)
        for balanced, other in zip(*errors, strict=True)
    ]
    assert chosen.count("other") < 0.05 * len(chosen)


@given(
    errors=st.lists(st.one_of(st.floats(0, 1), st.just(float("nan"))), min_size=1, max_size=8),
    limit=st.floats(0, 1),
)
def test_the_crossing_is_where_all_larger_sizes_are_within(errors, limit):
    sizes = np.linspace(0.1, 0.8, len(errors))
    place = crossing(sizes, np.array(errors), limit)
    within = [bool(error <= limit) for error in errors]
    good = [size for n, size in enumerate(sizes) if all(within[n:])]
    assert place.below == (good[0] if good else 1.0)
    bad = [size for size, holds in zip(sizes, within, strict=True) if not holds]
    assert place.above == (bad[-1] if bad else None)
    assert (place.above or place.below) <= place.size <= place.below + 1e-6
