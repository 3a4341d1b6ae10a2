"""Rules of normalisations, and of `prelu`: parameters that scale or shift features or channels.

The gradient of the scale is delta times the normalised input, that of the shift is delta, each
summed over the positions of a sample. A rule computes the normalised input again.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from sampimp.importance.gradients import Explicit
from sampimp.importance.per_sample import samples_at_once
from sampimp.importance.rules.batch import Batch, Factors, require_samples


def layer_norm_factors(
    batch: Batch,
    delta: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Factors:
    """Yield the factors of `functional.layer_norm`."""
    normal = functional.layer_norm(input, normalized_shape, eps=eps)
    return _feature_factors(batch, delta, normal, weight, bias, len(normalized_shape))


def rms_norm_factors(
    batch: Batch,
    delta: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Factors:
    """Yield the factor of `functional.rms_norm`."""
    normal = functional.rms_norm(input, normalized_shape, eps=eps)
    return _feature_factors(batch, delta, normal, weight, None, len(normalized_shape))


def _feature_factors(
    batch: Batch,
    delta: Tensor,
    normal: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    features: int,
) -> Factors:
    """Yield the factors of a scale and a shift of the last `features` axes."""
    for parameter, values in ((weight, delta * normal), (bias, delta)):
        values = batch.first(values, features)
        positions = list(range(1, values.dim() - features))
        yield parameter, Explicit(values.sum(positions) if positions else values)


def group_norm_factors(
    batch: Batch,
    delta: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Factors:
    """Yield the factors of `functional.group_norm`."""
    normalise = partial(functional.group_norm, num_groups=num_groups, eps=eps)
    return _channel_factors(batch, delta, input, normalise, weight, bias)


def instance_norm_factors(
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
    """Yield the factors of `functional.instance_norm`."""

    def normalise(images: Tensor) -> Tensor:
        if use_input_stats:  # without the running statistics, which must not be updated twice
            return functional.instance_norm(images, eps=eps)
        stored = running_mean, running_var
        return functional.instance_norm(images, *stored, use_input_stats=False, eps=eps)

    return _channel_factors(batch, delta, input, normalise, weight, bias)


def batch_norm_factors(
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
    """Yield the factors of `functional.batch_norm` with stored statistics.

    In training mode it mixes the samples; the recorder does not call the rule then.
    """

    def normalise(images: Tensor) -> Tensor:
        return functional.batch_norm(images, running_mean, running_var, eps=eps)

    return _channel_factors(batch, delta, input, normalise, weight, bias)


def _channel_factors(
    batch: Batch,
    delta: Tensor,
    input: Tensor,
    normalise: Callable[[Tensor], Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
) -> Factors:
    """Yield the factors of a scale and a shift of channels."""
    require_samples(batch, delta, "a normalisation by channel")
    if weight is not None:
        # A few samples at a time stay in the cache: 128 of 64 x 32 x 32 took 8 ms instead of 42.
        size = samples_at_once(4 * delta[0].numel() if len(delta) else 1, delta)
        chunks = zip(delta.split(size), input.split(size), strict=True)
        sums = [_channel_sums(delta_chunk * normalise(chunk)) for delta_chunk, chunk in chunks]
        yield weight, Explicit(torch.cat(sums))
    if bias is not None:
        yield bias, Explicit(_channel_sums(delta))


def _channel_sums(values: Tensor) -> Tensor:
    """Return values (N, C, ...) summed over positions, (N, C)."""
    return values.flatten(2).sum(2) if values.dim() > 2 else values


def prelu_factors(batch: Batch, delta: Tensor, input: Tensor, weight: Tensor) -> Factors:
    """Yield the factor of `functional.prelu`: delta times the negative part of the input."""
    values = delta * input.clamp_max(0)
    values = batch.first(values, min(values.dim() - 1, 1))
    if len(weight) == 1:
        yield weight, Explicit(values.reshape(batch.size, -1).sum(1, keepdim=True))
    else:
        yield weight, Explicit(_channel_sums(values))


def normalized_features(
    batch: Batch,
    ndim: int,
    input: Tensor,
    normalized_shape: Sequence[int],
    *_: object,
    **__: object,
) -> int:
    """Return the number of normalised axes."""
    return len(normalized_shape)


def all_but_first(batch: Batch, ndim: int, *_: object, **__: object) -> int:
    """Return the features of an operation whose samples must be on the first axis."""
    return ndim - 1
