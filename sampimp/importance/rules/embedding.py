"""Rules of tables: `functional.embedding` and `functional.embedding_bag`.

The gradient of a table is delta, added to the rows that a sample looks up. In a bag each row's
delta has the row's share in the bag (1, its weight, or 1 / the bag's size).
"""

import torch
from torch import Tensor

from sampimp.errors import UnsupportedError
from sampimp.importance.gradients import EmbeddingRows
from sampimp.importance.rules.batch import Batch, Factors, require_samples


def embedding_factors(
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
    """Yield the factor of `functional.embedding`."""
    _refuse(scale_grad_by_freq, "embedding with scale_grad_by_freq, which mixes the samples")
    index_NT = batch.first(input, 0).reshape(batch.size, -1)
    vectors_NTE = batch.rows(delta)
    if padding_idx is not None:
        is_padding = index_NT == padding_idx % len(weight)
        vectors_NTE = vectors_NTE.masked_fill(is_padding[:, :, None], 0)
    yield weight, EmbeddingRows(vectors_NTE, index_NT, weight.shape)


def embedding_bag_factors(
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
    """Yield the factor of `functional.embedding_bag`."""
    _refuse(scale_grad_by_freq, "embedding_bag with scale_grad_by_freq, which mixes the samples")
    _refuse(mode == "max", 'embedding_bag with mode "max"')
    share = torch.ones_like(input, dtype=delta.dtype)
    share = share if per_sample_weights is None else per_sample_weights.detach()
    if offsets is not None:
        place, inside = _places_in_bags(offsets, len(input), include_last_offset)
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
    yield weight, EmbeddingRows(delta[:, None, :] * share[:, :, None], input, weight.shape)


def _places_in_bags(
    offsets: Tensor, count: int, include_last_offset: bool
) -> tuple[Tensor, Tensor]:
    """Return the places (N, T) of each bag's rows among `count` rows, and which are in the bag."""
    ends = offsets[1:] if include_last_offset else None
    starts = offsets[:-1] if include_last_offset else offsets
    ends = torch.cat([starts[1:], starts.new_tensor([count])]) if ends is None else ends
    lengths = ends - starts
    place = starts[:, None] + torch.arange(int(lengths.max()), device=starts.device)
    return place, place < ends[:, None]


def _refuse(condition: bool, call: str) -> None:
    """If the condition holds, refuse a call that has no per-sample gradients."""
    if condition:
        raise UnsupportedError(
            expected="an operation that treats each sample on its own",
            got=call,
            where="an operation with parameters",
            todo="train without it",
        )
