"""The identity of a user's own network: its source, parameters, initial values and outputs."""

import importlib
import sys
from dataclasses import replace

import pytest
import torch

from sampimp.errors import ConfigError
from sampimp.training.identity import identify_network, require_network
from sampimp.training.models import build_model

NETWORK = """
import functools
from torch import nn
from helpers import tools

def make(input_shape, class_count, width=4, activation=nn.ReLU):
    layers = nn.Linear(6, width), activation(), nn.Linear(width, class_count)
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
    """Return a function that changes one file of a package, then identifies one of its networks."""
    for package in ("nets", "helpers"):
        (tmp_path / package).mkdir()
    files = {
        "nets/__init__.py": "from nets.inner import make as reexported",
        "nets/inner.py": NETWORK,
        "helpers/__init__.py": "",
        "helpers/tools.py": TOOLS,
    }
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # bytecode is keyed by seconds
    inputs = torch.linspace(0, 1, 18).reshape(3, 6)

    def unload():
        for module in [m for m in sys.modules if m.partition(".")[0] in ("nets", "helpers")]:
            del sys.modules[module]
        importlib.invalidate_caches()

    def call(function, file=None, before="", after=""):
        for path, text in files.items():
            assert path != file or before in text
            content = text.replace(before, after) if path == file else text
            (tmp_path / path).write_text(content)
        unload()
        module = "nets" if function == "reexported" else "nets.inner"
        name = f"{module}:{function}"
        network = build_model(name, (6,), (), 3, seed=0)
        return identify_network(name, network, inputs), network

    yield call
    unload()


@pytest.mark.parametrize("function", ["make", "reexported", "narrow", "decorated", "Network"])
def test_identity_contains_the_defining_source(identify, function):
    first, _ = identify(function)
    assert first.differences(identify(function)[0]) == []
    # Only the source differs: ReLU6 equals ReLU on these values, and has no parameters.
    changed, _ = identify(function, "nets/inner.py", "activation=nn.ReLU", "activation=nn.ReLU6")
    assert first.differences(changed) == ["source"]
    assert first.exact != changed.exact


def test_changes_in_an_imported_module_show_in_values_alone(identify):
    first, _ = identify("helped")
    comment, _ = identify("helped", "helpers/tools.py", "SCALE = 1.0", "SCALE = 1.0  # unchanged")
    assert first.differences(comment) == []
    within_tolerance, _ = identify("helped", "helpers/tools.py", "SCALE = 1.0", "SCALE = 1.00002")
    assert first.differences(within_tolerance) == []
    assert within_tolerance != first
    scaled, _ = identify("helped", "helpers/tools.py", "SCALE = 1.0", "SCALE = 1.01")
    assert first.differences(scaled) == ["initial values", "outputs for the same samples"]
    activation, _ = identify("helped", "helpers/tools.py", "nn.ReLU", "nn.Tanh")
    assert first.differences(activation) == ["outputs for the same samples"]
    before, after = "(6, 4), nn.ReLU(), nn.Linear(4", "(6, 5), nn.ReLU(), nn.Linear(5"
    wider, _ = identify("helped", "helpers/tools.py", before, after)
    assert first.differences(wider) == [
        "parameter shapes (0.weight [5, 6], was [4, 6]; 0.bias [5], was [4]; "
        "2.weight [3, 5], was [3, 4])"
    ]
    deeper, _ = identify("helped", "helpers/tools.py", "nn.ReLU()", "nn.PReLU()")
    assert first.differences(deeper) == ["parameter shapes (1.weight [1], was absent)"]


def test_worker_with_different_source_or_parameters_is_refused(identify):
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


def test_network_without_source_is_refused():
    network = torch.nn.Linear(2, 3)
    with pytest.raises(ConfigError, match="source can be read") as caught:
        identify_network("math:dist", network, torch.zeros(1, 2))
    assert "module math" in str(caught.value)
