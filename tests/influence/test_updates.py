"""Linearized updates against central differences of PyTorch's own optimizers."""

from copy import deepcopy

import pytest
import torch

from sampimp.influence.updates import LINEARIZED_UPDATES, PARAMETER, UpdatePoint

SGD, ADAM, RMSPROP = torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop
UPDATES = [
    (SGD, {"lr": 0.1}),
    (SGD, {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    (SGD, {"lr": 0.1, "momentum": 0.9}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (ADAM, {"lr": 0.1, "weight_decay": 0.1}),
    (ADAM, {"lr": 0.1, "amsgrad": True, "maximize": True, "weight_decay": 0.05}),
    (ADAM, {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    (torch.optim.AdamW, {"lr": torch.tensor(0.1), "betas": (0.7, 0.9)}),
    (RMSPROP, {"lr": 0.1}),
    (RMSPROP, {"lr": 0.1, "centered": True, "momentum": 0.9, "weight_decay": 0.1}),
    (RMSPROP, {"lr": 0.1, "momentum": 0.9, "maximize": True}),
    (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1}),
]


def update(optimizer_class, settings, values, gradient, state):
    """Return parameter, state tensors and point after one update by the optimizer."""
    parameter = torch.nn.Parameter(values.clone())
    optimizer = optimizer_class([parameter], **settings)
    if state:
        optimizer.state[parameter] = deepcopy(state)
    parameter.grad = gradient.clone()
    optimizer.step()
    after = optimizer.state[parameter]
    is_first = not state or state.get("momentum_buffer") is None
    group = optimizer.param_groups[0]
    point = UpdatePoint(values, gradient, after, group, is_first=is_first)
    return parameter.detach(), after, point


@pytest.mark.parametrize("earlier_steps", [0, 3])
@pytest.mark.parametrize(("optimizer_class", "settings"), UPDATES)
def test_push_and_pull_are_the_derivative_and_its_transpose(
    optimizer_class, settings, earlier_steps
):
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    optimizer = optimizer_class([parameter], **settings)
    for _ in range(earlier_steps):
        parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    rule = LINEARIZED_UPDATES[optimizer_class]
    names = rule.states(optimizer.param_groups[0])
    values, gradient = parameter.detach().clone(), torch.randn_like(parameter)
    state = deepcopy(dict(optimizer.state[parameter]))
    # In proportion to the state, since a square near 0 must remain positive.
    tangents = {PARAMETER: torch.randn_like(values)}
    for name in names:
        before = state.get(name, torch.zeros_like(values))
        tangents[name] = before * torch.rand_like(values)
    gradient_tangent = torch.randn_like(values)

    def shifted(size):
        moved = {
            name: value + size * tangents[name] if name in names else value
            for name, value in state.items()
        }
        return update(
            optimizer_class,
            settings,
            values + size * tangents[PARAMETER],
            gradient + size * gradient_tangent,
            moved,
        )

    size = 1e-6
    above, below = shifted(size), shifted(-size)
    expected = {PARAMETER: (above[0] - below[0]) / (2 * size)}
    expected |= {name: (above[1][name] - below[1][name]) / (2 * size) for name in names}
    point = update(optimizer_class, settings, values, gradient, state)[2]
    pushed = {name: value[None].clone() for name, value in tangents.items()}
    rule.push(point, pushed, gradient_tangent[None].clone())
    for name, value in expected.items():
        torch.testing.assert_close(pushed[name][0], value, rtol=1e-6, atol=1e-7)

    adjoints = {name: torch.randn(1, 4, 3, dtype=torch.float64) for name in expected}
    after = sum((adjoints[name] * pushed[name]).sum() for name in adjoints)
    pulled = rule.pull(point, adjoints)
    before = (pulled * gradient_tangent).sum()
    before += sum((adjoints[name] * tangents[name]).sum() for name in adjoints)
    torch.testing.assert_close(after, before, rtol=1e-11, atol=1e-11)


def test_pixel_that_is_never_on_gives_no_nan():
    parameter = torch.zeros(2, dtype=torch.float64)
    gradient = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for optimizer_class in (ADAM, RMSPROP, torch.optim.Adagrad):
        point = update(optimizer_class, {"lr": 0.1}, parameter, gradient, {})[2]
        rule = LINEARIZED_UPDATES[optimizer_class]
        adjoints = {
            name: torch.ones(3, 2, dtype=torch.float64)
            for name in (PARAMETER, *rule.states(point.group))
        }
        assert rule.pull(point, adjoints).isfinite().all()
        assert all(values.isfinite().all() for values in adjoints.values())
