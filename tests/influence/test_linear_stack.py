"""Written-out derivatives of a stack of linear layers against autograd in float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from sampimp.errors import UnsupportedError
from sampimp.influence.linear_stack import LinearStackStep
from sampimp.training.activations import ACTIVATIONS


@pytest.fixture(params=["relu", "gelu", "softplus"])
def stack(request):
    torch.manual_seed(0)
    activation = ACTIVATIONS[request.param]
    layers = [layer.double() for layer in (nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 3))]
    model = nn.Sequential(layers[0], activation.make(), layers[1], activation.make(), layers[2])
    inputs, labels = torch.randn(8, 5, dtype=torch.float64), torch.randint(0, 3, (8,))
    step = LinearStackStep(layers, [activation] * 2, inputs, labels, 10)
    return model, inputs, labels, step


def losses(model, inputs, labels):
    return functional.cross_entropy(model(inputs), labels, reduction="none") / 10


def random_directions(model, count):
    return [torch.randn(count, *p.shape, dtype=torch.float64) for p in model.parameters()]


def test_gradients_and_hessian_products(stack):
    model, inputs, labels, step = stack
    parameters = list(model.parameters())
    loss = losses(model, inputs, labels).sum()
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    torch.testing.assert_close(step.gradients(), [gradient.detach() for gradient in gradients])
    directions = random_directions(model, 4)
    out = [torch.zeros_like(direction) for direction in directions]
    step.products(directions, out)
    for number in range(4):
        along = sum((g * d[number]).sum() for g, d in zip(gradients, directions, strict=True))
        expected = torch.autograd.grad(along, parameters, retain_graph=True)
        torch.testing.assert_close([values[number] for values in out], list(expected))


def test_inner_products_by_layer_and_sample(stack):
    model, inputs, labels, step = stack
    directions = random_directions(model, 2)
    actual = step.products(directions, [torch.zeros_like(direction) for direction in directions])
    for sample, loss in enumerate(losses(model, inputs, labels)):
        gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        for layer in range(3):
            places = (2 * layer, 2 * layer + 1)
            expected = sum((directions[p] * gradients[p]).flatten(1).sum(1) for p in places)
            torch.testing.assert_close(actual[:, layer, sample], expected)
        torch.testing.assert_close(
            [values[0] for values in step.sample_gradients([sample])], list(gradients)
        )


def test_gauss_newton_products(stack):
    model, inputs, _labels, step = stack
    names = [name for name, _ in model.named_parameters()]
    detached = [parameter.detach() for parameter in model.parameters()]

    def logits(*values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), inputs)

    jacobians = torch.autograd.functional.jacobian(logits, tuple(detached))
    jacobian = torch.cat([part.flatten(2) for part in jacobians], 2)  # (N, C, P)
    p = logits(*detached).softmax(1)
    curvature = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / 10
    directions = random_directions(model, 3)
    flat = torch.cat([direction.flatten(1) for direction in directions], 1)
    expected = torch.einsum("nap,nab,nbq,kq->kp", jacobian, curvature, jacobian, flat)
    out = [torch.zeros_like(direction) for direction in directions]
    step.products(directions, out, curvature="gauss-newton")
    torch.testing.assert_close(torch.cat([values.flatten(1) for values in out], 1), expected)


def test_bump_replaces_the_second_derivative_of_a_relu():
    torch.manual_seed(0)
    width, layers = 0.4, [nn.Linear(3, 40).double(), nn.Linear(40, 2).double()]
    inputs, labels = torch.randn(6, 3, dtype=torch.float64), torch.randint(0, 2, (6,))
    relu = [ACTIVATIONS["relu"]]
    directions = [
        torch.randn(1, *parameter.shape, dtype=torch.float64)
        for layer in layers
        for parameter in (layer.weight, layer.bias)
    ]
    products = []
    for gate_width in (0.0, width):
        step = LinearStackStep(layers, relu, inputs, labels, 6, gate_width)
        out = [torch.zeros_like(direction) for direction in directions]
        step.products(directions, out)
        products.append(out)
    hidden = layers[0](inputs)
    tangent = (inputs @ directions[0][0].T) + directions[1][0]
    probabilities = layers[1](hidden.relu()).softmax(1)
    sums = (probabilities - functional.one_hot(labels, 2)) / 6 @ layers[1].weight
    bump = (1 - hidden.abs() / width).clamp_min(0) / width
    expected = (bump * sums * tangent).T @ inputs
    torch.testing.assert_close((products[1][0] - products[0][0])[0], expected.detach())


def test_layers_that_do_not_add_up_are_an_error(stack):
    model, _, _, step = stack
    step._deltas[0] = step._deltas[0] * 1.01
    directions = random_directions(model, 2)
    with pytest.raises(UnsupportedError, match="add up"):
        step.products(directions, [torch.zeros_like(direction) for direction in directions])
