"""The batch strategies of a study as a batch sampler, for a training of your own.

A `DataLoader` that is given the sampler trains in one of the paper's orders (section 3.6), by any
score of the samples: importance or NLL of a study, or a score of yours. The batches are those that
a study forms from the same score and seed.

Map: `StrategyBatchSampler`.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from sampimp.config import check_choice
from sampimp.errors import ConfigError, DataError
from sampimp.schema import REFERENCE_STRATEGY, SORTED_STRATEGIES, STRATEGIES
from sampimp.training.strategies import make_schedule


class StrategyBatchSampler(Sampler[list[int]]):
    """Batches of a strategy, for `DataLoader(data, batch_sampler=...)`.

    Parameters
    ----------
    strategy
        "shuffle" (reshuffled in each epoch), "rand" (drawn once), or an order by the score, low
        first: "nlo" or "sio" (sorted), "rnlo" or "rsio" (the same batches in reverse), "nlm" or
        "sim" (each batch has the whole range). The names of a pair differ in what a study sorts
        by, NLL or importance.
    difficulty
        Score of each sample, shape (N,): an array, a tensor, a `DataArray` along `sample`, or a
        column of a frame. Labels of the samples are followed, so that a sorted column is
        understood. "shuffle" and "rand" take none, and then need `sample_count`. Ties keep the
        samples' order.
    batch_size
        Largest batch, B. The sizes of the ceil(N / B) batches differ by at most one.
    sample_count
        Size of the training set, `len(data)`, which the score is compared with.
    seed
        Seed of "shuffle" and "rand", and of what `drop_last` leaves out; `order_seed` of a study.
    drop_last
        Leave out N mod B samples, drawn by the seed, so that each batch has exactly B. (The last
        ones of a sorted order would always be the hardest.)

    Raises
    ------
    ConfigError
        The strategy is unknown, or the batch size is no positive number; a sorted strategy has no
        score, or another one neither a score nor `sample_count`.
    DataError
        The score is not one finite number for each sample.

    Notes
    -----
    The sampler counts its epochs from 0, and each iteration begins the next one. `set_epoch`
    chooses the epoch of the next iteration: Lightning, and the Trainer of Hugging Face, call it,
    so that a resumed training goes on with the right batches. Epoch 0 is epoch 1 of a study.
    (Where a `DataLoader` has workers, Lightning resumes with an iterator that it made before:
    make the loader in `train_dataloader`, and call `sampler.set_epoch(self.current_epoch)` there.)

    References
    ----------
    Gao & Jojic (2017), section 3.6.

    Examples
    --------
    >>> scores = np.array([5.0, 3.0, 4.0, 0.0, 2.0, 1.0])
    >>> list(StrategyBatchSampler("nlo", scores, 2))
    [[3, 5], [4, 1], [2, 0]]
    >>> list(StrategyBatchSampler("rnlo", scores, 2))
    [[2, 0], [4, 1], [3, 5]]
    >>> data = torch.utils.data.TensorDataset(torch.arange(6))
    >>> sampler = StrategyBatchSampler("nlm", scores, 2, sample_count=len(data))
    >>> loader = torch.utils.data.DataLoader(data, batch_sampler=sampler)
    >>> [batch.tolist() for (batch,) in loader]
    [[3, 1], [5, 2], [4, 0]]
    """

    def __init__(
        self,
        strategy: str,
        difficulty: Any = None,
        batch_size: int = 1,
        *,
        sample_count: int | None = None,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        check_choice(strategy, (REFERENCE_STRATEGY, *STRATEGIES), "strategy")
        if isinstance(batch_size, bool) or int(batch_size) != batch_size or batch_size < 1:
            raise ConfigError(
                expected="a batch size of 1 or more",
                got=repr(batch_size),
                where="StrategyBatchSampler",
                todo="pass the number of samples of a batch",
            )
        if difficulty is None and (strategy in SORTED_STRATEGIES or sample_count is None):
            raise ConfigError(
                expected="a score of each sample; without an order by a score, sample_count alone",
                got="none",
                where=f"StrategyBatchSampler, strategy {strategy}",
                todo='pass a score such as frame["importance"] of sampimp.to_frame, or '
                "sample_count=len(data)",
            )
        values = None if difficulty is None else _scores(difficulty, sample_count)
        count = sample_count if values is None else len(values)
        assert count is not None
        self.strategy, self.batch_size, self.drop_last = strategy, int(batch_size), drop_last
        self._schedule = make_schedule(
            strategy, count, self.batch_size, seed, values, drop_last=drop_last
        )
        self._length = count // self.batch_size if drop_last else -(-count // self.batch_size)
        self._epoch = 0  # of the next iteration

    @property
    def sampler(self) -> "StrategyBatchSampler":
        """The sampler itself: of a batch sampler, Lightning sets the epoch of this attribute."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be that of an epoch, counted from 0."""
        self._epoch = int(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of the epoch; the next iteration is the next epoch."""
        # Read with the first batch: Lightning sets the epoch after it has made the iterator. And
        # counted there: a loader that knows its length leaves an iterator unfinished.
        self._epoch += 1
        yield from (batch.tolist() for batch in self._schedule(self._epoch))

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return self._length


def _scores(difficulty: Any, sample_count: int | None) -> np.ndarray:
    """Return the score of each sample in the order of the samples, or raise DataError."""
    if isinstance(difficulty, torch.Tensor):
        tensor = difficulty.detach().cpu()
        difficulty = (tensor.double() if tensor.is_floating_point() else tensor).numpy()
    values = np.asarray(difficulty)
    count = values.size if sample_count is None else sample_count
    is_number = values.dtype.kind in "iuf"
    unfit = int(np.sum(~np.isfinite(values))) if is_number else 0
    if not is_number or values.shape != (count,) or unfit:
        raise DataError(
            expected=f"one finite score for each of {count:,} samples",
            got=f"{values.dtype} of shape {values.shape}"
            + (f", {unfit:,} of them NaN or infinite" if unfit else ""),
            where="StrategyBatchSampler, difficulty",
            todo="pass a score for every sample of the training set; a sample without one has no "
            "place in a sorted order: train on the others alone (torch.utils.data.Subset)",
        )
    labels = _sample_labels(difficulty)
    if labels is None:
        return values
    order = np.argsort(labels, kind="stable")
    if not np.array_equal(labels[order], np.arange(count)):
        raise DataError(
            expected=f"scores whose labels are the samples 0 to {count - 1}",
            got=f"labels {', '.join(map(str, labels[:5]))}, ...",
            where="StrategyBatchSampler, difficulty",
            todo="pass the values alone, in the order of the training set",
        )
    return np.asarray(values[order])


def _sample_labels(difficulty: Any) -> np.ndarray | None:
    """Return the samples that a DataArray, or a column of a frame, has beside its values."""
    if "sample" in getattr(difficulty, "coords", ()):
        return np.asarray(difficulty["sample"])
    index = getattr(difficulty, "index", None)
    return None if index is None or callable(index) else np.asarray(index)  # list.index
