"""How each operation of a network makes per-sample gradients of its parameters: one rule each.

A rule is given the batch, delta (the gradient of the batch's loss at the operation's output) and
the operation's arguments, and yields for each parameter among them a factor of its per-sample
gradients (`sampimp.importance.gradients`). It may yield factors of all parameters: what is frozen,
absent or no
parameter is left out by who asks. The rules are of functions (`torch.nn.functional.linear`) and not
of modules (`nn.Linear`), since modules are many and all come down to a few functions: tied weights,
modules that are called twice, attention and models with parameters of their own need nothing more.

A rule of one's own, for x -> x * exp(s) as one operation:

>>> from torch.overrides import handle_torch_function, has_torch_function
>>> def scaled(input, s):
...     if has_torch_function((input, s)):  # so that a recorder sees it
...         return handle_torch_function(scaled, (input, s), input, s)
...     return input * s.exp()
>>> @layer_rule(scaled)
... def _scaled(batch, delta, input, s):
...     yield s, Explicit(batch.reduced(delta * input * s.exp(), s.shape))

What has no rule goes through `generic`: exact as well, slower. Shape suffixes as in
`sampimp.importance.gradients`; S... are the axes of an image, K what is unfolded of it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_flatten, tree_unflatten

from sampimp.errors import UnsupportedError
from sampimp.importance.gradients import Explicit, Factor, Outer, Product, Rows, chunk
from sampimp.importance.rules.inner_nodes import InnerNodes


@dataclass(frozen=True)
class Batch:
    """Where the samples of a batch are in the tensors of an operation.

    For a rule, every row of one axis is a sample of its own, and `dim` is that axis; rows of the
    same sample are joined afterwards (`Factor.joined`).
    """

    size: int
    """Number of samples, N."""
    dim: int
    """Axis of the samples. Before an operation is known: where another one, of positions, is beside
    it, 0 or 1."""
    varies: Callable[[Tensor], bool]
    """Whether a tensor depends on the samples: parameters, buffers and what is made of them do not.
    """

    def axis(self, ndim: int, features: int) -> int:
        """Return where samples are expected in a tensor with `features` axes of one position."""
        return self.dim if ndim - features >= 2 else 0

    def first(self, values: Tensor, features: int = 1) -> Tensor:
        """Return values with the samples on the first axis: (N, ..., features).

        Raises
        ------
        UnsupportedError
            There is no axis of N samples.
        """
        if values.dim() > max(self.dim, features) and values.shape[self.dim] == self.size:
            return values.movedim(self.dim, 0)
        raise UnsupportedError(
            expected=f"{self.size} samples on axis {self.dim}, one for each index of the step",
            got=f"a tensor of shape {tuple(values.shape)}",
            where="an operation with parameters",
            todo="name as many samples as the batch has, and batch_dim=1 where positions come "
            "before samples; keep the samples on an axis of their own, and make a buffer of what "
            "depends on none",
        )

    def rows(self, values: Tensor) -> Tensor:
        """Return values of the last axis by sample and position, (N, T, K)."""
        values = self.first(values)
        return values.unsqueeze(1) if values.dim() == 2 else values.flatten(1, -2)

    def reduced(self, values: Tensor, shape: Sequence[int], rows: bool = True) -> Tensor:
        """Return values summed to what was broadcast to them, but for the samples: (N, P...).

        What has as many rows as there are samples has one for each, unless `rows` is False.

        Raises
        ------
        UnsupportedError
            It has rows that are no samples'.

        Examples
        --------
        >>> batch = Batch(2, 0, lambda _: True)
        >>> batch.reduced(torch.ones(2, 3, 4), (4,))
        tensor([[3., 3., 3., 3.],
                [3., 3., 3., 3.]])
        """
        axis = self.dim
        if values.dim() <= axis or values.shape[axis] != self.size:
            values, axis = self.first(values), 0
        padded = [1] * (values.dim() - len(shape)) + list(shape)
        fits = all(size in (1, own) for size, own in zip(padded, values.shape, strict=True))
        summed = [
            d for d, size in enumerate(padded) if d != axis and size == 1 and values.shape[d] > 1
        ]
        values = values.sum(summed, keepdim=True) if summed else values
        if fits and padded[axis] == 1:
            values = values.movedim(axis, 0)
        elif fits and rows and padded[axis] == self.size:  # a row for each sample, its alone
            values = torch.diag_embed(values.movedim(axis, -1)).movedim(-2, axis).movedim(-1, 0)
        else:
            raise UnsupportedError(
                expected="a parameter that meets all samples alike",
                got=f"one of shape {tuple(shape)} on {self.size} rows",
                where="arithmetic with a parameter",
                todo="take a sample's rows by its index (parameter[index]), and make a tensor that "
                "depends on no sample a buffer",
            )
        return values.reshape(self.size, *shape)


Factors = Iterable[tuple[Tensor | None, Factor]]
Rule = Callable[..., Factors]
Features = int | Callable[..., int]

RULES: dict[Callable[..., Any], Rule] = {}
"""The rule of each operation."""

FEATURES: dict[Callable[..., Any], Features] = {}
"""Of the operations whose rows are more than one entry: how many axes of an output are one row's.

Samples may lie on any axis before these. The number, or a function of the batch, the output's
number of axes and the arguments; where there is none, samples may lie on any axis.
"""

LOOKS: dict[Callable[..., Any], Callable[..., InnerNodes | None]] = {}
"""Of the operations whose rule is given what is seen of them: how to look into one."""


def layer_rule(
    *functions: Callable[..., Any],
    look: Callable[..., InnerNodes | None] | None = None,
    features: Features | None = None,
) -> Callable[[Rule], Rule]:
    """Register a rule for operations, by whatever name they are called.

    The rule is called as `rule(batch, delta, *args, **kwargs)`, with the arguments of the
    operation, and yields pairs of a parameter and a factor of its per-sample gradients.

    `features` says which axes of an output cannot have the samples, see `FEATURES`.

    Where the operation hides others, `look(batch, outputs, *args, **kwargs)` is called after it and
    returns what is seen of them in autograd's graph, or None. The rule is then called as
    `rule(batch, None, reader, *args, **kwargs)` with the reader of that, when the backward pass is
    over. Where nothing was seen, it is called as `rule(batch, delta, output, *args, **kwargs)` with
    the (first) output, or None where that has been changed in place since.
    """

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, rule))
        for function in functions:
            LOOKS.pop(function, None)
            FEATURES.pop(function, None)
            if look is not None:
                LOOKS[function] = look
            if features is not None:
                FEATURES[function] = features
        return rule

    return register


def feature_axes(
    batch: Batch,
    function: Callable[..., Any],
    ndim: int,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> int:
    """Return how many of the last axes of an output are those of one row."""
    features = FEATURES.get(function, 0)
    return features if isinstance(features, int) else features(batch, ndim, *args, **kwargs)


def all_but_first(batch: Batch, ndim: int, *_: Any, **__: Any) -> int:
    """Return the feature axes of what has samples on its first axis alone."""
    return ndim - 1


def all_but_samples(
    batch: Batch, ndim: int, input: Tensor, weight: Tensor, *_: Any, **__: Any
) -> int:
    """Return the feature axes of a convolution: all, of an image without an axis of samples."""
    return ndim - (weight.dim() == ndim)


def _normalized(
    batch: Batch, ndim: int, input: Tensor, normalized_shape: Sequence[int], *_: Any, **__: Any
) -> int:
    return len(normalized_shape)


def _of_product(batch: Batch, ndim: int, input: Tensor, other: Tensor) -> int:
    return int(batch.varies(input) and not batch.varies(other))


def _of_sum(batch: Batch, ndim: int, input: Tensor, mat1: Tensor, mat2: Tensor, **_: Any) -> int:
    return _of_product(batch, ndim, mat1, mat2)


# Products.


@layer_rule(functional.linear, features=1)
def _linear(
    batch: Batch, delta: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Factors:
    product = _product(batch, delta, input, weight)
    yield weight, product
    if isinstance(product, Product):
        yield bias, product.left
    else:
        yield bias, Explicit(product.left.sum((1, 2)))


def _product(batch: Batch, left: Tensor, right: Tensor, weight: Tensor) -> Product | Outer:
    if left.dim() == 2 and not batch.dim:
        return Product(Explicit(left), Explicit(right))
    return Outer(batch.rows(left).unsqueeze(2), batch.rows(right).unsqueeze(2), weight.shape)


@layer_rule(torch.addmm, Tensor.addmm, features=_of_sum)
def _addmm(
    batch: Batch,
    delta: Tensor,
    input: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Factors:
    yield from _matmul(batch, delta if alpha == 1 else alpha * delta, mat1, mat2)
    yield from _add(batch, delta, None, input, alpha=beta)


@layer_rule(
    *(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), features=_of_product
)
def _matmul(batch: Batch, delta: Tensor, input: Tensor, other: Tensor) -> Factors:
    if batch.varies(other) or other.dim() != 2 or input.dim() < 2:
        yield from generic(batch, delta, input, other, function=torch.matmul)
        return
    yield other, _product(batch, input, delta, other)


def require_samples(batch: Batch, values: Tensor, where: str, least: int = 2) -> None:
    """Raise UnsupportedError unless values are (N, ...), of so many axes at least."""
    if values.dim() < least or len(values) != batch.size:
        raise UnsupportedError(
            expected=f"{batch.size} samples on the first axis, one for each index of the step",
            got=f"a tensor of shape {tuple(values.shape)}",
            where=where,
            todo="name as many samples as the batch has",
        )


# Tables.


@layer_rule(functional.embedding, features=1)
def _embedding(
    batch: Batch,
    delta: Tensor,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Factors:
    _refuse("embedding with scale_grad_by_freq, which mixes the samples,", scale_grad_by_freq)
    index_NT = batch.first(input, 0).reshape(batch.size, -1)
    vectors_NTE = batch.rows(delta)
    if padding_idx is not None:
        unused = index_NT == padding_idx % len(weight)
        vectors_NTE = vectors_NTE.masked_fill(unused[:, :, None], 0)
    yield weight, Rows(vectors_NTE, index_NT, weight.shape)


@layer_rule(functional.embedding_bag, features=1)
def _embedding_bag(
    batch: Batch,
    delta: Tensor,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Factors:
    _refuse("embedding_bag with scale_grad_by_freq, which mixes the samples,", scale_grad_by_freq)
    _refuse('embedding_bag with mode "max"', mode == "max")
    share = torch.ones_like(input, dtype=delta.dtype)
    share = share if per_sample_weights is None else per_sample_weights.detach()
    if offsets is not None:
        ends = offsets[1:] if include_last_offset else None
        starts = offsets[:-1] if include_last_offset else offsets
        ends = torch.cat([starts[1:], starts.new_tensor([len(input)])]) if ends is None else ends
        lengths = ends - starts
        place = starts[:, None] + torch.arange(int(lengths.max()), device=starts.device)
        inside = place < ends[:, None]
        place = place.clamp_max(len(input) - 1)
        input, share = input[place], share[place] * inside
    else:
        inside = torch.ones_like(input, dtype=torch.bool)
    if padding_idx is not None:
        inside = inside & (input != padding_idx % len(weight))
        share = share * inside
    if mode == "mean":
        share = share / inside.sum(1, keepdim=True).clamp_min(1)
    require_samples(batch, delta, "embedding_bag")
    yield weight, Rows(delta[:, None, :] * share[:, :, None], input, weight.shape)


# Normalisations: the gradient of the scale is delta times what was normalised.


@layer_rule(functional.layer_norm, features=_normalized)
def _layer_norm(
    batch: Batch,
    delta: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Factors:
    normal = functional.layer_norm(input, normalized_shape, eps=eps)
    return _scale_and_shift(batch, delta, normal, weight, bias, len(normalized_shape))


@layer_rule(functional.rms_norm, features=_normalized)
def _rms_norm(
    batch: Batch,
    delta: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Factors:
    normal = functional.rms_norm(input, normalized_shape, eps=eps)
    return _scale_and_shift(batch, delta, normal, weight, None, len(normalized_shape))


def _scale_and_shift(
    batch: Batch,
    delta: Tensor,
    normal: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    features: int,
) -> Factors:
    for parameter, values in ((weight, delta * normal), (bias, delta)):
        values = batch.first(values, features)
        positions = list(range(1, values.dim() - features))
        yield parameter, Explicit(values.sum(positions) if positions else values)


@layer_rule(functional.group_norm, features=all_but_first)
def _group_norm(
    batch: Batch,
    delta: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Factors:
    normalise = partial(functional.group_norm, num_groups=num_groups, eps=eps)
    return _by_channel(batch, delta, input, normalise, weight, bias)


@layer_rule(functional.instance_norm, features=all_but_first)
def _instance_norm(
    batch: Batch,
    delta: Tensor,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Factors:
    def normalise(some: Tensor) -> Tensor:
        if use_input_stats:  # and the running ones are not to be moved again
            return functional.instance_norm(some, eps=eps)
        stored = running_mean, running_var
        return functional.instance_norm(some, *stored, use_input_stats=False, eps=eps)

    return _by_channel(batch, delta, input, normalise, weight, bias)


@layer_rule(functional.batch_norm, features=all_but_first)
def _batch_norm(
    batch: Batch,
    delta: Tensor,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Factors:
    # In training it mixes the samples; the capture does not ask for it then.
    def normalise(some: Tensor) -> Tensor:
        return functional.batch_norm(some, running_mean, running_var, eps=eps)

    return _by_channel(batch, delta, input, normalise, weight, bias)


@layer_rule(functional.prelu, torch.prelu, Tensor.prelu, features=all_but_first)
def _prelu(batch: Batch, delta: Tensor, input: Tensor, weight: Tensor) -> Factors:
    values = delta * input.clamp_max(0)
    values = batch.first(values, min(values.dim() - 1, 1))
    if len(weight) == 1:
        yield weight, Explicit(values.reshape(batch.size, -1).sum(1, keepdim=True))
    else:
        yield weight, Explicit(_by_channel_sum(values))


def _by_channel(
    batch: Batch,
    delta: Tensor,
    input: Tensor,
    normalise: Callable[[Tensor], Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
) -> Factors:
    require_samples(batch, delta, "a normalisation by channel")
    if weight is not None:
        # By a few samples, which stay in the cache: of 128 of 64 x 32 x 32 8 ms instead of 42.
        few = chunk(4 * delta[0].numel() if len(delta) else 1, delta)
        pieces = zip(delta.split(few), input.split(few), strict=True)
        sums = [_by_channel_sum(own * normalise(some)) for own, some in pieces]
        yield weight, Explicit(torch.cat(sums))
    if bias is not None:
        yield bias, Explicit(_by_channel_sum(delta))


def _by_channel_sum(values: Tensor) -> Tensor:
    return values.flatten(2).sum(2) if values.dim() > 2 else values


# Arithmetic with parameters of a module's own.


@layer_rule(torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
def _add(batch: Batch, delta: Tensor, input: Any, other: Any, *, alpha: float = 1) -> Factors:
    for tensor, factor in ((input, 1), (other, alpha)):
        if isinstance(tensor, Tensor) and not batch.varies(tensor):
            values = batch.reduced(_like(delta, tensor), tensor.shape, not _is_parameter(tensor))
            yield tensor, Explicit(values if factor == 1 else factor * values)


@layer_rule(torch.sub, Tensor.sub, Tensor.sub_, Tensor.__sub__, Tensor.__isub__)
def _sub(batch: Batch, delta: Tensor, input: Any, other: Any, *, alpha: float = 1) -> Factors:
    return _add(batch, delta, input, other, alpha=-alpha)


@layer_rule(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
def _mul(batch: Batch, delta: Tensor, input: Any, other: Any) -> Factors:
    for tensor, factor in ((input, other), (other, input)):
        if isinstance(tensor, Tensor) and not batch.varies(tensor):
            values = delta * (factor.conj() if isinstance(factor, Tensor) else factor)
            values = batch.reduced(_like(values, tensor), tensor.shape, not _is_parameter(tensor))
            yield tensor, Explicit(values)


@layer_rule(Tensor.expand, Tensor.expand_as, torch.broadcast_to, Tensor.broadcast_to, Tensor.repeat)
def _expand(batch: Batch, delta: Tensor, input: Tensor, *_: Any, **__: Any) -> Factors:
    # One for every sample, as of a class token; the capture asks only where it is that.
    yield input, Explicit(batch.reduced(delta, input.shape))


def _like(values: Tensor, tensor: Tensor) -> Tensor:
    """Return complex gradients as those of a tensor, which may be real."""
    return values.real if values.is_complex() and not tensor.is_complex() else values


def _is_parameter(tensor: Tensor) -> bool:
    """Return whether it is one, or part of one: its rows are no samples'."""
    return (tensor if tensor._base is None else tensor._base).is_leaf


SUMS = (_add, _sub)
"""Where a parameter's part of the result depends on no sample."""


def _refuse(what: str, holds: bool) -> None:
    if holds:
        raise UnsupportedError(
            expected="an operation that treats each sample on its own",
            got=what.rstrip(","),
            where="an operation with parameters",
            todo="train without it",
        )


# What has no rule.


def generic(
    batch: Batch, delta: Tensor, *args: Any, function: Callable[..., Any], **kwargs: Any
) -> Factors:
    """Yield the factors of any operation that treats each sample on its own, by `torch.func`.

    The operation is carried out again for every sample, as a batch of one, and differentiated.

    Raises
    ------
    UnsupportedError
        It cannot be: it changes its arguments, is random, or has no derivative of that kind.
    """
    if not isinstance(delta, Tensor):
        raise UnsupportedError(
            expected="an operation with a rule, or with one output",
            got=f"{getattr(function, '__name__', function)}, which has {len(delta)}",
            where="an operation with parameters",
            todo="register a rule for it, see sampimp.importance.rules.arithmetic.layer_rule",
        )
    leaves, structure = tree_flatten((args, kwargs))
    tensors = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    varying = [
        i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and batch.varies(leaf)
    ]
    free = [
        i
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and not batch.varies(leaf) and leaf.requires_grad
    ]

    def of_one(parts: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
        values = list(tensors)
        for i, value in (*zip(varying, parts, strict=True), *zip(free, parameters, strict=True)):
            values[i] = value
        own_args, own_kwargs = tree_unflatten(values, structure)
        return function(*own_args, **own_kwargs)

    def gradients_of_one(parts: Sequence[Tensor], delta_1: Tensor) -> tuple[Tensor, ...]:
        parameters = [tensors[i] for i in free]
        return torch.func.vjp(lambda *given: of_one(parts, given), *parameters)[1](delta_1)

    name = getattr(function, "__name__", str(function))
    if name.endswith("_") and not name.endswith("__"):
        raise UnsupportedError(
            expected="operations with parameters that leave their arguments as they are",
            got=f"{name}, which changes its first one",
            where="an operation with parameters",
            todo="write h = h * gamma for h *= gamma or h.mul_(gamma), and so for the others",
        )
    try:
        with torch.enable_grad():
            inputs = [tensors[i] for i in varying]
            if batch.size == 1:  # wherever its axis is
                gradients = tuple(one.unsqueeze(0) for one in gradients_of_one(inputs, delta))
            else:
                parts = _parts(batch, inputs, delta, function, of_one, free, tensors)
                gradients = torch.func.vmap(gradients_of_one)(parts, _apart(delta, batch.dim))
    except (RuntimeError, ValueError) as error:
        raise UnsupportedError(
            expected="an operation with a rule, or one that torch.func.vmap can differentiate",
            got=f"{name}: {str(error).strip().splitlines()[0]}",
            where="an operation with parameters",
            todo="register a rule for it, see sampimp.importance.rules.arithmetic.layer_rule",
        ) from error
    for i, gradient in zip(free, gradients, strict=True):
        yield leaves[i], Explicit(gradient)


def _parts(
    batch: Batch,
    inputs: Sequence[Tensor],
    delta: Tensor,
    function: Callable[..., Any],
    of_one: Callable[..., Tensor],
    free: Sequence[int],
    tensors: Sequence[Any],
) -> list[Tensor]:
    """Return inputs with each sample as a batch of one, (N, ...).

    Where several axes of an input have N entries, that of the samples is the one by which the
    samples' outputs are the operation's.
    """
    choices = [
        [
            axis
            for axis in dict.fromkeys([batch.dim, *range(values.dim())])
            if values.shape[axis : axis + 1] == (batch.size,)
        ]
        for values in inputs
    ]
    for values, axes in zip(inputs, choices, strict=True):
        if not axes:
            batch.first(values, values.dim())  # which says what is missing
    several = list(product(*choices))
    said = (
        one.shape if isinstance(one, Tensor) else one if isinstance(one, str | int) else None
        for one in tensors
    )
    key = batch.dim, delta.shape, *said
    places = several[0] if len(several) == 1 else _PLACES.get((function, key))
    parameters = [tensors[i] for i in free]
    reason = "on which axis of its arguments the samples are cannot be told"
    for candidate in several if places is None else ():
        parts = [_apart(values, axis) for values, axis in zip(inputs, candidate, strict=True)]
        try:
            with torch.no_grad():
                found = torch.func.vmap(lambda *one: of_one(one, parameters))(*parts)
                whole = _apart(of_one(inputs, parameters), batch.dim)
        except (RuntimeError, ValueError) as error:
            reason = str(error)
            continue
        close = 4 * torch.finfo(found.dtype).eps ** 0.5
        if found.shape == whole.shape and torch.allclose(
            found, whole, close, close, equal_nan=True
        ):
            places = _PLACES[function, key] = candidate
            break
    if places is None:
        raise RuntimeError(reason)
    return [_apart(values, axis) for values, axis in zip(inputs, places, strict=True)]


_PLACES: dict[Any, tuple[int, ...]] = {}
"""The samples' axes of the arguments of operations, by their shapes, where that took a trial."""


def _apart(values: Tensor, axis: int) -> Tensor:
    """Return each sample as a batch of one: (N, ..., 1, ...)."""
    return values.unsqueeze(axis).movedim(axis + 1, 0)
