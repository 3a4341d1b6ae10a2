"""The networks of a study: layout, initialisation, and parameters as one flat vector."""

import math

import pytest
import torch

from sampimp.config import MODELS
from sampimp.errors import ConfigError
from sampimp.importance.snapshot import forward_layers
from sampimp.training.models import (
    build_mlp,
    build_model,
    flatten_parameters,
    load_parameters,
    parameter_layers,
)


def test_layers_and_sizes_of_the_paper_network():
    model = build_mlp((1, 28, 28), (512, 512, 512), 10, seed=1)
    assert parameter_layers(model) == [
        ("L1", 784 * 512),
        ("L1", 512),
        ("L2", 512 * 512),
        ("L2", 512),
        ("L3", 512 * 512),
        ("L3", 512),
        ("Out", 512 * 10),
        ("Out", 10),
    ]
    assert model(torch.zeros(3, 1, 28, 28)).tolist() == [[0.0] * 10] * 3  # the biases are zero


def test_weights_have_the_range_and_variance_of_glorot():
    model = build_mlp((784,), (512, 300), 10, seed=3)
    for name, fan_in, fan_out in (("L1", 784, 512), ("L2", 512, 300), ("Out", 300, 10)):
        weight, bound = getattr(model, name).weight.detach(), math.sqrt(6 / (fan_in + fan_out))
        assert weight.shape == (fan_out, fan_in)
        assert 0.99 * bound < weight.abs().max() <= bound
        # A uniform variable has variance bound^2 / 3; at n values its estimate has a relative
        # deviation of sqrt(0.8 / n), at most 0.017 here.
        assert weight.var().item() == pytest.approx(bound**2 / 3, rel=0.08)
        assert not getattr(model, name).bias.any()


def test_initialisation_depends_only_on_the_seed():
    torch.manual_seed(1)
    first = flatten_parameters(build_mlp((3,), (4,), 2, seed=5))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = flatten_parameters(build_mlp((3,), (4,), 2, seed=5))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first, flatten_parameters(build_mlp((3,), (4,), 2, seed=6)))


def test_flat_parameters_are_the_tensors_in_model_order():
    model = build_mlp((2,), (3,), 2, seed=0)
    flat = flatten_parameters(model)
    # 2 x 3 weights, 3 biases, 3 x 2 weights, 2 biases
    assert torch.equal(flat[:6].view(3, 2), model.L1.weight)
    assert torch.equal(flat[9:15].view(2, 3), model.Out.weight)
    assert [name for name, size in parameter_layers(model) for _ in range(size)] == (
        ["L1"] * 9 + ["Out"] * 8
    )
    values = torch.arange(17.0)
    load_parameters(model, values)
    assert torch.equal(flatten_parameters(model), values)
    assert model.L1.bias.tolist() == [6.0, 7.0, 8.0]
    assert model.Out.bias.tolist() == [15.0, 16.0]


def test_mlp_without_hidden_layers_is_linear():
    model = build_mlp((2, 2), (), 3, seed=0)
    inputs = torch.rand(5, 2, 2)
    torch.testing.assert_close(model(inputs), inputs.reshape(5, 4) @ model.Out.weight.T)


def linear_network(input_shape, class_count):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(input_shape[-1], class_count))


@pytest.mark.parametrize("name", MODELS)
def test_network_mixes_no_samples_and_is_initialised_by_its_seed(name):
    shape = (3, 8, 8)
    model = build_model(name, shape, (6,), 5, seed=3).double()
    images = torch.rand(4, *shape, dtype=torch.float64)
    logits = model(images)
    assert logits.shape == (4, 5)
    for i in range(4):
        torch.testing.assert_close(model(images[[i]]), logits[[i]])
    torch.manual_seed(1)
    again = build_model(name, shape, (6,), 5, seed=3).double()
    assert torch.equal(flatten_parameters(again), flatten_parameters(model))
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)  # the global generator is unchanged
    other = build_model(name, shape, (6,), 5, seed=4).double()
    assert not torch.equal(flatten_parameters(other), flatten_parameters(model))


def test_resnet18_has_the_usual_number_of_parameters():
    model = build_model("resnet18", (3, 32, 32), (), 10, seed=1)
    assert sum(size for _, size in parameter_layers(model)) == 11_173_962  # as with BatchNorm


def test_layers_are_in_forward_order():
    model = build_model("transformer", (1, 8, 8), (), 10, seed=1)
    order = forward_layers(model, torch.zeros(2, 1, 8, 8))
    assert order[0] == "embedding"
    assert order[-1] == "Out"
    assert order.index("block1.norm1") < order.index("block1.self_attn")
    assert set(order) == {name for name, _ in parameter_layers(model)}


def test_user_network_is_built_by_its_function():
    model = build_model(f"{__name__}:linear_network", (7,), (), 3, seed=1)
    assert parameter_layers(model) == [("1", 21), ("1", 3)]


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("cnnn", (1, 8, 8), "did you mean cnn"),
        ("no.such.module:f", (1, 8, 8), "No module named(.|\n)*PYTHONPATH"),
        ("math:no_such", (1, 8, 8), "no_such"),
        ("cnn", (64,), r"channels, rows, columns(.|\n)*\(64,\)(.|\n)*mlp"),
    ],
)
def test_unknown_network_is_refused(name, shape, words):
    with pytest.raises(ConfigError, match=words):
        build_model(name, shape, (), 3, seed=1)


def test_function_that_returns_no_network_is_refused():
    with pytest.raises(ConfigError, match="a function that returns float") as caught:
        build_model("math:dist", (1.0,), (), (3.0,), seed=1)
    assert "option --model math:dist" in str(caught.value)
