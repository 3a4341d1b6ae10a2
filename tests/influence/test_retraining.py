"""Retraining without samples: bit-identical where none is removed, else an unrolled plain loop."""

import numpy as np
import oracles
import pytest
import torch
from torch.nn import functional

from sampimp.data import Dataset
from sampimp.errors import ConfigError
from sampimp.influence.retraining import (
    final_values,
    random_subsets,
    retrain,
    retrained_model,
    single_removals,
)
from sampimp.influence.targets import make_targets
from sampimp.training.loop import TrainingRun
from sampimp.training.models import build_mlp, flatten_parameters
from sampimp.training.strategies import make_schedule

SAMPLES, INPUTS, CLASSES, EPOCHS = 12, 3, 3, 3
HIDDEN = (4,)


@pytest.fixture(autouse=True)
def threads_are_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make_data(dtype):
    rng = np.random.default_rng(0)

    def part(count):
        return rng.normal(size=(count, INPUTS)).astype(dtype), rng.integers(0, CLASSES, count)

    return Dataset(*part(SAMPLES), *part(4))


TEST_SAMPLES = (0, 2)
TARGETS = make_targets([f"sample:{i}" for i in TEST_SAMPLES], make_data(np.float64), ["L1", "Out"])


def make_trial(dtype=np.float64, **changes):
    """Return configuration, data and schedule of a run with a smooth network."""
    settings = {"hidden": HIDDEN, "epochs": EPOCHS, "batch_size": 5, "activation": "gelu"}
    config = oracles.trial_config(**(settings | changes))
    schedule = make_schedule("shuffle", SAMPLES, config.training.batch_size, config.order_seed)
    return config, make_data(dtype), schedule


def removing(*samples):
    return np.isin(np.arange(SAMPLES), samples)


def targets_by_unrolling(trial, weights_N, *, renormalised=False):
    """Return the targets as differentiable functions of the weights, by plain SGD written out."""
    config, data, schedule = trial
    training = config.training
    network = build_mlp((INPUTS,), HIDDEN, CLASSES, config.seed).double()
    parameters = [p.detach().clone().requires_grad_() for p in network.parameters()]
    inputs, labels = torch.from_numpy(data.train_inputs), torch.from_numpy(data.train_labels)

    def logits(x):
        w1, b1, w2, b2 = parameters
        return functional.gelu(x @ w1.T + b1) @ w2.T + b2

    for epoch in range(1, EPOCHS + 1):
        for batch in schedule(epoch):
            losses = functional.cross_entropy(
                logits(inputs[batch]), labels[batch], reduction="none"
            )
            remaining = weights_N[batch].sum() if weights_N[batch].any() else 1
            denominator = remaining if renormalised else len(batch)
            loss = (weights_N[batch] * losses).sum() / denominator
            gradients = torch.autograd.grad(loss, parameters, create_graph=True)
            parameters = [
                p - training.rate(epoch) * (g + training.weight_decay * p)
                for p, g in zip(parameters, gradients, strict=True)
            ]
    test_logits, test_labels = logits(torch.from_numpy(data.test_inputs)), data.test_labels
    nll = functional.cross_entropy(test_logits, torch.from_numpy(test_labels), reduction="none")
    return [nll[i] for i in TEST_SAMPLES]


@pytest.mark.parametrize(
    "changes",
    [{}, {"activation": "relu", "optimizer": "adamw", "learning_rate": 0.01, "schedule": "cosine"}],
    ids=["sgd", "adamw"],
)
def test_without_a_removal_every_bit_is_that_of_the_recorded_run(changes):
    trial = make_trial(np.float32, **changes)
    *_, last = TrainingRun(*trial).records()
    for removed in (None, removing()):
        parameters = flatten_parameters(retrained_model(*trial, removed))
        assert last.arrays["parameters"].tobytes() == parameters.numpy().tobytes()


@pytest.mark.parametrize("renormalised", [False, True])
@pytest.mark.parametrize("samples", [(3,), (0, 1, 5, 7, 8, 11)])
def test_values_after_a_removal_equal_the_unrolled_loop(samples, renormalised):
    trial, removed = make_trial(), removing(*samples)
    weights = torch.from_numpy(np.where(removed, 0.0, 1.0))
    expected = targets_by_unrolling(trial, weights, renormalised=renormalised)
    values = final_values(*trial, TARGETS, removed, renormalised=renormalised)
    np.testing.assert_allclose(values, [value.item() for value in expected], rtol=1e-11)


def test_a_small_change_of_a_weight_acts_as_the_derivative_says():
    trial = make_trial()
    weights = torch.ones(SAMPLES, dtype=torch.float64, requires_grad=True)
    derivatives = [
        torch.autograd.grad(value, weights, retain_graph=True)[0]
        for value in targets_by_unrolling(trial, weights)
    ]
    step = 1e-4

    def values(weight):
        changed = np.ones(SAMPLES)
        changed[3] = weight
        run = TrainingRun(*trial, record=False, weights=changed)
        for _ in run.records():
            pass
        return np.array([target.value(run.model) for target in TARGETS])

    # Central differences: their error is of the order of step².
    slope = (values(1 - step) - values(1 + step)) / (2 * step)
    expected = [-float(derivative[3]) for derivative in derivatives]
    np.testing.assert_allclose(slope, expected, rtol=1e-7)


def test_effects_are_differences_from_the_same_start():
    trial = make_trial(np.float32)
    removed = np.stack([removing(3), removing(0, 1)])
    counts = []
    effect = retrain(
        *trial, TARGETS, removed, repeats=2, progress=lambda *count: counts.append(count)
    )
    assert effect.shape == (2, 2, 2)
    for repeat in (0, 1):
        reference = final_values(*trial, TARGETS, None, repeat)
        for number, row in enumerate(removed):
            values = final_values(*trial, TARGETS, row, repeat)
            np.testing.assert_array_equal(effect[number, :, repeat], values - reference)
    assert counts == [(done, 6) for done in range(1, 7)]
    # The jitter moves a smooth network's targets, and hardly the effects of removals.
    assert 0 < np.abs(effect[..., 1] / effect[..., 0] - 1).max() < 0.1


def test_repeats_start_from_jittered_parameters_of_their_own():
    trial = make_trial(epochs=1, learning_rate=1e-30)
    run = TrainingRun(*trial, record=False)
    own = flatten_parameters(run.model)
    starts = [flatten_parameters(retrained_model(*trial, None, k, jitter=1e-3)) for k in range(3)]
    torch.testing.assert_close(starts[0], own, rtol=0, atol=1e-20)
    moves = [(start - own) / 1e-3 for start in starts[1:]]
    for move in moves:
        # 31 standard normal numbers: their mean square is 1 +- 0.25.
        assert 0.3 < move.square().mean() < 2
    assert not torch.allclose(*moves)
    removed = flatten_parameters(retrained_model(*trial, removing(2), 1, jitter=1e-3))
    torch.testing.assert_close(removed, starts[1], rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_a_training_that_diverges_has_no_effect_to_report():
    trial = make_trial(np.float32, activation="relu", learning_rate=1e18)
    effect = retrain(*trial, TARGETS, removing(3)[None], repeats=1)
    assert np.isnan(effect).all()


@pytest.mark.parametrize(
    ("removed", "words"),
    [
        (np.ones((1, SAMPLES), bool), f"{SAMPLES} samples removed"),
        (np.zeros((1, SAMPLES - 1), bool), r"bool of shape \(1, 11\)"),
        (np.zeros((1, SAMPLES)), "float64 of shape"),
        (np.zeros(SAMPLES, bool), r"shape \(12,\)"),
    ],
)
def test_removals_that_do_not_fit_are_refused(removed, words):
    with pytest.raises(ConfigError, match=words):
        retrain(*make_trial(), TARGETS, removed, repeats=1)


def test_a_run_of_several_workers_is_refused():
    with pytest.raises(ConfigError, match="2 workers"):
        retrained_model(*make_trial(workers=2), removing(1))


def test_single_removals_are_the_most_important_samples_and_a_random_draw():
    tau = np.array([3.0, np.nan, 9.0, 1.0, 7.0, 5.0])
    random, top = single_removals(tau, 4, 3, seed=5)
    assert top.argmax(1).tolist() == [2, 4, 5]
    for removed in (random, top):
        assert (removed.sum(1) == 1).all()
        assert (removed.sum(0) <= 1).all()
    np.testing.assert_array_equal(single_removals(tau, 4, 3, seed=5)[0], random)
    draws = [tuple(single_removals(tau, 1, 0, seed)[0][0].nonzero()[0]) for seed in range(60)]
    assert len(set(draws)) == len(tau)  # any sample, the most important ones included
    with pytest.raises(ConfigError, match="at most 6 removals"):
        single_removals(tau, 7, 0, seed=0)


@pytest.mark.parametrize(("share", "removed_count"), [(0.99, 2), (0.95, 10), (0.5, 100)])
def test_random_subsets_have_one_size_and_any_samples(share, removed_count):
    removed = random_subsets(200, share, 400, seed=3)
    assert (removed.sum(1) == removed_count).all()
    # Each sample is removed in a share of 1 - share of 400 subsets: a binomial number.
    mean = 400 * (1 - share)
    assert np.abs(removed.sum(0) - mean).max() < 5 * np.sqrt(mean)
    np.testing.assert_array_equal(random_subsets(200, share, 400, seed=3), removed)
    assert not np.array_equal(random_subsets(200, share, 400, seed=4), removed)


@pytest.mark.parametrize("share", [0.999, 1.0, 0.0, 1.5, -0.1])
def test_subsets_that_remove_nothing_or_all_are_refused(share):
    with pytest.raises(ConfigError, match="at least one"):
        random_subsets(100, share, 3, seed=0)
