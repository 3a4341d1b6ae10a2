"""Kernels and principal components against SciPy and NumPy."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from sampimp.analysis import kernels, pca

# Few distinct values, so that ties are as frequent as in the NLL of easy samples.
tied = st.sampled_from([0.0, 1e-30, 0.5, 1.0, 3.0, 1e8])
rows = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=1, max_dims=3, min_side=2, max_side=9), elements=tied
)


@given(rows)
def test_rank_equals_scipys(values):
    np.testing.assert_array_equal(kernels.rank(values), stats.rankdata(values, axis=-1))


def test_a_row_with_nan_has_no_ranks_and_does_not_affect_others():
    values = np.array([[1.0, np.nan, 2.0], [5.0, 4.0, 6.0]])
    ranks = kernels.rank(values)
    assert np.isnan(ranks[0]).all()
    np.testing.assert_array_equal(ranks[1], [2, 1, 3])


@given(rows)
def test_standardised_ranks_have_mean_0_and_mean_square_1_or_no_spread(values):
    ranks = kernels.standardised_ranks(values)
    spread = np.ptp(values, axis=-1) > 0
    assert np.isnan(ranks[~spread]).all()
    np.testing.assert_allclose(ranks[spread].mean(-1), 0, atol=1e-12)
    np.testing.assert_allclose(np.square(ranks[spread]).mean(-1), 1)


@given(hnp.arrays(np.float64, st.tuples(st.just(2), st.integers(3, 12)), elements=tied))
def test_spearman_equals_scipys(pair):
    ours = kernels.spearman(*pair)
    if np.ptp(pair, axis=-1).min() == 0:
        assert np.isnan(ours)
    else:
        np.testing.assert_allclose(ours, stats.spearmanr(*pair).statistic, atol=1e-12)


def plain_bootstrap(values, pair, resamples, seed):
    """Return Fisher's z of resampled pairs, each ranked by SciPy."""
    generator = np.random.default_rng(seed)
    n = values.shape[1]
    picks = (generator.integers(n, size=n) for _ in range(resamples))
    return np.arctanh(
        [stats.spearmanr(values[pair[0], i], values[pair[1], i]).statistic for i in picks]
    )


@pytest.mark.parametrize("ties", [False, True])
def test_the_interval_is_that_of_the_plain_bootstrap(ties):
    generator = np.random.default_rng(3)
    values = generator.normal(size=(2, 300))
    values[1] += values[0]
    if ties:
        values = np.round(values)
    # The same draws, ranked again, give the same standard error as their counts.
    z = plain_bootstrap(values, (0, 1), 60, kernels.BOOTSTRAP_SEED)
    estimate = np.arctanh(stats.spearmanr(*values).statistic)
    half = stats.norm.ppf(0.975) * z.std(ddof=1)
    expected = np.tanh([estimate - half, estimate + half])
    ours = kernels.bootstrap_spearman(values, [(0, 1)], resamples=60)[0]
    np.testing.assert_allclose(ours, expected, rtol=1e-9)


def test_the_interval_covers_the_truth_about_95_times_in_100():
    # Binormal with r = 0.6: Spearman's rho is 6/pi asin(r/2) = 0.5819.
    truth = 6 / np.pi * np.arcsin(0.3)
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        x = generator.normal(size=(2, 100))
        x[1] = 0.6 * x[0] + 0.8 * x[1]
        low, high = kernels.bootstrap_spearman(x, [(0, 1)], resamples=100)[0]
        hits += low <= truth <= high
    assert 180 <= hits <= 199  # 190 +- 3 deviations of 3.1


def test_a_correlation_of_1_has_width_0_and_a_missing_row_no_interval():
    x = np.arange(50.0)
    values = np.stack([x, np.exp(x / 10), np.full(50, np.nan), np.ones(50)])
    bounds = kernels.bootstrap_spearman(values, [(0, 1), (0, 2), (0, 3), (0, 0)])
    np.testing.assert_allclose(bounds[[0, 3]], 1)
    assert np.isnan(bounds[[1, 2]]).all()


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 12)), elements=tied),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_sum_by_group_equals_a_loop_over_groups(values, count, random):
    groups = np.array([random.randrange(count) for _ in range(values.shape[1])])
    expected = np.stack(
        [values[:, groups == g].astype(np.float64).sum(-1) for g in range(count)], axis=-1
    )
    np.testing.assert_allclose(kernels.sum_by_group(values, groups, count), expected)


def test_bootstrapped_totals_have_the_plain_bootstraps_width():
    generator = np.random.default_rng(1)
    values = generator.lognormal(size=5000)
    folds = np.stack([values[k::100].sum() for k in range(100)])
    value, low, high = kernels.bootstrap_sums(folds, lambda total: total)
    # A sum of N independent numbers has standard error sqrt(N) times their deviation; 100 folds
    # estimate it to 1 / sqrt(2 * 99) = 7 %, so 20 % is almost three deviations.
    assert value == pytest.approx(values.sum())
    assert (high - low) / 2 / 1.96 == pytest.approx(np.sqrt(5000) * values.std(), rel=0.2)
    assert np.isnan(kernels.bootstrap_sums(folds[:4], lambda total: total)[1:]).all()


def test_top_share_equals_a_sorted_sum_with_and_without_counts():
    values = np.random.default_rng(2).lognormal(size=200)
    assert kernels.top_share(values, 0.1) == pytest.approx(
        np.sort(values)[-20:].sum() / values.sum()
    )
    counts = np.random.default_rng(3).integers(0, 4, 200)
    counts[0] += -counts.sum() % 10  # so that the cut falls between two samples
    repeated = np.sort(np.repeat(values, counts))
    assert kernels.top_share(values, 0.1, counts) == pytest.approx(
        repeated[-len(repeated) // 10 :].sum() / repeated.sum()
    )


@given(hnp.arrays(np.float64, st.integers(2, 20), elements=st.floats(0.1, 1e3)))
def test_gini_is_the_mean_absolute_difference(values):
    expected = np.abs(values[:, None] - values).mean() / (2 * values.mean())
    np.testing.assert_allclose(kernels.gini(values), expected, atol=1e-12)


def test_the_t_interval_equals_scipys_and_leaves_missing_seeds_out():
    values = np.array([0.1, 0.4, np.nan, 0.2])
    expected = stats.ttest_1samp([0.1, 0.4, 0.2], 0).confidence_interval(0.95)
    mean, low, high = kernels.t_interval(values)
    np.testing.assert_allclose([mean, low, high], [0.7 / 3, *expected])
    assert np.isnan(kernels.t_interval(np.array([1.0]))[1:]).all()


@given(
    st.integers(2, 8),
    st.integers(1, 40),
    st.lists(st.integers(1, 39), max_size=4),
    st.integers(1, 16),
    st.integers(0, 2**32 - 1),
)
def test_principal_components_equal_those_of_an_svd(states, size, cuts, columns, seed):
    matrix = np.random.default_rng(seed).normal(size=(states, size)).astype(np.float32)
    blocks = np.split(matrix, sorted({c for c in cuts if c < size}), axis=1)
    products = pca.gram_matrix(blocks, columns=columns)
    scores, ratio = pca.principal_components(products, 3, np.ones(states, bool))
    centred = matrix.astype(np.float64) - matrix.astype(np.float64).mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    count = min(3, len(s))
    np.testing.assert_allclose(
        np.abs(scores[:, :count]), np.abs(u * s)[:, :count], atol=1e-5 * max(s[0], 1e-9)
    )
    np.testing.assert_allclose(ratio[:count], np.square(s[:count]) / np.square(s).sum(), atol=1e-9)


def test_a_state_that_is_not_finite_affects_only_itself():
    matrix = np.random.default_rng(0).normal(size=(5, 30))
    damaged = matrix.copy()
    damaged[3, 7], damaged[4, 2] = np.nan, np.inf
    good = np.array([True, True, True, False, False])
    scores, _ = pca.principal_components(pca.gram_matrix([damaged]), 2, good)
    alone, _ = pca.principal_components(pca.gram_matrix([matrix[:3]]), 2, good[:3])
    np.testing.assert_allclose(scores[:3], alone, atol=1e-12)
    assert np.isnan(scores[3:]).all()


def test_rows_that_were_not_fitted_are_projected():
    generator = np.random.default_rng(4)
    matrix = generator.normal(size=(6, 30))
    fit = np.array([True] * 4 + [False] * 2)
    scores, _ = pca.principal_components(pca.gram_matrix([matrix]), 2, fit)
    mean = matrix[fit].mean(0)
    axes = np.linalg.svd(matrix[fit] - mean, full_matrices=False)[2][:2]
    np.testing.assert_allclose(np.abs(scores), np.abs((matrix - mean) @ axes.T), atol=1e-9)


def test_kernels_without_statistics_need_no_scipy():
    code = (
        "import sys; sys.modules['scipy'] = None\n"
        "from sampimp.analysis import kernels, pca\n"
        "import numpy as np\n"
        "assert kernels.gini(np.array([1.0, 1.0])) == 0\n"
        "try: kernels.rank(np.ones(3))\n"
        "except ImportError as error: print(error.todo)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "pip install 'sampimp[report]'", done.stderr
