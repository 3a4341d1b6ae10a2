"""Tiny networks, one or more for every rule: `CASES`, a table of models with a batch.

By kind of network in `networks_feedforward`, `networks_recurrent`, `networks_attention` and
`networks_parameters`; `network_case` defines a case.
"""

from collections.abc import Callable

from network_case import (
    Calls,
    Case,
    N,
    T,
    convolutions,
    losses,
    parameter,
    recorded,
    stack,
    tokens,
)
from networks_attention import ATTENTION, Gpt, encoder_layer
from networks_feedforward import CONVOLUTIONS, FEEDFORWARD, TRANSPOSED
from networks_parameters import PARAMETERS
from networks_recurrent import RECURRENT, outputs_and_states

__all__ = [
    "CASES",
    "CONVOLUTIONS",
    "TRANSPOSED",
    "Calls",
    "Case",
    "Gpt",
    "N",
    "T",
    "convolutions",
    "encoder_layer",
    "losses",
    "outputs_and_states",
    "parameter",
    "recorded",
    "stack",
    "tokens",
]

CASES: dict[str, Callable[[], Case]] = {**FEEDFORWARD, **RECURRENT, **ATTENTION, **PARAMETERS}
"""By name, a function that builds a case; to be called after `torch.manual_seed`."""
