"""Influence at a fixed point against dense matrices in float64."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from sampimp.influence.fixed_point import fixed_point_influence, lanczos
from sampimp.influence.linear_stack import LinearStackStep
from sampimp.training.activations import ACTIVATIONS

SAMPLES, DAMPINGS, DECAY = 11, [1e-2, 1.0], 0.05


@pytest.fixture
def case():
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5).double(), nn.Linear(5, 3).double()]
    model = nn.Sequential(layers[0], nn.GELU(), layers[1])
    inputs = torch.randn(SAMPLES, 4, dtype=torch.float64)
    labels = torch.randint(0, 3, (SAMPLES,))
    return layers, model, inputs, labels


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_solutions_are_those_of_the_dense_matrix(case, curvature):
    layers, model, inputs, labels = case
    names = [name for name, _ in model.named_parameters()]
    values = flat(model.parameters()).detach()
    shapes = [parameter.shape for parameter in model.parameters()]

    def logits(vector):
        parts = vector.split([shape.numel() for shape in shapes])
        named = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return torch.func.functional_call(model, named, (inputs,))

    def loss(vector):
        return functional.cross_entropy(logits(vector), labels)

    if curvature == "hessian":
        matrix = torch.autograd.functional.hessian(loss, values)
    else:
        jacobian = torch.autograd.functional.jacobian(logits, values)
        p = logits(values).softmax(1)
        middle = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / SAMPLES
        matrix = torch.einsum("nap,nab,nbq->pq", jacobian, middle, jacobian)
    target = torch.randn(len(values), dtype=torch.float64)
    losses = functional.cross_entropy(model(inputs), labels, reduction="none") / SAMPLES
    gradients = torch.stack(
        [flat(torch.autograd.grad(one, model.parameters(), retain_graph=True)) for one in losses]
    )
    eye = torch.eye(len(values), dtype=torch.float64)
    expected = [
        -gradients @ torch.linalg.solve(matrix + (DECAY + damping) * eye, target)
        for damping in DAMPINGS
    ]

    def parts():
        for rows in torch.arange(SAMPLES).split(4):
            yield LinearStackStep(
                layers, [ACTIVATIONS["gelu"]], inputs[rows], labels[rows], SAMPLES
            )

    split = target.split([shape.numel() for shape in shapes])
    actual = fixed_point_influence(
        parts,
        [part.view(shape) for part, shape in zip(split, shapes, strict=True)],
        DAMPINGS,
        curvature=curvature,
        weight_decay=DECAY,
        steps=len(values),
    )
    np.testing.assert_allclose(actual, torch.stack(expected).numpy(), rtol=1e-6, atol=1e-10)


def test_krylov_space_ends_where_it_is_exhausted():
    matrix = torch.diag(torch.tensor([1.0, 1.0, 3.0, 3.0], dtype=torch.float64))
    basis, small = lanczos(lambda vector: matrix @ vector, torch.ones(4).double(), 4)
    assert basis.shape == (2, 4)
    np.testing.assert_allclose(np.linalg.eigvalsh(small), [1, 3])
