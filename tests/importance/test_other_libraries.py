"""Squared norms of per-sample gradients against BackPACK and Opacus, for layers that they know."""

import copy

import networks
import oracles
import pytest
import torch
from rule_checks import assert_equal
from torch import nn
from torch.nn import functional

from sampimp.importance.recorder import ImportanceRecorder

pytestmark = pytest.mark.usefixtures("double_on_one_thread")

OTHERS = {
    "linear": lambda: (networks.stack(), torch.randn(5, 4)),
    "conv": lambda: (
        nn.Sequential(
            nn.Conv2d(2, 4, 2, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.Flatten()
        ),
        torch.randn(5, 2, 4, 5),
    ),
    "sequence": lambda: (
        nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3), nn.Flatten()),
        torch.randn(5, 3, 4),
    ),
    "embedding": lambda: (
        nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 3), nn.Flatten()),
        networks.tokens(5, 7),
    ),
    "group_norm": lambda: (
        nn.Sequential(nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4), nn.Flatten()),
        torch.randn(5, 2, 4),
    ),
}


def compared(name):
    """Return a model, inputs, labels, and {layer: squared norms of gradients} by the recorder."""
    torch.manual_seed(1)
    model, inputs = OTHERS[name]()
    labels = torch.arange(5) % 3
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=1)
    recorder = ImportanceRecorder(twin, optimizer)
    with recorder.step(range(5), epoch=1):
        functional.cross_entropy(twin(inputs), labels).backward()
        optimizer.step()
    got = dict(zip(recorder.layers, recorder.pop_epoch(1, 5), strict=True))
    return model, inputs, labels, got


def by_layer(squares):
    layers = {}
    for name, square in squares.items():
        layer = oracles.layer_of(name)
        layers[layer] = layers.get(layer, 0) + square
    return layers


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_backpack_computes_the_same_norms(name):
    backpack = pytest.importorskip("backpack")
    model, inputs, labels, got = compared(name)
    loss = backpack.extend(nn.CrossEntropyLoss())(backpack.extend(model)(inputs), labels)
    with backpack.backpack(backpack.extensions.BatchL2Grad()):
        loss.backward()
    assert_equal(
        got, by_layer({key: parameter.batch_l2 for key, parameter in model.named_parameters()})
    )


@pytest.mark.parametrize("name", OTHERS)
def test_opacus_computes_the_same_norms(name):
    grad_sample = pytest.importorskip("opacus.grad_sample")
    model, inputs, labels, got = compared(name)
    wrapped = grad_sample.GradSampleModule(model, loss_reduction="sum")  # unscaled
    functional.cross_entropy(wrapped(inputs), labels).backward()
    named = model.named_parameters()
    squares = {key: parameter.grad_sample.square().flatten(1).sum(1) for key, parameter in named}
    assert_equal(got, by_layer(squares))
