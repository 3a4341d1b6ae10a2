"""One training on a subset, with a budget of steps or of epochs.

    steps         as many updates as all samples make in the study's epochs
    epochs        as many passes over the subset as the study's epochs
    convergence   all samples for `CONVERGENCE` times the study's epochs

The network, optimizer, rates and batch size are those of the study, and batches are reshuffled in
every pass. Under `steps`, an "epoch" is what it is for all samples, so that a schedule of the rate
ends where theirs does.

Map: `subset_schedule`, `train_subset`.
"""

import math
from dataclasses import replace

import numpy as np
from torch import nn

from sampimp.config import TrialConfig
from sampimp.data import Dataset
from sampimp.training.loop import TrainingRun
from sampimp.training.strategies import Schedule, make_schedule

CONVERGENCE = 5
"""Epochs of a converged training, in those of the study (arbitrary)."""


def subset_schedule(count: int, batch_size: int, order_seed: int, batches: int) -> Schedule:
    """Return epochs of `batches` batches each, cut from passes over `count` samples.

    Every pass is reshuffled; an epoch begins where the one before ended.

    Examples
    --------
    >>> epoch = subset_schedule(4, 2, order_seed=0, batches=3)
    >>> [len(batch) for batch in epoch(1)], sorted(np.concatenate([*epoch(1), *epoch(2)]).tolist())
    ([2, 2, 2], [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])
    """
    passes = make_schedule("shuffle", count, batch_size, order_seed)
    in_pass = math.ceil(count / batch_size)

    def schedule(epoch: int) -> list[np.ndarray]:
        first, last = (epoch - 1) * batches, epoch * batches
        numbers = range(first // in_pass, math.ceil(last / in_pass))
        whole = [batch for number in numbers for batch in passes(number + 1)]
        start = first - numbers[0] * in_pass
        return whole[start : start + batches]

    return schedule


def train_subset(
    config: TrialConfig, data: Dataset, selected: np.ndarray, budget: str
) -> nn.Module:
    """Return the network after training on a subset alone.

    Parameters
    ----------
    config
        The training; its seeds are those of the initialisation and of the order.
    data
        The whole data set.
    selected
        Positions of the training samples that are used, (n,).
    budget
        steps, epochs or convergence.
    """
    batch_size, pool = config.training.batch_size, len(data.train_labels)
    if budget == "convergence":
        training = replace(config.training, epochs=CONVERGENCE * config.training.epochs)
        config = replace(config, training=training)
    batches = math.ceil((pool if budget == "steps" else len(selected)) / batch_size)
    places = subset_schedule(len(selected), batch_size, config.order_seed, batches)
    # The whole data set: a subset without the last class would make a smaller network.
    run = TrainingRun(
        config, data, lambda epoch: [selected[batch] for batch in places(epoch)], record=False
    )
    for epoch in range(1, config.training.epochs + 1):
        for batch in run.begin_epoch(epoch):
            run.train_batch(batch)
    return run.model
