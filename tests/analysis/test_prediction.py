"""Scores of predicted effects against naive loops over removals and targets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from sampimp.analysis import kernels, prediction

# Few distinct values, so that there are ties.
tied = st.sampled_from([-3.0, 0.0, 1e-9, 0.5, 2.0])
shapes = st.tuples(st.integers(3, 9), st.integers(1, 4))
pairs = shapes.flatmap(
    lambda shape: st.tuples(*(hnp.arrays(np.float64, shape, elements=tied) for _ in "pa"))
)
repeats = st.tuples(st.integers(3, 6), st.integers(1, 3), st.integers(2, 4)).flatmap(
    lambda shape: hnp.arrays(np.float64, shape, elements=tied)
)


def naive_correlation(predicted, actual):
    """Return Spearman's correlation of two lists, NaN if all values of one are equal."""
    if len(set(predicted)) == 1 or len(set(actual)) == 1:
        return np.nan
    return stats.spearmanr(predicted, actual).statistic


def naive_score(predicted, actual):
    by_target = [
        naive_correlation(predicted[:, t].tolist(), actual[:, t].tolist())
        for t in range(predicted.shape[1])
    ]
    return sum(by_target) / len(by_target)


@given(pairs)
def test_scores_are_means_over_targets_of_spearmans_correlation(pair):
    expected = naive_score(*pair)
    for score in (prediction.tsloo, prediction.lds):
        np.testing.assert_allclose(score(*pair), expected, atol=1e-12)


@given(repeats)
def test_ceilings_score_repeats_against_repeats(effect):
    count = effect.shape[-1]
    by_pair = [naive_score(effect[..., a], effect[..., b]) for a in range(count) for b in range(a)]
    np.testing.assert_allclose(prediction.ceiling(effect), np.mean(by_pair), atol=1e-12)
    by_repeat = []
    for k in range(count):
        others = [effect[..., a] for a in range(count) if a != k]
        by_repeat.append(naive_score(effect[..., k], sum(others) / (count - 1)))
    # A mean in another order may split a tie by its last bit; NumPy adds up in this order, too.
    np.testing.assert_allclose(
        prediction.ceiling_against_mean(effect), np.mean(by_repeat), atol=1e-12
    )


def test_a_single_repeat_has_no_ceiling():
    effect = np.random.default_rng(0).normal(size=(6, 2, 1))
    assert np.isnan(prediction.ceiling(effect))
    assert np.isnan(prediction.ceiling_against_mean(effect))


@given(
    hnp.arrays(np.float32, (3, 7), elements=st.floats(-5, 5, width=32)),
    hnp.arrays(bool, (4, 7)),
)
def test_predicted_effects_are_minus_the_sum_over_removed_samples(influence, removed):
    expected = [
        [-sum(float(influence[t, i]) for i in range(7) if removed[r, i]) for t in range(3)]
        for r in range(4)
    ]
    np.testing.assert_allclose(
        prediction.predicted_effects(influence, removed), expected, atol=1e-12
    )


def test_a_diverged_retraining_leaves_no_score():
    predicted, actual = np.random.default_rng(1).normal(size=(2, 8, 3))
    actual[2, 1] = np.nan
    assert np.isnan(prediction.rank_agreement(predicted, actual)).tolist() == [False, True, False]
    assert np.isnan(prediction.tsloo(predicted, actual))


@settings(max_examples=20)
@given(seed=st.integers(0, 99))
def test_the_interval_is_that_of_resampled_removals(seed):
    predicted, actual = np.random.default_rng(seed).normal(size=(2, 9, 2))
    value, low, high = prediction.score_interval(
        prediction.tsloo, predicted, actual, resamples=50, seed=seed
    )
    generator = np.random.default_rng(seed)
    replicates = []
    for _ in range(50):
        rows = generator.integers(9, size=9)
        replicates.append(naive_score(predicted[rows], actual[rows]))
    assert value == pytest.approx(naive_score(predicted, actual))
    np.testing.assert_allclose((low, high), np.percentile(replicates, [2.5, 97.5]))


def test_the_interval_of_a_ceiling_resamples_removals_only():
    effect = np.random.default_rng(2).normal(size=(40, 3, 2)) + np.arange(40.0)[:, None, None]
    value, low, high = prediction.score_interval(prediction.ceiling, effect)
    assert low < value < high
    assert prediction.score_interval(prediction.ceiling, effect) == (value, low, high)
    assert prediction.score_interval(prediction.ceiling, effect, seed=1) != (value, low, high)


def test_intervals_cover_the_truth_about_95_times_in_100():
    # Binormal with r = 0.6: Spearman's rho is 6/pi asin(r/2) = 0.5819.
    truth, covered, trials = 6 / np.pi * np.arcsin(0.3), 0, 150
    generator = np.random.default_rng(7)
    for _ in range(trials):
        predicted = generator.normal(size=(60, 1))
        actual = 0.6 * predicted + 0.8 * generator.normal(size=(60, 1))
        _, low, high = prediction.score_interval(prediction.tsloo, predicted, actual, resamples=200)
        covered += low <= truth <= high
    # The percentile bootstrap is slightly too narrow at 60 removals; 150 trials at 0.95 have a
    # standard error of 0.018.
    assert 0.88 <= covered / trials <= 1


def test_few_removals_have_no_interval():
    effect = np.arange(4.0)[:, None]
    value, low, high = prediction.score_interval(prediction.lds, effect, effect)
    assert value == 1
    assert np.isnan([low, high]).all()


def test_the_seed_is_that_of_the_other_intervals():
    effect = np.random.default_rng(3).normal(size=(2, 12, 2))
    first = prediction.score_interval(prediction.lds, *effect)
    assert first == prediction.score_interval(prediction.lds, *effect, seed=kernels.BOOTSTRAP_SEED)


@given(pairs, st.integers(0, 2**32 - 1))
def test_resampled_correlations_are_those_of_the_drawn_rows(pair, seed):
    first, second = (values.T for values in pair)
    count = first.shape[1]
    rows = np.random.default_rng(seed).integers(count, size=(4, count))
    counts = np.stack([np.bincount(drawn, minlength=count) for drawn in rows])
    expected = [
        [
            naive_correlation(a[drawn].tolist(), b[drawn].tolist())
            for a, b in zip(first, second, strict=True)
        ]
        for drawn in rows
    ]
    np.testing.assert_allclose(
        prediction.resampled_spearman(first, second, counts), expected, atol=1e-12
    )


def test_resampled_correlations_broadcast_and_leave_out_what_is_counted_zero_times():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(3, 2, 9)), rng.normal(size=(2, 9))
    half = np.arange(9) % 2
    both = prediction.resampled_spearman(first, second, np.stack([half == 0, half == 1]))
    for number in range(2):
        for m in range(3):
            for t in range(2):
                rows = half == number
                expected = stats.spearmanr(first[m, t, rows], second[t, rows]).statistic
                assert both[number, m, t] == pytest.approx(expected, abs=1e-12)
    first[0, 0, 0] = np.nan
    assert np.isnan(prediction.resampled_spearman(first, second, np.ones((1, 9)))[0, 0, 0])


def test_counts_are_those_of_the_bootstrap_of_single_scores():
    effect = np.random.default_rng(1).normal(size=(12, 3, 2))
    counts = prediction.resample_counts(12, resamples=200)
    scores = prediction.resampled_spearman(effect[..., 0].T, effect[..., 1].T, counts).mean(1)
    value, low, high = prediction.score_interval(
        prediction.lds, effect[..., 0], effect[..., 1], resamples=200
    )
    assert scores[0] == pytest.approx(value)
    np.testing.assert_allclose(np.quantile(scores[1:], [0.025, 0.975]), [low, high])


@given(
    hnp.arrays(np.float64, (2, 8), elements=st.floats(-5, 5)),
    hnp.arrays(np.int64, 8, elements=st.integers(0, 3)),
)
def test_renormalised_influence_is_the_derivative_of_a_mean_over_the_rest(losses, batch):
    """sum(v l) / sum(v) of each batch, differentiated by each weight, on a linear target."""
    step = 1e-6
    for row in losses:
        kept = np.array([row[i] / (batch == batch[i]).sum() for i in range(8)])
        actual = prediction.renormalised_influence(kept, batch)
        for i in range(8):
            mine = batch == batch[i]
            weights = np.ones(8)
            values = []
            for sign in (1, -1):
                weights[i] = 1 + sign * step
                values.append((weights[mine] @ row[mine]) / weights[mine].sum())
            assert actual[i] == pytest.approx((values[0] - values[1]) / (2 * step), abs=1e-6)
