"""Paths from the parameters that autograd does not follow, and those that are none."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from sampimp.errors import UnsupportedError
from sampimp.influence.hidden_paths import CutValues, constant_buffers
from sampimp.influence.targets import FunctionTarget

WEIGHT = nn.Parameter(torch.tensor([0.5, 2.0]))
Normal, Categorical = torch.distributions.Normal, torch.distributions.Categorical


@torch.no_grad()
def doubled():
    return 2 * WEIGHT


@torch.no_grad()
def shape_of_weight():
    return torch.zeros_like(WEIGHT), torch.ones(2).type_as(WEIGHT)


def assigned(value):
    """Return a tensor of which one entry is assigned."""
    tensor = torch.zeros(2)
    tensor[0] = value
    return tensor


def viewed(value):
    """Return a tensor that is changed by way of a view."""
    tensor = torch.zeros(3)
    tensor[:2].copy_(value)
    return tensor


CUT = {
    "detach": lambda: WEIGHT * WEIGHT.detach(),
    "data": lambda: WEIGHT * WEIGHT.data,
    "no_grad": lambda: WEIGHT * doubled(),
    "item": lambda: WEIGHT * WEIGHT[0].item(),
    "float": lambda: WEIGHT * float(WEIGHT.detach()[0]),
    "numpy": lambda: WEIGHT * float(WEIGHT.detach().numpy().mean()),
    "array": lambda: WEIGHT * torch.from_numpy(np.asarray(WEIGHT.detach())),
    "list": lambda: WEIGHT * WEIGHT.tolist()[0],
    "new tensor": lambda: WEIGHT * torch.tensor([WEIGHT[0], 1.0]),
    "assignment": lambda: WEIGHT * assigned(WEIGHT.detach()[0]),
    "view": lambda: WEIGHT * viewed(WEIGHT.detach())[:2],
    "fill": lambda: WEIGHT * torch.zeros(2).fill_(WEIGHT.detach()[0]),
    "sample of a distribution": lambda: Normal(WEIGHT, 1.0).log_prob(Normal(WEIGHT, 1.0).sample()),
    "straight-through": lambda: WEIGHT + (WEIGHT.round() - WEIGHT).detach(),
}

FOLLOWED = {
    "mask": lambda: WEIGHT * (WEIGHT.detach() > 1).float(),
    "sign": lambda: WEIGHT * WEIGHT.detach().sign(),
    "label": lambda: functional.cross_entropy(WEIGHT, WEIGHT.detach().argmax()),
    "forms": lambda: WEIGHT * sum(shape_of_weight()),
    "new zeros": lambda: WEIGHT + WEIGHT.detach().new_zeros(2),
    "truth value": lambda: WEIGHT if WEIGHT.sum() > 0 else -WEIGHT,
    "printed": lambda: (f"{WEIGHT} {WEIGHT.sum():.2f}", WEIGHT * 1)[1],
    "unused": lambda: (WEIGHT.detach().sum(), WEIGHT * 1)[1],
    "sampled class": lambda: Categorical(logits=WEIGHT).log_prob(
        Categorical(logits=WEIGHT).sample()
    ),
    "reparametrized sample": lambda: Normal(WEIGHT, 1.0).rsample(),
    "data of no parameter": lambda: WEIGHT * torch.ones(2).detach().sum().item(),
}


def follow(function):
    with CutValues("the loss") as cuts:
        value = function()
    cuts.require_none_in(value)


@pytest.mark.parametrize("name", CUT)
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")
def test_cut_values_are_refused(name):
    with pytest.raises(UnsupportedError, match="Where the loss"):
        follow(CUT[name])


@pytest.mark.parametrize("name", FOLLOWED)
def test_values_that_jump_or_are_followed_are_not_refused(name):
    follow(FOLLOWED[name])


def test_a_buffer_that_changes_is_named_but_a_count_is_not():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3))
    model.register_buffer("count", torch.tensor(0))
    with constant_buffers(model, "here"):
        model.count += 1
        model.eval()(torch.ones(2, 3))

    def train():
        with constant_buffers(model, "here"):
            model.train()(torch.rand(2, 3))

    with pytest.raises(UnsupportedError, match=r"1\.running_mean, 1\.running_var"):
        train()


def test_a_target_of_a_recurrent_network_needs_no_cudnn():
    """The backward pass of cuDNN refuses a recurrent layer in evaluation mode."""
    switches = []

    def target(model):
        switches.append(torch.backends.cudnn.enabled)
        return model(torch.ones(1, 2, 3))[0].sum()

    before = torch.backends.cudnn.enabled
    FunctionTarget("sum", target).gradient(nn.GRU(3, 2))
    assert switches == [False]
    assert torch.backends.cudnn.enabled == before
