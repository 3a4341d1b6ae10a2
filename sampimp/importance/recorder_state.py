"""What a recorder keeps in a checkpoint, so that a recording goes on where it was interrupted.

A state that is restored has to be the one that was saved with the model: it names the parameters,
their shapes and the digest of their values, and is refused by a model with others. So steps that
were recorded after the checkpoint cannot count twice, and none can be missing.

Map: `recorder_state`, `restore_recorder`.
"""

import hashlib
from collections.abc import Mapping
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sampimp.errors import ConfigError
from sampimp.importance.epoch_parts import describe_epochs
from sampimp.importance.recorded_step import restored_steps, steps_state

if TYPE_CHECKING:
    from sampimp.importance.recorder import ImportanceRecorder

STATE_FORMAT = "sampimp recorder, version 1"
"""Entry `format` of a state."""


def recorder_state(recorder: "ImportanceRecorder", sample_count: int | None) -> dict[str, Any]:
    """Return the state of a recorder; it changes nothing, and a step may be under way.

    Raises
    ------
    ConfigError
        A step has made its update, and is not recorded yet.
    """
    if recorder._open_step is not None and recorder._open_step.updates:
        raise ConfigError(
            expected="no step between its update and its end",
            got="a step that has made its update, and is not recorded yet, or has failed",
            where="ImportanceRecorder.state_dict",
            todo="save after the block of the step",
        )
    capture = recorder._capture
    recent = {}
    if recorder._indices and recorder._epoch is not None:
        recent[recorder._epoch] = torch.cat(recorder._indices), capture.norms.read()
    return {
        "format": STATE_FORMAT,
        "parameters": _parameters(capture.tensors.model),
        "digest": _digest(capture.tensors.model),
        "settings": _settings(recorder),
        "sample_count": sample_count,
        "step_count": recorder._step_count,
        "epochs": recorder._parts.state(recent),
        "epoch": None if recorder._epoch is None else int(recorder._epoch),
        "is_reported": recorder._is_reported,
        "resumed_at": list(recorder._resumed_at),
        "called": list(capture.tensors.called),
        "largest_batch": recorder._largest_batch,
        "undefined_layers": sorted(capture.norms.undefined_layers),
        "loss": capture.loss,
        "steps": steps_state(recorder.steps),
    }


def restore_recorder(
    recorder: "ImportanceRecorder", state: Mapping[str, Any], sample_count: int | None
) -> None:
    """Take a state into a recorder that has recorded nothing.

    Raises
    ------
    ConfigError
        See `ImportanceRecorder.load_state_dict`.
    """
    capture = recorder._capture
    if not isinstance(state, Mapping) or state.get("format") != STATE_FORMAT:
        raise _refusal(f"a state by ImportanceRecorder.state_dict ({STATE_FORMAT})", _kind(state))
    if recorder._step_count:
        raise _refusal(
            "a recorder that has recorded nothing",
            f"one of {recorder._step_count} steps, the last in epoch {recorder._epoch}",
            "make a new recorder, load the state, and train then",
        )
    own = _parameters(capture.tensors.model)
    for here, there in zip_longest(own, state["parameters"]):
        if here != there:
            raise _refusal(f"a state of this network, with {_named(here)}", _named(there))
    for name, value in _settings(recorder).items():
        if state["settings"][name] != value:
            raise _refusal(
                f"a state with {name} {value!r}, as this recorder has",
                f"{state['settings'][name]!r}",
                "make the recorder as the one that was saved",
            )
    if None not in (sample_count, state["sample_count"]) and sample_count != state["sample_count"]:
        raise _refusal(
            f"a state of a training set of {sample_count} samples",
            f"one of {state['sample_count']}",
            "train on the data set of the checkpoint",
        )
    if state["digest"] != _digest(capture.tensors.model):
        raise _refusal(
            "a state that was saved with the present values of the model's parameters",
            f"one saved with other values: {describe_state(state)}",
            "load the model from the same checkpoint, before the recorder",
        )
    capture.tensors.called.update(dict.fromkeys(state["called"]))
    capture.norms.undefined_layers.update(state["undefined_layers"])
    capture.loss = state["loss"]
    recorder._parts.restore(state["epochs"], state["epoch"])
    recorder._epoch, recorder._is_reported = state["epoch"], state["is_reported"]
    recorder._step_count, recorder._largest_batch = state["step_count"], state["largest_batch"]
    recorder._resumed_at, recorder._resumes = list(state["resumed_at"]), True
    recorder.steps.extend(restored_steps(state["steps"]))


def describe_state(state: Mapping[str, Any]) -> str:
    """Return the steps and epochs of a state for messages."""
    return f"{state['step_count']} steps, {describe_epochs(state['epochs'])}"


def _refusal(
    expected: str, got: str, todo: str = "load the checkpoint of this training"
) -> ConfigError:
    return ConfigError(expected, got, "ImportanceRecorder.load_state_dict", todo)


def _kind(state: object) -> str:
    if isinstance(state, Mapping):
        return str(state.get("format", f"a dict with {', '.join(map(str, state)) or 'no entries'}"))
    return f"a {type(state).__name__}"


def _named(parameter: list[Any] | None) -> str:
    if parameter is None:
        return "no further parameter"
    return f"parameter {parameter[0]} of shape {tuple(parameter[1])}"


def _parameters(model: nn.Module) -> list[list[Any]]:
    """Return name and shape of each parameter."""
    return [[name, list(parameter.shape)] for name, parameter in model.named_parameters()]


def _settings(recorder: "ImportanceRecorder") -> dict[str, Any]:
    """Return what a state and its recorder must have in common."""
    return {
        "optimizer": type(recorder.optimizer).__name__,
        "loss_reduction": recorder.loss_reduction,
        "keep_steps": recorder._keeps_steps,
    }


def _digest(model: nn.Module) -> str:
    """Return the digest of the values of all parameters."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        values = parameter.detach().reshape(-1).view(torch.uint8)
        digest.update(values.cpu().numpy().data)
    return digest.hexdigest()
