"""Runs with weighted or removed samples, from a jittered start, and step by step."""

import numpy as np
import oracles
import pytest
import torch
from torch import nn
from torch.nn import functional

from sampimp.data import Dataset
from sampimp.errors import ConfigError
from sampimp.training.loop import TrainingRun
from sampimp.training.models import build_model, flatten_parameters
from sampimp.training.strategies import make_schedule

SAMPLES, CLASSES = 23, 3


@pytest.fixture(autouse=True)
def threads_are_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def dropout_network(input_shape, class_count):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, 8), nn.GELU(), nn.Dropout(0.4), nn.Linear(8, class_count)
    )


NETWORKS = {
    "mlp": {"activation": "gelu"},
    "mlp, adamw": {"optimizer": "adamw", "learning_rate": 0.01, "schedule": "cosine"},
    "cnn": {"model": "cnn", "optimizer": "momentum", "learning_rate": 0.05},
    "dropout": {"model": f"{__name__}:dropout_network"},
}
every_network = pytest.mark.parametrize("network", NETWORKS)


def make_data(dtype=np.float32):
    rng = np.random.default_rng(0)

    def part(count):
        return rng.random((count, 1, 4, 4)).astype(dtype), rng.integers(0, CLASSES, count)

    return Dataset(*part(SAMPLES), *part(5))


def make_run(network, data=None, **options):
    config = oracles.trial_config(epochs=3, **NETWORKS[network])
    schedule = make_schedule("shuffle", SAMPLES, config.training.batch_size, config.order_seed)
    return TrainingRun(config, data or make_data(), schedule, record=False, **options)


def trained(run):
    """Return the parameters (P,) after a run's last epoch."""
    for _ in run.records():
        pass
    return flatten_parameters(run.model)


def random_weights(kind):
    rng = np.random.default_rng(1)
    removed = rng.random(SAMPLES) < 0.4
    return {
        "removed": np.where(removed, 0.0, 1.0),
        "any": rng.random(SAMPLES) * 2,
        "one removed": np.where(np.arange(SAMPLES) == 5, 0.0, 1.0),
        "all removed": np.zeros(SAMPLES),
    }[kind]


@every_network
def test_weights_of_one_leave_every_bit(network):
    plain = trained(make_run(network))
    assert torch.equal(plain, trained(make_run(network, weights=np.ones(SAMPLES))))
    assert not torch.equal(plain, trained(make_run(network, weights=random_weights("any"))))


def oracle_parameters(network, data, weights, renormalised):
    """Return the parameters that a plain loop over single samples' losses trains."""
    config = oracles.trial_config(epochs=3, **NETWORKS[network])
    training = config.training
    model = build_model(
        training.model, (1, 4, 4), training.hidden, CLASSES, config.seed, training.activation
    ).double()
    kind = torch.optim.AdamW if training.optimizer == "adamw" else torch.optim.SGD
    options = {"momentum": 0.9} if training.optimizer == "momentum" else {}
    optimizer = kind(model.parameters(), weight_decay=training.weight_decay, lr=1.0, **options)
    schedule = make_schedule("shuffle", SAMPLES, training.batch_size, config.order_seed)
    for epoch in (1, 2, 3):
        torch.manual_seed(hash((config.seed, epoch)))
        for group in optimizer.param_groups:
            group["lr"] = training.rate(epoch)
        for batch in schedule(epoch):
            logits = model(torch.from_numpy(data.train_inputs[batch]))
            losses = [
                weight * functional.cross_entropy(row, torch.tensor(label))
                for row, label, weight in zip(
                    logits, data.train_labels[batch], weights[batch], strict=True
                )
            ]
            total = weights[batch].sum()
            denominator = (total if total else 1.0) if renormalised else len(batch)
            optimizer.zero_grad()
            (sum(losses) / denominator).backward()
            optimizer.step()
    return flatten_parameters(model)


@every_network
@pytest.mark.parametrize("kind", ["removed", "any", "one removed", "all removed"])
@pytest.mark.parametrize("renormalised", [False, True])
def test_a_weighted_run_equals_a_loop_over_single_losses(network, kind, renormalised):
    data, weights = make_data(np.float64), random_weights(kind)
    run = make_run(network, data, weights=weights, renormalised=renormalised)
    expected = oracle_parameters(network, data, weights, renormalised)
    torch.testing.assert_close(trained(run), expected, rtol=1e-10, atol=1e-12)


@every_network
def test_a_removed_sample_has_no_effect_by_any_bit(network):
    weights, data = random_weights("one removed"), make_data()
    inputs, labels = data.train_inputs.copy(), data.train_labels.copy()
    inputs[5], labels[5] = 1 - inputs[5], (labels[5] + 1) % CLASSES
    changed = data._replace(train_inputs=inputs, train_labels=labels)
    first, second = (trained(make_run(network, d, weights=weights)) for d in (data, changed))
    assert torch.equal(first, second)


@every_network
def test_an_epoch_is_trained_step_by_step_with_the_same_bits(network):
    run = make_run(network)
    states, ends = [run.state()], [flatten_parameters(run.model)]
    for record in run.records():
        if record.epoch:
            states.append(run.state())
            ends.append(flatten_parameters(run.model))
    other = make_run(network)
    for epoch in (3, 1, 2):
        torch.manual_seed(99)  # as in another process
        other.restore(states[epoch - 1], epoch - 1)
        for batch in other.begin_epoch(epoch):
            inputs, labels = other.batch_data(batch)
            assert inputs.shape == (len(batch), 1, 4, 4)
            np.testing.assert_array_equal(labels, make_data().train_labels[batch])
            other.train_batch(batch)
        assert torch.equal(flatten_parameters(other.model), ends[epoch])


@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_jitter_adds_a_normal_number_to_every_initial_parameter(network):
    start = flatten_parameters(make_run(network).model)
    moved, again, other = (
        flatten_parameters(make_run(network, jitter=(1e-3, seed)).model) for seed in (4, 4, 5)
    )
    assert torch.equal(moved, again)
    noise, other_noise = ((values - start).double() / 1e-3 for values in (moved, other))
    # Over n values, the standard errors of a normal's mean and of its variance are 1 and 1.4
    # times 1 / sqrt(n).
    bound = 4 * len(start) ** -0.5
    assert abs(noise.mean()) < bound
    assert abs(noise.var() - 1) < 2 * bound
    assert abs((noise * other_noise).mean()) < bound
    double = make_run(network, make_data(np.float64), jitter=(1e-3, 4))
    torch.testing.assert_close(flatten_parameters(double.model).float(), moved, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("weights", "changes", "words"),
    [
        (np.ones(SAMPLES - 1), {}, r"23 finite weights(.|\n)*shape \(22,\)"),
        (np.full(SAMPLES, np.nan), {}, "not finite"),
        (np.ones(SAMPLES), {"workers": 2}, "2 workers(.|\n)*workers=1"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, changes, words):
    config = oracles.trial_config(**changes)
    schedule = make_schedule("shuffle", SAMPLES, 7, 0)
    with pytest.raises(ConfigError, match=words):
        TrainingRun(config, make_data(), schedule, record=False, weights=weights)


def test_weights_are_refused_where_importance_is_recorded():
    schedule = make_schedule("shuffle", SAMPLES, 7, 0)
    with pytest.raises(ConfigError, match="a run that records importance"):
        TrainingRun(oracles.trial_config(), make_data(), schedule, weights=np.ones(SAMPLES))
