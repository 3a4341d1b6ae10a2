"""The training loop against a float64 replay in NumPy, and against an interrupted run."""

import itertools
import os

import numpy as np
import oracles
import pytest
import torch

from sampimp.data import Dataset
from sampimp.errors import RecordError
from sampimp.importance.evaluation import evaluation_mode
from sampimp.schema import CURVES
from sampimp.training.loop import (
    EVALUATION_CHUNK,
    TrainingRun,
    evaluate,
    use_deterministic_algorithms,
)
from sampimp.training.models import build_mlp, flatten_parameters
from sampimp.training.strategies import batch_positions, make_schedule


@pytest.fixture(autouse=True)
def threads_are_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make_data(samples=40, tests=11, inputs=6, classes=3, seed=0):
    rng = np.random.default_rng(seed)

    def part(count):
        labels = rng.permutation(np.arange(count) % classes)
        return rng.random((count, inputs), dtype=np.float32), labels

    return Dataset(*part(samples), *part(tests))


def make_run(data=None, record=True, difficulty=None, **changes):
    config = oracles.trial_config(**changes)
    data = data if data is not None else make_data()
    schedule = make_schedule(
        config.strategy,
        len(data.train_labels),
        config.training.batch_size,
        config.order_seed,
        difficulty,
    )
    return TrainingRun(config, data, schedule, record=record)


# The replay: forward, backward and update in float64.


def split(flat_P, sizes):
    """Return the (weight, bias) of each layer of a flat parameter vector."""
    layers, start = [], 0
    for fan_in, fan_out in itertools.pairwise(sizes):
        stop = start + fan_in * fan_out
        weight = flat_P[start:stop].reshape(fan_out, fan_in)
        layers.append((weight, flat_P[stop : stop + fan_out]))
        start = stop + fan_out
    assert start == len(flat_P)
    return layers


def log_softmax(logits):
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def forward(layers, x):
    """Return the input of every layer, and the logits."""
    activations = [x]
    for number, (weight, bias) in enumerate(layers, 1):
        z = activations[-1] @ weight.T + bias
        activations.append(np.maximum(z, 0) if number < len(layers) else z)
    return activations[:-1], activations[-1]


def replay_step(layers, x, y, rate, weight_decay):
    """Return the layers after a step, and the importance (layer, sample) of its samples."""
    activations, logits = forward(layers, x)
    delta = np.exp(log_softmax(logits))
    delta[np.arange(len(y)), y] -= 1
    delta /= len(y)
    new, importance = [], []
    for number in reversed(range(len(layers))):
        (weight, bias), activation = layers[number], activations[number]
        # The update by sample n alone, in full: -rate delta_n (x_n, 1)
        phi_NOJ = -rate * np.einsum(
            "no,ni->noi", delta, np.pad(activation, ((0, 0), (0, 1)), constant_values=1)
        )
        importance.append((phi_NOJ**2).sum((1, 2)))
        update = phi_NOJ.sum(0)
        new.append(
            (
                weight + update[:, :-1] - rate * weight_decay * weight,
                bias + update[:, -1] - rate * weight_decay * bias,
            )
        )
        delta = (delta @ weight) * (activation > 0)
    return new[::-1], np.array(importance[::-1])


def relative_error(actual, expected):
    return np.abs(actual - expected) / np.abs(expected)


@pytest.mark.parametrize("strategy", ["shuffle", "rand", "rnlo", "sim"])
def test_epoch_equals_a_float64_replay(strategy):
    data = make_data(300, 50, 64, 10)
    rate, decay, hidden, difficulty = 0.1, 1e-2, (24, 20, 16), np.random.default_rng(5).random(300)
    run = make_run(
        data,
        strategy=strategy,
        difficulty=difficulty,
        hidden=hidden,
        epochs=2,
        batch_size=20,
        learning_rate=rate,
        weight_decay=decay,
    )
    start, *epochs = run.records()
    assert [name for name, _ in run.layers[::2]] == ["L1", "L2", "L3", "Out"]
    state = start.arrays["parameters"].astype(np.float64)
    for record in epochs:
        arrays = record.arrays
        layers = split(state, (64, *hidden, 10))
        importance = np.full((4, 300), np.nan)
        for position in range(15):  # from the recorded `batch` only
            batch = np.flatnonzero(arrays["batch"] == position)
            x = data.train_inputs[batch].astype(np.float64)
            layers, importance[:, batch] = replay_step(
                layers, x, data.train_labels[batch], rate, decay
            )
        first = arrays["batch"] == 0
        assert (
            np.median(relative_error(arrays["importance"][:, first], importance[:, first])) < 1e-5
        )
        assert np.median(relative_error(arrays["importance"], importance)) < 1e-4
        flat = np.concatenate([part.ravel() for layer in layers for part in layer])
        np.testing.assert_allclose(arrays["parameters"], flat, rtol=0, atol=1e-5)
        state = arrays["parameters"].astype(np.float64)  # replay the next epoch from the record
        nll, logits = {}, {}
        for part, x, y in (("train", *data[:2]), ("test", *data[2:])):
            _, logits[part] = forward(split(state, (64, *hidden, 10)), x.astype(np.float64))
            nll[part] = -log_softmax(logits[part])[np.arange(len(y)), y]
            assert arrays[f"{part}_nll"] == pytest.approx(nll[part].mean(), rel=1e-5)
            assert arrays[f"{part}_error"] == (logits[part].argmax(1) != y).mean()
        np.testing.assert_allclose(arrays["nll"], nll["train"], rtol=1e-4)


def test_contents_of_a_record():
    run = make_run(parameters_every=3)
    records = list(run.records())
    assert [record.epoch for record in records] == [0, 1, 2, 3, 4]
    assert list(records[0].arrays) == ["parameters"]
    always = {"importance", "nll", "batch", *CURVES}
    for record in records[1:]:
        stored = (
            {"parameters"} if record.epoch in (3, 4) else set()
        )  # every third epoch, and the last
        assert set(record.arrays) == always | stored
        assert record.arrays["importance"].shape == (3, 40)
        assert record.arrays["nll"].shape == record.arrays["batch"].shape == (40,)
        assert {record.arrays[name].dtype for name in ("importance", "nll", "batch")} == {
            np.dtype(np.float32)
        }
        assert np.isfinite(record.arrays["importance"]).all()
        assert not record.diverged
        assert record.seconds > 0
        np.testing.assert_array_equal(
            record.arrays["batch"],
            batch_positions(make_schedule("shuffle", 40, 7, 0)(record.epoch), 40),
        )
    initial = flatten_parameters(build_mlp((6,), (6, 5), 3, seed=1)).numpy()
    np.testing.assert_array_equal(records[0].arrays["parameters"], initial)
    final = flatten_parameters(run.model).numpy()
    np.testing.assert_array_equal(records[-1].arrays["parameters"], final)


def test_parameters_every_zero_records_no_parameters():
    records = list(make_run(parameters_every=0).records())
    assert records[0].arrays == {}
    assert not any("parameters" in record.arrays for record in records)


def same_bytes(record, other):
    assert set(record.arrays) == set(other.arrays)
    return record.epoch == other.epoch and all(
        np.asarray(record.arrays[name]).tobytes() == np.asarray(other.arrays[name]).tobytes()
        for name in record.arrays
    )


@pytest.mark.parametrize("strategy", ["shuffle", "rand"])
@pytest.mark.parametrize("epoch", [1, 3])
def test_resumed_run_continues_with_equal_bytes(strategy, epoch):
    whole = list(make_run(strategy=strategy).records())
    interrupted = make_run(strategy=strategy)
    for record in interrupted.records():
        if record.epoch == epoch:
            break
    torch.manual_seed(123)  # as in another process
    resumed = make_run(strategy=strategy)
    resumed.restore(interrupted.state(), epoch)
    rest = list(resumed.records())
    assert [record.epoch for record in rest] == list(range(epoch + 1, 5))
    assert all(map(same_bytes, rest, whole[epoch + 1 :]))


OTHER_CONFIGURATIONS = [
    {"model": "cnn", "optimizer": "momentum", "schedule": "cosine"},
    {"model": "gru", "optimizer": "adam", "schedule": "step"},
    {"model": "transformer", "optimizer": "adamw"},
    {"model": "mlp", "optimizer": "adamw"},
    {"model": "mlp", "activation": "gelu"},
]


@pytest.mark.parametrize(
    "changes", OTHER_CONFIGURATIONS, ids=lambda changes: "-".join(changes.values())
)
def test_other_networks_and_optimizers_resume_with_equal_bytes(changes):
    data = make_data(inputs=16)
    data = data._replace(
        train_inputs=data.train_inputs.reshape(-1, 1, 4, 4),
        test_inputs=data.test_inputs.reshape(-1, 1, 4, 4),
    )
    changes = {**changes, "learning_rate": 0.01}
    whole = list(make_run(data, **changes).records())
    assert (whole[-1].arrays["importance"].sum(1) > 0).all()
    first = make_run(data, **changes)
    for record in first.records():
        if record.epoch == 2:
            break
    second = make_run(data, **changes)
    second.restore(first.state(), 2)
    for record, expected in zip(second.records(), whole[3:], strict=True):
        assert same_bytes(record, expected)
    *_, plain = make_run(data, record=False, **changes).records()
    np.testing.assert_array_equal(plain.arrays["parameters"], whole[-1].arrays["parameters"])


def test_finished_run_yields_no_record():
    run = make_run()
    for _ in run.records():
        pass
    restored = make_run()
    restored.restore(run.state(), 4)
    assert list(restored.records()) == []


def test_state_of_another_epoch_is_refused():
    run = make_run()
    records = run.records()
    next(records), next(records), next(records)
    before = flatten_parameters(make_run().model)
    other = make_run()
    with pytest.raises(RecordError, match=r"seed 1, after epoch 1(.|\n)*after epoch 2"):
        other.restore(run.state(), 1)
    assert other.epoch == 0
    assert torch.equal(flatten_parameters(other.model), before)


def test_recording_does_not_change_the_parameters():
    with_recording, without = (list(make_run(record=record).records()) for record in (True, False))
    for recorded, plain in zip(with_recording, without, strict=True):
        assert recorded.arrays["parameters"].tobytes() == plain.arrays["parameters"].tobytes()
        assert "importance" not in plain.arrays


def test_seed_and_order_seed_are_independent():
    def first_epoch(**changes):
        records = make_run(epochs=1, **changes).records()
        return next(records).arrays["parameters"].tobytes(), next(records).arrays["batch"].tobytes()

    start, batch = first_epoch(seed=1, order_seed=0)
    assert first_epoch(seed=2, order_seed=0)[0] != start
    assert first_epoch(seed=2, order_seed=0)[1] == batch
    assert first_epoch(seed=1, order_seed=5)[0] == start
    assert first_epoch(seed=1, order_seed=5)[1] != batch


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_diverging_run_is_marked_and_stops():
    records = list(make_run(learning_rate=1e18).records())
    assert [record.epoch for record in records] == [0, 1]
    assert records[-1].diverged
    assert not np.isfinite(records[-1].arrays["train_nll"])
    assert np.isfinite(records[-1].arrays["batch"]).all()


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_infinite_importance_counts_as_divergence():
    # A linear model at rate 1e20: logits and NLL of 1e20 are finite, (1e20 x)^2 in float32 is not.
    records = list(make_run(learning_rate=1e20, hidden=(), weight_decay=0.0).records())
    assert np.isfinite(records[1].arrays["train_nll"])
    assert not np.isfinite(records[1].arrays["importance"]).all()
    assert records[1].diverged
    assert len(records) == 2


def test_class_of_the_training_set_only_is_an_output():
    data = make_data()
    data = data._replace(test_labels=np.minimum(data.test_labels, 1))
    assert make_run(data).model.Out.out_features == 3


def test_nll_and_error_equal_numpy():
    samples = EVALUATION_CHUNK + 7  # more than one chunk
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(samples, 5)).astype(np.float32) * 30  # confident: NLL from 1e-40 up
    labels = rng.integers(0, 4, samples)
    model = build_mlp((5,), (), 4, seed=2)
    with torch.no_grad():
        logits = model(torch.from_numpy(inputs)).double().numpy()
    labels[::2] = logits[::2].argmax(1)
    nll, error = evaluate(model, torch.from_numpy(inputs), torch.from_numpy(labels))
    assert nll.shape == (samples,)
    # -log p = log(1 + sum over the other classes of exp(their logit - the label's))
    label_logit = logits[np.arange(samples), labels]
    others = np.exp(logits - label_logit[:, None])
    others[np.arange(samples), labels] = 0
    expected = np.log1p(others.sum(1))
    np.testing.assert_allclose(nll, expected, rtol=1e-5, atol=1e-14)
    assert error == (logits.argmax(1) != labels).mean()
    assert 0 < error < 0.5


# Networks that behave differently in training mode; they are evaluated in evaluation mode.


def with_dropout(input_shape, class_count):
    middle = (torch.nn.Linear(*input_shape, 32), torch.nn.ReLU(), torch.nn.Dropout(0.5))
    return torch.nn.Sequential(*middle, torch.nn.Linear(32, class_count))


def with_batch_norm(input_shape, class_count):
    middle = (torch.nn.Linear(*input_shape, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
    return torch.nn.Sequential(*middle, torch.nn.Linear(8, class_count))


def with_frozen_batch_norm(input_shape, class_count):
    model = with_batch_norm(input_shape, class_count)
    model[1].eval()
    model[1].running_mean.copy_(torch.linspace(-1, 1, 8))
    model[1].running_var.copy_(torch.linspace(0.5, 2, 8))
    return model


def nll_by_numpy(model, inputs, labels):
    """Return NLL and fraction misclassified of one of these networks in evaluation mode."""
    values = inputs.astype(np.float64)
    for module in model:
        state = {name: tensor.double().numpy() for name, tensor in module.state_dict().items()}
        if isinstance(module, torch.nn.Linear):
            values = values @ state["weight"].T + state["bias"]
        elif isinstance(module, torch.nn.BatchNorm1d):
            values = (values - state["running_mean"]) / np.sqrt(state["running_var"] + module.eps)
            values = values * state["weight"] + state["bias"]
        elif isinstance(module, torch.nn.ReLU):
            values = np.maximum(values, 0)
    nll = -log_softmax(values)[np.arange(len(labels)), labels]
    return nll, (values.argmax(1) != labels).mean()


@pytest.mark.parametrize(
    ("network", "record"),
    [(with_dropout, True), (with_frozen_batch_norm, True), (with_batch_norm, False)],
)
def test_nll_and_errors_are_those_of_evaluation_mode(network, record):
    data = make_data(samples=60, tests=200, inputs=4)
    run = make_run(data, record=record, model=f"{__name__}:{network.__name__}", batch_size=20)
    before = [module.training for module in run.model.modules()]
    *_, epoch = run.records()
    nll, error = nll_by_numpy(run.model, data.train_inputs, data.train_labels)
    np.testing.assert_allclose(epoch.arrays["nll"], nll, rtol=1e-4, atol=1e-6)
    assert epoch.arrays["train_error"] == error
    nll, error = nll_by_numpy(run.model, data.test_inputs, data.test_labels)
    np.testing.assert_allclose(epoch.arrays["test_nll"], nll.mean(), rtol=1e-4)
    assert epoch.arrays["test_error"] == error
    assert [module.training for module in run.model.modules()] == before
    if network is with_batch_norm:  # 4 epochs of 3 batches; evaluation adds none
        assert run.model[1].num_batches_tracked == 12
    if network is with_frozen_batch_norm:
        assert run.model[1].num_batches_tracked == 0
        torch.testing.assert_close(run.model[1].running_mean, torch.linspace(-1, 1, 8))


def test_failed_evaluation_restores_every_mode():
    model = with_frozen_batch_norm((4,), 3)
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        evaluate(model, torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64))
    assert [module.training for module in model.modules()] == before
    assert torch.backends.mha.get_fastpath_enabled()


def test_evaluations_that_overlap_restore_the_fused_encoder_layer():
    """As two threads interleave: the second begins before the first ends, and ends after it."""
    first, second = (evaluation_mode(torch.nn.Linear(1, 1)) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.backends.mha.get_fastpath_enabled()
    second.__exit__(None, None, None)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.fixture
def determinism_is_restored(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that teardown restores it
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.use_deterministic_algorithms(False)


def test_run_supports_deterministic_algorithms(determinism_is_restored):
    before = list(make_run().records())
    use_deterministic_algorithms()
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert all(map(same_bytes, make_run().records(), before))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_gpu_runs_have_equal_bytes(determinism_is_restored):
    first, second = (list(make_run(device="cuda").records()) for _ in range(2))
    assert torch.are_deterministic_algorithms_enabled()
    assert all(map(same_bytes, first, second))
    for gpu, cpu in zip(first[1:], list(make_run().records())[1:], strict=True):
        np.testing.assert_array_equal(gpu.arrays["batch"], cpu.arrays["batch"])
        np.testing.assert_allclose(gpu.arrays["nll"], cpu.arrays["nll"], rtol=1e-2)
