"""Recording leaves training as it is, and leaves nothing behind after a step."""

import contextlib
import copy
import gc
import pickle
import weakref

import numpy as np
import oracles
import pytest
import torch
from recording import SGD, FunctionModel, batch, hooks, recorded, train_step
from torch import nn
from torch.nn import functional

from sampimp.errors import UnsupportedError
from sampimp.importance.recorder import ImportanceRecorder
from sampimp.training.models import build_mlp, flatten_parameters

pytestmark = pytest.mark.usefixtures("one_thread")


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
                functional.cross_entropy(logits, labels).backward()  # the graph is freed already
            optimizer.step(
                1 if fails_in == "update" else None
            )  # 1 is not callable, so the update fails

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
    assert oracles.close(recorder.pop_epoch(1, 6), expected)  # the failed step is not in the sum


def test_a_step_that_fails_after_its_update_records_nothing():
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
    beta = recorder.pop_epoch(1, 12)
    assert oracles.close(beta[:, 6:], expected)
    assert bool(beta.isfinite().all())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("fails", [True, False])
def test_an_interrupted_backward_pass_keeps_no_references(kind, fails):
    """A reference cycle through autograd's graph would never be collected."""
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


def test_an_evaluation_in_the_block_is_no_part_of_the_step():
    def function(m, x):
        with torch.no_grad():
            m.out(m.inner(x.flip(0)))
        return m.out(m.inner(x))

    model = FunctionModel(function, inner=nn.Linear(4, 4), out=nn.Linear(4, 3)).double()
    optimizer, (inputs, labels) = SGD(model.parameters(), lr=0.2), batch()
    expected = oracles.importance_by_autograd(model, optimizer, inputs, labels)
    assert oracles.close(recorded(model, optimizer, inputs, labels), expected)
