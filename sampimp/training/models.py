"""The networks of a study: the paper's, and small standard networks of other kinds.

The paper's network has fully connected layers of ReLU units and a linear output (section 3.1); the
paper's last section asks for convolutional and recurrent ones. Other activations can take the
ReLUs' place (`sampimp.training.activations`). All map (N, C, H, W) to logits
(N, classes). The recurrent networks and the transformer read an image as a sequence of its rows, as
is usual for MNIST. Layers are registered in the order in which they are called. No network mixes
samples.

Map: `build_model` (a network by its name), `build_mlp` (the paper's), `build_cnn`,
`build_resnet18`, `RowRNN`, `RowTransformer`; `import_builder` (a user's own function);
`parameter_layers`, `flatten_parameters`, `load_parameters`, `jitter_parameters` (parameters as one
vector).

Shape suffixes: N samples, T positions, E entries of an embedding, P parameters.
"""

import importlib
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sampimp.config import MODELS, RELU_MODELS, check_choice
from sampimp.errors import ConfigError
from sampimp.training.activations import ACTIVATIONS


def build_model(
    name: str,
    input_shape: Sequence[int],
    hidden: Sequence[int],
    class_count: int,
    seed: int,
    activation: str = "relu",
) -> nn.Module:
    """Return a network by its name; its initialisation depends only on the seed.

    Parameters
    ----------
    name
        One of `sampimp.config.MODELS`, or a user's own `package.module:function`, which is called
        as `function(input_shape, class_count)` and initialises by PyTorch's global generator.
    input_shape
        Shape of one sample: (C, H, W) for all but the mlp.
    hidden
        Units of each hidden layer of the mlp.
    class_count
        Number of logits.
    seed
        Seed of the initialisation.
    activation
        One of `sampimp.training.activations.ACTIVATIONS`, in the place of the ReLUs of
        `sampimp.config.RELU_MODELS`; the other networks ignore it.

    Raises
    ------
    ConfigError
        The name is unknown, the samples are not images, or the function returns no network.
    """
    if name == "mlp":
        return build_mlp(input_shape, hidden, class_count, seed, activation)
    if ":" in name:
        builder = import_builder(name)
    else:
        builder = _BUILDERS[check_choice(name, MODELS, "model")]
        if name in RELU_MODELS:
            builder = partial(builder, activation=activation)
        if len(input_shape) != 3:
            raise ConfigError(
                expected="samples of shape (channels, rows, columns)",
                got=f"shape {tuple(input_shape)}",
                where=f"option --model {name}",
                todo="use the mlp, or your own network: package.module:function",
            )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = builder(tuple(input_shape), class_count)
    if not isinstance(network, nn.Module):
        raise ConfigError(
            expected="a function that returns a torch.nn.Module",
            got=f"a function that returns {type(network).__name__}",
            where=f"option --model {name}",
            todo="return the network; it is called with the shape of a sample and the number of "
            "classes",
        )
    return network


def import_function(name: str, where: str) -> Callable[..., Any]:
    """Return a user's function `package.module:function`; `where` names the option, for errors.

    Raises
    ------
    ConfigError
        The module cannot be imported, or has no such function.
    """
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            expected="package.module:function, importable here and on every worker",
            got=str(error),
            where=where,
            todo="install the package where the study runs, or set PYTHONPATH",
        ) from error


def import_builder(name: str) -> Callable[[tuple[int, ...], int], nn.Module]:
    """Return the function `package.module:function` that builds a user's own network.

    Raises
    ------
    ConfigError
        The module cannot be imported, or has no such function.
    """
    return import_function(name, f"option --model {name}")


def build_mlp(
    input_shape: Sequence[int],
    hidden: Sequence[int],
    class_count: int,
    seed: int,
    activation: str = "relu",
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
    activation
        One of `sampimp.training.activations.ACTIVATIONS`.

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
        modules[f"{activation}{number}"] = ACTIVATIONS[activation].make()
    modules["Out"] = _glorot_linear(sizes[-1], class_count, generator)
    return nn.Sequential(modules)


def _glorot_linear(fan_in: int, fan_out: int, generator: torch.Generator) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, fan_in, fan_out)
    nn.init.xavier_uniform_(layer.weight, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def build_cnn(input_shape: Sequence[int], class_count: int, activation: str = "relu") -> nn.Module:
    """Return a network of two 3 x 3 convolutions with pooling and two fully connected layers."""
    channels, rows, columns = input_shape
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (fan_in, fan_out) in enumerate(((channels, 32), (32, 64)), start=1):
        modules[f"conv{number}"] = nn.Conv2d(fan_in, fan_out, 3, padding=1)
        modules[f"{activation}{number}"] = ACTIVATIONS[activation].make()
        modules[f"pool{number}"] = nn.MaxPool2d(2)
    modules["flatten"] = nn.Flatten()
    modules["fc"] = nn.Linear(64 * (rows // 4) * (columns // 4), 128)
    modules[f"{activation}3"] = ACTIVATIONS[activation].make()
    modules["Out"] = nn.Linear(128, class_count)
    return nn.Sequential(modules)


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut, with GroupNorm in the place of He et al.'s BatchNorm."""

    def __init__(self, fan_in: int, fan_out: int, stride: int, activation: str = "relu") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(32, fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(32, fan_out)
        self.activation = ACTIVATIONS[activation].make()
        self.shortcut = nn.Sequential()
        if stride != 1 or fan_in != fan_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(fan_in, fan_out, 1, stride, bias=False), nn.GroupNorm(32, fan_out)
            )

    def forward(self, images: Tensor) -> Tensor:
        """Return (N, fan_out, H / stride, W / stride)."""
        inner = self.activation(self.norm1(self.conv1(images)))
        inner = self.norm2(self.conv2(inner))
        return self.activation(inner + self.shortcut(images))


def build_resnet18(
    input_shape: Sequence[int], class_count: int, activation: str = "relu"
) -> nn.Module:
    """Return ResNet-18 for small images: its first convolution is 3 x 3, without pooling after it.

    References
    ----------
    He et al. (2016), "Deep residual learning", sections 3 and 4.2; Wu & He (2018), GroupNorm with
    32 groups.
    """
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    modules["stem"] = nn.Conv2d(input_shape[0], 64, 3, 1, 1, bias=False)
    modules["norm"] = nn.GroupNorm(32, 64)
    modules[activation] = ACTIVATIONS[activation].make()
    width = 64
    for number, fan_out in enumerate((64, 128, 256, 512), start=1):
        stride = 1 if number == 1 else 2
        modules[f"block{number}a"] = ResidualBlock(width, fan_out, stride, activation)
        modules[f"block{number}b"] = ResidualBlock(fan_out, fan_out, 1, activation)
        width = fan_out
    modules["pool"] = nn.AdaptiveAvgPool2d(1)
    modules["flatten"] = nn.Flatten()
    modules["Out"] = nn.Linear(width, class_count)
    return nn.Sequential(modules)


def image_rows(images: Tensor) -> Tensor:
    """Return images (N, C, H, W) as sequences of rows, (N, H, C W)."""
    return images.transpose(1, 2).flatten(2)


class RowRNN(nn.Module):
    """A recurrent layer of 128 units over the rows of an image; logits from its last output."""

    def __init__(self, kind: type[nn.LSTM | nn.GRU], shape: Sequence[int], classes: int) -> None:
        super().__init__()
        self.recurrent = kind(shape[0] * shape[2], 128, batch_first=True)
        self.Out = nn.Linear(128, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, classes)."""
        return self.Out(self.recurrent(image_rows(images))[0][:, -1])


class RowTransformer(nn.Module):
    """Two encoder layers over the rows of an image; logits from the mean over the rows.

    References
    ----------
    Vaswani et al. (2017), in the form with LayerNorm first; without dropout, so that a step's
    gradient is that of the whole network.
    """

    def __init__(
        self, input_shape: Sequence[int], class_count: int, activation: str = "relu"
    ) -> None:
        super().__init__()
        channels, rows, columns = input_shape
        self.embedding = nn.Linear(channels * columns, 64)
        self.position = nn.Parameter(0.02 * torch.randn(1, rows, 64))
        for number in (1, 2):
            layer = nn.TransformerEncoderLayer(
                64,
                4,
                128,
                dropout=0.0,
                activation=ACTIVATIONS[activation].make(),
                batch_first=True,
                norm_first=True,
            )
            self.add_module(f"block{number}", layer)
        self.norm = nn.LayerNorm(64)
        self.Out = nn.Linear(64, class_count)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, classes)."""
        inner_NTE = self.embedding(image_rows(images)) + self.position
        for number in (1, 2):
            inner_NTE = self.get_submodule(f"block{number}")(inner_NTE)
        return self.Out(self.norm(inner_NTE.mean(1)))


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "cnn": build_cnn,
    "resnet18": build_resnet18,
    "lstm": partial(RowRNN, nn.LSTM),
    "gru": partial(RowRNN, nn.GRU),
    "transformer": RowTransformer,
}


def parameter_layers(model: nn.Module) -> list[tuple[str, int]]:
    """Return the layer (module name) and size of every tensor of `model.parameters()`, in order.

    Examples
    --------
    >>> parameter_layers(build_mlp((2,), (3,), 4, seed=0))
    [('L1', 6), ('L1', 3), ('Out', 12), ('Out', 4)]
    """
    return [
        (name.rpartition(".")[0] or "model", parameter.numel())
        for name, parameter in model.named_parameters()
    ]


@torch.no_grad()
def flatten_parameters(model: nn.Module) -> Tensor:
    """Return all tensors of `model.parameters()` flattened in order, shape (P,)."""
    return torch.cat([parameter.reshape(-1) for parameter in model.parameters()])


@torch.no_grad()
def load_parameters(model: nn.Module, flat_P: Tensor) -> None:
    """Set all parameters of the model from a vector (P,) as `flatten_parameters` returns it."""
    sizes = [parameter.numel() for parameter in model.parameters()]
    for parameter, values in zip(model.parameters(), flat_P.split(sizes), strict=True):
        parameter.copy_(values.view_as(parameter))


def jitter_parameters(model: nn.Module, size: float, seed: int) -> None:
    """Add `size` times a standard normal number, drawn by the seed, to every parameter."""
    flat_P = flatten_parameters(model)
    generator = torch.Generator().manual_seed(seed)
    # Drawn in float64: the same numbers for each precision and device.
    noise_P = torch.randn(flat_P.shape, generator=generator, dtype=torch.float64)
    load_parameters(model, flat_P + (size * noise_P).to(flat_P))
