"""Batches of each strategy against an implementation of its description in plain Python."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sampimp.errors import ConfigError, RecordError
from sampimp.schema import REFERENCES, SORTED_STRATEGIES, STRATEGIES
from sampimp.training.strategies import batch_positions, make_schedule

counts = st.integers(1, 60)
batch_sizes = st.integers(1, 70)


def as_lists(batches):
    return [batch.tolist() for batch in batches]


def split_evenly(order, count):
    """Split a list into `count` parts whose lengths differ by at most one, longer parts first."""
    short, longer = divmod(len(order), count)
    batches, start = [], 0
    for number in range(count):
        stop = start + short + (number < longer)
        batches.append(order[start:stop])
        start = stop
    return batches


def expected_batches(strategy, difficulty, count):
    """Return the batches of a sorted strategy, by Python's stable sort."""
    order = sorted(range(len(difficulty)), key=lambda sample: difficulty[sample])
    if strategy in ("nlm", "sim"):
        batches = [[] for _ in range(count)]
        for k, sample in enumerate(order):
            batches[k % count].append(sample)
        return batches
    batches = split_evenly(order, count)
    return batches[::-1] if strategy in ("rnlo", "rsio") else batches


@settings(max_examples=100)
@given(counts, batch_sizes, st.sampled_from((*REFERENCES, *STRATEGIES)), st.integers(0, 99))
def test_every_sample_is_in_exactly_one_batch(sample_count, batch_size, strategy, seed):
    difficulty = np.random.default_rng(seed).random(sample_count)
    schedule = make_schedule(strategy, sample_count, batch_size, seed, difficulty)
    for epoch in (1, 2):
        batches = schedule(epoch)
        sizes = [len(batch) for batch in batches]
        assert sorted(np.concatenate(batches).tolist()) == list(range(sample_count))
        assert len(batches) == math.ceil(sample_count / batch_size)
        assert max(sizes) <= batch_size
        assert max(sizes) - min(sizes) <= 1


@settings(max_examples=100)
@given(
    st.lists(st.integers(0, 8), min_size=1, max_size=60),  # few values: many ties
    batch_sizes,
    st.sampled_from(SORTED_STRATEGIES),
)
def test_sorted_strategies_match_their_description(difficulty, batch_size, strategy):
    count = math.ceil(len(difficulty) / batch_size)
    schedule = make_schedule(strategy, len(difficulty), batch_size, 7, np.array(difficulty))
    expected = expected_batches(strategy, difficulty, count)
    assert as_lists(schedule(1)) == expected
    assert as_lists(schedule(9)) == expected


def test_batches_of_six_samples_by_hand():
    difficulty = np.array([0.5, 0.1, 0.9, 0.3, 0.7, 0.2])  # sorted: 1, 5, 3, 0, 4, 2
    batches = {
        strategy: as_lists(make_schedule(strategy, 6, 2, 0, difficulty)(1))
        for strategy in SORTED_STRATEGIES
    }
    assert batches["nlo"] == batches["sio"] == [[1, 5], [3, 0], [4, 2]]  # low first
    assert batches["rnlo"] == batches["rsio"] == [[4, 2], [3, 0], [1, 5]]
    assert batches["nlm"] == batches["sim"] == [[1, 0], [5, 4], [3, 2]]  # k-th into batch k mod 3


def test_rand_is_one_permutation_from_the_order_seed():
    schedule = make_schedule("rand", 40, 8, 3)
    assert as_lists(schedule(1)) == as_lists(schedule(50))
    assert as_lists(schedule(1)) == as_lists(make_schedule("rand", 40, 8, 3)(1))
    assert as_lists(schedule(1)) != as_lists(make_schedule("rand", 40, 8, 4)(1))


@pytest.mark.parametrize("strategy", REFERENCES)
def test_references_are_reshuffled_every_epoch(strategy):
    schedule, again = (make_schedule(strategy, 40, 8, 3) for _ in range(2))
    epochs = [as_lists(schedule(epoch)) for epoch in range(1, 6)]
    assert all(a != b for i, a in enumerate(epochs) for b in epochs[:i])
    # A resumed run requests a later epoch first, and gets the same batches.
    assert as_lists(again(5)) == epochs[4]
    assert as_lists(again(2)) == epochs[1]
    assert as_lists(make_schedule(strategy, 40, 8, 4)(1)) != epochs[0]


def test_shuffle_differs_from_rand():
    assert as_lists(make_schedule("shuffle", 40, 8, 3)(1)) != as_lists(
        make_schedule("rand", 40, 8, 3)(1)
    )


@settings(max_examples=50)
@given(counts, batch_sizes)
def test_batch_positions_identify_the_batches(sample_count, batch_size):
    batches = make_schedule("shuffle", sample_count, batch_size, 0)(1)
    positions = batch_positions(batches, sample_count)
    assert positions.dtype == np.float32
    for number, batch in enumerate(batches):
        assert np.flatnonzero(positions == number).tolist() == sorted(batch.tolist())


def test_position_of_a_sample_in_no_batch_is_nan():
    positions = batch_positions([np.array([2])], 3)
    assert np.isnan(positions).tolist() == [True, True, False]


@pytest.mark.parametrize(
    "difficulty", [None, np.zeros(5), np.array([0, 1, np.nan, 2, 3, 4]), np.full(6, np.inf)]
)
def test_missing_or_infinite_difficulty_is_refused(difficulty):
    with pytest.raises(RecordError, match=r"finite overall_importance of 6 samples(.|\n)*sim"):
        make_schedule("sim", 6, 2, 0, difficulty)


def test_unknown_strategy_error_suggests_the_nearest():
    with pytest.raises(ConfigError, match="did you mean shuffle_by_seed"):
        make_schedule("shufle_by_seed", 6, 2, 0)
