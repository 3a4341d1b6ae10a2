"""The paper's network: layout, initialisation, and parameters as one flat vector."""

import importlib
import math
import sys
from dataclasses import replace

import pytest
import torch

from sampimp.config import MODELS
from sampimp.errors import ConfigError
from sampimp.importance.recorder import forward_layers
from sampimp.training.models import (
    build_mlp,
    build_model,
    flatten_parameters,
    identify_network,
    load_parameters,
    parameter_layers,
    require_network,
)


def test_layers_and_sizes_of_the_papers_network():
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


def test_glorot_initialisation():
    model = build_mlp((784,), (512, 300), 10, seed=3)
    for name, fan_in, fan_out in (("L1", 784, 512), ("L2", 512, 300), ("Out", 300, 10)):
        weight, bound = getattr(model, name).weight.detach(), math.sqrt(6 / (fan_in + fan_out))
        assert weight.shape == (fan_out, fan_in)
        assert 0.99 * bound < weight.abs().max() <= bound
        # A uniform variable has variance bound^2 / 3; at n values its estimate has a relative
        # deviation of sqrt(0.8 / n), at most 0.017 here.
        assert weight.var().item() == pytest.approx(bound**2 / 3, rel=0.08)
        assert not getattr(model, name).bias.any()


def test_initialisation_depends_on_the_seed_alone():
    torch.manual_seed(1)
    first = flatten_parameters(build_mlp((3,), (4,), 2, seed=5))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = flatten_parameters(build_mlp((3,), (4,), 2, seed=5))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first, flatten_parameters(build_mlp((3,), (4,), 2, seed=6)))


def test_flat_parameters_are_the_tensors_in_order():
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


def test_without_hidden_layers_it_is_a_linear_model():
    model = build_mlp((2, 2), (), 3, seed=0)
    inputs = torch.rand(5, 2, 2)
    torch.testing.assert_close(model(inputs), inputs.reshape(5, 4) @ model.Out.weight.T)


def own(input_shape, class_count):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(input_shape[-1], class_count))


@pytest.mark.parametrize("name", MODELS)
def test_every_network_treats_samples_one_by_one_and_starts_from_its_seed(name):
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
    assert torch.equal(torch.rand(1), after)  # the generator of others is left alone
    other = build_model(name, shape, (6,), 5, seed=4).double()
    assert not torch.equal(flatten_parameters(other), flatten_parameters(model))


def test_a_resnet18_has_its_parameters():
    model = build_model("resnet18", (3, 32, 32), (), 10, seed=1)
    assert sum(size for _, size in parameter_layers(model)) == 11_173_962  # as with BatchNorm


def test_layers_are_in_forward_order():
    model = build_model("transformer", (1, 8, 8), (), 10, seed=1)
    order = forward_layers(model, torch.zeros(2, 1, 8, 8))
    assert order[0] == "embedding"
    assert order[-1] == "Out"
    assert order.index("block1.norm1") < order.index("block1.self_attn")
    assert set(order) == {name for name, _ in parameter_layers(model)}


def test_a_network_of_ones_own():
    model = build_model(f"{__name__}:own", (7,), (), 3, seed=1)
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
def test_a_network_that_is_not_there_is_said(name, shape, words):
    with pytest.raises(ConfigError, match=words):
        build_model(name, shape, (), 3, seed=1)


def test_a_function_has_to_return_a_network():
    with pytest.raises(ConfigError, match="one that returns float") as caught:
        build_model("math:dist", (1.0,), (), (3.0,), seed=1)
    assert "option --model math:dist" in str(caught.value)


# What a network of one's own is.

NETWORK = """
import functools
from torch import nn
from helpers import tools

def make(input_shape, class_count, width=4, active=nn.ReLU):
    layers = nn.Linear(6, width), active(), nn.Linear(width, class_count)
    return nn.Sequential(*layers)

narrow = functools.partial(make, width=3)
decorated = tools.decorate(make)

class Network(nn.Sequential):
    def __init__(self, input_shape, class_count):
        super().__init__(nn.Linear(6, class_count))

def helped(input_shape, class_count):
    return tools.network(class_count)
"""

TOOLS = """
import functools
from torch import nn

def decorate(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)
    return wrapper

SCALE = 1.0

def network(class_count):
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, class_count))
    model[0].weight.data *= SCALE
    return model
"""


@pytest.fixture
def identify(tmp_path, monkeypatch):
    """Return what identifies a network of a package after one of its files was changed."""
    for package in ("nets", "helpers"):
        (tmp_path / package).mkdir()
    files = {
        "nets/__init__.py": "from nets.inner import make as passed_on",
        "nets/inner.py": NETWORK,
        "helpers/__init__.py": "",
        "helpers/tools.py": TOOLS,
    }
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two versions within one second
    inputs = torch.linspace(0, 1, 18).reshape(3, 6)

    def forget():
        for module in [m for m in sys.modules if m.partition(".")[0] in ("nets", "helpers")]:
            del sys.modules[module]
        importlib.invalidate_caches()

    def call(function, file=None, before="", after=""):
        for path, text in files.items():
            assert path != file or before in text
            content = text.replace(before, after) if path == file else text
            (tmp_path / path).write_text(content)
        forget()
        module = "nets" if function == "passed_on" else "nets.inner"
        name = f"{module}:{function}"
        network = build_model(name, (6,), (), 3, seed=0)
        return identify_network(name, network, inputs), network

    yield call
    forget()


@pytest.mark.parametrize("function", ["make", "passed_on", "narrow", "decorated", "Network"])
def test_the_source_that_defines_a_network_is_in_its_identity(identify, function):
    first, _ = identify(function)
    assert first.differences(identify(function)[0]) == []
    # Nothing but the source tells it: ReLU6 is ReLU here, and has no parameters.
    changed, _ = identify(function, "nets/inner.py", "active=nn.ReLU", "active=nn.ReLU6")
    assert first.differences(changed) == ["source"]
    assert first.exact != changed.exact


def test_of_a_helper_parameters_initial_values_and_outputs_are_compared(identify):
    first, _ = identify("helped")
    unseen, _ = identify("helped", "helpers/tools.py", "SCALE = 1.0", "SCALE = 1.0  # as it was")
    assert first.differences(unseen) == []
    nearly, _ = identify("helped", "helpers/tools.py", "SCALE = 1.0", "SCALE = 1.00002")
    assert first.differences(nearly) == []
    assert nearly != first
    scaled, _ = identify("helped", "helpers/tools.py", "SCALE = 1.0", "SCALE = 1.01")
    assert first.differences(scaled) == ["initial values", "outputs for the same samples"]
    active, _ = identify("helped", "helpers/tools.py", "nn.ReLU", "nn.Tanh")
    assert first.differences(active) == ["outputs for the same samples"]
    before, after = "(6, 4), nn.ReLU(), nn.Linear(4", "(6, 5), nn.ReLU(), nn.Linear(5"
    wider, _ = identify("helped", "helpers/tools.py", before, after)
    assert first.differences(wider) == [
        "parameter shapes (0.weight [5, 6], was [4, 6]; 0.bias [5], was [4]; "
        "2.weight [3, 5], was [3, 4])"
    ]
    deeper, _ = identify("helped", "helpers/tools.py", "nn.ReLU()", "nn.PReLU()")
    assert first.differences(deeper) == ["parameter shapes (1.weight [1], was absent)"]


def test_a_worker_with_other_source_or_parameters_is_refused(identify):
    identity, network = identify("make")
    require_network("nets.inner:make", network, identity)
    require_network("mlp", network, None)
    for changed, words in (
        (replace(identity, source="0"), "different: source"),
        (replace(identity, parameters=identity.parameters[1:]), "0.weight"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            require_network("nets.inner:make", network, changed)
        assert "module nets.inner on " in str(caught.value)


def test_a_network_without_source_is_refused():
    network = torch.nn.Linear(2, 3)
    with pytest.raises(ConfigError, match="source can be read") as caught:
        identify_network("math:dist", network, torch.zeros(1, 2))
    assert "module math" in str(caught.value)
