"""In-step importance against two oracles, training left as it is, and what is refused."""

import contextlib
import copy
import gc
import itertools
import pickle
import warnings
import weakref

import numpy as np
import oracles
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import sampimp.importance.optimizers
from sampimp.errors import ConfigError, UnsupportedError
from sampimp.importance.recorder import ImportanceRecorder
from sampimp.importance.snapshot import snapshot_importance
from sampimp.training.models import build_mlp, flatten_parameters

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


# What a step may be.


class Own(nn.Module):
    """Whatever a function makes of parts."""

    def __init__(self, function, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, inputs):
        return self.function(self, inputs)


def test_a_layer_used_twice_in_a_pass_is_one_sum():
    model = Own(
        lambda m, x: m.out(torch.relu(m.inner(torch.relu(m.inner(x))))),
        inner=nn.Linear(4, 4),
        out=nn.Linear(4, 3),
    ).double()
    optimizer, (inputs, labels) = SGD(model.parameters(), lr=0.2), batch()
    expected = oracles.importance_by_autograd(model, optimizer, inputs, labels)
    assert oracles.close(recorded(model, optimizer, inputs, labels), expected)


def test_a_layer_that_is_not_called_has_none():
    model = Own(lambda m, x: m.used(x), idle=nn.Linear(4, 3), used=nn.Linear(4, 3)).double()
    optimizer, (inputs, labels) = SGD(model.parameters(), lr=0.2, weight_decay=0.1), batch()
    recorder = ImportanceRecorder(model, optimizer)
    with recorder.step(range(6), epoch=1):
        train_step(model, optimizer, inputs, labels)
    assert recorder.layers == ("used", "idle")
    used, idle = recorder.pop_epoch(1, 6)
    assert (used > 0).all()
    assert (idle == 0).all()


def own_losses(model, inputs, labels):
    return functional.cross_entropy(model(inputs), labels, reduction="none")


def test_a_batch_may_be_made_in_the_step():
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer, values = SGD(model.parameters(), lr=0.2), inputs.numpy()
    expected = oracles.importance_by_autograd(model, optimizer, inputs, labels)
    recorder = ImportanceRecorder(model, optimizer)
    with recorder.step(range(6), epoch=1):
        train_step(model, optimizer, torch.as_tensor(values), labels)
    assert oracles.close(recorder.pop_epoch(1, 6), expected)


def test_several_passes_forward_are_one_loss():
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)

    def loss_of(rows):
        model(3 * inputs[rows])  # leads nowhere
        one = own_losses(model, inputs[rows], labels[rows])
        return one + own_losses(model, 2 * inputs[rows], labels[rows])

    expected = gradients_squared(model, [loss_of([i]).sum() / 6 for i in range(6)], 0.2)
    recorder = ImportanceRecorder(model, optimizer)
    with recorder.step(range(6), epoch=1):
        loss_of(list(range(6))).mean().backward()
        optimizer.step()
    assert oracles.close(recorder.pop_epoch(1, 6), expected)


def gradients_squared(model, losses, rate):
    """Return rate^2 |gradient|^2 of each sample's own loss by layer, (layer, sample)."""
    parameters = list(model.parameters())
    columns = []
    for loss in losses:
        squares = [(rate * g).square().sum() for g in torch.autograd.grad(loss, parameters)]
        own = {id(p): square for p, square in zip(parameters, squares, strict=True)}
        columns.append(
            torch.stack([sum(own[id(p)] for p in ps) for ps in oracles.layers_of(model).values()])
        )
    return torch.stack(columns, 1)


def test_a_token_is_a_sample_where_its_sequence_is_repeated_for_it():
    torch.manual_seed(1)
    words, targets = torch.randint(0, 5, (2, 3)), torch.randint(0, 5, (2, 3))
    model = nn.Sequential(
        nn.Embedding(5, 4),
        nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
        nn.Linear(4, 5),
    ).double()
    optimizer = SGD(model.parameters(), lr=0.2)
    logits = model(words).flatten(0, 1)
    own = functional.cross_entropy(logits, targets.flatten(), reduction="none")
    parameters = dict(model.named_parameters())
    expected = torch.zeros(len(ImportanceRecorder(model, optimizer).layers), 6).double()
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))
    for token, loss in enumerate(own / 6):
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            row = layers.index(name.rpartition(".")[0])
            expected[row, token] += (0.2 * gradient).square().sum()

    recorder = ImportanceRecorder(model, optimizer)
    labels = torch.where(torch.eye(3).bool().repeat(2, 1), targets.repeat_interleave(3, 0), -100)
    with recorder.step(range(6), epoch=1):
        logits = model(words.repeat_interleave(3, 0))
        functional.cross_entropy(logits.transpose(1, 2), labels).backward()
        optimizer.step()
    order = [layers.index(layer) for layer in recorder.layers]
    assert oracles.close(recorder.pop_epoch(1, 6), expected[order], relative=1e-9)


@pytest.mark.parametrize("make", [SGD, torch.optim.AdamW], ids=["SGD", "AdamW"])
def test_accumulated_gradients_are_those_of_one_batch(make):
    (inputs, labels), found = batch(samples=7), []
    for parts in ([7], [3, 4]):
        model = oracles.tiny_mlp()
        optimizer = make(model.parameters(), lr=0.2)
        recorder = ImportanceRecorder(model, optimizer)
        for epoch in (1, 2):
            index = torch.arange(7).split(parts)
            with recorder.step(index, epoch=epoch):
                optimizer.zero_grad()
                for rows in index:
                    (own_losses(model, inputs[rows], labels[rows]).sum() / 7).backward()
                optimizer.step()
        found.append(recorder.pop_epoch(2, 7))
    assert oracles.close(found[1], found[0], scale=1e-6 * found[0].amax())


@pytest.mark.parametrize("make", [SGD, torch.optim.AdamW], ids=["SGD", "AdamW"])
def test_passes_may_be_named_as_they_come(make):
    (inputs, labels), found = batch(samples=9), []
    parts = torch.arange(9).split([2, 4, 3])  # more than the buffer for the first has room for
    for early in (True, False):
        model = oracles.tiny_mlp()
        optimizer = make(model.parameters(), lr=0.2)
        recorder = ImportanceRecorder(model, optimizer)
        for epoch in (1, 2):
            with recorder.step(parts if early else parts[0], epoch=epoch) as add_pass:
                optimizer.zero_grad()
                for number, rows in enumerate(parts):
                    if number and not early:
                        add_pass(rows)
                    (own_losses(model, inputs[rows], labels[rows]).sum() / 9).backward()
                optimizer.step()
        found.append(recorder.pop_epoch(2, 9))
    assert (found[0] > 0).all()
    assert torch.equal(found[1], found[0])


@pytest.mark.parametrize(
    ("backward_first", "rows", "error", "words"),
    [
        (False, [2, 3], UnsupportedError, "1 backward passes before one more batch\n +Got 0"),
        (True, [1, 2], ConfigError, "1 repeated"),
        (True, [2, -3], ConfigError, "smallest -3"),
    ],
)
def test_a_pass_that_cannot_be_added_is_refused(backward_first, rows, error, words):
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    recorder = ImportanceRecorder(model, SGD(model.parameters(), lr=0.2))

    def step():
        with recorder.step([0, 1], epoch=1) as add_pass:
            loss = own_losses(model, inputs[:2], labels[:2]).mean()
            if backward_first:
                loss.backward()
            add_pass(rows)

    with pytest.raises(error, match=words):
        step()


@pytest.mark.parametrize("zero", ["before", "in the closure"])
@pytest.mark.parametrize("recorders", [1, 2])
@pytest.mark.parametrize("make", [SGD, torch.optim.AdamW], ids=["SGD", "AdamW"])
def test_a_closure_is_the_same_step(make, recorders, zero):
    inputs, labels = batch()
    found, trained = [], []
    for closure in (True, False):
        model = oracles.tiny_mlp()
        optimizer = make(model.parameters(), lr=0.2)
        own = [ImportanceRecorder(model, optimizer) for _ in range(recorders)]
        for epoch in (1, 2):

            def run(model=model, optimizer=optimizer, inside=zero != "before"):
                if inside:
                    optimizer.zero_grad()
                loss = own_losses(model, inputs, labels).mean()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
                return loss

            with contextlib.ExitStack() as steps:
                for recorder in own:
                    steps.enter_context(recorder.step(range(6), epoch=epoch))
                if zero == "before":
                    optimizer.zero_grad()
                if closure:
                    assert optimizer.step(run).item() > 0  # the loss, as without the recorder
                else:
                    run()
                    optimizer.step()
        found += [recorder.pop_epoch(2, 6) for recorder in own]
        trained.append(flatten_parameters(model))
    assert (found[0] > 0).all()
    assert all(torch.equal(one, found[0]) for one in found)
    assert torch.equal(*trained)


class Twice(SGD):
    """Evaluates its closure twice, as a line search does."""

    @torch.no_grad()
    def step(self, closure):
        for _ in range(2):
            with torch.enable_grad():
                closure()
        for parameter in self.param_groups[0]["params"]:
            parameter -= self.param_groups[0]["lr"] * parameter.grad


def test_a_closure_that_is_evaluated_twice_is_refused(monkeypatch):
    monkeypatch.setitem(
        sampimp.importance.optimizers.DERIVATIVE_RULES,
        Twice,
        sampimp.importance.optimizers.SGDRule(),
    )
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = Twice(model.parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)

    def run():
        optimizer.zero_grad(set_to_none=False)
        own_losses(model, inputs, labels).mean().backward()

    before = flatten_parameters(model)
    with (
        pytest.raises(UnsupportedError, match=r"1 backward passes in the step\n +Got one more"),
        recorder.step(range(6), epoch=1),
    ):
        optimizer.step(closure=run)
    assert torch.equal(flatten_parameters(model), before)


class Averaging(nn.Module):
    """Keeps the mean of its inputs as a buffer, made anew in each pass, and does not use it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        for _ in range(4):
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            x = self.linear(x).tanh()
        return x


def test_a_buffer_that_is_made_anew_is_no_activation():
    """Whatever takes the memory of the old one, some twenty times, depends on the samples."""
    torch.manual_seed(1)
    model, (inputs, labels) = Averaging().double(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)
    for epoch in range(1, 21):
        losses = [own_losses(model, inputs[[i]], labels[[i]]).sum() / 6 for i in range(6)]
        expected = gradients_squared(model, losses, 0.2)
        with recorder.step(range(6), epoch=epoch):
            train_step(model, optimizer, inputs, labels)
        assert oracles.close(recorder.pop_epoch(epoch, 6), expected, relative=1e-9)


def test_a_detached_parameter_is_a_number():
    torch.manual_seed(1)
    model, (inputs, labels) = Detached().double(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    losses = [own_losses(model, inputs[[i]], labels[[i]]).sum() / 6 for i in range(6)]
    expected = gradients_squared(model, losses, 0.2)
    recorder = ImportanceRecorder(model, optimizer)
    with recorder.step(range(6), epoch=1):
        train_step(model, optimizer, inputs, labels)
    assert oracles.close(recorder.pop_epoch(1, 6), expected)


class Detached(nn.Module):
    """Uses its weight with and without its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x) * (x @ self.linear.weight.detach().T)


def accumulated(between, make=SGD):
    """Return beta of two passes of three samples each, with something in between."""
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = make(model.parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)
    with recorder.step([[0, 1, 2], [3, 4, 5]], epoch=1):
        own_losses(model, inputs[:3], labels[:3]).mean().backward()
        between(model, inputs)
        own_losses(model, inputs[3:], labels[3:]).mean().backward()
        optimizer.step()
    return recorder.pop_epoch(1, 6)


def test_a_factor_between_two_passes_is_on_the_first_alone():
    def halve(model, _):
        for parameter in model.parameters():
            parameter.grad.mul_(0.5)

    plain, halved = accumulated(lambda *_: None), accumulated(halve)
    assert oracles.close(halved[:, :3], 0.25 * plain[:, :3])
    assert oracles.close(halved[:, 3:], plain[:, 3:])


@pytest.mark.parametrize(
    "between",
    [
        lambda model, _: nn.utils.clip_grad_value_(model.parameters(), 1e-3),
        lambda model, _: model.zero_grad(set_to_none=False),
        lambda model, _: model[0].weight.grad.add_(1.0),
        lambda model, _: setattr(
            model[0].weight, "grad", torch.ones_like(model[0].weight, requires_grad=False)
        ),
    ],
    ids=["values clipped", "zeroed", "noise", "another"],
)
def test_gradients_changed_between_two_passes_are_refused(between):
    with pytest.raises(UnsupportedError, match=r"changed since|from elsewhere"):
        accumulated(between)


def test_a_batch_that_is_filled_again_before_the_update_is_refused_where_it_is_needed():
    def refill(_, inputs):
        inputs[:3] += 1

    accumulated(refill)  # under SGD its norms are taken already
    with pytest.raises(UnsupportedError, match="changed in place after its backward pass"):
        accumulated(refill, torch.optim.AdamW)


def test_a_rule_that_speaks_of_other_samples_is_refused():
    torch.manual_seed(1)
    model, bags = nn.EmbeddingBag(5, 3, mode="sum"), torch.randint(0, 5, (6, 2))
    optimizer = SGD(model.parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)
    with (
        pytest.raises(UnsupportedError, match=r"3 samples(.|\n)*\(6, 3\)"),
        recorder.step(range(3), epoch=1),
    ):
        model(bags).square().sum().backward()


def test_what_fails_after_the_update_takes_nothing_along():
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)
    with recorder.step(range(6), epoch=1):
        train_step(model, optimizer, inputs, labels)

    def interrupted():
        with recorder.step(range(6), epoch=1):
            train_step(model, optimizer, inputs, labels)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    expected = oracles.importance_by_autograd(model, optimizer, inputs, labels)
    with recorder.step(range(6, 12), epoch=1):
        train_step(model, optimizer, inputs, labels)
    found = recorder.pop_epoch(1, 12)
    assert oracles.close(found[:, 6:], expected)
    assert bool(found.isfinite().all())


def test_a_rate_may_be_an_integer(monkeypatch):
    class Whole(SGD):
        pass

    class WholeRule(sampimp.importance.optimizers.SGDRule):
        def after(self, step):
            return -2

    monkeypatch.setitem(sampimp.importance.optimizers.DERIVATIVE_RULES, Whole, WholeRule())
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    expected = oracles.importance_by_autograd(
        model, SGD(model.parameters(), lr=2.0), inputs, labels
    )
    optimizer = Whole(model.parameters(), lr=2.0)
    recorder = ImportanceRecorder(model, optimizer)
    with recorder.step(range(6), epoch=1):
        train_step(model, optimizer, inputs, labels)
    assert oracles.close(recorder.pop_epoch(1, 6), expected)


SCALED = {
    "norm clipped": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1e-3),
    "last layer clipped": lambda model: nn.utils.clip_grad_norm_(model[2].parameters(), 1e-3),
    "a bias scaled": lambda model: model[2].bias.grad.mul_(0.5),
    "all divided": lambda model: [p.grad.div_(3) for p in model.parameters()],
    "twice": lambda model: [p.grad.mul_(2).mul_(0.3) for p in model.parameters()],
    "one dropped": lambda model: setattr(model[2].weight, "grad", None),
}


@pytest.mark.parametrize("name", SCALED)
def test_a_factor_on_the_gradients_is_part_of_the_update(name):
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    before = {}
    recorder = ImportanceRecorder(model, optimizer)
    with recorder.step(range(6), epoch=4):
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        before = {id(p): p.grad.clone() for p in model.parameters()}
        SCALED[name](model)
        factors = [
            0.0 if p.grad is None else float(p.grad.norm() / before[id(p)].norm())
            for p in model.parameters()
        ]
        state = copy.deepcopy(model)
        optimizer.step()
    expected = torch.zeros(2, 6, dtype=torch.float64)
    for i in range(6):
        loss = functional.cross_entropy(state(inputs[[i]]), labels[[i]]) / 6
        gradients = torch.autograd.grad(loss, list(state.parameters()))
        for n, (factor, gradient) in enumerate(zip(factors, gradients, strict=True)):
            expected[n // 2, i] += (0.2 * factor * gradient).square().sum()
    assert oracles.close(recorder.pop_epoch(4, 6), expected, relative=1e-9)


@pytest.mark.parametrize("overflows", [False, True])
def test_a_grad_scaler_changes_nothing_or_leaves_the_step_out(overflows):
    model, (inputs, labels) = oracles.tiny_mlp().float(), batch(dtype=torch.float32)
    if overflows:
        inputs[0, 0] = torch.inf
    optimizer = SGD(model.parameters(), lr=0.2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    expected = oracles.importance_by_autograd(model, optimizer, inputs, labels)
    before = flatten_parameters(model)
    recorder = ImportanceRecorder(model, optimizer)
    with recorder.step(range(6), epoch=1):
        scaler.scale(own_losses(model, inputs, labels).mean()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        scaler.step(optimizer)
        scaler.update()
    found = recorder.pop_epoch(1, 6)
    if overflows:
        assert torch.equal(flatten_parameters(model), before)
        assert (found[:, 1:] == 0).all()
    else:
        assert oracles.close(found, expected, relative=1e-4)


def test_autocast_is_recorded_to_its_precision():
    model, (inputs, labels) = oracles.tiny_mlp().float(), batch(dtype=torch.float32)
    optimizer = SGD(model.parameters(), lr=0.2)
    expected = oracles.importance_by_autograd(model, optimizer, inputs, labels)
    recorder = ImportanceRecorder(model, optimizer)
    with recorder.step(range(6), epoch=1):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(inputs)
        functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
    found = recorder.pop_epoch(1, 6)
    assert found.dtype == torch.float32
    assert oracles.close(found, expected, relative=0.05, scale=expected.amax())  # 8 bits


def test_a_pass_without_samples_adds_none():
    model = Own(
        lambda m, x: m.out(m.conv(x).mean(2)), conv=nn.Conv1d(4, 5, 2), out=nn.Linear(5, 3)
    ).double()
    recorder = ImportanceRecorder(model, optimizer := SGD(model.parameters(), lr=0.1))
    inputs = torch.empty(0, 4, 6).double()
    with recorder.step([], epoch=1):
        model(inputs).sum().backward()
        optimizer.step()
    assert recorder.pop_epoch(1, 2).isnan().all()


@pytest.mark.parametrize("kind", [SGD, torch.optim.AdamW])
def test_parameters_without_elements_have_no_importance(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of initialising nothing
        model = nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 2)).double()
    recorder = ImportanceRecorder(model, optimizer := kind(model.parameters(), lr=0.1))
    inputs = torch.randn(2, 4, 3).double()
    with recorder.step(range(2), epoch=1):
        (model(inputs) - 1).square().sum().backward()
        optimizer.step()
    first, second = recorder.pop_epoch(1, 2)
    assert first.tolist() == [0, 0]
    assert (second > 0).all()


def test_passes_that_overlap_are_refused():
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    recorder = ImportanceRecorder(model, SGD(model.parameters(), lr=0.1))

    def step():
        with recorder.step([[0, 1, 2], [3, 4, 5]], epoch=1):
            losses = [
                functional.cross_entropy(model(inputs[some]), labels[some])
                for some in (slice(3), slice(3, 6))
            ]
            for loss in losses:
                loss.backward()

    with pytest.raises(UnsupportedError, match="one batch after the other"):
        step()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("fails", [True, False])
def test_a_pass_that_comes_to_no_end_leaves_nothing(kind, fails):
    """Autograd's graph holds what it has saved: no collector sees a cycle through it."""
    freed = []

    class Alarm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.alarm = Freed()
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("no further")

    class Freed:
        def __del__(self):
            freed.append(True)

    model = kind(4, 3, 2, batch_first=True)
    recorder = ImportanceRecorder(model, SGD(model.parameters(), lr=0.1))
    for _ in range(3):
        with contextlib.suppress(RuntimeError, UnsupportedError), recorder.step(range(2), epoch=1):
            output = model(Alarm.apply(torch.rand(2, 5, 4, requires_grad=True)))[0]
            if fails:
                output.sum().backward()
        output = None
    gc.collect()
    assert len(freed) == 3


@pytest.mark.parametrize("kind", [SGD, torch.optim.AdamW])
def test_no_gradient_outlives_its_zero_grad(kind):
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.1)
    recorder = ImportanceRecorder(model, optimizer)
    with recorder.step(range(len(labels)), epoch=1):
        functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    gradients = [weakref.ref(parameter.grad) for parameter in model.parameters()]
    assert all(gradient() is not None for gradient in gradients)
    optimizer.zero_grad()
    assert all(gradient() is None for gradient in gradients)


def test_checkpointed_layers_are_exact():
    from torch.utils.checkpoint import checkpoint

    inner = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
    model = Own(
        lambda m, x: m.out(checkpoint(m.inner, x, use_reentrant=False)),
        inner=inner,
        out=nn.Linear(4, 3),
    ).double()
    optimizer, (inputs, labels) = SGD(model.parameters(), lr=0.2), batch()
    expected = oracles.importance_by_autograd(model, optimizer, inputs, labels)
    assert oracles.close(recorded(model, optimizer, inputs, labels), expected)
    model.function = lambda m, x: m.out(checkpoint(m.inner, x, use_reentrant=True))
    with pytest.raises(UnsupportedError, match=r"cannot be seen(.|\n)*use_reentrant"):
        recorded(model, optimizer, inputs.requires_grad_(), labels)


def test_what_a_function_hides_is_missed_also_where_a_weight_is_seen_elsewhere():
    from torch.utils.checkpoint import checkpoint

    model = Own(
        lambda m, x: m.out(m.inner(checkpoint(m.inner, x, use_reentrant=True))),
        inner=nn.Linear(4, 4),
        out=nn.Linear(4, 3),
    ).double()
    optimizer, (inputs, labels) = SGD(model.parameters(), lr=0.2), batch()
    with pytest.raises(UnsupportedError, match=r"cannot be seen\n +Where layer inner"):
        recorded(model, optimizer, inputs.requires_grad_(), labels)


def test_an_evaluation_in_the_block_is_no_part_of_the_step():
    def function(m, x):
        with torch.no_grad():
            m.out(m.inner(x.flip(0)))
        return m.out(m.inner(x))

    model = Own(function, inner=nn.Linear(4, 4), out=nn.Linear(4, 3)).double()
    optimizer, (inputs, labels) = SGD(model.parameters(), lr=0.2), batch()
    expected = oracles.importance_by_autograd(model, optimizer, inputs, labels)
    assert oracles.close(recorded(model, optimizer, inputs, labels), expected)


def test_gradients_that_are_not_finite_are_recorded_as_such():
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    inputs[2] = torch.nan
    optimizer = SGD(model.parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)
    with recorder.step(range(6), epoch=3):
        train_step(model, optimizer, inputs, labels)
    assert recorder.to_dataset()["importance"].attrs["not_finite_epochs"] == [3]
    found = recorder.pop_epoch(3, 6)
    assert found[:, 2].isnan().all()
    assert found[:, [0, 1, 3, 4, 5]].isfinite().all()
    assert flatten_parameters(model).isnan().any()  # as without the recorder


def test_two_recorders_around_one_step_both_record():
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    expected = oracles.importance_by_autograd(model, optimizer, inputs, labels)
    recorders = [ImportanceRecorder(model, optimizer) for _ in range(2)]
    with recorders[0].step(range(6), epoch=1), recorders[1].step(range(6), epoch=1):
        train_step(model, optimizer, inputs, labels)
    for recorder in recorders:
        assert oracles.close(recorder.pop_epoch(1, 6), expected)


def test_unsorted_packed_sequences_go_to_their_samples():
    lengths = torch.tensor([2, 5, 1, 5, 3, 4])

    def run(m, x):
        packed = nn.utils.rnn.pack_padded_sequence(
            x, lengths[: len(x)] if len(x) > 1 else own_length, True, enforce_sorted=False
        )
        output, (state, _) = m.rnn(packed)
        padded, _ = nn.utils.rnn.pad_packed_sequence(output, True)
        return m.out(padded.sum(1) + state[-1])

    model = Own(run, rnn=nn.LSTM(4, 5, batch_first=True), out=nn.Linear(5, 3)).double()
    inputs, labels = torch.randn(6, 5, 4, dtype=torch.float64), torch.randint(0, 3, (6,))
    losses = []
    for i in range(6):
        own_length = lengths[[i]]
        losses.append(own_losses(model, inputs[[i]], labels[[i]]).sum() / 6)
    expected = gradients_squared(model, losses, 0.2)
    found = recorded(model, SGD(model.parameters(), lr=0.2), inputs, labels)
    assert oracles.close(found, expected)


def test_recorders_of_two_networks_in_one_step_do_not_mix():
    models, (inputs, labels) = [oracles.tiny_mlp(), oracles.tiny_mlp((4, 7, 3), nn.Tanh)], batch()
    optimizers = [SGD(model.parameters(), lr=0.2) for model in models]
    expected = [
        oracles.importance_by_autograd(model, optimizer, inputs, labels)
        for model, optimizer in zip(models, optimizers, strict=True)
    ]
    recorders = [ImportanceRecorder(*pair) for pair in zip(models, optimizers, strict=True)]
    with recorders[0].step(range(6), epoch=1), recorders[1].step(range(6), epoch=1):
        for model, optimizer in zip(models, optimizers, strict=True):
            own_losses(model, inputs, labels).mean().backward()
            optimizer.step()
    for recorder, wanted in zip(recorders, expected, strict=True):
        assert oracles.close(recorder.pop_epoch(1, 6), wanted)


def with_batch_norm(affine=True):
    return nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5, affine=affine), nn.ReLU(), nn.Linear(5, 3)
    ).double()


def test_what_is_below_a_batch_norm_is_not_defined():
    model, (inputs, labels) = with_batch_norm(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    with pytest.raises(UnsupportedError, match=r"(?s)BatchNorm1d.*module 1.*batch_norm"):
        ImportanceRecorder(model, optimizer)
    recorder = ImportanceRecorder(model, optimizer, batch_norm="undefined")
    # Above it each sample's gradient is its own, given what the BatchNorm made of all.
    with torch.no_grad():
        hidden = copy.deepcopy(model)[:3](inputs)
    expected = gradients_squared(
        model[3:], [own_losses(model[3], hidden[[i]], labels[[i]]).sum() / 6 for i in range(6)], 0.2
    )
    with recorder.step(range(6), epoch=1):
        train_step(model, optimizer, inputs, labels)
    assert recorder.to_dataset()["importance"].attrs["not_finite_epochs"] == []
    first, norm, last = recorder.pop_epoch(1, 6)
    assert first.isnan().all()
    assert norm.isnan().all()
    assert oracles.close(last[None], expected)


def test_a_batch_norm_in_eval_mode_mixes_nothing():
    model, (inputs, labels) = with_batch_norm().eval(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    expected = oracles.importance_by_autograd(model, optimizer, inputs, labels)
    assert oracles.close(recorded(model, optimizer, inputs, labels), expected)


# What is refused.


def contrast(m, x):
    z = m.inner(x)
    return z @ z.T


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, weight):
        ctx.save_for_backward(inputs, weight)
        return inputs @ weight

    @staticmethod
    def backward(ctx, delta):
        inputs, weight = ctx.saved_tensors
        return delta @ weight.T, inputs.T @ delta


def shuffled(m, x):
    z = m.inner(x)
    return z + z[torch.randperm(len(z))]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (contrast, "several samples depend"),
        (shuffled, "several samples depend"),
        (lambda m, x: Hidden.apply(m.inner(x), m.weight), "from elsewhere"),
    ],
)
def test_what_is_not_a_function_of_single_samples_is_refused(function, words):
    model = Own(function, inner=nn.Linear(4, 6), weight=nn.Parameter(torch.rand(6, 6))).double()
    optimizer, (inputs, labels) = SGD(model.parameters(), lr=0.2), batch(classes=6)
    before = flatten_parameters(model)
    with pytest.raises(UnsupportedError, match=words):
        recorded(model, optimizer, inputs, labels)
    assert torch.equal(flatten_parameters(model), before)


def test_a_compiled_model_is_refused():
    model = torch.compile(oracles.tiny_mlp())
    with pytest.raises(UnsupportedError, match=r"passed to torch\.compile"):
        ImportanceRecorder(model, SGD(model.parameters(), lr=0.1))


def test_an_unknown_optimizer_is_refused():
    model = oracles.tiny_mlp()
    with pytest.raises(UnsupportedError, match=r"(?s)Adamax.*derivative_rule"):
        ImportanceRecorder(model, torch.optim.Adamax(model.parameters()))


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
    "value clipped": lambda model: nn.utils.clip_grad_value_(model.parameters(), 1e-3),
    "replaced by other tensors": halve_by_new_tensors,
    "noise added": lambda model: model[0].weight.grad.add_(0.1),
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

    before = flatten_parameters(model)
    with pytest.raises(UnsupportedError, match=r"otherwise than by a factor(.|\n)*layer 0"):
        step()
    assert torch.equal(flatten_parameters(model), before)
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


def two_backwards(model, optimizer, inputs, labels):
    loss_of(model, inputs, labels).backward()
    loss_of(model, inputs, labels).backward()
    optimizer.step()


def stale_gradients(model, optimizer, inputs, labels):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    loss_of(model, inputs, labels).backward()
    optimizer.step()


def no_update(model, optimizer, inputs, labels):
    loss_of(model, inputs, labels).backward()


def two_updates(model, optimizer, inputs, labels):
    loss_of(model, inputs, labels).backward()
    optimizer.step()
    optimizer.step()


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (forward_only, "backward"),
        (backward_outside, "backward"),
        (two_backwards, "1 backward passes in the step(.|\n)*index_1"),
        (stale_gradients, "empty before the step's first backward"),
        (no_update, "one optimizer.step.. in the block\n +Got 0\n +Where epoch 7"),
        (two_updates, "one optimizer.step.. in the block\n +Got 2\n +Where epoch 7"),
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


def test_a_batch_of_another_length_is_refused():
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)
    before = flatten_parameters(model)
    with (
        pytest.raises(UnsupportedError, match=r"5 samples(.|\n)*\(6, [345]\)(.|\n)*layer [02]"),
        recorder.step(range(5), epoch=1),
    ):
        train_step(model, optimizer, inputs, labels)
    assert torch.equal(flatten_parameters(model), before)  # refused before the update


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_a_model_without_an_axis_of_samples_is_refused(count):
    """Its four inputs and three outputs are samples in no number."""
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)
    with (
        pytest.raises(UnsupportedError, match=rf"Expected {count} samples on axis 0"),
        recorder.step(range(count), epoch=1),
    ):
        train_step(model, optimizer, inputs[0], labels[0])


def test_an_image_without_an_axis_of_samples_is_refused():
    torch.manual_seed(1)
    model, image = nn.Conv2d(1, 2, 2), torch.randn(1, 4, 4)
    optimizer = SGD(model.parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)
    with (
        pytest.raises(UnsupportedError, match=r"1 samples on axis 0(.|\n)*\(2, 3, 3\)"),
        recorder.step([0], epoch=1),
    ):
        model(image).square().sum().backward()


def test_an_index_beyond_the_training_set_is_refused():
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)
    with recorder.step(range(2, 8), epoch=1):
        train_step(model, optimizer, inputs, labels)
    with pytest.raises(ConfigError, match=r"indices below 7(.|\n)*Got 7"):
        recorder.to_dataset(sample_count=7)
    with pytest.raises(ConfigError, match="indices below 7"):
        recorder.pop_epoch(1, 7)
    assert recorder.pop_epoch(1, 8).shape == (2, 8)  # nothing was lost


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ([0, 1, 2, 3, 4, 4], "1 repeated"),
        ([0, 1, 2, 3, 4, -1], "smallest -1"),
        (torch.arange(6).view(2, 3), r"shape \(2, 3\)"),
        (torch.tensor(3), r"shape \(\)"),
        ([0.0, 1.2, 2.0, 3.0, 4.0, 5.0], "torch.float32"),
        (torch.ones(6, dtype=torch.bool), "torch.bool"),
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


@pytest.mark.parametrize("frozen", [False, True])
def test_snapshot_importance_is_that_of_a_network_in_use(frozen):
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(6)
    model = nn.Sequential(nn.Linear(4, 6), norm, nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3))
    model.double()
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    norm.train(not frozen)
    state = copy.deepcopy(model.state_dict())
    before = [module.training for module in model.modules()]
    inputs, labels = torch.randn(9, 4, dtype=torch.float64), torch.arange(9) % 3
    got = snapshot_importance(model, inputs, labels, rate=0.3, chunk=4)
    assert [module.training for module in model.modules()] == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    twin = copy.deepcopy(model).eval()
    sgd = torch.optim.SGD(twin.parameters(), lr=0.3)
    expected = oracles.importance_by_autograd(twin, sgd, inputs, labels, reduction="sum")
    assert oracles.close(got, expected)


def test_a_batch_norm_without_statistics_has_no_snapshot_importance():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False))
    with pytest.raises(UnsupportedError, match="mixes them"):
        snapshot_importance(model, torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), rate=0.3)
    assert all(module.training for module in model.modules())
