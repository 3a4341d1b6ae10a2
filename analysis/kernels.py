"""The arithmetic of the analysis on samples: NumPy arrays in, NumPy arrays out, no dimension names.

Every kernel works on the last axis (samples, unless it says otherwise) and sums in float64. A row
with a NaN gives NaN: the value of a missing trial is unknown, and omitting it would silently give a
result for fewer samples.

Map: `rank`, `standardised_ranks`, `spearman`, `bootstrap_spearman` (rank correlation and its
interval); `sum_by_group`, `top_share`, `gini`, `histogram` (how an amount is spread);
`bootstrap_sums`, `bootstrap_samples` (intervals over samples), `t_interval` (over seeds).
Principal components are in `sampimp.analysis.pca`. SciPy, which the extra `report` installs, is
imported by the functions that need it.

Shapes: N samples, V variables, Q pairs of them, R resamples, F folds, G groups of ties.
"""

from collections.abc import Callable, Iterable

import numpy as np

from sampimp.errors import require_package

RESAMPLES = 200
"""Bootstrap resamples behind a standard error (200 suffice: Efron & Tibshirani 1993, sec. 6.4)."""

BOOTSTRAP_SEED = 20170424
"""Seed of the resamples: the same in every call, so that two reports have the same numbers.
(Arbitrary: the first day of the conference that the paper was submitted to.)"""


def rank(values: np.ndarray) -> np.ndarray:
    """Return the ranks along the last axis, 1 for the smallest; ties share their average rank.

    Parameters
    ----------
    values : array [..., N]

    Returns
    -------
    array [..., N] of float64
        As `scipy.stats.rankdata(values, axis=-1)`; all NaN in a row that holds a NaN.

    Examples
    --------
    >>> rank(np.array([0.3, 0.1, 0.3, 0.9]))
    array([2.5, 1. , 2.5, 4. ])
    """
    require_package("scipy", "report")
    from scipy import stats

    return stats.rankdata(values, axis=-1, nan_policy="propagate").astype(np.float64, copy=False)


def standardised_ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks with mean 0 and mean square 1.

    The mean product of two such rows is Spearman's correlation. Ranks are divided by their actual
    standard deviation; with ties it is less than sqrt((N^2 - 1) / 12). A row of equal values, for
    which no correlation is defined, is NaN.

    Parameters
    ----------
    values : array [..., N]

    Returns
    -------
    array [..., N] of float64

    Examples
    --------
    >>> standardised_ranks(np.array([5.0, 7.0, 5.0, 7.0]))
    array([-1.,  1., -1.,  1.])
    """
    ranks = rank(values)
    ranks -= (values.shape[-1] + 1) / 2
    deviation = np.sqrt(np.mean(np.square(ranks), axis=-1, keepdims=True))
    return np.divide(ranks, deviation, out=np.full_like(ranks, np.nan), where=deviation > 0)


def spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return Spearman's rank correlation along the last axis; leading axes broadcast.

    Parameters
    ----------
    first, second : array [..., N]

    Returns
    -------
    array [...] of float64

    Examples
    --------
    >>> spearman(np.array([1.0, 2.0, 3.0]), np.array([[1.0, 4.0, 9.0], [9.0, 4.0, 1.0]]))
    array([ 1., -1.])
    """
    products = np.einsum("...n,...n->...", standardised_ranks(first), standardised_ranks(second))
    return np.clip(products / first.shape[-1], -1.0, 1.0)


def bootstrap_spearman(
    values: np.ndarray,
    pairs: Iterable[tuple[int, int]],
    *,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = BOOTSTRAP_SEED,
) -> np.ndarray:
    """Return bootstrap intervals, over samples, of the rank correlations of pairs of rows.

    This is the plain bootstrap: N samples are drawn with replacement and ranked again. No resample
    is sorted, however. A resample is a vector of counts, and its ranks are cumulative counts in the
    order of the full data, which is computed once (1.6 ms instead of 20 ms per resample of 3 x
    50,000 values). Resampling the products of the *full* data's standardised ranks would be cheaper
    and wrong: it treats the ranks as known, and gives an interval of positive width for a
    correlation of 1.

    The interval is atanh(rho) +- 1.96 standard errors on Fisher's scale, transformed back. 200
    resamples estimate a standard error well and a 2.5 % quantile badly.

    Parameters
    ----------
    values : array [V, N]
    pairs
        Q pairs of rows to correlate.

    Returns
    -------
    array [Q, 2] of float64
        Lower and upper bound; NaN where a row has a NaN or no spread, or N < 4.

    Examples
    --------
    >>> x = np.arange(100.0)
    >>> bootstrap_spearman(np.stack([x, x, (x * 37) % 100]), [(0, 1), (0, 2)]).round(2)
    array([[ 1.  ,  1.  ],
           [-0.19,  0.23]])

    References
    ----------
    Efron & Tibshirani, An Introduction to the Bootstrap (1993), sections 6.4 and 12.6.
    """
    require_package("scipy", "report")
    from scipy import stats

    pairs = list(pairs)
    n = values.shape[-1]
    bounds = np.full((len(pairs), 2), np.nan)
    usable = [q for q, pair in enumerate(pairs) if np.isfinite(values[list(pair)]).all()]
    if not usable or n < 4:  # Fisher's scale needs more than three points
        return bounds
    first, second = np.array([pairs[q] for q in usable]).T
    estimate = spearman(values[first], values[second])
    spread = np.isfinite(estimate)
    usable = [q for q, has_spread in zip(usable, spread, strict=True) if has_spread]
    first, second, estimate = first[spread], second[spread], estimate[spread]
    if not usable:
        return bounds
    places = {row: _tie_groups(values[row]) for row in sorted({*first, *second})}
    generator = np.random.default_rng(seed)
    replicates = np.empty((resamples, len(usable)))
    ranks_VN = np.zeros(values.shape)
    for r in range(resamples):
        count_N = np.bincount(generator.integers(n, size=n), minlength=n).astype(np.float64)
        for row, group_N in places.items():
            count_G = np.bincount(group_N, weights=count_N)
            ranks_VN[row] = (np.cumsum(count_G) - count_G / 2)[group_N]
            ranks_VN[row] -= n / 2  # the mean rank (n + 1) / 2, less the 1/2 not added above
        weighted_VN = ranks_VN * count_N
        # einsum instead of @: when the cores are busy, BLAS threads on such short products take ten
        # times as long (5.2 s instead of 0.5 s for 200 resamples of 5 x 50,000 at a load of 5).
        square_V = np.einsum("vn,vn->v", weighted_VN, ranks_VN)
        dot_Q = np.array(
            [
                np.einsum("n,n->", weighted_VN[a], ranks_VN[b])
                for a, b in zip(first, second, strict=True)
            ]
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            replicates[r] = dot_Q / np.sqrt(square_V[first] * square_V[second])
    # atanh(1) is infinite. A correlation of 1 is replaced by 1 minus half the distance to the
    # largest correlation below 1, so that a resample in perfect order is large and finite.
    limit = 1 - 6 / (n**3 - n)
    error = np.nanstd(np.arctanh(np.clip(replicates, -limit, limit)), axis=0, ddof=1)
    half = stats.norm.ppf((1 + level) / 2) * error
    centre = np.arctanh(np.clip(estimate, -limit, limit))
    ends = np.tanh(np.stack([centre - half, centre + half], axis=-1))
    bounds[usable] = np.where(error[:, None] > 1e-12, ends, estimate[:, None])
    return bounds


def _tie_groups(values: np.ndarray) -> np.ndarray:
    """Return the position of each value among the sorted distinct values."""
    return np.unique(values, return_inverse=True)[1]


def sum_by_group(values: np.ndarray, groups: np.ndarray, count: int) -> np.ndarray:
    """Return the sum over the samples of each group, in float64.

    Parameters
    ----------
    values : array [..., N]
    groups : array [N] of int
        0 to count - 1.
    count
        The number of groups; a group may be empty, and its sum is then 0.

    Returns
    -------
    array [..., count] of float64

    Examples
    --------
    >>> sum_by_group(np.array([[1.0, 2.0, 4.0]]), np.array([0, 2, 0]), 3)
    array([[5., 0., 2.]])
    """
    rows = values.reshape(-1, values.shape[-1])
    sums = np.empty((len(rows), count))
    for row, out in zip(rows, sums, strict=True):
        out[:] = np.bincount(groups, weights=row, minlength=count)
    return sums.reshape(*values.shape[:-1], count)


def bootstrap_sums(
    folds: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = BOOTSTRAP_SEED,
) -> tuple[float, float, float]:
    """Return a statistic of totals over samples, and its percentile interval over folds.

    The samples are divided into F folds once and summed within each fold; then folds are resampled.
    The sum of a resample has the variance of the plain bootstrap's, from F numbers instead of N.
    Shares, ratios and peaks of totals over 50,000 samples thus get an interval from one pass over
    the data.

    Parameters
    ----------
    folds : array [F, ...]
        The totals of each fold.
    statistic
        Function of totals [R, ...] that returns R numbers.

    Returns
    -------
    value, low, high
        NaN bounds with fewer than 5 folds.

    Examples
    --------
    >>> folds = np.stack([np.full(50, 2.0), np.tile([0.9, 1.1], 25)], axis=1)
    >>> bootstrap_sums(folds, lambda total: total[:, 1] / total[:, 0])[0]
    0.5
    """
    count = len(folds)
    value = float(statistic(folds.sum(0, keepdims=True))[0])
    if count < 5:  # arbitrary: with fewer folds, resamples have only a few distinct values
        return value, np.nan, np.nan
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples)
    totals = (draws @ folds.reshape(count, -1)).reshape(resamples, *folds.shape[1:])
    with np.errstate(invalid="ignore", divide="ignore"):
        replicates = statistic(totals)
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return value, float(low), float(high)


def bootstrap_samples(
    columns: np.ndarray,
    statistic: Callable[[np.ndarray, np.ndarray], float],
    *,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = BOOTSTRAP_SEED,
) -> tuple[float, float, float]:
    """Return a statistic of weighted samples, and its percentile interval over resampled samples.

    Parameters
    ----------
    columns : array [..., N]
    statistic
        Function of the columns and of the count of each sample in the resample [N] that returns one
        number.

    Returns
    -------
    value, low, high
    """
    n = columns.shape[-1]
    generator = np.random.default_rng(seed)
    replicates = [
        statistic(columns, np.bincount(generator.integers(n, size=n), minlength=n))
        for _ in range(resamples)
    ]
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return float(statistic(columns, np.ones(n))), float(low), float(high)


def top_share(values: np.ndarray, fraction: float, weights: np.ndarray | None = None) -> float:
    """Return the share of the total that the largest `fraction` of the samples holds.

    Parameters
    ----------
    values : array [N], in any order, non-negative
    fraction
        Between 0 and 1.
    weights : array [N], optional
        Count of each sample. The sample at the cut counts in part.

    Examples
    --------
    >>> top_share(np.array([1.0, 6.0, 1.0, 2.0]), 0.25)
    0.6
    """
    order = np.argsort(-values, kind="stable")
    weight = np.ones(len(values)) if weights is None else weights[order].astype(np.float64)
    before = np.cumsum(weight) - weight
    taken = np.clip(fraction * weight.sum() - before, 0, weight)
    amount = values[order].astype(np.float64)
    return float((taken * amount).sum() / (weight * amount).sum())


def gini(values: np.ndarray) -> np.ndarray:
    """Return the Gini coefficient along the last axis.

    It is 0 if all values are equal, and near 1 if one value holds the whole sum.

    Examples
    --------
    >>> float(gini(np.array([1.0, 1.0, 1.0]))), float(gini(np.array([0.0, 0.0, 0.0, 1.0])))
    (0.0, 0.75)
    """
    n = values.shape[-1]
    ordered = np.sort(values, axis=-1).astype(np.float64)
    total = ordered.sum(-1)
    weight = (2 * np.arange(1, n + 1) - n - 1) / n
    weighted = ordered @ weight
    return np.divide(weighted, total, out=np.full_like(total, np.nan), where=total != 0)


def histogram(values: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a histogram of log10 of the positive values, and the number of zeros.

    Parameters
    ----------
    values : array [N], non-negative
    bins
        Equal widths on the logarithmic scale, from the smallest to the largest positive value.

    Returns
    -------
    count : array [bins] of int
    edges : array [bins + 1] of float64
    zeros : array [] of int

    Examples
    --------
    >>> count, edges, zeros = histogram(np.array([0.0, 1.0, 10.0, 100.0]), 2)
    >>> count.tolist(), edges.tolist(), int(zeros)
    ([1, 2], [0.0, 1.0, 2.0], 1)
    """
    positive = values[values > 0].astype(np.float64)
    count, edges = np.histogram(np.log10(positive), bins=bins)
    return count, edges.astype(np.float64), np.array(np.count_nonzero(values == 0))


def t_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """Return the mean of a few independent numbers and its interval by Student's t.

    Parameters
    ----------
    values : array [n]
        NaN are left out.

    Returns
    -------
    mean, low, high
        NaN bounds with fewer than two numbers.

    Examples
    --------
    >>> [round(x, 3) for x in t_interval(np.array([1.0, 2.0, 3.0]))]
    [2.0, -0.484, 4.484]
    """
    require_package("scipy", "report")
    from scipy import stats

    values = values[np.isfinite(values)]
    if len(values) < 2:
        return float(values.mean()) if len(values) else np.nan, np.nan, np.nan
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values)
    mean = float(values.mean())
    return mean, float(mean - half), float(mean + half)
