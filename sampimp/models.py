"""The paper's network: fully connected layers of ReLU units with a linear output (section 3.1)."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


def build_mlp(
    input_shape: Sequence[int], hidden: Sequence[int], class_count: int, seed: int
) -> nn.Sequential:
    """Return a Glorot-initialised multilayer perceptron with layers L1, L2, ..., Out.

    Parameters
    ----------
    input_shape
        Shape of one sample; it is flattened.
    hidden
        Units of each hidden layer.
    class_count
        Number of outputs (logits).
    seed
        Seed of the initialisation, which depends on nothing else.

    References
    ----------
    Gao & Jojic (2017), section 3.1: three hidden layers of 512 ReLU units. Glorot & Bengio (2010):
    uniform in ±sqrt(6 / (fan in + fan out)); the biases start at zero.

    Examples
    --------
    >>> [name for name, _ in build_mlp((1, 28, 28), (512, 512, 512), 10, seed=1).named_children()]
    ['flatten', 'L1', 'relu1', 'L2', 'relu2', 'L3', 'relu3', 'Out']
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = (math.prod(input_shape), *hidden)
    modules: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number, (fan_in, fan_out) in enumerate(pairwise(sizes), start=1):
        modules[f"L{number}"] = _glorot_linear(fan_in, fan_out, generator)
        modules[f"relu{number}"] = nn.ReLU()
    modules["Out"] = _glorot_linear(sizes[-1], class_count, generator)
    return nn.Sequential(modules)


def _glorot_linear(fan_in: int, fan_out: int, generator: torch.Generator) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, fan_in, fan_out)
    nn.init.xavier_uniform_(layer.weight, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def parameter_layers(model: nn.Module) -> list[tuple[str, int]]:
    """Return the layer (module name) and size of every tensor of `model.parameters()`, in order.

    Examples
    --------
    >>> parameter_layers(build_mlp((2,), (3,), 4, seed=0))
    [('L1', 6), ('L1', 3), ('Out', 12), ('Out', 4)]
    """
    return [
        (name.rpartition(".")[0], parameter.numel()) for name, parameter in model.named_parameters()
    ]


@torch.no_grad()
def flatten_parameters(model: nn.Module) -> Tensor:
    """Return all tensors of `model.parameters()` flattened in order, shape (P,)."""
    return torch.cat([parameter.reshape(-1) for parameter in model.parameters()])


@torch.no_grad()
def load_parameters(model: nn.Module, flat_P: Tensor) -> None:
    """Set all parameters of the model from `flatten_parameters`' form."""
    sizes = [parameter.numel() for parameter in model.parameters()]
    for parameter, values in zip(model.parameters(), flat_P.split(sizes), strict=True):
        parameter.copy_(values.view_as(parameter))
