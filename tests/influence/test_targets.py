"""Targets: their names, values and gradients."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from sampimp.data import Dataset
from sampimp.errors import ConfigError
from sampimp.influence.targets import FunctionTarget, make_targets


@pytest.fixture
def data():
    generator = np.random.default_rng(0)
    labels = np.array([0, 1, 2, 2, 1, 0, 2])
    inputs = generator.normal(size=(7, 4)).astype(np.float32)
    return Dataset(inputs[:4], labels[:4], inputs, labels)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Dropout(), nn.GELU(), nn.Linear(5, 3)).double()


def test_values_and_gradients_are_those_of_the_formulas(data, model):
    inputs, labels = torch.from_numpy(data.test_inputs).double(), torch.from_numpy(data.test_labels)
    model.eval()
    logits = model(inputs)
    losses = functional.cross_entropy(logits, labels, reduction="none")
    others = logits.detach().clone()
    others[torch.arange(7), labels] = -torch.inf
    expected = {
        "mean": losses.mean(),
        "mean-error": (1 - logits.softmax(1)[torch.arange(7), labels]).mean(),
        "class:2": losses[labels == 2].mean(),
        "sample:6": losses[6],
        "margin:3": logits[3, 2] - logits[3, others[3].argmax()],
        "train:1": losses[1],
    }
    model.train()
    for target in make_targets(list(expected), data, ["0", "3"]):
        value = expected[target.name]
        assert target.value(model) == pytest.approx(value.item(), rel=1e-12)
        gradients = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
        torch.testing.assert_close(target.gradient(model), list(gradients))
    assert model.training


def test_names_expand(data):
    targets = make_targets(["class", "sample:1..3", "probe:2", "probe:1@3"], data, ["0", "3"])
    assert [target.name for target in targets] == [
        *("class:0", "class:1", "class:2", "sample:1", "sample:2", "sample:3"),
        *("probe:0", "probe:1", "probe:0@3"),
    ]


def test_probes_are_standard_normal_and_repeatable(data):
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 50))
    first, second, of_layer = make_targets(["probe:2", "probe:1@1"], data, ["0", "1"])
    directions = torch.cat([part.flatten() for part in first.gradient(model)])
    assert abs(float(directions.mean())) < 0.05
    assert float(directions.std()) == pytest.approx(1, abs=0.05)
    again = make_targets(["probe:1"], data, ["0", "1"])[0].gradient(model)
    torch.testing.assert_close(again, first.gradient(model), rtol=0, atol=0)
    assert not torch.equal(second.gradient(model)[0], first.gradient(model)[0])
    parts = of_layer.gradient(model)
    assert not parts[0].any()
    assert not parts[1].any()
    assert parts[2].all()
    parameters = torch.cat([parameter.flatten() for parameter in model.parameters()])
    expected = float(directions.double() @ parameters.detach().double())
    assert first.value(model) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("meen", "mean, class"),
        ("sample:7", "numbers from 0 to 6"),
        ("sample:5..9", "numbers from 0 to 6"),
        ("sample:3..1", "numbers from 0 to 6"),
        ("sample:", "a number"),
        ("train:4", "numbers from 0 to 3"),
        ("class:3", "numbers from 0 to 2"),
        ("probe:0", "number of probes"),
        ("probe:4@L9", "a layer among 0, 3"),
        ("nowhere.at_all:target", "package.module:function"),
    ],
)
def test_targets_that_do_not_exist(data, spec, message):
    with pytest.raises(ConfigError, match=message):
        make_targets([spec], data, ["0", "3"])


def test_targets_named_twice(data):
    with pytest.raises(ConfigError, match="sample:1 twice"):
        make_targets(["sample:0..2", "sample:1"], data, ["0", "3"])
    with pytest.raises(ConfigError, match="one or more targets"):
        make_targets([], data, ["0", "3"])


@pytest.mark.parametrize("value", [1.5, torch.zeros(2, requires_grad=True), torch.tensor(1.0)])
def test_function_that_is_no_target(model, value):
    target = FunctionTarget("mine", lambda _: value)
    with pytest.raises(ConfigError, match="mine"):
        target.gradient(model)
