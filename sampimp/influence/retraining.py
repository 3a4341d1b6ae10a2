"""Truth about removals: the run trained again without some of its samples.

    effect = T(run without the samples) - T(run with all), both from the same start

The retrained run keeps the recorded run's initial parameters, batches and order, learning rates and
dropout masks; the removed samples' losses have weight 0. The mean of a batch's loss keeps its
denominator B, as the derivatives of the influence pass do; if `renormalised`, it is the number of
samples that remain. To first order, the effect of a removal is minus the samples' influence.

Where gates of ReLUs flip, a tiny change of the start can change a target as much as a removal does.
So effects have repeats: repeat 0 starts from the run's own initial parameters, repeats 1, 2, ...
from jittered ones, each with and without the removal. The agreement of repeats with each other is
the highest score that a prediction can be expected to reach.

Map: `retrain` (all effects), `final_values` and `retrained_model` (one training, for a study on
several machines); `single_removals` and `random_subsets` (which samples to remove).

Dimensions: removal (R), sample (N), target, repeat.

References
----------
Koh & Liang (2017), section 4.1, leave-one-out retraining; Ilyas et al. (2022), Datamodels, and Park
et al. (2023), TRAK, for random subsets.
"""

from collections.abc import Callable, Sequence

import numpy as np
from torch import nn

from sampimp.config import TrialConfig
from sampimp.data import Dataset
from sampimp.errors import ConfigError
from sampimp.influence.targets import Target
from sampimp.training.loop import TrainingRun
from sampimp.training.strategies import Schedule

JITTER = 1e-3
"""Standard deviation of the jitter of a start (arbitrary): 2.5 % of that of the weights in the
paper's first hidden layer, sqrt(2 / (784 + 512)) = 0.039."""


def retrained_model(
    config: TrialConfig,
    data: Dataset,
    schedule: Schedule,
    removed_N: np.ndarray | None = None,
    repeat: int = 0,
    *,
    jitter: float = JITTER,
    renormalised: bool = False,
) -> nn.Module:
    """Return the network after training without some samples; repeat 0 of none removed is the run.

    Parameters
    ----------
    config, data, schedule
        Those of the recorded run.
    removed_N
        Shape (N,), bool: True for a removed sample. None removes no sample.
    repeat
        Number of the start: 0 is the run's own; others are jittered by seeds that follow from it
        and from the run's seed.
    jitter
        Standard deviation of the number that is added to each initial parameter.
    renormalised
        Divide each batch's loss by the number of samples that remain in it, instead of B.

    Raises
    ------
    ConfigError
        `removed_N` is no bool for each sample, or removes all of them; a run of several workers.
    """
    weights = None
    if removed_N is not None:
        _check_removed(removed_N[None], len(data.train_labels))
        weights = np.where(removed_N, 0.0, 1.0)
    seed = int(np.random.SeedSequence([config.seed, repeat]).generate_state(1)[0])
    run = TrainingRun(
        config,
        data,
        schedule,
        record=False,
        weights=weights,
        renormalised=renormalised,
        jitter=(jitter, seed) if repeat else None,
    )
    for epoch in range(1, config.training.epochs + 1):
        for batch in run.begin_epoch(epoch):
            run.train_batch(batch)
    return run.model


def final_values(
    config: TrialConfig,
    data: Dataset,
    schedule: Schedule,
    targets: Sequence[Target],
    removed_N: np.ndarray | None = None,
    repeat: int = 0,
    *,
    jitter: float = JITTER,
    renormalised: bool = False,
) -> np.ndarray:
    """Return the targets after training without some samples, shape (target,), float64.

    Parameters and errors are those of `retrained_model`. Of a training that diverges, the values
    are NaN or infinite.
    """
    model = retrained_model(
        config, data, schedule, removed_N, repeat, jitter=jitter, renormalised=renormalised
    )
    return np.array([target.value(model) for target in targets], np.float64)


def retrain(
    config: TrialConfig,
    data: Dataset,
    schedule: Schedule,
    targets: Sequence[Target],
    removed_RN: np.ndarray,
    *,
    repeats: int,
    jitter: float = JITTER,
    renormalised: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Return the effect of each removal on each target, by (R + 1) x repeats trainings.

    Parameters
    ----------
    config, data, schedule
        Those of the recorded run.
    targets
        Functions of the final network, by `sampimp.influence.targets.make_targets`.
    removed_RN
        Shape (removal, sample), bool: True for a sample that a removal removes.
    repeats
        Number of starts: the run's own, then jittered ones. With 1 there is no ceiling.
    jitter, renormalised
        See `retrained_model`.
    progress
        Called after each training with the number of trainings done and of all.

    Returns
    -------
    array (removal, target, repeat) of float64
        Value without the samples minus the value with all, in the target's unit; NaN where one of
        the two trainings diverged.

    Raises
    ------
    ConfigError
        `removed_RN` is no bool for each removal and sample, or a removal removes all samples; a
        run of several workers.
    """
    _check_removed(removed_RN, len(data.train_labels))
    effect = np.empty((len(removed_RN), len(targets), repeats))
    done, count = 0, (len(removed_RN) + 1) * repeats
    for repeat in range(repeats):
        reference = None
        for number, removed_N in enumerate((None, *removed_RN)):
            values = final_values(
                config,
                data,
                schedule,
                targets,
                removed_N,
                repeat,
                jitter=jitter,
                renormalised=renormalised,
            )
            if reference is None:
                reference = values
            else:
                effect[number - 1, :, repeat] = values - reference
            done += 1
            if progress is not None:
                progress(done, count)
    return effect


def single_removals(
    tau_N: np.ndarray, count_random: int, count_top: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return removals of single samples: some drawn at random, and the most important ones.

    The two kinds are judged apart: among the most important samples effects are large and easier to
    predict. A sample may be in both.

    Parameters
    ----------
    tau_N
        Shape (N,): overall importance of each sample; NaN counts as the least.
    count_random, count_top
        How many of each kind, at most N.
    seed
        Seed of the random draw, without replacement.

    Returns
    -------
    random, top : arrays (count, sample) of bool
        True for the removed sample of each row; the most important one first.

    Raises
    ------
    ConfigError
        More removals than samples.

    Examples
    --------
    >>> random, top = single_removals(np.array([0.1, 0.9, 0.5]), 2, 2, seed=0)
    >>> top.astype(int)
    array([[0, 1, 0],
           [0, 0, 1]])
    >>> random.sum(1)
    array([1, 1])
    """
    count = len(tau_N)
    if not 0 <= max(count_random, count_top) <= count:
        raise ConfigError(
            expected=f"at most {count} removals, one for each sample",
            got=f"{count_random} random ones and {count_top} of the most important",
            where="single removals",
            todo="choose fewer",
        )
    drawn = np.random.default_rng(seed).choice(count, count_random, replace=False)
    order = np.argsort(-np.nan_to_num(tau_N, nan=-np.inf), kind="stable")
    random, top = (np.arange(count) == samples[:, None] for samples in (drawn, order[:count_top]))
    return random, top


def random_subsets(sample_count: int, share_kept: float, count: int, seed: int) -> np.ndarray:
    """Return removals of all samples but random subsets of one size.

    Parameters
    ----------
    sample_count
        Number of training samples, N.
    share_kept
        Share of the samples that each subset keeps, between 0 and 1.
    count
        Number of subsets.
    seed
        Seed of the draw; each subset is drawn without replacement, independently of the others.

    Returns
    -------
    array (removal, sample) of bool
        True for a removed sample: round((1 - share_kept) N) in each row.

    Raises
    ------
    ConfigError
        The share would remove no sample, or all.

    Examples
    --------
    >>> random_subsets(10, 0.8, 3, seed=0).sum(1)
    array([2, 2, 2])
    """
    removed_count = round((1 - share_kept) * sample_count)
    if not 0 < removed_count < sample_count:
        raise ConfigError(
            expected="a share of kept samples that removes at least one and keeps at least one",
            got=f"{share_kept:g} of {sample_count} samples, which removes {removed_count}",
            where="random subsets",
            todo="choose a share between 0 and 1, such as 0.95",
        )
    generator = np.random.default_rng(seed)
    removed = np.zeros((count, sample_count), bool)
    for row in removed:
        row[generator.choice(sample_count, removed_count, replace=False)] = True
    return removed


def _check_removed(removed_RN: np.ndarray, sample_count: int) -> None:
    """Raise ConfigError unless removals are a bool for each sample, and each keeps a sample."""
    if (
        removed_RN.dtype != np.bool_
        or removed_RN.ndim != 2
        or removed_RN.shape[1] != sample_count
        or removed_RN.all(1).any()
    ):
        raise ConfigError(
            expected=f"a bool for each of {sample_count} samples, and a sample that is kept",
            got=f"{removed_RN.dtype} of shape {removed_RN.shape}, "
            f"{removed_RN.astype(bool).sum(-1).max(initial=0)} samples removed",
            where="removals to retrain without",
            todo="make them with single_removals or random_subsets",
        )
