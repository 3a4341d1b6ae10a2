"""Which rule belongs to which function: the table `RULES`, and the call shape of all rules.

A rule is a function `rule(batch, delta, *args, **kwargs)`. `batch` is a `Batch`; `delta` is the
gradient of the batch's loss by the operation's output (a sequence of gradients if there are several
outputs); `args` and `kwargs` are the operation's arguments as it was called. The rule yields
pairs of a parameter and a factor of its per-sample gradients (`sampimp.importance.gradients`). It
may yield pairs for all its arguments: the recorder ignores None and tensors that depend on no
trained parameter.

A *look* is a function `look(batch, outputs, *args, **kwargs)` for an operation that hides others.
It is called right after the operation, and returns the nodes of autograd's graph that contain the
gradients inside (`InnerNodes`), or None. When the backward pass has ended, the nodes' reader yields
the factors. Only if `look` has returned None is the rule called, with the operation's first output
in `Batch.output`.

A *features* entry says which axes of an output cannot be the batch axis: a number of last axes, or
a function `features(batch, ndim, *args, **kwargs)` of the output's number of axes. The default 0
permits every axis.

An operation without a rule goes through `vmap_factors`, which is exact as well, and slower.

Map: `RULES` (the table), `LayerRule` (its entries), `layer_rule` (add an entry), `factors_of`,
`look_inside`, `feature_axes`, `looks_inside` and `is_sum` (called by the recorder).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sampimp.importance.rules.arithmetic import (
    add_factors,
    expand_factors,
    mul_factors,
    sub_factors,
)
from sampimp.importance.rules.batch import Batch, Factors, Features
from sampimp.importance.rules.convolution import (
    conv_factors,
    conv_features,
    conv_transpose_factors,
)
from sampimp.importance.rules.embedding import embedding_bag_factors, embedding_factors
from sampimp.importance.rules.fallback import vmap_factors
from sampimp.importance.rules.inner_nodes import InnerNodes
from sampimp.importance.rules.linear import (
    addmm_factors,
    addmm_features,
    linear_factors,
    matmul_factors,
    matmul_features,
)
from sampimp.importance.rules.normalization import (
    all_but_first,
    batch_norm_factors,
    group_norm_factors,
    instance_norm_factors,
    layer_norm_factors,
    normalized_features,
    prelu_factors,
    rms_norm_factors,
)
from sampimp.importance.rules.recurrent import recurrent_cell_factors, recurrent_factors
from sampimp.importance.rules.recurrent_graph import look_into_cell, look_into_layer

Rule = Callable[..., Factors]
Look = Callable[..., InnerNodes | None]


@dataclass(frozen=True)
class LayerRule:
    """The rule of an operation; see the docstring of the module for the call shapes."""

    factors: Rule
    features: Features = 0
    look: Look | None = None
    is_sum: bool = False
    """Whether a parameter's term in the output depends on no sample, as in a sum."""


_LINEAR = LayerRule(linear_factors, features=1)
_MATMUL = LayerRule(matmul_factors, matmul_features)
_ADDMM = LayerRule(addmm_factors, addmm_features)
_CONV = LayerRule(conv_factors, conv_features)
_CONV_TRANSPOSE = LayerRule(conv_transpose_factors, conv_features)
_PRELU = LayerRule(prelu_factors, all_but_first)
_ADD = LayerRule(add_factors, is_sum=True)
_SUB = LayerRule(sub_factors, is_sum=True)
_MUL = LayerRule(mul_factors)
_EXPAND = LayerRule(expand_factors)


def _recurrent_layer(name: str) -> LayerRule:
    return LayerRule(partial(recurrent_factors, name), 1, partial(look_into_layer, name))


def _recurrent_cell(name: str) -> LayerRule:
    return LayerRule(partial(recurrent_cell_factors, name), 1, partial(look_into_cell, name))


RULES: dict[Callable[..., Any], LayerRule] = {
    # Matrix products
    functional.linear: _LINEAR,
    torch.matmul: _MATMUL,
    Tensor.matmul: _MATMUL,
    Tensor.__matmul__: _MATMUL,
    torch.mm: _MATMUL,
    Tensor.mm: _MATMUL,
    torch.addmm: _ADDMM,
    Tensor.addmm: _ADDMM,
    # Tables
    functional.embedding: LayerRule(embedding_factors, features=1),
    functional.embedding_bag: LayerRule(embedding_bag_factors, features=1),
    # Normalisations
    functional.layer_norm: LayerRule(layer_norm_factors, normalized_features),
    functional.rms_norm: LayerRule(rms_norm_factors, normalized_features),
    functional.group_norm: LayerRule(group_norm_factors, all_but_first),
    functional.instance_norm: LayerRule(instance_norm_factors, all_but_first),
    functional.batch_norm: LayerRule(batch_norm_factors, all_but_first),
    functional.prelu: _PRELU,
    torch.prelu: _PRELU,
    Tensor.prelu: _PRELU,
    # Convolutions
    functional.conv1d: _CONV,
    functional.conv2d: _CONV,
    functional.conv3d: _CONV,
    functional.conv_transpose1d: _CONV_TRANSPOSE,
    functional.conv_transpose2d: _CONV_TRANSPOSE,
    functional.conv_transpose3d: _CONV_TRANSPOSE,
    # Arithmetic
    torch.add: _ADD,
    Tensor.add: _ADD,
    Tensor.add_: _ADD,
    Tensor.__add__: _ADD,
    Tensor.__radd__: _ADD,
    Tensor.__iadd__: _ADD,
    torch.sub: _SUB,
    Tensor.sub: _SUB,
    Tensor.sub_: _SUB,
    Tensor.__sub__: _SUB,
    Tensor.__isub__: _SUB,
    torch.mul: _MUL,
    Tensor.mul: _MUL,
    Tensor.__mul__: _MUL,
    Tensor.__rmul__: _MUL,
    Tensor.expand: _EXPAND,
    Tensor.expand_as: _EXPAND,
    torch.broadcast_to: _EXPAND,
    Tensor.broadcast_to: _EXPAND,
    Tensor.repeat: _EXPAND,
    # Recurrent layers and cells
    torch.rnn_tanh: _recurrent_layer("rnn_tanh"),
    torch.rnn_relu: _recurrent_layer("rnn_relu"),
    torch.lstm: _recurrent_layer("lstm"),
    torch.gru: _recurrent_layer("gru"),
    torch.rnn_tanh_cell: _recurrent_cell("rnn_tanh"),
    torch.rnn_relu_cell: _recurrent_cell("rnn_relu"),
    torch.lstm_cell: _recurrent_cell("lstm"),
    torch.gru_cell: _recurrent_cell("gru"),
}
"""The rule of each function, under every name by which it is called."""


def layer_rule(
    *functions: Callable[..., Any], look: Look | None = None, features: Features = 0
) -> Callable[[Rule], Rule]:
    """Register a rule for operations; it replaces an earlier one.

    Parameters
    ----------
    *functions
        The operation, under every name by which it is called.
    look
        `look(batch, outputs, *args, **kwargs)`: finds the nodes inside the operation, if it hides
        others.
    features
        How many of the last axes of an output cannot be the batch axis.

    Returns
    -------
    callable
        Decorator for the rule, `rule(batch, delta, *args, **kwargs)`, which yields pairs of a
        parameter and a factor of its per-sample gradients. The call shapes are described in
        `sampimp.importance.rules.registry`.

    Examples
    --------
    A rule for x -> x * exp(s) as one operation:

    >>> from torch.overrides import handle_torch_function, has_torch_function
    >>> from sampimp import layer_rule
    >>> from sampimp.importance.gradients import Explicit
    >>> def scaled(input, s):
    ...     if has_torch_function((input, s)):  # makes the operation visible to a recorder
    ...         return handle_torch_function(scaled, (input, s), input, s)
    ...     return input * s.exp()
    >>> @layer_rule(scaled)
    ... def scaled_factors(batch, delta, input, s):
    ...     yield s, Explicit(batch.reduced(delta * input * s.exp(), s.shape))
    """

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, LayerRule(rule, features, look)))
        return rule

    return register


def feature_axes(
    batch: Batch,
    function: Callable[..., Any],
    ndim: int,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> int:
    """Return how many of the last axes of an output belong to one row."""
    rule = RULES.get(function)
    features = 0 if rule is None else rule.features
    return features if isinstance(features, int) else features(batch, ndim, *args, **kwargs)


def is_sum(function: Callable[..., Any]) -> bool:
    """Return whether a parameter's term in the function's output depends on no sample."""
    rule = RULES.get(function)
    return rule is not None and rule.is_sum


def looks_inside(function: Callable[..., Any]) -> bool:
    """Return whether the rule of a function looks at the nodes inside the operation."""
    rule = RULES.get(function)
    return rule is not None and rule.look is not None


def look_inside(
    function: Callable[..., Any],
    batch: Batch,
    outputs: Sequence[Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> InnerNodes | None:
    """Return the nodes inside an operation for which `looks_inside`; None if some are missing."""
    look = RULES[function].look
    return None if look is None else look(batch, outputs, *args, **kwargs)


def factors_of(
    function: Callable[..., Any],
    batch: Batch,
    delta: Tensor | Sequence[Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Factors:
    """Return the factors of an operation's parameters, by its rule or by `vmap_factors`."""
    rule = RULES.get(function)
    factors = partial(vmap_factors, function) if rule is None else rule.factors
    return factors(batch, delta, *args, **kwargs)
