"""Properties of every run, on real data: one seed, a few epochs of scikit-learn's digits."""

import itertools

import numpy as np
import oracles
import pytest
import torch

from sampimp.data import load_dataset
from sampimp.importance.snapshot import snapshot_importance
from sampimp.training.loop import TrainingRun
from sampimp.training.models import build_mlp, load_parameters
from sampimp.training.strategies import make_schedule

HIDDEN, BATCH, RATE, EPOCHS = (32, 24, 16), 100, 0.1, 3


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def train(data):
    def run(strategy, difficulty=None, **changes):
        config = oracles.trial_config(
            strategy, hidden=HIDDEN, epochs=EPOCHS, batch_size=BATCH, learning_rate=RATE, **changes
        )
        count = len(data.train_labels)
        schedule = make_schedule(strategy, count, BATCH, config.order_seed, difficulty)
        return list(TrainingRun(config, data, schedule).records())

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def reference(train):
    return train("shuffle")


def test_first_batch_importance_is_snapshot_importance_of_the_previous_state(data, reference):
    # The first step of epoch t is taken at the parameters of state t - 1.
    model = build_mlp(data.train_inputs.shape[1:], HIDDEN, 10, seed=1)
    for before, record in itertools.pairwise(reference):
        load_parameters(model, torch.from_numpy(before.arrays["parameters"]))
        first = np.flatnonzero(record.arrays["batch"] == 0)
        snapshot = snapshot_importance(
            model,
            torch.from_numpy(data.train_inputs[first]),
            torch.from_numpy(data.train_labels[first]),
            rate=RATE / len(first),
        ).numpy()
        in_step = record.arrays["importance"][:, first]
        assert np.median(np.abs(in_step - snapshot) / snapshot) < 1e-5
        np.testing.assert_allclose(in_step, snapshot, rtol=1e-2, atol=1e-6 * snapshot.max())


def test_every_sample_has_importance_in_every_epoch(data, reference):
    for record in reference[1:]:
        importance = record.arrays["importance"]
        assert importance.shape == (4, len(data.train_labels))
        assert np.isfinite(importance).all()
        assert (importance >= 0).all()
        assert (importance[-1] > 0).all()  # delta is softmax minus one-hot, never 0


def test_output_layer_importance_is_bounded(data, reference):
    # delta = (softmax - one-hot) / B has a squared norm below 2 / B^2; x is the layer's input.
    model = build_mlp(data.train_inputs.shape[1:], HIDDEN, 10, seed=1)
    load_parameters(model, torch.from_numpy(reference[0].arrays["parameters"]))
    first = np.flatnonzero(reference[1].arrays["batch"] == 0)
    with torch.no_grad():
        x = model[:-1](torch.from_numpy(data.train_inputs[first])).double().numpy()
    bound = 2 * (RATE / len(first)) ** 2 * ((x**2).sum(1) + 1)
    assert (reference[1].arrays["importance"][-1, first] < bound).all()


def test_shuffle_has_one_sequence_for_all_seeds_and_shuffle_by_seed_one_per_seed(train, reference):
    other = train("shuffle", seed=2)
    by_seed = train("shuffle_by_seed", seed=2, order_seed=2)
    for first, second, third in zip(reference[1:], other[1:], by_seed[1:], strict=True):
        np.testing.assert_array_equal(first.arrays["batch"], second.arrays["batch"])
        assert (first.arrays["batch"] != third.arrays["batch"]).mean() > 0.5
    # Equal initialisation; only the batches make the final parameters differ.
    assert other[0].arrays["parameters"].tobytes() == by_seed[0].arrays["parameters"].tobytes()
    assert other[3].arrays["parameters"].tobytes() != by_seed[3].arrays["parameters"].tobytes()


def test_hardest_samples_come_last_in_nlo_and_first_in_rnlo(train, reference):
    final_nll = reference[-1].arrays["nll"].astype(np.float64)
    nlo, rnlo = (train(strategy, final_nll)[1].arrays["batch"] for strategy in ("nlo", "rnlo"))
    last = int(nlo.max())
    np.testing.assert_array_equal(rnlo, last - nlo)
    by_batch = [final_nll[nlo == number] for number in range(last + 1)]
    for easier, harder in itertools.pairwise(by_batch):
        assert easier.max() <= harder.min()
