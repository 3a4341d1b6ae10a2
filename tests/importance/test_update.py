"""What `UpdateDerivative` refuses: optimizers, settings and gradients without an exact rule."""

import pytest
import torch
from torch import nn, optim

from sampimp.errors import UnsupportedError
from sampimp.importance.update import UpdateDerivative


class DerivedAdam(optim.Adam):
    pass


@pytest.mark.parametrize("kind", [optim.Rprop, DerivedAdam])
def test_an_error_for_an_optimizer_without_a_rule_names_derivative_rule(kind):
    with pytest.raises(UnsupportedError, match=kind.__name__) as caught:
        UpdateDerivative(kind([nn.Parameter(torch.zeros(2))]))
    assert "AdamW" in caught.value.expected
    assert "derivative_rule" in caught.value.todo


def test_settings_without_an_exact_rule_are_refused():
    weight = nn.Parameter(torch.zeros(2))
    with pytest.raises(UnsupportedError, match="differentiable"):
        UpdateDerivative(optim.SGD([weight], differentiable=True))
    with pytest.raises(UnsupportedError, match="complex"):
        UpdateDerivative(optim.Adam([nn.Parameter(torch.zeros(2, dtype=torch.complex64))]))

    derivative = UpdateDerivative(optimizer := optim.SGD([weight]))
    optimizer.add_param_group(
        {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.1, "differentiable": True}
    )
    with pytest.raises(UnsupportedError, match="group 1"):
        derivative.before()


def test_sparse_gradients_are_refused_where_the_derivative_is_elementwise():
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    derivative = UpdateDerivative(optim.Adagrad(embedding.parameters()))
    with pytest.raises(UnsupportedError, match="sparse"):
        derivative.before()


def test_an_error_for_a_wrapped_optimizer_names_the_inner_one():
    accelerate = pytest.importorskip("accelerate")
    wrapped = accelerate.Accelerator(cpu=True).prepare(optim.SGD([nn.Parameter(torch.zeros(2))]))
    with pytest.raises(UnsupportedError, match=r"around SGD(.|\n)*optimizer\.optimizer"):
        UpdateDerivative(wrapped)


def test_a_scaler_inside_a_fused_step_is_refused():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = optim.Adam([weight], fused=True)
    derivative = UpdateDerivative(optimizer)
    optimizer.found_inf = torch.tensor(0.0)
    with pytest.raises(UnsupportedError, match="GradScaler"):
        derivative.before()


def test_gradients_replaced_within_the_step_are_refused():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = optim.Adam([weight])
    derivative = UpdateDerivative(optimizer)

    def closure():
        optimizer.zero_grad()
        loss = weight.sum()
        loss.backward()
        return loss

    closure()
    derivative.before()
    optimizer.step(closure)
    with pytest.raises(UnsupportedError, match="other gradients"):
        derivative.after()
