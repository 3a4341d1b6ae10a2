"""The activations: ATen's operations equal the modules, the derivatives equal double autograd."""

import typing

import oracles
import pytest
import torch
from torch import nn
from torch.nn import functional

from sampimp.config import MODELS, RELU_MODELS, TrainingConfig
from sampimp.errors import ConfigError
from sampimp.importance.recorder import ImportanceRecorder
from sampimp.training.activations import ACTIVATIONS, activation_of
from sampimp.training.models import build_model, flatten_parameters

every_activation = pytest.mark.parametrize("name", ACTIVATIONS)


def points():
    """Return values from saturation to saturation, on both sides of the softplus's threshold."""
    generator = torch.Generator().manual_seed(0)
    return torch.cat([3 * torch.randn(2000, generator=generator), torch.linspace(-30, 30, 97)])


def test_the_configuration_names_them_all():
    assert typing.get_args(typing.get_type_hints(TrainingConfig)["activation"]) == tuple(
        ACTIVATIONS
    )


@every_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("in_place", [True, False])
def test_forward_and_backward_are_those_of_the_module(name, dtype, in_place):
    activation, z = ACTIVATIONS[name], points().to(dtype).requires_grad_()
    delta = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    expected = activation.make()(z)
    (gradient,) = torch.autograd.grad(expected, z, delta)
    with torch.no_grad():
        before = z.clone()
        out = before if in_place else torch.empty_like(z)
        output = activation.forward(before, out=out)
        assert output is out
        backward = activation.backward(delta, output if activation.reads_output else z.detach())
    assert torch.equal(output, expected)
    assert torch.equal(backward, gradient)


@every_activation
def test_derivatives_are_those_of_double_autograd(name):
    activation, z = ACTIVATIONS[name], points().double().requires_grad_()
    (slope,) = torch.autograd.grad(activation.make()(z).sum(), z, create_graph=True)
    torch.testing.assert_close(activation.slope(z.detach()), slope.detach(), rtol=0, atol=1e-14)
    curvature = torch.zeros_like(z)
    if slope.requires_grad and name != "relu":
        (curvature,) = torch.autograd.grad(slope.sum(), z)
    torch.testing.assert_close(activation.curvature(z.detach()), curvature, rtol=0, atol=1e-13)


@every_activation
def test_a_module_is_recognised_with_its_settings(name):
    assert activation_of(ACTIVATIONS[name].make()) is ACTIVATIONS[name]


def test_a_module_with_other_settings_is_not_recognised():
    assert activation_of(nn.ReLU(inplace=True)) is ACTIVATIONS["relu"]
    for module in (nn.Softplus(), nn.GELU(approximate="tanh"), nn.Sigmoid(), nn.Linear(2, 2)):
        assert activation_of(module) is None


@every_activation
@pytest.mark.parametrize("model", RELU_MODELS)
def test_networks_have_the_activation_instead_of_the_relu(model, name):
    network, relu_network = (
        build_model(model, (1, 8, 8), (6, 5), 3, seed=1, activation=activation).double()
        for activation in (name, "relu")
    )
    assert torch.equal(flatten_parameters(network), flatten_parameters(relu_network))
    activations = [
        module for module in network.modules() if activation_of(module) is ACTIVATIONS[name]
    ]
    # resnet18: one module in each of 8 blocks, which calls it twice.
    assert len(activations) == {"mlp": 2, "cnn": 3, "resnet18": 9, "transformer": 2}[model]
    if name != "relu":
        assert not any(isinstance(module, nn.ReLU) for module in network.modules())
        images = torch.rand(4, 1, 8, 8, dtype=torch.float64)
        logits = network(images)
        assert not torch.allclose(logits, relu_network(images))
        network.eval()
        with torch.inference_mode():  # where PyTorch may take a fast path of its own
            torch.testing.assert_close(network(images), logits.detach())


@pytest.mark.parametrize("model", [*sorted({*MODELS} - {*RELU_MODELS}), "nets:make"])
def test_other_networks_accept_no_activation(model):
    assert TrainingConfig(model=model).activation == "relu"
    with pytest.raises(ConfigError, match=r"relu for a model other than mlp(.|\n)*--activation"):
        TrainingConfig(model=model, activation="gelu")


@every_activation
def test_importance_of_the_cnn_is_that_of_single_samples(name):
    model = build_model("cnn", (1, 8, 8), (), 3, seed=1, activation=name).double()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 1, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 2, 1, 0])
    losses = functional.cross_entropy(model(images), labels, reduction="none") / 4
    expected: dict[str, torch.Tensor] = {}  # by layer: 0.1² times the squared gradients
    for parameter, rows in oracles.gradients_by_loss(model, losses).items():
        layer = oracles.layer_of(parameter)
        expected[layer] = expected.get(layer, 0) + (0.1 * rows).square().flatten(1).sum(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = ImportanceRecorder(model, optimizer)
    with recorder.step(torch.arange(4), epoch=1):
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    beta = recorder.pop_epoch(1, 4)
    torch.testing.assert_close(beta, torch.stack([*expected.values()]), rtol=1e-12, atol=0)
