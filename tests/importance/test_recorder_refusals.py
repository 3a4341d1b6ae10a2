"""Models, losses, gradients and blocks that are refused, because no exact record is possible."""

import oracles
import pytest
import torch
from recording import SGD, FunctionModel, batch, hooks, loss_of, recorded, train_step
from torch import nn
from torch.nn import functional

from sampimp.errors import ConfigError, UnsupportedError
from sampimp.importance.recorder import ImportanceRecorder
from sampimp.training.models import flatten_parameters

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_rule_with_another_number_of_samples_is_refused():
    torch.manual_seed(1)
    model, bags = nn.EmbeddingBag(5, 3, mode="sum"), torch.randint(0, 5, (6, 2))
    optimizer = SGD(model.parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)
    with (
        pytest.raises(UnsupportedError, match=r"3 samples(.|\n)*\(6, 3\)"),
        recorder.step(range(3), epoch=1),
    ):
        model(bags).square().sum().backward()


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
        (contrast, "row depends on several samples"),
        (shuffled, "row depends on several samples"),
        (lambda m, x: Hidden.apply(m.inner(x), m.weight), "from elsewhere"),
    ],
)
def test_functions_that_are_not_of_single_samples_are_refused(function, words):
    model = FunctionModel(
        function, inner=nn.Linear(4, 6), weight=nn.Parameter(torch.rand(6, 6))
    ).double()
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


def forward_only(model, optimizer, inputs, labels):
    loss_of(model, inputs, labels)
    optimizer.step()


def backward_outside(model, optimizer, inputs, labels):
    optimizer.step()  # with the gradients of the previous step


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
    assert recorder.to_dataset()["epoch"].values.tolist() == [
        6
    ]  # the refused steps are not recorded


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
    """A model whose four inputs and three outputs have no axis of samples."""
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
