"""Each strategy's batches against its description, in plain Python."""

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


def listed(batches):
    return [batch.tolist() for batch in batches]


def cut(order, count):
    """Cut a list into `count` runs whose lengths differ by at most one, the longer ones first."""
    short, longer = divmod(len(order), count)
    batches, start = [], 0
    for number in range(count):
        stop = start + short + (number < longer)
        batches.append(order[start:stop])
        start = stop
    return batches


def described(strategy, difficulty, count):
    """The description of a sorted strategy, with Python's own stable sort."""
    order = sorted(range(len(difficulty)), key=lambda sample: difficulty[sample])
    if strategy in ("nlm", "sim"):
        batches = [[] for _ in range(count)]
        for k, sample in enumerate(order):
            batches[k % count].append(sample)
        return batches
    batches = cut(order, count)
    return batches[::-1] if strategy in ("rnlo", "rsio") else batches


@settings(deadline=None, max_examples=100)
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


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(0, 8), min_size=1, max_size=60),  # few values: many ties
    batch_sizes,
    st.sampled_from(SORTED_STRATEGIES),
)
def test_sorted_strategies_follow_their_description(difficulty, batch_size, strategy):
    count = math.ceil(len(difficulty) / batch_size)
    schedule = make_schedule(strategy, len(difficulty), batch_size, 7, np.array(difficulty))
    expected = described(strategy, difficulty, count)
    assert listed(schedule(1)) == expected
    assert listed(schedule(9)) == expected


def test_the_order_of_the_papers_terms():
    difficulty = np.array([0.5, 0.1, 0.9, 0.3, 0.7, 0.2])  # sorted: 1, 5, 3, 0, 4, 2
    batches = {
        strategy: listed(make_schedule(strategy, 6, 2, 0, difficulty)(1))
        for strategy in SORTED_STRATEGIES
    }
    assert batches["nlo"] == batches["sio"] == [[1, 5], [3, 0], [4, 2]]  # low first
    assert batches["rnlo"] == batches["rsio"] == [[4, 2], [3, 0], [1, 5]]
    assert batches["nlm"] == batches["sim"] == [[1, 0], [5, 4], [3, 2]]  # k into k mod 3


def test_rand_is_drawn_once_from_the_order_seed():
    schedule = make_schedule("rand", 40, 8, 3)
    assert listed(schedule(1)) == listed(schedule(50))
    assert listed(schedule(1)) == listed(make_schedule("rand", 40, 8, 3)(1))
    assert listed(schedule(1)) != listed(make_schedule("rand", 40, 8, 4)(1))


@pytest.mark.parametrize("strategy", REFERENCES)
def test_references_are_reshuffled_every_epoch(strategy):
    schedule, again = (make_schedule(strategy, 40, 8, 3) for _ in range(2))
    epochs = [listed(schedule(epoch)) for epoch in range(1, 6)]
    assert all(a != b for i, a in enumerate(epochs) for b in epochs[:i])
    # A run that resumes asks for a later epoch first, and gets the same.
    assert listed(again(5)) == epochs[4]
    assert listed(again(2)) == epochs[1]
    assert listed(make_schedule(strategy, 40, 8, 4)(1)) != epochs[0]


def test_shuffle_is_not_the_batches_of_rand():
    assert listed(make_schedule("shuffle", 40, 8, 3)(1)) != listed(
        make_schedule("rand", 40, 8, 3)(1)
    )


@settings(deadline=None, max_examples=50)
@given(counts, batch_sizes)
def test_positions_lead_back_to_the_batches(sample_count, batch_size):
    batches = make_schedule("shuffle", sample_count, batch_size, 0)(1)
    positions = batch_positions(batches, sample_count)
    assert positions.dtype == np.float32
    for number, batch in enumerate(batches):
        assert np.flatnonzero(positions == number).tolist() == sorted(batch.tolist())


def test_a_sample_in_no_batch_has_no_position():
    positions = batch_positions([np.array([2])], 3)
    assert np.isnan(positions).tolist() == [True, True, False]


@pytest.mark.parametrize(
    "difficulty", [None, np.zeros(5), np.array([0, 1, np.nan, 2, 3, 4]), np.full(6, np.inf)]
)
def test_a_difficulty_that_cannot_be_sorted_by_is_refused(difficulty):
    with pytest.raises(RecordError, match=r"finite overall_importance of 6 samples(.|\n)*sim"):
        make_schedule("sim", 6, 2, 0, difficulty)


def test_an_unknown_strategy_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean shuffle_by_seed"):
        make_schedule("shufle_by_seed", 6, 2, 0)
