"""A committed trial, replayed: bits, errors, and influence against retraining in float32."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sampimp.config import TrainingConfig, TrialConfig
from sampimp.data import Dataset
from sampimp.errors import ConfigError, RecordError
from sampimp.influence.fixed_point import fixed_point_influence
from sampimp.influence.reverse_pass import ReversePass
from sampimp.influence.targets import make_targets
from sampimp.influence.trial_run import TrialRun, forward_states, needs_states
from sampimp.training.loop import TrainingRun
from sampimp.training.strategies import make_schedule

SAMPLES = 23
TRAINING = TrainingConfig(
    activation="gelu", hidden=(6, 5), epochs=3, batch_size=10, schedule="cosine"
)


@pytest.fixture(scope="module")
def data():
    generator = np.random.default_rng(0)
    inputs = generator.random((SAMPLES + 9, 1, 2, 4)).astype(np.float32)
    labels = generator.integers(0, 3, SAMPLES + 9)
    return Dataset(inputs[:SAMPLES], labels[:SAMPLES], inputs[SAMPLES:], labels[SAMPLES:])


def trial(training):
    return TrialConfig(dataset="d", strategy="shuffle", seed=1, order_seed=0, training=training)


def schedule_of(training):
    return make_schedule("shuffle", SAMPLES, training.batch_size, 0)


def stored_parameters(training, data):
    """Return the parameters that a training stores, by state."""
    run = TrainingRun(trial(training), data, schedule_of(training))
    return {record.epoch: record.arrays.get("parameters") for record in run.records()}


def replayable(training, data):
    parameters = stored_parameters(training, data).get
    arguments = trial(training), data, schedule_of(training)
    states = None
    if needs_states(arguments[0]):
        states = dict(forward_states(*arguments, parameters=parameters)).__getitem__
    return TrialRun(*arguments, parameters=parameters, states=states)


# Adam's derivative is that of an infinitesimal weight: a difference of 0.02 is none of that.
@pytest.mark.parametrize(("optimizer", "rate"), [("sgd", 0.1), ("momentum", 0.01)])
def test_replay_is_bit_for_bit_and_influence_is_the_derivative(data, optimizer, rate):
    training = replace(TRAINING, optimizer=optimizer, learning_rate=rate)
    run = replayable(training, data)
    targets = make_targets(["mean", "sample:2"], data, run.layers)
    reverse = ReversePass(run, targets, memory=1)  # the replay is checked after every epoch
    influence = sum(result.influence.sum(1) for result in reverse.epochs())
    size = 0.02
    for sample in (0, 7, 22):
        values = []
        for sign in (1, -1):
            weights = np.ones(SAMPLES)
            weights[sample] += sign * size
            reweighted = TrainingRun(
                trial(training), data, schedule_of(training), record=False, weights=weights
            )
            list(reweighted.records())
            values.append([target.value(reweighted.model) for target in targets])
        expected = (np.array(values[0]) - values[1]) / (2 * size)
        scale = np.abs(influence).max()
        np.testing.assert_allclose(influence[:, sample], expected, atol=0.02 * scale)


def test_layers_are_in_forward_order(data):
    assert list(replayable(TRAINING, data).layers) == ["L1", "L2", "Out"]


def test_states_continue_with_the_same_bytes(data):
    training = replace(TRAINING, optimizer="adamw", learning_rate=1e-3)
    parameters = stored_parameters(training, data).get
    arguments = trial(training), data, schedule_of(training)
    whole = dict(forward_states(*arguments, parameters=parameters))
    assert sorted(whole) == [0, 1, 2, 3]
    rest = dict(forward_states(*arguments, parameters=parameters, start=(1, whole[1])))
    assert rest == {epoch: whole[epoch] for epoch in (2, 3)}


def test_thinned_parameters_are_replayed_from_the_start(data):
    training = replace(TRAINING, parameters_every=2)
    assert needs_states(trial(training))
    assert not needs_states(trial(TRAINING))
    thinned = [result.influence for result in reverse_of(replayable(training, data), data)]
    whole = [result.influence for result in reverse_of(replayable(TRAINING, data), data)]
    np.testing.assert_array_equal(thinned, whole)


def reverse_of(run, data):
    return ReversePass(run, make_targets(["mean"], data, run.layers)).epochs()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_replay_that_differs_is_an_error(data, optimizer):
    training = replace(TRAINING, optimizer=optimizer, learning_rate=1e-3)
    parameters = stored_parameters(training, data)
    parameters[2] = parameters[2] + np.float32(1e-3)
    arguments = trial(training), data, schedule_of(training)
    replay = (
        forward_states(*arguments, parameters=parameters.get)
        if needs_states(arguments[0])
        else reverse_of(TrialRun(*arguments, parameters=parameters.get), data)
    )
    with pytest.raises(RecordError, match=r"(?s)largest difference of 1\.0e-03.*epoch [23]"):
        list(replay)


def test_run_of_several_workers_is_refused(data):
    with pytest.raises(ConfigError, match="2 workers"):
        TrialRun(
            trial(replace(TRAINING, workers=2)), data, schedule_of(TRAINING), parameters={}.get
        )


def test_random_state_of_the_caller_does_not_matter(data):
    run = replayable(TRAINING, data)
    first = [result.influence for result in reverse_of(run, data)]
    torch.manual_seed(99)
    second = [result.influence for result in reverse_of(run, data)]
    np.testing.assert_array_equal(first, second)


NETWORK = """
from torch import nn

def build(input_shape, class_count):
    return nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.GELU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(9, class_count)
    )
"""


@pytest.fixture
def network(tmp_path, monkeypatch):
    """Return the training of a convolutional network with dropout."""
    (tmp_path / "replayed_network.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    return TrainingConfig(
        model="replayed_network:build", epochs=2, batch_size=10, learning_rate=0.1
    )


def test_another_network_is_replayed_with_its_dropout(data, network):
    run = replayable(network, data)
    assert list(run.layers) == ["0", "4"]
    influence = sum(result.influence.sum(1) for result in reverse_of(run, data))
    size = 0.02
    for sample in (3, 11):
        values = []
        for sign in (1, -1):
            weights = np.ones(SAMPLES)
            weights[sample] += sign * size
            model = TrainingRun(
                trial(network), data, schedule_of(network), record=False, weights=weights
            )
            list(model.records())
            target = make_targets(["mean"], data, run.layers)[0]
            values.append(target.value(model.model))
        expected = (values[0] - values[1]) / (2 * size)
        assert influence[0, sample] == pytest.approx(
            expected, abs=0.02 * float(np.abs(influence).max())
        )


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_parts_of_the_loss_are_the_same_in_both_ways(data, curvature):
    stack = replayable(TRAINING, data)
    stack.load_start(4)
    other = TrialRun(
        trial(TRAINING),
        data,
        schedule_of(TRAINING),
        parameters=stored_parameters(TRAINING, data).get,
    )
    other.load_start(4)
    other._stack = None  # as for a network that is no stack of linear layers
    gradient = make_targets(["mean"], data, stack.layers)[0].gradient(stack.model)
    results = [
        fixed_point_influence(run.loss_parts, gradient, [0.1, 1.0], curvature=curvature)
        for run in (stack, other)
    ]
    assert results[0].shape == (2, SAMPLES)
    np.testing.assert_allclose(results[0], results[1], rtol=1e-3, atol=1e-4 * results[0].max())
