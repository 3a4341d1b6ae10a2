"""Subsets by exchange: influence of samples that ride along, resumption, and the target."""

import io
from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from torch.nn import functional

from sampimp.config import TrainingConfig, TrialConfig
from sampimp.data import Dataset, load_source, scale_inputs
from sampimp.influence.reverse_pass import InfiniteDerivativeError, ReversePass
from sampimp.influence.targets import MeanTarget, error_probability
from sampimp.influence.trial_run import forward_states
from sampimp.subsets import metagradient
from sampimp.subsets.metagradient import MetagradientSearch, RidingRun
from sampimp.subsets.rules import Pool, select
from sampimp.training.checkpoint_states import UnusableCheckpointError
from sampimp.training.loop import TrainingRun

SAMPLES, BATCH = 20, 4
BATCHES = {1: [[0, 1, 2, 3], [4, 5, 6]], 2: [[5, 2, 0], [1, 3, 6, 4]], 3: [[0, 6], [1, 2]]}
"""Samples 0 to 6 are trained."""
RIDERS = {1: [[7, 8], [9, 10, 11]], 2: [[12], [13, 8]], 3: [[9, 7, 14], [15, 16]]}
"""Samples 17 to 19 never ride."""


@pytest.fixture
def data():
    """Twenty samples in float64, so that differences of trainings are exact."""
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(SAMPLES + 6, 1, 2, 3))
    labels = generator.permutation(np.arange(SAMPLES + 6) % 3)
    return Dataset(inputs[:SAMPLES], labels[:SAMPLES], inputs[SAMPLES:], labels[SAMPLES:])


def schedule_of(table):
    return lambda epoch: [np.array(samples) for samples in table[epoch]]


def target_of(data):
    inputs, labels = (torch.from_numpy(values) for values in data[:2])
    return MeanTarget("pool-error", "1", error_probability, inputs, labels)


def target_after(config, data, weights):
    """Train in a plain loop, with a weight for each sample's loss; return the target."""
    training = config.training
    model = TrainingRun(config, data, lambda epoch: [], record=False).model  # its start alone
    inputs, labels = (torch.from_numpy(values) for values in data[:2])
    momentum = 0.9 if training.optimizer == "momentum" else 0.0
    optimizer = torch.optim.SGD(
        model.parameters(),
        training.learning_rate,
        momentum=momentum,
        weight_decay=training.weight_decay,
    )
    for epoch, batches in BATCHES.items():
        for batch, riders in zip(batches, RIDERS[epoch], strict=True):
            index = torch.tensor(batch + riders)
            losses = functional.cross_entropy(model(inputs[index]), labels[index], reduction="none")
            optimizer.zero_grad()
            ((weights[index] * losses).sum() / len(batch)).backward()
            optimizer.step()
    return target_of(data).value(model)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_influence_is_the_derivative_by_weights_of_1_and_of_0(data, optimizer, model):
    if model == "cnn":
        generator = np.random.default_rng(1)
        shape = (SAMPLES, 1, 8, 8)
        data = data._replace(train_inputs=generator.normal(size=shape))
        data = data._replace(test_inputs=generator.normal(size=(6, 1, 8, 8)))
    training = TrainingConfig(
        model=model,
        activation="gelu",
        hidden=(5,) if model == "mlp" else (),
        epochs=3,
        batch_size=BATCH,
        learning_rate=0.2,
        optimizer=optimizer,
    )
    config = TrialConfig(dataset="d", strategy="shuffle", seed=1, order_seed=0, training=training)
    batches = schedule_of(BATCHES)
    states = dict(forward_states(config, data, batches, parameters=lambda state: None))
    run = RidingRun(config, data, batches, states=states, riders=schedule_of(RIDERS))
    reverse = ReversePass(run, [target_of(data)])
    by_epoch = [epoch.influence[0].sum(0) for epoch in reverse.epochs()]
    ridden = {sample for table in RIDERS.values() for part in table for sample in part}
    at_0 = torch.zeros(SAMPLES, dtype=torch.float64)
    at_0[:7] = 1
    size = 2e-6  # so small that max-pooling does not change its choice
    expected = np.full(SAMPLES, np.nan)
    for sample in range(17):
        values = []
        for step in (size, -size):
            weights = at_0.clone()
            weights[sample] += step
            values.append(target_after(config, data, weights))
        expected[sample] = (values[0] - values[1]) / (2 * size)
    assert ridden == set(range(7, 17))
    assert all(np.isnan(values[17:]).all() for values in by_epoch)
    actual = np.nansum(by_epoch, axis=0)
    np.testing.assert_allclose(actual[:17], expected[:17], atol=1e-6 * np.abs(expected[:17]).max())


@pytest.fixture
def digits():
    return scale_inputs(load_source("digits"), "unit")


CONFIG = oracles.trial_config(hidden=(32,), epochs=8, batch_size=25, learning_rate=0.1)


@pytest.fixture
def short(monkeypatch):
    """A search of six rounds of 60 steps."""
    monkeypatch.setattr(metagradient, "ROUNDS", 6)
    monkeypatch.setattr(metagradient, "SURROGATE_STEPS", 60)


def rounds_of(search):
    return [search.advance() for _ in range(search.round, metagradient.ROUNDS)]


def test_a_search_lowers_the_target(digits, short):
    search = MetagradientSearch(CONFIG, digits, 60)
    values = rounds_of(search)
    assert min(values[1:]) < values[0] - 0.02
    assert search.best_value == min(values)
    assert len(search.best) == 60
    assert (np.diff(search.best) > 0).all()


def test_a_search_continues_from_every_round_with_the_same_bytes(digits, short):
    whole = MetagradientSearch(CONFIG, digits, 40)
    values, states = [], [whole.state()]
    while whole.round < metagradient.ROUNDS:
        values.append(whole.advance())
        states.append(whole.state())
    for number in range(metagradient.ROUNDS):
        part = MetagradientSearch(CONFIG, digits, 40)
        part.restore(states[number])
        assert rounds_of(part) == values[number:]
        assert part.state() == states[-1]


def test_a_state_of_another_search_is_a_named_error(digits, short):
    search = MetagradientSearch(CONFIG, digits, 40)
    states = [b"", bytes(500), search.state()[:-50], MetagradientSearch(CONFIG, digits, 41).state()]
    sound = {"round": 1, "best_value": 1.0, "selected": np.arange(40), "best": np.arange(40)}
    for changes in ({"round": 99}, {"best": np.arange(40) - 1}, {"best": np.array([{}] * 40)}):
        buffer = io.BytesIO()
        np.savez(buffer, **(sound | changes))
        states.append(buffer.getvalue())
    for state in states:
        with pytest.raises(UnusableCheckpointError):
            search.restore(state)
    assert search.round == 0


def test_the_test_set_has_no_part_in_a_search(digits, short):
    generator = np.random.default_rng(0)
    other = digits._replace(
        test_labels=generator.permutation(digits.test_labels),
        test_inputs=generator.permutation(digits.test_inputs),
    )
    first, second = (MetagradientSearch(CONFIG, data, 40) for data in (digits, other))
    assert rounds_of(first) == rounds_of(second)
    np.testing.assert_array_equal(first.best, second.best)


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_a_surrogate_that_diverges_does_not_end_the_search(digits, short):
    config = replace(CONFIG, training=replace(CONFIG.training, learning_rate=1e20))
    search = MetagradientSearch(config, digits, 40)
    assert np.isnan(rounds_of(search)).all()
    first = select("balanced", Pool(labels=digits.train_labels, scores={}), 40, CONFIG.seed)
    np.testing.assert_array_equal(search.best, first)


def test_a_derivative_that_explodes_does_not_end_the_search(digits, short, monkeypatch):
    search = MetagradientSearch(CONFIG, digits, 40)
    search.advance()
    best = search.best

    def explode(self):
        raise InfiniteDerivativeError("finite derivatives", "infinity", "epoch 2", "-")
        yield

    monkeypatch.setattr(ReversePass, "epochs", explode)
    assert np.isfinite(search.advance())
    assert search._selected is search.best
    monkeypatch.undo()
    assert np.isfinite(rounds_of(search)).all()
    assert len(search.best) == len(best) == 40


def test_a_search_for_all_samples_has_nothing_to_exchange(short):
    data = scale_inputs(oracles.make_source(), "unit")
    search = MetagradientSearch(CONFIG, data, 24)
    assert np.isfinite(rounds_of(search)).all()
    assert search.best.tolist() == list(range(24))
