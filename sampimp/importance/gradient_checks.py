"""Checks that a step's gradients are those of its samples, and factors by which they are scaled.

Importance is that of the update which is actually made. Clipping by norm and a GradScaler multiply
gradients by a factor, which is taken as a constant of the step. Any other change of a gradient
between its backward pass and the update would make the record wrong, and is refused. In the first
step of each epoch, and in all steps if a parameter has a hook, the sum of the per-sample gradients
is also compared with the batch's gradient, so that a use of a parameter that was not recorded is
noticed.

Map: `GradientChecks`, `SCALINGS` (functions that scale gradients in place), `HIDDEN_CAUSES` (advice
for messages).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sampimp.errors import UnsupportedError
from sampimp.importance.gradients import Factor
from sampimp.importance.model_tensors import ModelTensors
from sampimp.importance.ownership.call import argument
from sampimp.importance.ownership.row_notes import as_sequence

SCALINGS: dict[Callable[..., Any], tuple[bool, int]] = {
    Tensor.mul_: (False, 1),
    Tensor.__imul__: (False, 1),
    Tensor.div_: (True, 1),
    Tensor.__itruediv__: (True, 1),
    torch._foreach_mul_: (False, 1),
    torch._foreach_div_: (True, 1),
    torch._amp_foreach_non_finite_check_and_unscale_: (False, 2),
}
"""Functions that scale gradients in place: whether they divide, and the factor's position."""

HIDDEN_CAUSES = (
    "remove code that hides operations or changes gradients: compiled or scripted modules, "
    "autograd.Functions, checkpoint(use_reentrant=True), DistributedDataParallel"
)
"""Advice for errors: the causes of operations that cannot be recorded."""

_COMPARED_ENTRIES = 2**16
"""Entries of a gradient that are compared; arbitrary, so that no second gradient is kept."""

_BOUNDS = ((1e-4, 0.1), (1e-8, 1e-2), (0.0, 1e-6))
"""Largest relative difference of two sums, by the precision of the outputs: half, single, double.

Single precision may be TF32 on a GPU, with 10 bits.
"""


class GradientChecks:
    """The gradients of one step: their state after its passes, and the factors applied since.

    Parameters
    ----------
    tensors
        The model's parameters.
    """

    def __init__(self, tensors: ModelTensors) -> None:
        self._tensors = tensors

    def begin_step(self, first_of_epoch: bool) -> None:
        """Forget the previous step."""
        self.compares = first_of_epoch or any(map(_has_hooks, self._tensors.parameters))
        """Whether this step's sums are compared: a hook may change any step's gradient."""
        self.used: set[int] = set()
        """Rows of the parameters whose output gradients have arrived, or that were found zero."""
        self.undefined: set[int] = set()
        """Rows of the parameters below a BatchNorm in training mode."""
        self.penalised: set[int] = set()
        """Rows of the parameters in a penalty beside the loss, which belongs to no sample."""
        self.hidden: set[int] = set()
        """Rows of the parameters that were passed to an autograd.Function."""
        self.scales: list[tuple[int, int, Tensor | float]] = []
        """Factors on gradients: row, number of samples whose gradients were scaled, factor."""
        self.precision = 0.0
        """Rounding unit of the coarsest output of a use."""
        self._sums: dict[int, Tensor] = {}  # by row: sum of the per-sample gradients
        self._bounds: dict[int, Tensor] = {}  # by row: sum of their norms, which bounds the sum's
        self._sample_count = 0  # of the passes so far
        # By id: row and version; and the gradient, so that no other tensor gets its id.
        self._gradients: dict[int, tuple[int, int, Tensor]] = {}

    def note_precision(self, output: Tensor) -> None:
        """Take into account the data type of a use's output."""
        if output.is_floating_point():
            self.precision = max(self.precision, torch.finfo(output.dtype).eps)

    def add_sum(self, row: int, factor: Factor) -> None:
        """Add a pass's per-sample gradients to the sum of a parameter."""
        bound = factor.square().sqrt().sum()
        self._sums[row] = self._sums.get(row, 0) + _some_entries(factor.summed())
        self._bounds[row] = self._bounds.get(row, 0) + bound

    def end_pass(self, sample_count: int) -> None:
        """Note the gradients as the passes so far, over `sample_count` samples, have made them."""
        self._sample_count = sample_count
        self._gradients = {
            id(parameter.grad): (row, parameter.grad._version, parameter.grad)
            for row, parameter in enumerate(self._tensors.parameters)
            if parameter.grad is not None
        }

    def forget_gradients(self) -> None:
        """Drop the references to the gradients, so that the user can free them."""
        self._gradients = {}

    def known(self, value: Any) -> list[Tensor]:
        """Return the step's gradients among a tensor or a list of tensors."""
        return [tensor for tensor in as_sequence(value) if id(tensor) in self._gradients]

    def _is_unchanged(self, row: int, gradient: Tensor) -> bool:
        return self._gradients.get(id(gradient), ())[:2] == (row, gradient._version)

    def scale(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Carry out a scaling of gradients, and note the factor."""
        tensors, gradients = as_sequence(args[0]), self.known(args[0])
        were_known = [self._gradients[id(g)][1] == g._version for g in gradients]
        output = function(*args, **kwargs)
        divides, position = SCALINGS[function]
        factors = argument(args, kwargs, position, "other", 1.0)
        for gradient, was_known in zip(gradients, were_known, strict=True):
            row = self._gradients[id(gradient)][0]
            factor = factors
            if isinstance(factor, list | tuple):
                factor = factor[[tensor is gradient for tensor in tensors].index(True)]
            factor = 1 / factor if divides else factor
            is_number = not isinstance(factor, Tensor) or factor.numel() == 1
            if was_known and is_number and "rounding_mode" not in kwargs:
                if isinstance(factor, Tensor):  # which the user may fill anew
                    factor = factor.clone()
                self.scales.append((row, self._sample_count, factor))
                self._gradients[id(gradient)] = row, gradient._version, gradient
                if row in self._sums:
                    self._sums[row] = self._sums[row] * factor
                    self._bounds[row] = self._bounds[row] * abs(factor)
        return output

    def require_fresh(self, is_first_pass: bool) -> None:
        """Raise UnsupportedError if gradients, before a backward pass, come from elsewhere.

        They have to be empty before the step's first pass, and those of its passes afterwards.
        """
        for row, parameter in enumerate(self._tensors.parameters):
            gradient = parameter.grad
            if gradient is None:
                stale, got = not is_first_pass and row in self.used, "none"
            elif id(gradient) in self._gradients:
                stale, got = not self._is_unchanged(row, gradient), "a changed gradient"
            else:
                stale, got = bool(_dense(gradient).any()), "a gradient from elsewhere"
            if stale:
                raise UnsupportedError(
                    expected="gradients that are empty before the step's first backward pass, and "
                    "unchanged until its last, except for a factor",
                    got=got,
                    where=self._tensors.place(row),
                    todo="call optimizer.zero_grad() once in the block, before its backward "
                    "passes (model.zero_grad() if the optimizer lacks the parameter); to "
                    "accumulate, pass one index per backward pass: step([index_1, index_2], ...); "
                    + HIDDEN_CAUSES,
                )

    def require_unchanged(self) -> None:
        """Raise UnsupportedError unless the gradients are as the step's passes have made them."""
        for row, parameter in enumerate(self._tensors.parameters):
            gradient = parameter.grad
            if gradient is None or not parameter.requires_grad:
                continue
            if not self._is_unchanged(row, gradient):
                raise UnsupportedError(
                    expected="the gradients of this step's backward passes",
                    got="a gradient that was changed otherwise than by a factor",
                    where=self._tensors.place(row),
                    todo="clip by norm, not by value, and change no gradient between backward() "
                    "and optimizer.step()",
                )
            if (row not in self.used or row in self.hidden) and bool(_dense(gradient).any()):
                raise UnsupportedError(
                    expected="gradients that come from recorded operations only",
                    got="a gradient from an operation that could not be recorded",
                    where=self._tensors.place(row),
                    todo=HIDDEN_CAUSES,
                )
            if row in self.penalised and _has_hooks(parameter):
                raise UnsupportedError(
                    expected="no hook on a parameter with a penalty: the gradient of the samples "
                    "alone cannot be compared with their sum",
                    got="a hook that may change the gradient",
                    where=self._tensors.place(row),
                    todo="remove the hook, or leave the penalty to the optimizer's weight_decay",
                )
            if row in self._sums and row not in self.penalised | self.undefined:
                self._compare(row, gradient)

    @torch.no_grad()
    def _compare(self, row: int, gradient: Tensor) -> None:
        """Raise UnsupportedError unless the per-sample gradients add up to the batch's."""
        relative = next(relative for least, relative in _BOUNDS if self.precision >= least)
        # Some gradients are nothing but rounding errors, as that of the bias of attention's keys.
        largest = torch.stack([bound.to(gradient.device) for bound in self._bounds.values()]).max()
        rounding = 100 * self.precision * largest
        difference = (self._sums[row] - _some_entries(gradient)).norm()
        if bool(difference > relative * self._bounds[row] + rounding):
            raise UnsupportedError(
                expected="a gradient that is the sum of the samples' gradients",
                got="a gradient that differs from the sum by "
                f"{float(difference / self._bounds[row]):.1%} of the sum of the samples' norms",
                where=self._tensors.place(row),
                todo="clip by norm, and change no gradient by hooks or by .data; " + HIDDEN_CAUSES,
            )

    def overflowed(self) -> bool:
        """Return whether a gradient of this step is not finite."""
        gradients = [p.grad for p in self._tensors.parameters if p.grad is not None]
        return not all(bool(torch.isfinite(_dense(gradient)).all()) for gradient in gradients)


def _has_hooks(parameter: Tensor) -> bool:
    """Return whether the user's hooks see, and may change, a parameter's gradient."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def _some_entries(gradient: Tensor) -> Tensor:
    """Return the entries of a gradient that are compared; all those of a small one."""
    step = gradient.numel() // _COMPARED_ENTRIES | 1  # odd, so that it meets all columns
    return _dense(gradient).flatten()[::step].clone()


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.layout == torch.sparse_coo else gradient
