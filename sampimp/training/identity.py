"""Identification of a user's own network.

A study records a user's network by its name, `package.module:function`, which does not identify it.
The identity is the source of the modules that define it, its parameters' names and shapes, and
statistics of its initial values and outputs. The first two are exact and enter fingerprints; the
last two are compared within a tolerance, since processors differ in their rounding.

Map: `identify_network`, `require_network` (refuses any other network), `source_digest` (of a
function by its name).
"""

import hashlib
import inspect
import sys
from dataclasses import replace
from functools import partial
from socket import gethostname
from typing import Any

import torch
from torch import Tensor, nn

from sampimp.config import NetworkIdentity
from sampimp.errors import ConfigError
from sampimp.importance.evaluation import evaluation_mode
from sampimp.training.models import import_builder


def identify_network(name: str, network: nn.Module, inputs: Tensor) -> NetworkIdentity:
    """Return the identity of a user's own network.

    Parameters
    ----------
    name
        Its name, `package.module:function`.
    network
        The result of `sampimp.training.models.build_model` with seed 0.
    inputs
        A few training samples, in "unit" scaling.

    Raises
    ------
    ConfigError
        The source of the function cannot be read.
    """
    with evaluation_mode(network), torch.no_grad():
        outputs = network(inputs).double().flatten(1)
    return NetworkIdentity(
        source=source_digest(name),
        parameters=_parameter_shapes(network),
        initial=tuple(
            (
                float(values.mean()),
                float(values.square().mean().sqrt()),
                *map(float, values[:1]),
                *map(float, values[-1:]),
            )
            for parameter in network.parameters()
            for values in [parameter.detach().double().flatten()]
        ),
        outputs=tuple(map(tuple, outputs.tolist())),
    )


def require_network(name: str, network: nn.Module, identity: NetworkIdentity | None) -> None:
    """Check that a network has the source and the parameters of the study's network.

    Parameters
    ----------
    name
        As for `sampimp.training.models.build_model`.
    network
        The network to be trained or scored.
    identity
        Identity of the study's network; None for this package's networks, which are not checked.

    Raises
    ------
    ConfigError
        The source, or the parameters' names or shapes, differ.
    """
    if identity is None:
        return
    local = replace(identity, source=source_digest(name), parameters=_parameter_shapes(network))
    differences = identity.differences(local)
    if differences:
        raise ConfigError(
            expected=f"the network that the study recorded as {name}",
            got=f"another network; different: {', '.join(differences)}",
            where=f"module {name.partition(':')[0]} on {gethostname()}",
            todo="install the same version of its module on every machine, and leave it unchanged "
            "while the study runs",
        )


def _parameter_shapes(network: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, tuple(p.shape)) for name, p in network.named_parameters())


def source_digest(name: str) -> str:
    """Return the SHA-256 of the source of the modules that a function comes from.

    These are the module in the name and the module that defines the function. The two differ if a
    package re-exports the function, or if the function is a partial or decorated one.

    Raises
    ------
    ConfigError
        The source cannot be read.
    """
    function: Any = import_builder(name)
    while isinstance(function, partial) or hasattr(function, "__wrapped__"):
        function = function.func if isinstance(function, partial) else function.__wrapped__
    sha = hashlib.sha256()
    for module in dict.fromkeys([name.partition(":")[0], function.__module__]):
        try:
            sha.update(inspect.getsource(sys.modules[module]).encode())
        except (KeyError, OSError, TypeError) as error:
            raise ConfigError(
                expected="a network whose source can be read, since the source identifies it",
                got=str(error),
                where=f"module {module}, option --model {name}",
                todo="define the function in your own .py file; it may call functions of others",
            ) from None
    return sha.hexdigest()
