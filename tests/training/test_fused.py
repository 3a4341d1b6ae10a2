"""The fused step equals autograd and the optimizer bit for bit, and the recorder's importance."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from sampimp.errors import UnsupportedError
from sampimp.importance.recorder import ImportanceRecorder
from sampimp.importance.sample_index import sum_by_sample
from sampimp.training.activations import ACTIVATIONS
from sampimp.training.fused import FusedStep, loss_gradient
from sampimp.training.models import build_mlp

RATE, DECAY = 0.1, 1e-2


def make_batches(sizes, inputs, classes, dtype, seed=0):
    """Return batches of these sizes, scaled differently, so that some samples are confident."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.rand(size, inputs, generator=generator, dtype=dtype) * 3**number,
            torch.randint(0, classes, (size,), generator=generator),
        )
        for number, size in enumerate(sizes)
    ]


def train_with_autograd(model, batches, decay=DECAY, optimizer=None):
    """Train in place by a plain loop; return the recorded importance of all samples in order."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=RATE, weight_decay=decay)
    recorder = ImportanceRecorder(model, optimizer)
    start = 0
    for inputs, labels in batches:
        index = torch.arange(start, start + len(labels))
        start += len(labels)
        with recorder.step(index, epoch=1):
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs).double(), labels).backward()
            optimizer.step()
    return recorder.pop_epoch(1, start)


def make_step(model, decay=DECAY, record=True):
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, weight_decay=decay, fused=True)
    return FusedStep(model, optimizer, record=record)


def assert_same_bytes(left, right):
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.detach().view(torch.uint8), b.detach().view(torch.uint8))


def assert_same_importance(actual, expected):
    """Compare up to rounding: the last multiplications are in another order."""
    torch.testing.assert_close(actual, expected, rtol=8 * torch.finfo(actual.dtype).eps, atol=0)


@settings(max_examples=120)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    # At least 2: a matrix of one column is also a row, and BLAS may get the other layout.
    hidden=st.lists(st.integers(2, 33), max_size=4),
    inputs=st.integers(1, 40),
    classes=st.integers(2, 11),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    decay=st.sampled_from([0.0, DECAY]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 9),
)
def test_parameters_and_importance_equal_autograd(
    sizes, hidden, inputs, classes, activation, decay, dtype, seed
):
    expected = build_mlp((inputs,), hidden, classes, seed, activation).to(dtype)
    model = copy.deepcopy(expected)
    batches = make_batches(sizes, inputs, classes, dtype, seed)
    beta = train_with_autograd(expected, batches, decay)
    step = make_step(model, decay)
    for batch in batches:
        step(*batch)
    assert_same_bytes(expected.parameters(), model.parameters())
    assert_same_importance(step.take(), beta)


@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3}),
        (torch.optim.Adam, {"weight_decay": DECAY}),
        (torch.optim.AdamW, {"amsgrad": True}),
    ],
)
def test_other_optimizers_make_the_same_update(optimizer_class, options):
    expected = build_mlp((6,), (8, 5), 3, seed=1).double()
    model = copy.deepcopy(expected)
    batches = make_batches([5, 4, 3], 6, 3, torch.float64)
    optimizers = [
        optimizer_class(network.parameters(), lr=RATE, fused=True, **options)
        for network in (expected, model)
    ]
    beta = train_with_autograd(expected, batches, optimizer=optimizers[0])
    step = FusedStep(model, optimizers[1], record=True)
    for batch in batches:
        step(*batch)
    assert_same_bytes(expected.parameters(), model.parameters())
    # At Adam's first step terms cancel, so that the last bits are rounding errors.
    torch.testing.assert_close(step.take(), beta, rtol=1e-12, atol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_paper_network_is_trained_to_equal_bytes(activation):
    expected = build_mlp((1, 28, 28), (512, 512, 512), 10, 1, activation)
    model = copy.deepcopy(expected)
    batches = [(x.view(-1, 1, 28, 28), y) for x, y in make_batches([100] * 3, 784, 10, None)]
    beta = train_with_autograd(expected, batches, 1e-5)
    step = make_step(model, 1e-5)
    for batch in batches:
        step(*batch)
    assert_same_bytes(expected.parameters(), model.parameters())
    assert_same_importance(step.take(), beta)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_recording_parameters_are_equal_and_take_returns_none(activation):
    batches = make_batches([5, 4], 6, 3, None)
    models = [build_mlp((6,), (8,), 3, 1, activation) for _ in range(2)]
    for model, record in zip(models, (True, False), strict=True):
        step = make_step(model, record=record)
        for batch in batches:
            step(*batch)
    assert_same_bytes(models[0].parameters(), models[1].parameters())
    assert step.take() is None


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_latest_equals_the_importance_that_take_returns(optimizer_class):
    model = build_mlp((6,), (8, 7), 3, seed=1)
    step = FusedStep(model, optimizer_class(model.parameters(), lr=0.1), record=True)
    latest = []
    for batch in make_batches([5, 4], 6, 3, None):
        step(*batch)
        latest.append(step.latest())
    assert_same_bytes([torch.cat(latest, 1)], [step.take()])


def test_take_returns_each_sample_once():
    model = build_mlp((6,), (8,), 3, seed=1)
    step = make_step(model)
    first, second = make_batches([5, 4], 6, 3, None)
    step(*first)
    assert step.take().shape == (2, 5)
    step(*second)
    assert step.take().shape == (2, 4)


@given(
    count=st.integers(1, 8),
    classes=st.integers(2, 6),
    scale=st.sampled_from([1, 30]),
    seed=st.integers(0, 99),
)
def test_loss_gradient_equals_autograd_of_cross_entropy(count, classes, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(count, classes, generator=generator)
    labels = torch.randint(0, classes, (count,), generator=generator)
    leaf = logits.clone().requires_grad_()
    functional.cross_entropy(leaf.double(), labels).backward()
    assert_same_bytes([leaf.grad], [loss_gradient(logits, labels)])


def test_samples_that_no_batch_used_are_nan():
    beta = sum_by_sample(torch.tensor([3, 0]), torch.tensor([[1.0, 2.0]]), 4)
    torch.testing.assert_close(
        beta, torch.tensor([[2.0, torch.nan, torch.nan, 1.0]]), equal_nan=True, rtol=0, atol=0
    )


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(),
        nn.Sequential(nn.Linear(2, 3), nn.ReLU()),
        nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)),
        nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 2)),
        nn.Sequential(nn.Linear(2, 3), nn.GELU(approximate="tanh"), nn.Linear(3, 2)),
        nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 2)),
        nn.Sequential(nn.Conv1d(2, 3, 1), nn.ReLU(), nn.Linear(3, 2)),
    ],
)
def test_other_models_are_refused(model):
    with pytest.raises(UnsupportedError, match="alternating with activations"):
        FusedStep(model, None, record=True)


@pytest.mark.parametrize("part", ["0.weight", "2.bias"])
@pytest.mark.parametrize("frozen", [True, False])
def test_untrained_parameter_is_refused(part, frozen):
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    named = dict(model.named_parameters())
    if frozen:
        named[part].requires_grad_(False)
    trained = [parameter for name, parameter in named.items() if name != part or frozen]
    with pytest.raises(UnsupportedError, match="all parameters of the model"):
        FusedStep(model, torch.optim.SGD(trained, lr=0.1), record=True)
