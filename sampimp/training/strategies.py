"""Batch strategies: the reshuffled reference runs and the paper's seven fixed ones (section 3.6).

N samples form b = ceil(N / B) batches whose sizes differ by at most one; every sample is in exactly
one batch. (With a smaller last batch instead, its samples would weigh more in their mean loss: at
B = 100, the sample of a batch of one has 10^4 times the importance.) If B divides N, every batch
has B samples.

A fixed strategy visits the batches 1..b in the same order in every epoch:

    rand              drawn once, from the order seed
    nlo               sorted by the reference's final NLL, low first
    rnlo              the batches of nlo, visited in reverse
    nlm               k-th sample of the sorted list into batch k mod b
    sio, rsio, sim    as nlo, rnlo, nlm, sorted by the reference's overall importance tau

Map: `make_schedule` (a strategy's batches per epoch), `batch_positions` (which batch used which
sample), `SORT_KEY` (the quantity that a strategy sorts by).
"""

import math
from collections.abc import Callable

import numpy as np

from sampimp.config import check_choice
from sampimp.errors import RecordError
from sampimp.schema import REFERENCES, SORTED_STRATEGIES, STRATEGIES

Schedule = Callable[[int], list[np.ndarray]]
"""Function from an epoch (1-based) to its batches of sample indices, in the order of training."""

SORT_KEY = {
    **dict.fromkeys(("nlo", "rnlo", "nlm"), "final_nll"),
    **dict.fromkeys(("sio", "rsio", "sim"), "overall_importance"),
}
"""The quantity of the reference run that each sorted strategy sorts by."""


def make_schedule(
    strategy: str,
    sample_count: int,
    batch_size: int,
    order_seed: int,
    difficulty: np.ndarray | None = None,
    *,
    drop_last: bool = False,
) -> Schedule:
    """Return a strategy's batches as a function of the epoch.

    Parameters
    ----------
    strategy
        "shuffle", "shuffle_by_seed" or one of `STRATEGIES`.
    sample_count, batch_size
        N and B.
    order_seed
        Seed of the random permutations; sorted strategies use none.
    difficulty
        Shape (N,): the quantity that a sorted strategy sorts by, see `SORT_KEY`. Ties keep the
        samples' order.
    drop_last
        Leave out N mod B samples, so that every batch has B. They are the last of the order seed's
        permutation (of each epoch, if the strategy is a reference): the last of a sorted order
        would always be the hardest ones.

    Raises
    ------
    ConfigError
        The strategy is unknown.
    RecordError
        The difficulty is missing, has another length, or is not finite.

    Examples
    --------
    >>> schedule = make_schedule("nlm", 6, 2, 0, difficulty=np.array([5, 3, 4, 0, 2, 1]))
    >>> [batch.tolist() for batch in schedule(1)]
    [[3, 1], [5, 2], [4, 0]]
    """
    check_choice(strategy, (*REFERENCES, *STRATEGIES), "strategy")
    count = sample_count // batch_size if drop_last else math.ceil(sample_count / batch_size)
    kept = count * batch_size if drop_last else sample_count
    if strategy in REFERENCES:
        return lambda epoch: _split(_permutation(order_seed, epoch, sample_count)[:kept], count)
    order = _permutation(order_seed, 0, sample_count)
    if strategy in SORTED_STRATEGIES:
        values = _require_difficulty(difficulty, strategy, sample_count)
        left_out, order = order[kept:], np.argsort(values, kind="stable")
        order = order[~np.isin(order, left_out)]
    else:
        order = order[:kept]
    if strategy in ("nlm", "sim"):
        batches = [order[first::count] for first in range(count)]
    else:
        batches = _split(order, count)
    if strategy in ("rnlo", "rsio"):
        batches.reverse()
    return lambda epoch: batches


def _split(order: np.ndarray, count: int) -> list[np.ndarray]:
    """Split an order into `count` parts whose sizes differ by at most one; none if count is 0."""
    return np.array_split(order, count) if count else []


def batch_positions(batches: list[np.ndarray], sample_count: int) -> np.ndarray:
    """Return the position of the batch that uses each sample, shape (N,), float32.

    Examples
    --------
    >>> batch_positions([np.array([2, 0]), np.array([1])], 3)
    array([0., 1., 0.], dtype=float32)
    """
    position = np.full(sample_count, np.nan, np.float32)
    for number, batch in enumerate(batches):
        position[batch] = number
    return position


def _permutation(order_seed: int, epoch: int, sample_count: int) -> np.ndarray:
    """Return the permutation of an epoch; seeded per epoch, it needs no stored generator state."""
    return np.random.default_rng([order_seed, epoch]).permutation(sample_count)


def _require_difficulty(
    difficulty: np.ndarray | None, strategy: str, sample_count: int
) -> np.ndarray:
    """Return the difficulty; raise RecordError unless it is a finite value per sample."""
    if (
        difficulty is None
        or difficulty.shape != (sample_count,)
        or not np.isfinite(difficulty).all()
    ):
        got = "none" if difficulty is None else f"shape {difficulty.shape}, or values not finite"
        raise RecordError(
            expected=f"a finite {SORT_KEY[strategy]} of {sample_count:,} samples to sort by",
            got=got,
            where=f"strategy {strategy}",
            todo="let the reference run (shuffle, seed 1) finish without diverging first",
        )
    return difficulty
