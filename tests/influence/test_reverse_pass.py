"""The reverse pass against differences of whole trainings, and against the forward recursion."""

import io
from functools import partial

import numpy as np
import pytest
import torch
from replayed_runs import SAMPLES, TinyRun, differences_by_weight, tiny_targets

from sampimp.errors import RecordError, UnsupportedError
from sampimp.influence.recursion import final_tangents
from sampimp.influence.replay import Smoothing
from sampimp.influence.reverse_pass import InfiniteDerivativeError, ReversePass
from sampimp.influence.targets import FunctionTarget
from sampimp.training.checkpoint_states import UnusableCheckpointError

RUNS = {
    "sgd": (torch.optim.SGD, {"lr": 0.3}, None),
    "sgd clipped": (torch.optim.SGD, {"lr": 0.3, "weight_decay": 0.01}, 0.3),
    "momentum": (
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01},
        None,
    ),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, None),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}, None),
    "adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}, None),
    "amsgrad clipped": (
        torch.optim.Adam,
        {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True},
        0.2,
    ),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.5}, None),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.01}, None),
}


def total_influence(run, **options):
    """Return the influence of each sample on each target, over all epochs and layers."""
    reverse = ReversePass(run, tiny_targets(), **options)
    return sum(result.influence.sum(1) for result in reverse.epochs())


@pytest.mark.parametrize("name", RUNS)
def test_influence_is_the_derivative_of_training_by_the_weights(name):
    optimizer_class, settings, clip_norm = RUNS[name]
    make_run = partial(TinyRun, optimizer_class, settings, clip_norm=clip_norm)
    expected = differences_by_weight(make_run, tiny_targets())
    actual = total_influence(make_run())
    assert np.abs(actual - expected).max() < 1e-7 * np.abs(expected).max()


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh", "softplus"])
@pytest.mark.parametrize("name", RUNS)
def test_reverse_pass_agrees_with_the_recursion(name, activation):
    optimizer_class, settings, clip_norm = RUNS[name]
    run = TinyRun(optimizer_class, settings, activation=activation, clip_norm=clip_norm)
    influence = total_influence(run)
    tangents = final_tangents(run, range(SAMPLES))
    for target, values in zip(tiny_targets(), influence, strict=True):
        gradients = target.gradient(run.model)
        pairs = zip(tangents, gradients, strict=True)
        expected = sum(tangent.flatten(1) @ g.flatten() for tangent, g in pairs).numpy()
        assert np.abs(values - expected).max() < 1e-12 * np.abs(expected).max()


@pytest.mark.parametrize("smoothing", [Smoothing(eps=1e-2), Smoothing(gate_width=0.3)])
def test_smoothing_changes_the_derivative_alone(smoothing):
    run = TinyRun(torch.optim.AdamW, {"lr": 0.01}, activation="relu")
    final = [parameter.clone() for parameter in run.states[4][0].values()]
    plain, smoothed = total_influence(run), total_influence(run, smoothing=smoothing)
    tangents = final_tangents(run, range(SAMPLES), smoothing=smoothing)
    run.load_start(4)
    assert all(map(torch.equal, run.parameters, final))
    assert np.abs(smoothed - plain).max() > 1e-3 * np.abs(plain).max()
    gradients = tiny_targets()[0].gradient(run.model)
    pairs = zip(tangents, gradients, strict=True)
    expected = sum(tangent.flatten(1) @ g.flatten() for tangent, g in pairs).numpy()
    assert np.abs(smoothed[0] - expected).max() < 1e-12 * np.abs(expected).max()


def test_segments_and_resume_give_the_same_bits():
    def run():
        return TinyRun(torch.optim.AdamW, {"lr": 0.01})

    whole = list(ReversePass(run(), tiny_targets()).epochs())
    in_segments = list(ReversePass(run(), tiny_targets(), memory=1).epochs())
    begun = ReversePass(run(), tiny_targets())
    first = next(begun.epochs())
    continued = ReversePass(run(), tiny_targets())
    continued.restore(begun.state())
    resumed = [first, *continued.epochs()]
    for results in (in_segments, resumed):
        assert [result.epoch for result in results] == [3, 2, 1]
        for result, expected in zip(results, whole, strict=True):
            np.testing.assert_array_equal(result.influence, expected.influence)
            np.testing.assert_array_equal(result.adjoint_norm, expected.adjoint_norm)


def test_a_state_of_another_pass_is_a_named_error():
    def make(optimizer=torch.optim.AdamW, targets=2):
        return ReversePass(TinyRun(optimizer, {"lr": 0.01}), tiny_targets()[:targets])

    begun, whole = make(), make()
    next(begun.epochs())
    for state in (b"", bytes(1000), begun.state()[:-99], make(targets=1).state()):
        with pytest.raises(UnusableCheckpointError):
            whole.restore(state)
    stored = torch.load(io.BytesIO(begun.state()), weights_only=True)
    for changes in ({"next_epoch": 4}, {"next_epoch": "1"}, {"adjoints": [{}]}, {"adjoints": 1}):
        buffer = io.BytesIO()
        torch.save(stored | changes, buffer)
        with pytest.raises(UnusableCheckpointError):
            whole.restore(buffer.getvalue())
    assert [result.epoch for result in whole.epochs()] == [3, 2, 1]  # as if none had been tried


def test_target_that_is_not_finite_is_refused():
    run = TinyRun(torch.optim.SGD, {"lr": 0.3})
    target = FunctionTarget("log", lambda model: (model[0].bias * 0).sum().log())
    with pytest.raises(RecordError, match="target log"):
        ReversePass(run, [target])


def test_unknown_optimizer_is_refused():
    run = TinyRun(torch.optim.Adamax, {"lr": 0.01})
    with pytest.raises(UnsupportedError, match="Adamax"):
        ReversePass(run, tiny_targets())


def test_dataset_has_labels_units_and_signs():
    run = TinyRun(torch.optim.SGD, {"lr": 0.3})
    reverse = ReversePass(run, {"first": lambda model: model[0].bias.sum()})
    dataset = reverse.to_dataset()
    assert dict(dataset["influence"].sizes) == {"target": 1, "epoch": 3, "layer": 3, "sample": 12}
    assert dataset["epoch"].values.tolist() == [10, 11, 12]
    assert dataset["layer"].values.tolist() == ["0", "2", "4"]
    assert "-influence" in dataset["influence"].attrs["sign"]
    again = list(ReversePass(run, {"first": lambda model: model[0].bias.sum()}).epochs())
    assert [result.epoch for result in again] == [3, 2, 1]
    for result in again:
        values = dataset["influence"].isel(epoch=result.epoch - 1).values
        np.testing.assert_array_equal(values, result.influence)


def test_derivatives_that_explode_are_an_error():
    run = TinyRun(torch.optim.SGD, {"lr": 0.3})
    explode = {"huge": lambda model: 1e308 * model[0].weight.sum() * 1.5}
    with pytest.raises(InfiniteDerivativeError, match="epoch 12"):
        list(ReversePass(run, explode, smoothing=Smoothing(gate_width=1.0)).epochs())
