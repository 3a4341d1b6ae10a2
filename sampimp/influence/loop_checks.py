"""Checks of what a recorded loop is made of, before it is replayed.

Map: `require_complete` (steps, states and settings), `require_states` (that only the optimizer
changed the model), `largest_sample`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sampimp.errors import ConfigError, UnsupportedError
from sampimp.importance.recorded_step import RecordedStep


def require_complete(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Sequence[RecordedStep],
    starts: Mapping[int, Mapping[str, Any]],
    clip_norm: float | None,
    sample_count: int | None,
) -> None:
    """Raise ConfigError if something is missing, or of another model; see `RecordedLoop`."""
    if not isinstance(steps, Sequence) or not steps:
        raise ConfigError(
            expected="the steps of a recorded loop",
            got="none" if isinstance(steps, Sequence) else type(steps).__name__,
            where="RecordedLoop, steps",
            todo="record with ImportanceRecorder(..., keep_steps=True), and pass its `steps`",
        )
    _require_starts(steps, starts)
    _require_parameters(model, optimizer, steps)
    if clip_norm is None and any(step.is_scaled for step in steps):
        raise ConfigError(
            expected="the largest norm to which gradients were clipped",
            got="none, but gradients were multiplied by a factor",
            where="RecordedLoop, clip_norm",
            todo="pass the loop's max_norm as clip_norm; a GradScaler is not supported",
        )
    largest = largest_sample(steps)
    if sample_count is not None and largest >= sample_count:
        raise ConfigError(
            expected=f"samples up to {sample_count - 1}",
            got=f"a step that uses sample {largest}",
            where="RecordedLoop, sample_count",
            todo="pass the size of the training set, or leave it out",
        )


def largest_sample(steps: Sequence[RecordedStep]) -> int:
    """Return the largest index of a sample; -1 if no step uses a sample."""
    return max(int(step.index.max(initial=-1)) for step in steps)


def _require_starts(steps: Sequence[RecordedStep], starts: Mapping[int, Mapping[str, Any]]) -> None:
    labels = sorted({step.epoch for step in steps})
    final = labels[-1] + 1
    missing = [label for label in (*labels, final) if label not in starts]
    if missing:
        raise ConfigError(
            expected=f"the state before each recorded epoch, and the final one under {final}",
            got=f"none under {', '.join(map(str, missing))}",
            where="RecordedLoop, starts",
            todo="keep copies of the state dicts of model and optimizer before each epoch, and "
            "after the last",
        )
    for label in (*labels, final):
        state = starts[label]
        keys = list(map(str, state)) if isinstance(state, Mapping) else [type(state).__name__]
        if not {"model", "optimizer"} <= set(keys):
            raise ConfigError(
                expected='states of the form {"model": ..., "optimizer": ...}',
                got=", ".join(keys[:5]),
                where=f"RecordedLoop, starts[{label}]",
                todo="keep model.state_dict() and optimizer.state_dict() under these two names",
            )


def _require_parameters(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: Sequence[RecordedStep]
) -> None:
    """Raise ConfigError unless the optimizer's parameters are the model's, and trainable."""
    named = {
        id(parameter): (row, name) for row, (name, parameter) in enumerate(model.named_parameters())
    }
    ever_used = torch.stack([step.gradient_norms.isfinite().cpu() for step in steps]).any(0)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in named:
                raise ConfigError(
                    expected="an optimizer of the model's parameters",
                    got=f"a parameter of shape {tuple(parameter.shape)} that is not the model's",
                    where="RecordedLoop, optimizer",
                    todo="make it a part of the model before recording: its change is a part of "
                    "each sample's influence",
                )
            row, name = named[id(parameter)]
            if bool(ever_used[row]) and not parameter.requires_grad:
                raise ConfigError(
                    expected="parameters that are trainable now if a step trained them",
                    got=f"{name}, which was frozen since",
                    where="RecordedLoop, model",
                    todo="call requires_grad_(True) on it: the replay leaves it out of the steps "
                    "that did",
                )
    counts = {len(step.groups) for step in steps} | {len(optimizer.param_groups)}
    if len(counts) > 1:
        raise ConfigError(
            expected="the same parameter groups in all steps",
            got=f"from {min(counts)} to {max(counts)} groups",
            where="RecordedLoop, optimizer",
            todo="make all groups when the optimizer is made; requires_grad_(False) freezes those "
            "that begin later",
        )


def require_states(
    model: nn.Module, parameters: Sequence[Tensor], states: Sequence[Mapping[str, Any]]
) -> None:
    """Check that states differ only in trained parameters and whole numbers.

    A derivative takes everything else for constant.

    Parameters
    ----------
    model
        The model.
    parameters
        Those that the optimizer updates.
    states
        The states between the epochs.

    Raises
    ------
    ConfigError
        A state is of another model.
    UnsupportedError
        Something else differs.
    """
    keys = set(model.state_dict())
    for state in states:
        if set(state["model"]) != keys:
            raise ConfigError(
                expected="states of this model",
                got=", ".join(sorted(set(state["model"]) ^ keys)[:5]) + " in one of the two only",
                where="RecordedLoop, starts",
                todo="keep the states of the model that is passed, when it has all its parameters",
            )
    trained = {id(parameter) for parameter in parameters}
    names = {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in trained
    }
    for name, values in states[0]["model"].items():
        if name in names or not (isinstance(values, Tensor) and values.is_floating_point()):
            continue
        if not all(torch.equal(values, s["model"][name].to(values)) for s in states[1:]):
            raise UnsupportedError(
                expected="a model of which nothing but the optimizer's parameters changes",
                got=f"a change of {name} between two epochs",
                where="RecordedLoop, starts",
                todo="train all parameters by the recorded optimizer; train modules with running "
                "statistics in evaluation mode, or without them (track_running_stats=False); keep "
                "averages of the parameters outside of the model",
            )
