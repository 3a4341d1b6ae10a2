"""How well predicted effects of removals agree with actual ones: scores, ceilings and intervals.

A removal leaves out one sample or a group. Its *actual* effect on a target is the target's value
after training without the samples minus that after training with all of them, from the same start
in the same order (`sampimp.influence.retraining`). Its *predicted* effect is minus the sum of the
samples' influence, or any other score. Agreement is by rank: Spearman's correlation over removals,
for each target, averaged over targets.

    TSLOO    over removals of single samples, random ones and the most important ones apart
    LDS      over random subsets that keep a share of the samples
    ceiling  the same score of one retraining against another from a jittered start: where it is
             low, the truth does not agree with itself, and no prediction can agree with it

A NaN (a training that diverged) makes the score of its target, and with it the mean, NaN: a score
over the other removals is no score of all. Leave such removals out beforehand, and say so.

Map: `predicted_effects`; `rank_agreement` (by target), `tsloo`, `lds`; `ceiling` and
`ceiling_against_mean`; `score_interval` (bootstrap over removals).

Shapes: R removals or subsets, T targets, N samples, K repeats.

References
----------
Park et al. (2023), TRAK, section 2, for the linear datamodeling score.
"""

from collections.abc import Callable
from itertools import combinations

import numpy as np

from sampimp.analysis.kernels import BOOTSTRAP_SEED, spearman

Score = Callable[..., float]
"""From arrays [R, ...] to a score of their rows."""


def predicted_effects(influence: np.ndarray, removed: np.ndarray) -> np.ndarray:
    """Return the effect that influence predicts for removals: minus the sum over their samples.

    The mean of a batch's loss keeps its denominator when samples are removed.

    Parameters
    ----------
    influence : array [T, N]
        Derivative of each target by the weight of each sample's loss, in all epochs.
    removed : array [R, N] of bool
        True for a removed sample.

    Returns
    -------
    array [R, T] of float64

    Examples
    --------
    >>> predicted_effects(np.array([[1.0, 2.0, 4.0]]), np.array([[True, False, True]]))
    array([[-5.]])
    """
    return -(removed.astype(np.float64) @ influence.T.astype(np.float64))


def rank_agreement(predicted: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """Return Spearman's correlation of predicted with actual effects over removals, by target.

    Parameters
    ----------
    predicted, actual : array [R, T]

    Returns
    -------
    array [T] of float64
        NaN for a target with a NaN, or whose effects, predicted or actual, are all equal.

    Examples
    --------
    >>> predicted = np.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    >>> rank_agreement(predicted, np.array([[0.1, 3.0], [0.5, 2.0], [0.9, 1.0]]))
    array([ 1., -1.])
    """
    return spearman(predicted.T, actual.T)


def tsloo(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Return the score over removals of single samples ("test-sample leave-one-out").

    Spearman's correlation, over removals of one sample each, of the predicted with the actual
    change of a target, averaged over the targets (single test samples, at least 12). Samples that
    were drawn at random and samples that were chosen for their importance are scored apart.

    Parameters
    ----------
    predicted, actual : array [R, T]

    Examples
    --------
    >>> predicted = np.array([[1.0], [2.0], [3.0], [4.0]])
    >>> tsloo(predicted, np.array([[1.0], [3.0], [2.0], [4.0]]))
    0.8
    """
    return float(rank_agreement(predicted, actual).mean())


def lds(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Return the linear datamodeling score, over removals of groups.

    Spearman's correlation, over random subsets that keep one share of the samples, of the predicted
    with the actual change of a target, averaged over the targets. A group's predicted change is the
    sum of its samples' (`predicted_effects`).

    Parameters
    ----------
    predicted, actual : array [R, T]
        Subsets of one size; scores of several sizes are separate.

    Examples
    --------
    >>> removed = np.array([[True, True, False], [True, False, True], [False, True, True]])
    >>> predicted = predicted_effects(np.array([[0.1, 0.2, 0.4]]), removed)
    >>> round(lds(predicted, np.array([[-0.2], [-0.3], [-0.8]])), 6)
    1.0
    """
    return float(rank_agreement(predicted, actual).mean())


def ceiling(effect: np.ndarray) -> float:
    """Return the score of one retraining against another from a jittered start.

    Spearman's correlation over removals, averaged over targets and over all pairs of repeats: the
    score to expect of a prediction that is as good as one retraining.

    Parameters
    ----------
    effect : array [R, T, K]
        Actual effects, in K >= 2 repeats; NaN with fewer.

    Examples
    --------
    >>> repeat = np.array([[1.0], [2.0], [3.0], [4.0]])
    >>> ceiling(np.stack([repeat, repeat, -repeat], axis=-1))  # 1, -1 and -1
    -0.333...
    """
    scores = [
        rank_agreement(effect[..., a], effect[..., b]).mean()
        for a, b in combinations(range(effect.shape[-1]), 2)
    ]
    return float(np.mean(scores)) if scores else np.nan


def ceiling_against_mean(effect: np.ndarray) -> float:
    """Return the score of one retraining against the mean of the other repeats.

    As `ceiling`, but each repeat is scored against the mean effect of the K - 1 others, which has
    less noise: the number to compare with a prediction's score against the mean of all repeats.

    Parameters
    ----------
    effect : array [R, T, K]
        Actual effects, in K >= 2 repeats; NaN with fewer.

    Examples
    --------
    >>> repeat = np.array([[1.0], [2.0], [3.0], [4.0]])
    >>> ceiling_against_mean(np.stack([repeat, 2 * repeat], axis=-1))
    1.0
    """
    count = effect.shape[-1]
    if count < 2:
        return np.nan
    scores = [
        rank_agreement(effect[..., k], np.delete(effect, k, -1).mean(-1)).mean()
        for k in range(count)
    ]
    return float(np.mean(scores))


def score_interval(
    score: Score,
    *arrays: np.ndarray,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = BOOTSTRAP_SEED,
) -> tuple[float, float, float]:
    """Return a score and its percentile bootstrap interval over removals.

    Removals are drawn with replacement, the same ones of every array; targets and repeats stay. The
    interval thus says how much the score depends on which removals were tried.

    Parameters
    ----------
    score
        `tsloo`, `lds`, `ceiling` or another function of the arrays.
    *arrays : array [R, ...]
        Its arguments.

    Returns
    -------
    value, low, high
        NaN bounds with fewer than 5 removals.

    Examples
    --------
    >>> effect = np.arange(20.0)[:, None]
    >>> [round(bound, 6) for bound in score_interval(tsloo, effect, effect**3)]
    [1.0, 1.0, 1.0]

    References
    ----------
    Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    count, value = len(arrays[0]), score(*arrays)
    if count < 5:  # arbitrary: with fewer removals, resamples have only a few distinct values
        return value, np.nan, np.nan
    generator = np.random.default_rng(seed)
    replicates = []
    for _ in range(resamples):
        rows = generator.integers(count, size=count)
        replicates.append(score(*(array[rows] for array in arrays)))
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return value, float(low), float(high)
