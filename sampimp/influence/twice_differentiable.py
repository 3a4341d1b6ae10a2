"""Operations that can be differentiated twice, in the place of those that cannot.

Not every operation of PyTorch has a second derivative, and that of one is wrong:

    attention          the fused kernels have none; the composed one has
    recurrent layers   those of oneDNN (CPU, float32) and cuDNN have none; the native ones have
    weight_norm        takes the norm for a constant; v * (g / |v|) is carried out instead
    sparse embeddings  their gradients have none; they are dense here

The others differ from these by rounding errors. Two things are refused, because nothing could tell
whether the second derivative is right. A hook on gradients would be called again in the second
derivative, whose gradients are others. The backward pass of an autograd.Function may be no
derivative (straight-through estimators, reversed gradients), or take a variable for a constant.

Map: `twice_differentiable` (for a forward pass), `native_recurrence` (its part that first
derivatives need as well), `require_no_hooks` (of a model), `require_no_functions` (in a graph),
`second_derivatives` (names an operation that has none).
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from sampimp.errors import UnsupportedError

_SWITCHES = {
    "attention": "leave out the model's own sdpa_kernel(...)",
    "rnn": "leave torch.backends.mkldnn and torch.backends.cudnn as they are in the model",
}
"""What chose a kernel without a second derivative, by a part of the kernel's name."""


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Carry a model's forward pass out by operations that can be differentiated twice."""
    with sdpa_kernel(SDPBackend.MATH), native_recurrence(model), _Replacements():
        yield


@contextmanager
def native_recurrence(model: nn.Module) -> Iterator[None]:
    """Carry recurrent layers out by PyTorch's own operations; does nothing without such layers.

    The gradient of a recurrent layer in evaluation mode needs it, which cuDNN refuses.
    """
    with ExitStack() as stack:
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            stack.enter_context(_without_mkldnn())
        yield


@contextmanager
def _without_mkldnn() -> Iterator[None]:
    """Switch oneDNN off; `torch.backends.mkldnn.flags` sets TF32 as well, and warns on a CPU."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


class _Replacements(TorchFunctionMode):
    """Replaces operations; below the mode of the recorder, which sees the original ones."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        kinds: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is Tensor.register_hook:
            raise _hook_error("a tensor of the forward pass")
        kwargs = kwargs or {}
        if function is torch._weight_norm:
            return _weight_norm(*args, **kwargs)
        position = _SPARSE.get(function)
        if position is not None:
            args, kwargs = args[:position], {**kwargs, "sparse": False}
        return function(*args, **kwargs)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


_SPARSE: dict[Callable[..., Any], int] = {functional.embedding: 6, torch.embedding: 4}
"""Functions whose last argument asks for sparse gradients, and its position."""


def require_no_hooks(model: nn.Module) -> None:
    """Raise UnsupportedError for a hook on a gradient of a module or a parameter."""
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise _hook_error(f"module {name}" if name else "the model itself")
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks:
            raise _hook_error(f"parameter {name}")


def require_no_functions(loss: Tensor) -> None:
    """Raise UnsupportedError for an autograd.Function in a tensor's graph.

    Custom operations (`torch.library`) are such functions as well, of classes that PyTorch makes.
    """
    visited: set[Any] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in visited:
            visited.add(node)
            waiting += [child for child, _ in node.next_functions]
            function = getattr(node, "_forward_cls", None)
            if function is not None and not function.__module__.startswith("sampimp."):
                raise UnsupportedError(
                    expected="operations of PyTorch, whose second derivatives are known",
                    got=f"the autograd.Function {node.name()}",
                    where="the network, in the product with the Hessian of a step's loss",
                    todo="write it by operations of PyTorch for the reverse pass",
                )


def _hook_error(where: str) -> UnsupportedError:
    return UnsupportedError(
        expected="gradients without hooks: a second derivative would call them again",
        got="a hook on a gradient",
        where=where,
        todo="take the hook off for the reverse pass; if it changes the gradient, train without it",
    )


@contextmanager
def second_derivatives() -> Iterator[None]:
    """Name an operation that cannot be differentiated twice.

    Raises
    ------
    UnsupportedError
        A second derivative that is computed inside the block does not exist.
    """
    try:
        yield
    except RuntimeError as error:
        match = re.search(r"derivative for '?([\w:]+)'? is not implemented", str(error))
        if match is None:
            raise
        name = match[1]
        switches = [advice for part, advice in _SWITCHES.items() if part in name]
        raise UnsupportedError(
            expected="operations that can be differentiated twice",
            got=name,
            where="the reverse pass, in the product with the Hessian of a step's loss",
            todo=" ".join(switches) or "replace the operation by others with the same result",
        ) from error
