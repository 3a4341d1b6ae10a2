"""Hooks on optimizers that run before and after the update of a recorded step.

Before the recorder's optimizer makes its update, the gradients are checked and recording is
suspended; afterwards the update's derivative is known. Updates by other optimizers in the same
block are noticed too, because they may move the same parameters.

Map: `UpdateHooks`.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from sampimp.errors import UnsupportedError
from sampimp.importance.ownership.call import argument
from sampimp.importance.recorded_step import gradient_norms
from sampimp.importance.step import Capture
from sampimp.importance.update import UpdateDerivative


class UpdateHooks:
    """Hooks on the optimizers during one recorded step.

    Parameters
    ----------
    optimizer
        The recorder's optimizer.
    capture, derivative
        Called before and after its update.
    keeps_settings
        Whether to note `settings`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        capture: Capture,
        derivative: UpdateDerivative,
        *,
        keeps_settings: bool,
    ) -> None:
        self._optimizer, self._capture, self._derivative = optimizer, capture, derivative
        self._keeps_settings = keeps_settings
        self.updates = 0
        """Updates made by the recorder's optimizer."""
        self.moved_by: dict[str, list[Tensor]] = {}
        """Parameters that other optimizers have moved, by the class of the optimizer."""
        self.settings: dict[str, Any] = {}
        """`groups`, `training` and `gradient_norms` of `RecordedStep`, at the update."""

    def __enter__(self) -> "UpdateHooks":
        """Register the hooks."""
        self._handles = (
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_update),
            register_optimizer_step_post_hook(self._after_any_update),
        )
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the hooks."""
        self._derivative.forget()
        for handle in self._handles:
            handle.remove()

    def _before_step(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Prepare for the update: now, or when the closure passed to `optimizer.step` is done."""
        closure = argument(args, kwargs, 1, "closure", None)  # argument 0 is the optimizer
        if closure is None:
            return self._before_update()
        recorded = self._recorded(closure)
        if len(args) > 1:
            return (args[0], recorded, *args[2:]), kwargs
        return args, {**kwargs, "closure": recorded}

    def _recorded(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return a closure that is recorded, and followed by the preparation for the update."""

        def recorded() -> Any:
            self._capture.watch.resume()  # so that a second call is recorded, and refused
            loss = closure()
            self._before_update()
            return loss

        return recorded

    def _before_update(self) -> None:
        self._capture.watch.suspend()
        self._capture.check()
        self._require_last_hook()
        if self._keeps_settings:
            self._note_settings()
        self._derivative.before()

    def _require_last_hook(self) -> None:
        """Raise UnsupportedError if a hook may change the gradients that have been checked."""
        hooks = self._optimizer._optimizer_step_pre_hooks
        later = list(hooks)[list(hooks).index(self._handles[0].id) + 1 :]
        if not all(isinstance(getattr(hooks[key], "__self__", 0), UpdateHooks) for key in later):
            raise UnsupportedError(
                expected="no hook that runs between the check of the gradients and the update",
                got="a step pre-hook that was registered inside the block",
                where=type(self._optimizer).__name__,
                todo="register it before the block, or change nothing before the update",
            )

    def _note_settings(self) -> None:
        tensors = self._capture.tensors
        self.settings = {
            "groups": [
                # Copies: a scheduler changes a rate that is a tensor in place.
                {name: deepcopy(value) for name, value in group.items() if name != "params"}
                for group in self._optimizer.param_groups
            ],
            "training": frozenset(
                name for name, module in tensors.model.named_modules() if module.training
            ),
            "gradient_norms": gradient_norms([p.grad for p in tensors.parameters]),
        }

    def _after_update(self, *_: Any) -> None:
        self.updates += 1
        if self.updates == 1:
            self._capture.finish(self._derivative.after())
        self._capture.watch.resume()

    def _after_any_update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if optimizer is not self._optimizer:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            moved = [parameter for parameter in parameters if parameter.grad is not None]
            self.moved_by.setdefault(type(optimizer).__name__, []).extend(moved)
