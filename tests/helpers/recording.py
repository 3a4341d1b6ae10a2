"""Small networks, batches and recorded steps, shared by the tests of the recorder."""

import itertools

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from sampimp.importance.recorder import ImportanceRecorder

SGD = torch.optim.SGD


def batch(samples=6, inputs=4, classes=3, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(samples, inputs, generator=generator, dtype=dtype),
        torch.randint(0, classes, (samples,), generator=generator),
    )


def train_step(model, optimizer, inputs, labels, reduction="mean"):
    optimizer.zero_grad()
    functional.cross_entropy(model(inputs), labels, reduction=reduction).backward()
    optimizer.step()


def recorded(model, optimizer, inputs, labels, reduction="mean", dropout_seed=0):
    """Return the importance that the recorder measures in one training step."""
    recorder = ImportanceRecorder(model, optimizer, loss_reduction=reduction)
    torch.manual_seed(dropout_seed)
    with recorder.step(range(len(labels)), epoch=1):
        train_step(model, optimizer, inputs, labels, reduction)
    return recorder.pop_epoch(1, len(labels))


@st.composite
def cases(draw, dropout=False):
    """Draw a network, its optimizer, a batch and a reduction."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=2, max_size=5))
    sizes[-1] = max(2, sizes[-1])  # with a single class, all gradients are zero
    torch.manual_seed(draw(st.integers(0, 2**16)))
    modules = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        modules.append(nn.Linear(fan_in, fan_out, bias=draw(st.booleans())))
        modules.append(draw(st.sampled_from([nn.Tanh(), nn.ReLU(), nn.ReLU(inplace=True)])))
        if dropout:
            modules.append(nn.Dropout(0.4))
    last = 2 if dropout else 1
    model = nn.Sequential(*modules[:-last]).double()
    rate = st.floats(0.01, 2)
    options = {"weight_decay": draw(st.sampled_from([0.0, 1e-5, 0.1]))}
    if draw(st.booleans()):
        optimizer = SGD(model.parameters(), lr=draw(rate), **options)
    else:  # one group per parameter; some parameters are not trained
        groups = [
            {"params": [parameter], "lr": draw(rate)}
            for parameter in model.parameters()
            if draw(st.integers(0, 3))
        ] or [{"params": [next(model.parameters())], "lr": draw(rate)}]
        optimizer = SGD(groups, **options)
    inputs = torch.randn(draw(st.integers(1, 6)), sizes[0], dtype=torch.float64)
    labels = torch.randint(0, sizes[-1], (len(inputs),))
    return model, optimizer, inputs, labels, draw(st.sampled_from(["mean", "sum"]))


def freeze(*positions):
    def change(model):
        for position in positions:
            model[position].requires_grad_(False)

    return change


class FunctionModel(nn.Module):
    """A model that applies a function to its parts and its inputs."""

    def __init__(self, function, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, inputs):
        return self.function(self, inputs)


def sample_losses(model, inputs, labels):
    return functional.cross_entropy(model(inputs), labels, reduction="none")


def loss_of(model, inputs, labels):
    return functional.cross_entropy(model(inputs), labels)


def hooks(model):
    """Return the hooks on the modules and parameters of a model."""
    return [
        (name, kind)
        for name, module in model.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        if getattr(module, kind)
    ] + [
        (name, "parameter")
        for name, parameter in model.named_parameters()
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
    ]
