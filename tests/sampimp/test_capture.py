"""In-step importance against two oracles, training left as it is, and what is refused."""

import copy
import importlib.util
import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from sampimp.capture import (
    ImportanceRecorder,
    snapshot_importance,
)
from sampimp.errors import ConfigError, UnsupportedError
from sampimp.models import build_mlp, flatten_parameters

_spec = importlib.util.spec_from_file_location("oracles", Path(__file__).with_name("oracles.py"))
oracles = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(oracles)

SGD = torch.optim.SGD


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batch(samples=6, inputs=4, classes=3, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(samples, inputs, generator=generator, dtype=dtype),
        torch.randint(0, classes, (samples,), generator=generator),
    )


def train_step(model, optimizer, inputs, labels, reduction="mean"):
    optimizer.zero_grad()
    functional.cross_entropy(model(inputs), labels, reduction=reduction).backward()
    optimizer.step()


def recorded(model, optimizer, inputs, labels, reduction="mean", dropout_seed=0):
    """Importance of one training step, by the recorder."""
    recorder = ImportanceRecorder(model, optimizer, loss_reduction=reduction)
    torch.manual_seed(dropout_seed)
    with recorder.step(range(len(labels)), epoch=1):
        train_step(model, optimizer, inputs, labels, reduction)
    return recorder.pop_epoch(1, len(labels))


@st.composite
def cases(draw, dropout=False):
    """Draw a network, its optimizer, a batch and a reduction."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=2, max_size=5))
    sizes[-1] = max(2, sizes[-1])  # one class alone has no gradient
    torch.manual_seed(draw(st.integers(0, 2**16)))
    modules = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        modules.append(nn.Linear(fan_in, fan_out, bias=draw(st.booleans())))
        modules.append(draw(st.sampled_from([nn.Tanh(), nn.ReLU(), nn.ReLU(inplace=True)])))
        if dropout:
            modules.append(nn.Dropout(0.4))
    last = 2 if dropout else 1
    model = nn.Sequential(*modules[:-last]).double()
    rate = st.floats(0.01, 2)
    options = {"weight_decay": draw(st.sampled_from([0.0, 1e-5, 0.1]))}
    if draw(st.booleans()):
        optimizer = SGD(model.parameters(), lr=draw(rate), **options)
    else:  # a group for each parameter, some left out of training
        groups = [
            {"params": [parameter], "lr": draw(rate)}
            for parameter in model.parameters()
            if draw(st.integers(0, 3))
        ] or [{"params": [next(model.parameters())], "lr": draw(rate)}]
        optimizer = SGD(groups, **options)
    inputs = torch.randn(draw(st.integers(1, 6)), sizes[0], dtype=torch.float64)
    labels = torch.randint(0, sizes[-1], (len(inputs),))
    return model, optimizer, inputs, labels, draw(st.sampled_from(["mean", "sum"]))


@settings(deadline=None, max_examples=60)
@given(cases())
def test_in_step_importance_is_that_of_each_samples_own_gradient(case):
    model, optimizer, inputs, labels, reduction = case
    expected = oracles.importance_by_autograd(model, optimizer, inputs, labels, reduction)
    got = recorded(model, optimizer, inputs, labels, reduction)
    # A gradient that cancels to 1e-8 of its layer's largest keeps no ten digits in either way.
    assert oracles.close(got, expected, scale=1e-8 * expected.amax(1, keepdim=True))


@settings(deadline=None, max_examples=60)
@given(cases(dropout=False) | cases(dropout=True))
def test_in_step_importance_is_the_step_with_the_sample_minus_the_one_without(case):
    model, optimizer, inputs, labels, reduction = case
    expected = oracles.importance_by_two_steps(model, optimizer, inputs, labels, reduction)
    # Parameters of size 1 after two steps are known to 1e-16, their difference d to 1e-16 / d, and
    # its square to twice that.
    size = 1 + flatten_parameters(model).abs().max()
    rounding = (1e-15 * size) * expected.sqrt() / 1e-10 + 1e-20
    got = recorded(model, optimizer, inputs, labels, reduction)
    assert oracles.close(got, expected, scale=rounding)


def freeze(*positions):
    def change(model):
        for position in positions:
            model[position].requires_grad_(False)

    return change


def freeze_bias(model):
    model[2].bias.requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "silent"),
    [
        (freeze(0), [0]),
        (freeze(2), [1]),
        (freeze(0, 2), [0, 1]),
        (freeze(4), [2]),
        (freeze_bias, []),
    ],
    ids=["first", "middle", "first two", "last", "a bias"],
)
@pytest.mark.parametrize("offered", [True, False], ids=["in the optimizer", "left out"])
def test_frozen_layers_have_no_importance(change, silent, offered):
    model = oracles.tiny_mlp((4, 5, 5, 3), nn.Tanh)
    change(model)
    trained = [p for p in model.parameters() if offered or p.requires_grad]
    optimizer, (inputs, labels) = SGD(trained, lr=0.2), batch()
    expected = oracles.importance_by_autograd(model, optimizer, inputs, labels)
    got = recorded(model, optimizer, inputs, labels)
    assert oracles.close(got, expected)
    assert (got == 0).all(1).nonzero().flatten().tolist() == silent


def test_a_first_layer_frozen_later_has_no_importance_from_then_on():
    model, (inputs, labels) = oracles.tiny_mlp((4, 5, 5, 3), nn.Tanh), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)
    for epoch in (1, 2):
        expected = oracles.importance_by_autograd(model, optimizer, inputs, labels)
        with recorder.step(range(6), epoch=epoch):
            train_step(model, optimizer, inputs, labels)
        assert oracles.close(recorder.pop_epoch(epoch, 6), expected)
        freeze(0)(model)


def test_rate_of_the_step_counts_when_a_scheduler_changes_it():
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    recorder = ImportanceRecorder(model, optimizer)
    for epoch in (1, 2):
        expected = oracles.importance_by_autograd(model, optimizer, inputs, labels)
        with recorder.step(range(6), epoch=epoch):
            train_step(model, optimizer, inputs, labels)
        assert oracles.close(recorder.pop_epoch(epoch, 6), expected)
        scheduler.step()


def test_groups_added_after_the_recorder_was_made_count():
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = SGD(model[2].parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)
    optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.3})
    expected = oracles.importance_by_autograd(model, optimizer, inputs, labels)
    with recorder.step(range(6), epoch=1):
        train_step(model, optimizer, inputs, labels)
    assert oracles.close(recorder.pop_epoch(1, 6), expected)


def test_rates_restored_after_the_recorder_was_made_count():
    # load_state_dict replaces the groups by new ones.
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)
    optimizer.load_state_dict(SGD(oracles.tiny_mlp().parameters(), lr=0.7).state_dict())
    expected = oracles.importance_by_autograd(model, optimizer, inputs, labels)
    with recorder.step(range(6), epoch=1):
        train_step(model, optimizer, inputs, labels)
    assert oracles.close(recorder.pop_epoch(1, 6), expected)


class Reversed(nn.Module):
    """Registers its layers in another order than it calls them."""

    def __init__(self):
        super().__init__()
        self.second, self.first = nn.Linear(5, 3), nn.Linear(4, 5)

    def forward(self, inputs):
        return self.second(torch.relu(self.first(inputs)))


def test_layers_are_labelled_in_forward_order():
    model, (inputs, labels) = Reversed().double(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    # The oracle goes by registration: second, first.
    expected = oracles.importance_by_autograd(model, optimizer, inputs, labels).flip(0)
    recorder = ImportanceRecorder(model, optimizer)
    with recorder.step(range(6), epoch=1):
        train_step(model, optimizer, inputs, labels)
    importance = recorder.to_dataset()["importance"]
    assert importance["layer"].values.tolist() == ["first", "second"]
    np.testing.assert_allclose(importance[0], expected.numpy(), rtol=1e-6)


def test_evaluation_and_penalty_inside_the_step_change_nothing():
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    expected = oracles.importance_by_autograd(model, optimizer, inputs, labels)
    recorder = ImportanceRecorder(model, optimizer)
    with recorder.step(range(6), epoch=1):
        penalty = sum((parameter**2).sum() for parameter in model.parameters())
        loss = functional.cross_entropy(model(inputs), labels) + 0.01 * penalty
        with torch.no_grad():
            model(inputs[:2] * 3)
        loss.backward()
        optimizer.step()
    assert oracles.close(recorder.pop_epoch(1, 6), expected)


class Keyword(nn.Module):
    """Calls its layer with a keyword."""

    def __init__(self):
        super().__init__()
        self.only = nn.Linear(4, 3)

    def forward(self, inputs):
        return self.only(input=inputs)


def test_a_layer_may_be_called_with_a_keyword():
    model, (inputs, labels) = Keyword().double(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    expected = oracles.importance_by_autograd(model, optimizer, inputs, labels)
    assert oracles.close(recorded(model, optimizer, inputs, labels), expected)


# Training is left as it is.


def trained_parameters(record, input_size, hidden, batch_size, steps, groups=False):
    model = build_mlp((input_size,), hidden, 10, seed=1)
    parameters = model.parameters()
    if groups:
        parameters = [{"params": [p], "lr": 0.05 * n} for n, p in enumerate(parameters, 1)]
    optimizer = SGD(parameters, lr=0.1, weight_decay=1e-5)
    recorder = ImportanceRecorder(model, optimizer)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        inputs = torch.rand(batch_size, input_size, generator=generator)
        labels = torch.randint(0, 10, (batch_size,), generator=generator)
        index = np.arange(batch_size) + step * batch_size
        if record:
            with recorder.step(index, epoch=1):
                train_step(model, optimizer, inputs, labels)
        else:
            train_step(model, optimizer, inputs, labels)
    return flatten_parameters(model)


@pytest.mark.parametrize("groups", [False, True])
def test_parameters_are_bit_identical_with_and_without_recording(groups):
    with_recording, without = (
        trained_parameters(record, 64, (32, 32, 32), 20, 30, groups) for record in (True, False)
    )
    assert with_recording.dtype == torch.float32
    assert torch.equal(with_recording, without)


def test_parameters_of_the_papers_network_are_bit_identical():
    with_recording, without = (
        trained_parameters(record, 784, (512, 512, 512), 100, 4) for record in (True, False)
    )
    assert torch.equal(with_recording, without)


def hooks(model):
    return [
        (name, kind)
        for name, module in model.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        if getattr(module, kind)
    ] + [
        (name, "parameter")
        for name, parameter in model.named_parameters()
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
    ]


@pytest.mark.parametrize("fails_in", [None, "forward", "loss", "backward", "update"])
def test_nothing_stays_behind_after_a_step(fails_in):
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)

    def step():
        with recorder.step(range(6), epoch=1):
            if fails_in == "forward":
                model(inputs[:, :2])
            logits = model(inputs)
            if fails_in == "loss":
                raise KeyboardInterrupt
            functional.cross_entropy(logits, labels).backward()
            if fails_in == "backward":
                functional.cross_entropy(logits, labels).backward()  # freed already
            optimizer.step(1 if fails_in == "update" else None)  # 1 cannot be called

    if fails_in is None:
        step()
    else:
        with pytest.raises((RuntimeError, KeyboardInterrupt, TypeError)):
            step()
    assert hooks(model) == []
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    twin = copy.deepcopy(model)
    assert torch.equal(flatten_parameters(twin), flatten_parameters(model))
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(flatten_parameters(again), flatten_parameters(model))


def test_a_step_after_one_that_failed_is_exact():
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)

    def interrupted():
        with recorder.step(range(6), epoch=1):
            functional.cross_entropy(model(inputs * 2), labels).backward()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    expected = oracles.importance_by_autograd(model, optimizer, inputs, labels)
    with recorder.step(range(6), epoch=1):
        train_step(model, optimizer, inputs, labels)
    assert oracles.close(recorder.pop_epoch(1, 6), expected)  # the failed one is not in the sum


# What an epoch holds.


def test_a_sample_used_twice_is_summed_and_an_unused_one_is_nan():
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)
    expected = torch.zeros(2, 8, dtype=torch.float64)
    used = torch.zeros(8, dtype=torch.bool)
    for rows in ([5, 0, 2], [2, 4], [2, 0]):  # sizes differ: so does the 1/B
        x, y = inputs[rows], labels[rows]
        expected[:, rows] += oracles.importance_by_autograd(model, optimizer, x, y)
        used[rows] = True
        with recorder.step(rows, epoch=3):
            train_step(model, optimizer, x, y)
    dataset = recorder.to_dataset(sample_count=8)
    got = recorder.pop_epoch(3, 8)
    assert oracles.close(got[:, used], expected[:, used])
    assert got[:, ~used].isnan().all()
    assert (~used).nonzero().flatten().tolist() == [1, 3, 6, 7]
    np.testing.assert_allclose(dataset["importance"][0], got.numpy(), rtol=1e-6)


@pytest.mark.filterwarnings("ignore:.*does not have a Zarr V3 specification")
def test_the_dataset_is_labelled(tmp_path):
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = SGD(model.parameters(), lr=0.2, weight_decay=0.01)
    recorder = ImportanceRecorder(model, optimizer, loss_reduction="sum")
    for epoch in (2, 1):
        for rows in (torch.tensor([0, 5, 3]), np.array([1, 4])):
            with recorder.step(rows, epoch=epoch):
                train_step(model, optimizer, inputs[rows], labels[rows], "sum")
    dataset = recorder.to_dataset()
    importance = dataset["importance"]
    assert importance.dims == ("epoch", "layer", "sample")
    assert importance.dtype == np.float32
    assert importance["epoch"].values.tolist() == [1, 2]
    assert importance["layer"].values.tolist() == ["0", "2"]
    assert importance["sample"].values.tolist() == list(range(6))  # the largest index seen, plus 1
    assert np.isnan(importance.sel(sample=2)).all()
    expected = {
        "units": "parameter^2",
        "learning_rate": 0.2,
        "batch_size": 3,
        "loss_reduction": "sum",
        "weight_decay": 0.01,
        "optimizer": "SGD",
    }
    assert {key: importance.attrs[key] for key in expected} == expected
    dataset.to_zarr(tmp_path / "importance.zarr", consolidated=False)
    stored = xr.open_zarr(tmp_path / "importance.zarr", consolidated=False)
    xr.testing.assert_identical(stored.load(), dataset)


def test_each_step_of_each_epoch_is_exact_without_anything_being_taken_in_between():
    """Three epochs of uneven batches in one recorder, against the single-sample oracle."""
    inputs, labels = batch(samples=7)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    optimizer = SGD(model.parameters(), lr=0.3)
    recorder = ImportanceRecorder(model, optimizer)
    expected = np.zeros((3, 2, 7))
    for epoch in (1, 2, 3):
        for index in torch.randperm(7).split(3):
            for i in index.tolist():
                own = copy.deepcopy(model)
                loss = functional.cross_entropy(own(inputs[[i]]), labels[[i]]) / len(index)
                squares = [
                    grad.square().sum() for grad in torch.autograd.grad(loss, [*own.parameters()])
                ]
                expected[epoch - 1, :, i] = [
                    0.09 * (squares[0] + squares[1]),
                    0.09 * (squares[2] + squares[3]),
                ]
            with recorder.step(index, epoch=epoch):
                train_step(model, optimizer, inputs[index], labels[index])
    found = recorder.to_dataset()["importance"]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_epochs_are_forgotten_once_they_are_taken():
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)
    for epoch in (1, 2):
        with recorder.step(range(6), epoch=epoch):
            train_step(model, optimizer, inputs, labels)
    recorder.pop_epoch(1, 6)
    assert recorder.to_dataset()["epoch"].values.tolist() == [2]


def test_the_reduction_changes_importance_by_the_square_of_the_batch():
    (inputs, labels), values = batch(), {}
    for reduction in ("mean", "sum"):
        model = oracles.tiny_mlp()
        values[reduction] = recorded(
            model, SGD(model.parameters(), lr=0.2), inputs, labels, reduction
        )
    assert oracles.close(values["sum"], 36 * values["mean"])  # B = 6


# What is refused.


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, inputs):
        return self.out(torch.relu(self.inner(torch.relu(self.inner(inputs)))))


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


class OwnScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.scale = nn.Linear(4, 3), nn.Parameter(torch.ones(()))

    def forward(self, inputs):
        return self.inner(inputs) * self.scale


class Thinned(nn.Linear):
    def forward(self, inputs):
        return super().forward(2 * inputs)


def with_first(change):
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    model[0] = change(model[0])
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)), "Conv2d.*module 0"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "BatchNorm1d.*module 1"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False)), "BatchNorm1d.*module 1"),
        (nn.Sequential(nn.Linear(4, 4), nn.SyncBatchNorm(4, affine=False)), "SyncB.*module 1"),
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), "LayerNorm.*module 1"),
        (nn.Sequential(nn.Linear(4, 4), nn.PReLU()), "PReLU.*module 1"),
        (nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3)), "Embedding.*module 0"),
        (nn.Sequential(nn.Linear(4, 4), Thinned(4, 3)), "Thinned.*module 1"),
        (tied(), "shared with 0.*module 2"),
        (OwnScale(), "OwnScale.*model itself"),
        (nn.Sequential(nn.ReLU()), "Sequential without parameters"),
    ],
)
def test_models_without_an_exact_rule_are_refused(model, words):
    with pytest.raises(UnsupportedError, match="(?s)" + words):
        find_layers(model)


@pytest.mark.parametrize(
    "change",
    [
        nn.utils.spectral_norm,
        nn.utils.parametrizations.spectral_norm,
        pytest.param(
            nn.utils.weight_norm,
            marks=pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated"),
        ),
        nn.utils.parametrizations.weight_norm,
        lambda layer: nn.utils.prune.random_unstructured(layer, "weight", amount=0.5),
    ],
    ids=["spectral_norm", "new spectral_norm", "weight_norm", "new weight_norm", "pruned"],
)
def test_layers_whose_weight_is_computed_are_refused(change):
    # The trained parameter is another one: (0.1 delta x)^2 is not the square of its update.
    import torch.nn.utils.prune  # noqa: F401

    with pytest.raises(UnsupportedError, match=r"module 0"):
        find_layers(with_first(change))


def make_optimizers(parameters):
    return {
        "Adam": torch.optim.Adam(parameters),
        "AdamW": torch.optim.AdamW(parameters),
        "SGD, momentum": SGD(parameters, lr=0.1, momentum=0.9),
        "SGD, nesterov": SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
        "one group with momentum": SGD(
            [{"params": parameters[:1]}, {"params": parameters[1:], "momentum": 0.5}], lr=0.1
        ),
        "subclass": type("MySGD", (SGD,), {})(parameters, lr=0.1),
    }


@pytest.mark.parametrize("name", make_optimizers(list(nn.Linear(1, 1).parameters())))
def test_other_optimizers_are_refused(name):
    model = oracles.tiny_mlp()
    optimizer = make_optimizers(list(model.parameters()))[name]
    for refuse in (check_optimizer, lambda given: ImportanceRecorder(model, given)):
        with pytest.raises(
            UnsupportedError, match=f"SGD without momentum(.|\n)*Got {type(optimizer).__name__}"
        ):
            refuse(optimizer)


def test_momentum_that_is_switched_on_later_is_refused():
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(UnsupportedError, match="momentum"), recorder.step(range(6), epoch=1):
        train_step(model, optimizer, inputs, labels)


def test_an_optimizer_of_another_model_is_refused():
    with pytest.raises(UnsupportedError, match="parameters of the model"):
        ImportanceRecorder(oracles.tiny_mlp(), SGD(oracles.tiny_mlp().parameters(), lr=0.1))


def test_an_unknown_reduction_is_refused():
    model = oracles.tiny_mlp()
    with pytest.raises(ConfigError, match=r"none(.|\n)*reduction"):
        ImportanceRecorder(model, SGD(model.parameters(), lr=0.1), loss_reduction="none")


def halve_by_new_tensors(model):
    for parameter in model.parameters():
        parameter.grad = parameter.grad * 0.5


CHANGED_GRADIENTS = {
    "norm clipped": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1e-3),
    "value clipped": lambda model: nn.utils.clip_grad_value_(model.parameters(), 1e-3),
    "last layer clipped": lambda model: nn.utils.clip_grad_norm_(model[2].parameters(), 1e-3),
    "first layer clipped": lambda model: nn.utils.clip_grad_norm_(model[0].parameters(), 1e-3),
    "a bias scaled": lambda model: model[2].bias.grad.mul_(0.5),
    "replaced by other tensors": halve_by_new_tensors,
    "one dropped": lambda model: setattr(model[2].weight, "grad", None),
}


@pytest.mark.parametrize("name", CHANGED_GRADIENTS)
def test_gradients_changed_between_backward_and_step_are_refused(name):
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)

    def step():
        with recorder.step(range(6), epoch=4):
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), labels).backward()
            CHANGED_GRADIENTS[name](model)
            optimizer.step()

    with pytest.raises(UnsupportedError, match=r"changed between backward(.|\n)*epoch 4"):
        step()
    assert hooks(model) == []


@pytest.mark.parametrize("set_to_none", [True, False])
def test_either_way_to_zero_gradients_is_fine(set_to_none):
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)
    for epoch in (1, 2, 3):
        expected = oracles.importance_by_autograd(model, optimizer, inputs, labels)
        with recorder.step(range(6), epoch=epoch):
            optimizer.zero_grad(set_to_none=set_to_none)
            functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        assert oracles.close(recorder.pop_epoch(epoch, 6), expected)


def loss_of(model, inputs, labels):
    return functional.cross_entropy(model(inputs), labels)


def forward_only(model, optimizer, inputs, labels):
    loss_of(model, inputs, labels)
    optimizer.step()


def backward_outside(model, optimizer, inputs, labels):
    optimizer.step()  # the gradients are those of the step before


def two_losses(model, optimizer, inputs, labels):
    (loss_of(model, inputs, labels) + loss_of(model, 2 * inputs, labels)).backward()
    optimizer.step()


def two_backwards(model, optimizer, inputs, labels):
    loss_of(model, inputs, labels).backward()
    loss_of(model, inputs, labels).backward()
    optimizer.step()


def another_pass_after(model, optimizer, inputs, labels):
    loss = loss_of(model, inputs, labels)
    model(3 * inputs)  # the activations that the recorder saw last are not those of the loss
    loss.backward()
    optimizer.step()


def no_update(model, optimizer, inputs, labels):
    loss_of(model, inputs, labels).backward()


def two_updates(model, optimizer, inputs, labels):
    loss_of(model, inputs, labels).backward()
    optimizer.step()
    optimizer.step()


def backward_in_a_closure(model, optimizer, inputs, labels):
    optimizer.step(lambda: loss_of(model, inputs, labels).backward())


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (forward_only, "backward"),
        (backward_outside, "backward"),
        (two_losses, "used once(.|\n)*layer [02]"),
        (two_backwards, "used once(.|\n)*layer [02]"),
        (another_pass_after, "used once(.|\n)*layer [02]"),
        (no_update, "one optimizer.step.. in the block\n +Got 0\n +Where epoch 7"),
        (two_updates, "one optimizer.step.. in the block\n +Got 2\n +Where epoch 7"),
        (backward_in_a_closure, "."),
    ],
)
def test_blocks_that_are_not_one_training_step_are_refused(block, words):
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)
    with recorder.step(range(6), epoch=6):
        train_step(model, optimizer, inputs, labels)
    optimizer.zero_grad(set_to_none=False)
    with pytest.raises(UnsupportedError, match=words), recorder.step(range(6), epoch=7):
        block(model, optimizer, inputs, labels)
    assert hooks(model) == []
    assert recorder.to_dataset()["epoch"].values.tolist() == [6]  # nothing wrong was kept


def test_a_layer_used_twice_in_a_pass_is_refused():
    model, (inputs, labels) = Twice().double(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)
    with pytest.raises(UnsupportedError, match="layer inner"), recorder.step(range(6), epoch=1):
        train_step(model, optimizer, inputs, labels)


def test_a_layer_that_is_not_used_is_named():
    model, (inputs, labels) = (
        nn.ModuleDict({"used": nn.Linear(4, 3), "idle": nn.Linear(4, 3)}),
        batch(),
    )
    optimizer = SGD(model.double().parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)
    with pytest.raises(UnsupportedError, match="layer idle"), recorder.step(range(6), epoch=1):
        train_step(model["used"], optimizer, inputs, labels)


def test_a_batch_of_another_length_is_refused():
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)
    before = flatten_parameters(model)
    with (
        pytest.raises(UnsupportedError, match=r"\(5, inputs\)(.|\n)*\(6, 4\)(.|\n)*layer 0"),
        recorder.step(range(5), epoch=1),
    ):
        train_step(model, optimizer, inputs, labels)
    assert torch.equal(flatten_parameters(model), before)  # refused before the update


def test_sequences_are_refused():
    model = nn.Sequential(nn.Linear(4, 3), nn.Flatten(1)).double()
    optimizer = SGD(model.parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)
    with (
        pytest.raises(UnsupportedError, match=r"\(6, 2, 4\)(.|\n)*layer 0(.|\n)*sequences"),
        recorder.step(range(6), epoch=1),
    ):
        train_step(model, optimizer, torch.rand(6, 2, 4).double(), torch.zeros(6, dtype=torch.long))


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ([0, 1, 2, 3, 4, 4], "1 repeated"),
        ([0, 1, 2, 3, 4, -1], "smallest -1"),
        ([[0, 1, 2], [3, 4, 5]], r"shape \(2, 3\)"),
        (torch.tensor(3), r"shape \(\)"),
    ],
)
def test_indices_that_name_no_sample_each_are_refused(index, words):
    model = oracles.tiny_mlp()
    recorder = ImportanceRecorder(model, SGD(model.parameters(), lr=0.2))
    with pytest.raises(ConfigError, match=words), recorder.step(index, epoch=1):
        pytest.fail("the block must not run")


# Snapshots.


@settings(deadline=None, max_examples=30)
@given(cases(), st.integers(1, 4))
def test_snapshot_importance_is_that_of_each_samples_own_gradient(case, chunk):
    model, _, inputs, labels, _ = case
    expected = oracles.importance_by_autograd(
        model, SGD(model.parameters(), lr=0.3), inputs, labels, "sum"
    )
    got = snapshot_importance(model, inputs, labels, rate=0.3, chunk=chunk)
    assert oracles.close(got, expected, scale=1e-8 * expected.amax(1, keepdim=True))


def test_a_snapshot_leaves_gradients_and_parameters_alone():
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    model[0].weight.grad = torch.full_like(model[0].weight, 7.0)
    before = flatten_parameters(model)
    snapshot_importance(model, inputs, labels, rate=0.3)
    assert torch.equal(flatten_parameters(model), before)
    assert model[0].weight.grad.unique().tolist() == [7.0]
    assert model[2].weight.grad is None
    assert hooks(model) == []


def test_a_snapshot_of_a_model_with_a_frozen_first_layer():
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    freeze(0)(model)
    optimizer = SGD(model.parameters(), lr=0.3)
    expected = oracles.importance_by_autograd(model, optimizer, inputs, labels, "sum")
    assert oracles.close(snapshot_importance(model, inputs, labels, rate=0.3), expected)


def test_in_step_importance_of_a_step_is_the_snapshot_before_it():
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    snapshot = snapshot_importance(model, inputs, labels, rate=0.2 / 6)  # rate / B
    assert oracles.close(recorded(model, SGD(model.parameters(), lr=0.2), inputs, labels), snapshot)
