"""Training on a subset, against a plain loop of PyTorch."""

import math
from itertools import pairwise

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from sampimp.data import Dataset
from sampimp.subsets.training import CONVERGENCE, subset_schedule, train_subset
from sampimp.training.loop import TrainingRun

SAMPLES, BATCH, EPOCHS = 23, 7, 4


def make_data(dtype=np.float64):
    generator = np.random.default_rng(0)
    inputs = generator.random((SAMPLES + 9, 1, 2, 4)).astype(dtype)
    labels = generator.permutation(np.arange(SAMPLES + 9) % 3)
    return Dataset(inputs[:SAMPLES], labels[:SAMPLES], inputs[SAMPLES:], labels[SAMPLES:])


@given(
    count=st.integers(1, 40),
    size=st.integers(1, 12),
    batches=st.integers(1, 9),
    seed=st.integers(0, 9),
)
def test_epochs_are_cut_from_whole_passes(count, size, batches, seed):
    schedule = subset_schedule(count, size, seed, batches)
    in_pass = math.ceil(count / size)
    epochs = [schedule(epoch) for epoch in range(1, 6)]
    assert [len(epoch) for epoch in epochs] == [batches] * 5
    every = [batch for epoch in epochs for batch in epoch]
    whole = len(every) // in_pass
    passes = [np.concatenate(every[n * in_pass : (n + 1) * in_pass]) for n in range(whole)]
    for samples in passes:
        assert sorted(samples.tolist()) == list(range(count))
    assert all(len(batch) <= size for batch in every)
    if count > 20:
        assert all(a.tolist() != b.tolist() for a, b in pairwise(passes))
    for left, right in zip(epochs[2], schedule(3), strict=True):  # an epoch on its own
        np.testing.assert_array_equal(left, right)


def train_plainly(config, data, selected, updates):
    """Return parameters after `updates` steps of SGD, with passes over the selected samples."""
    training = config.training
    model = TrainingRun(config, data, lambda epoch: [], record=False).model  # its start alone
    inputs, labels = (torch.from_numpy(values) for values in data[:2])
    optimizer = torch.optim.SGD(
        model.parameters(), training.learning_rate, weight_decay=training.weight_decay
    )
    batches, number = [], 0
    per_epoch = updates // training.epochs
    for update in range(updates):
        if not batches:
            number += 1
            order = np.random.default_rng([config.order_seed, number]).permutation(len(selected))
            batches = np.array_split(selected[order], math.ceil(len(selected) / BATCH))
        elapsed = (update // per_epoch) / training.epochs
        rate = training.learning_rate * (1 + math.cos(math.pi * elapsed)) / 2
        optimizer.param_groups[0]["lr"] = rate
        index = torch.from_numpy(batches.pop(0))
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs[index]), labels[index]).backward()
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(
    ("budget", "epochs", "per_epoch"),
    [
        ("steps", EPOCHS, math.ceil(SAMPLES / BATCH)),
        ("epochs", EPOCHS, math.ceil(9 / BATCH)),
        ("convergence", CONVERGENCE * EPOCHS, math.ceil(SAMPLES / BATCH)),
    ],
)
def test_training_is_that_of_a_plain_loop(budget, epochs, per_epoch):
    data = make_data()
    config = oracles.trial_config(
        seed=3, order_seed=5, schedule="cosine", epochs=EPOCHS, batch_size=BATCH
    )
    selected = np.array([0, 2, 3, 7, 8, 11, 16, 20, 22])
    if budget == "convergence":
        selected = np.arange(SAMPLES)
    model = train_subset(config, data, selected, budget)
    longer = oracles.trial_config(
        seed=3, order_seed=5, schedule="cosine", epochs=epochs, batch_size=BATCH
    )
    expected = train_plainly(longer, data, selected, epochs * per_epoch)
    actual = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    again = train_subset(config, data, selected, budget)
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_all_samples_train_as_the_studys_own_run_does():
    data = make_data(np.float32)
    config = oracles.trial_config(seed=1, order_seed=1, epochs=EPOCHS, batch_size=BATCH)
    model = train_subset(config, data, np.arange(SAMPLES), "epochs")
    schedule = subset_schedule(SAMPLES, BATCH, 1, math.ceil(SAMPLES / BATCH))
    run = TrainingRun(config, data, schedule)
    list(run.records())
    assert all(map(torch.equal, model.parameters(), run.model.parameters()))
    other = train_subset(config, data, np.arange(SAMPLES), "steps")
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_the_other_samples_do_not_matter():
    data = make_data()
    config = oracles.trial_config(epochs=EPOCHS, batch_size=BATCH)
    selected = np.array([1, 4, 5, 6, 9, 10, 17])
    others = np.setdiff1d(np.arange(SAMPLES), selected)
    changed = data._replace(
        train_inputs=data.train_inputs.copy(), train_labels=data.train_labels.copy()
    )
    changed.train_inputs[others] += 1
    changed.train_labels[others] = 0
    for budget in ("steps", "epochs"):
        models = [train_subset(config, each, selected, budget) for each in (data, changed)]
        assert all(map(torch.equal, *(model.parameters() for model in models)))


def test_a_subset_without_the_last_class_has_the_same_network():
    data = make_data()
    data = data._replace(test_labels=np.zeros(9, np.int64))  # nor has the test set
    selected = np.flatnonzero(data.train_labels < 2)
    model = train_subset(oracles.trial_config(), data, selected, "epochs")
    assert model(torch.from_numpy(data.test_inputs)).shape == (9, 3)
