"""In-step importance equals that of two oracles, for layers used in any way.

One oracle takes each sample's gradient by itself, the other makes the step with and without it.
"""

import copy
import warnings

import oracles
import pytest
import torch
from hypothesis import given, settings
from recording import SGD, FunctionModel, batch, cases, recorded, sample_losses, train_step
from torch import nn
from torch.nn import functional

from sampimp.errors import UnsupportedError
from sampimp.importance.recorder import ImportanceRecorder
from sampimp.training.models import flatten_parameters

pytestmark = pytest.mark.usefixtures("one_thread")


@settings(max_examples=60)
@given(cases())
def test_in_step_importance_is_that_of_each_samples_own_gradient(case):
    model, optimizer, inputs, labels, reduction = case
    expected = oracles.importance_by_autograd(model, optimizer, inputs, labels, reduction)
    got = recorded(model, optimizer, inputs, labels, reduction)
    # A gradient that cancels to 1e-8 of its layer's largest has fewer than ten exact digits, in the
    # recorder and in the oracle.
    assert oracles.close(got, expected, scale=1e-8 * expected.amax(1, keepdim=True))


@settings(max_examples=60)
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


class Keyword(nn.Module):
    """A model that calls its layer with a keyword argument."""

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


def test_a_layer_used_twice_in_a_pass_is_one_sum():
    model = FunctionModel(
        lambda m, x: m.out(torch.relu(m.inner(torch.relu(m.inner(x))))),
        inner=nn.Linear(4, 4),
        out=nn.Linear(4, 3),
    ).double()
    optimizer, (inputs, labels) = SGD(model.parameters(), lr=0.2), batch()
    expected = oracles.importance_by_autograd(model, optimizer, inputs, labels)
    assert oracles.close(recorded(model, optimizer, inputs, labels), expected)


def test_a_layer_that_is_not_called_has_none():
    model = FunctionModel(
        lambda m, x: m.used(x), idle=nn.Linear(4, 3), used=nn.Linear(4, 3)
    ).double()
    optimizer, (inputs, labels) = SGD(model.parameters(), lr=0.2, weight_decay=0.1), batch()
    recorder = ImportanceRecorder(model, optimizer)
    with recorder.step(range(6), epoch=1):
        train_step(model, optimizer, inputs, labels)
    assert recorder.layers == ("used", "idle")
    used, idle = recorder.pop_epoch(1, 6)
    assert (used > 0).all()
    assert (idle == 0).all()


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
        model(3 * inputs[rows])  # the loss does not depend on this pass
        losses = sample_losses(model, inputs[rows], labels[rows])
        return losses + sample_losses(model, 2 * inputs[rows], labels[rows])

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
        by_id = {id(p): square for p, square in zip(parameters, squares, strict=True)}
        columns.append(
            torch.stack([sum(by_id[id(p)] for p in ps) for ps in oracles.layers_of(model).values()])
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
    token_losses = functional.cross_entropy(logits, targets.flatten(), reduction="none")
    parameters = dict(model.named_parameters())
    expected = torch.zeros(len(ImportanceRecorder(model, optimizer).layers), 6).double()
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))
    for token, loss in enumerate(token_losses / 6):
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


class Averaging(nn.Module):
    """A model that replaces a buffer, the mean of its inputs, in each pass, and does not use it."""

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
    """A tensor that reuses the id of the old buffer depends on the samples; tried twenty times."""
    torch.manual_seed(1)
    model, (inputs, labels) = Averaging().double(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)
    for epoch in range(1, 21):
        losses = [sample_losses(model, inputs[[i]], labels[[i]]).sum() / 6 for i in range(6)]
        expected = gradients_squared(model, losses, 0.2)
        with recorder.step(range(6), epoch=epoch):
            train_step(model, optimizer, inputs, labels)
        assert oracles.close(recorder.pop_epoch(epoch, 6), expected, relative=1e-9)


def test_a_detached_parameter_is_a_number():
    torch.manual_seed(1)
    model, (inputs, labels) = Detached().double(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    losses = [sample_losses(model, inputs[[i]], labels[[i]]).sum() / 6 for i in range(6)]
    expected = gradients_squared(model, losses, 0.2)
    recorder = ImportanceRecorder(model, optimizer)
    with recorder.step(range(6), epoch=1):
        train_step(model, optimizer, inputs, labels)
    assert oracles.close(recorder.pop_epoch(1, 6), expected)


class Detached(nn.Module):
    """A model that uses its weight with and without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x) * (x @ self.linear.weight.detach().T)


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
    beta = recorder.pop_epoch(1, 6)
    assert beta.dtype == torch.float32
    assert oracles.close(beta, expected, relative=0.05, scale=expected.amax())  # 8 bits


@pytest.mark.parametrize("kind", [SGD, torch.optim.AdamW])
def test_parameters_without_elements_have_no_importance(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about the initialisation of no elements
        model = nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 2)).double()
    recorder = ImportanceRecorder(model, optimizer := kind(model.parameters(), lr=0.1))
    inputs = torch.randn(2, 4, 3).double()
    with recorder.step(range(2), epoch=1):
        (model(inputs) - 1).square().sum().backward()
        optimizer.step()
    first, second = recorder.pop_epoch(1, 2)
    assert first.tolist() == [0, 0]
    assert (second > 0).all()


def test_checkpointed_layers_are_exact():
    from torch.utils.checkpoint import checkpoint

    inner = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
    model = FunctionModel(
        lambda m, x: m.out(checkpoint(m.inner, x, use_reentrant=False)),
        inner=inner,
        out=nn.Linear(4, 3),
    ).double()
    optimizer, (inputs, labels) = SGD(model.parameters(), lr=0.2), batch()
    expected = oracles.importance_by_autograd(model, optimizer, inputs, labels)
    assert oracles.close(recorded(model, optimizer, inputs, labels), expected)
    model.function = lambda m, x: m.out(checkpoint(m.inner, x, use_reentrant=True))
    with pytest.raises(UnsupportedError, match=r"could not be recorded(.|\n)*use_reentrant"):
        recorded(model, optimizer, inputs.requires_grad_(), labels)


def test_a_hidden_use_of_a_weight_is_refused_also_if_another_use_is_recorded():
    from torch.utils.checkpoint import checkpoint

    model = FunctionModel(
        lambda m, x: m.out(m.inner(checkpoint(m.inner, x, use_reentrant=True))),
        inner=nn.Linear(4, 4),
        out=nn.Linear(4, 3),
    ).double()
    optimizer, (inputs, labels) = SGD(model.parameters(), lr=0.2), batch()
    with pytest.raises(UnsupportedError, match=r"could not be recorded\n +Where layer inner"):
        recorded(model, optimizer, inputs.requires_grad_(), labels)


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

    model = FunctionModel(run, rnn=nn.LSTM(4, 5, batch_first=True), out=nn.Linear(5, 3)).double()
    inputs, labels = torch.randn(6, 5, 4, dtype=torch.float64), torch.randint(0, 3, (6,))
    losses = []
    for i in range(6):
        own_length = lengths[[i]]
        losses.append(sample_losses(model, inputs[[i]], labels[[i]]).sum() / 6)
    expected = gradients_squared(model, losses, 0.2)
    beta = recorded(model, SGD(model.parameters(), lr=0.2), inputs, labels)
    assert oracles.close(beta, expected)


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
            sample_losses(model, inputs, labels).mean().backward()
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
    # Above the BatchNorm, each sample's gradient is its own, for fixed outputs of the BatchNorm.
    with torch.no_grad():
        hidden = copy.deepcopy(model)[:3](inputs)
    expected = gradients_squared(
        model[3:],
        [sample_losses(model[3], hidden[[i]], labels[[i]]).sum() / 6 for i in range(6)],
        0.2,
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
