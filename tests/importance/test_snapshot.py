"""Snapshot importance equals that of each sample's own gradient, and changes no model."""

import copy

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recording import SGD, batch, cases, freeze, hooks, recorded
from torch import nn

from sampimp.errors import UnsupportedError
from sampimp.importance.snapshot import snapshot_importance
from sampimp.training.models import flatten_parameters

pytestmark = pytest.mark.usefixtures("one_thread")


@settings(max_examples=30)
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
def test_snapshot_importance_is_that_of_a_network_in_evaluation_mode(frozen):
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
    with pytest.raises(UnsupportedError, match="mixes samples"):
        snapshot_importance(model, torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), rate=0.3)
    assert all(module.training for module in model.modules())
