"""Tiny networks of matrix products, convolutions, tables and normalisations."""

from collections.abc import Callable
from typing import Any

import torch
from network_case import Calls, Case, N, T, convolutions, parameter, positions_first, stack, tokens
from torch import Tensor, nn

IMAGES = {1: (N, 2, 6), 2: (N, 2, 5, 4), 3: (N, 2, 4, 3, 3)}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def case_of_bags(mode: str, **options: Any) -> Case:
    words, starts = (
        torch.tensor([3, 3, 5, 1, 3, 0, 5]),
        torch.tensor([0, 2, 2]),
    )  # the second bag is empty
    ends = [2, 2, 7]
    weights = torch.rand(7) if options.pop("weighted", False) else None
    inputs = [words, *([] if weights is None else [weights]), starts]

    def forward(model: nn.Module, words: Tensor, *rest: Tensor) -> Tensor:
        return model.out(model.bag(words, rest[-1], *rest[:-1]).tanh())

    def one_sample(i: int) -> tuple[Tensor, ...]:
        part = slice(int(starts[i]), ends[i])
        return *(x[part] for x in inputs[:-1]), torch.tensor([0])

    bag = nn.EmbeddingBag(6, 4, mode=mode, **options)
    return Case(Calls(forward, bag=bag, out=nn.Linear(4, 3)), *inputs, one_sample=one_sample)


FEEDFORWARD: dict[str, Callable[[], Case]] = {
    # Products.
    "linear": lambda: Case(stack(), torch.randn(N, 4)),
    "linear on a sequence": lambda: Case(stack(), torch.randn(N, T, 4)),
    "linear on a field": lambda: Case(stack(), torch.randn(N, 2, 2, 4)),
    "linear by the Gram matrices": lambda: Case(nn.Linear(14, 15), torch.randn(N, 2, 14)),
    "linear without bias": lambda: Case(nn.Linear(4, 3, bias=False), torch.randn(N, 4)),
    "linear on flattened positions": lambda: Case(
        Calls(lambda s, x: s.l(x.flatten(0, 1)).unflatten(0, (-1, T)), l=nn.Linear(4, 3)),
        torch.randn(N, T, 4),
    ),
    "linear on flattened positions, positions first": lambda: Case(
        Calls(
            lambda s, x: positions_first(lambda x: s.l(x.flatten(0, 1)).unflatten(0, (T, -1)), x),
            l=nn.Linear(4, 3),
        ),
        torch.randn(N, T, 4),
        batch_dim=1,
    ),
    "matmul": lambda: Case(
        Calls(lambda s, x: x @ s.w + s.b, w=parameter(4, 3), b=parameter(3)), torch.randn(N, T, 4)
    ),
    "matmul with the transposed": lambda: Case(
        Calls(lambda s, x: x @ s.w.t(), w=parameter(3, 4)), torch.randn(N, T, 4)
    ),
    "matmul from the left": lambda: Case(
        Calls(lambda s, x: s.w @ x, w=parameter(3, 4)), torch.randn(N, 4, 2)
    ),
    "matmul with a vector": lambda: Case(
        Calls(lambda s, x: x @ s.w, w=parameter(4)), torch.randn(N, T, 4)
    ),
    "matmul of a batch": lambda: Case(  # an expert for each position
        Calls(lambda s, x: torch.matmul(x[:, :, None], s.w), w=parameter(T, 4, 3)),
        torch.randn(N, T, 4),
    ),
    "addmm on flattened positions": lambda: Case(
        Calls(
            lambda s, x: torch.addmm(s.b, x.reshape(-1, 4), s.w).view(-1, T, 3),
            w=parameter(4, 3),
            b=parameter(3),
        ),
        torch.randn(N, T, 4),
    ),
    "addmm with factors": lambda: Case(
        Calls(
            lambda s, x: torch.addmm(s.b, x, s.w, beta=0.5, alpha=2.0),
            w=parameter(4, 3),
            b=parameter(3),
        ),
        torch.randn(N, 4),
    ),
    "einsum": lambda: Case(
        Calls(lambda s, x: torch.einsum("bti,ij->btj", x, s.w), w=parameter(4, 3)),
        torch.randn(N, T, 4),
    ),
    "bilinear": lambda: Case(nn.Bilinear(4, 2, 3), torch.randn(N, 4), torch.randn(N, 2)),
    # Convolutions.
    **{
        f"conv{d}d {options}": lambda d=d, options=options: Case(
            CONVOLUTIONS[d](2, 4, **options), torch.randn(IMAGES[d])
        )
        for d in CONVOLUTIONS
        for options in (
            {"kernel_size": 2},
            {"kernel_size": 3, "stride": 2, "padding": 1},
            {"kernel_size": 2, "dilation": 2, "padding": "same"},
            {"kernel_size": 2, "groups": 2, "bias": False, "padding": "valid"},
            {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
        )
        if d < 3 or "stride" in options  # the other options as with two axes
    },
    **{
        f"conv_transpose{d}d {options}": lambda d=d, options=options: Case(
            TRANSPOSED[d](2, 4, **options), torch.randn(IMAGES[d])
        )
        for d in TRANSPOSED
        for options in (
            {"kernel_size": 2},
            {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
            {"kernel_size": 2, "dilation": 2, "bias": False},
            {"kernel_size": 2, "stride": 3, "output_padding": 2, "groups": 2},
        )
        if d < 3 or "stride" in options
    },
    "convolutions on one another": lambda: Case(convolutions(), torch.randn(N, 2, 4, 5)),
    # Tables.
    "embedding": lambda: Case(
        nn.Sequential(nn.Embedding(6, 4, padding_idx=1), nn.Linear(4, 3)), tokens(N, 2 * T)
    ),
    "embedding, one token a sample": lambda: Case(nn.Embedding(6, 4), tokens(N)),
    **{
        f"embedding_bag, {mode}": lambda mode=mode: Case(
            nn.EmbeddingBag(6, 4, mode=mode, padding_idx=-1), tokens(N, 2 * T)
        )
        for mode in ("mean", "sum")
    },
    "embedding_bag of offsets, mean": lambda: case_of_bags("mean"),
    "embedding_bag of offsets, padded": lambda: case_of_bags("mean", padding_idx=3),
    "embedding_bag of offsets, weighted": lambda: case_of_bags("sum", weighted=True),
    # Normalisations.
    "layer_norm": lambda: Case(stack(nn.LayerNorm(6)), torch.randn(N, T, 4)),
    "layer_norm over two axes": lambda: Case(nn.LayerNorm((T, 4)), torch.randn(N, T, 4)),
    "layer_norm without bias": lambda: Case(stack(nn.LayerNorm(6, bias=False)), torch.randn(N, 4)),
    "layer_norm, positions first": lambda: Case(
        Calls(lambda s, x: positions_first(s.n, x), n=nn.LayerNorm(4)),
        torch.randn(N, T, 4),
        batch_dim=1,
    ),
    "rms_norm": lambda: Case(stack(nn.RMSNorm(6)), torch.randn(N, T, 4)),
    "group_norm": lambda: Case(convolutions(nn.GroupNorm(2, 4)), torch.randn(N, 2, 5, 4)),
    "group_norm of vectors": lambda: Case(stack(nn.GroupNorm(2, 6)), torch.randn(N, 4)),
    "instance_norm": lambda: Case(
        convolutions(nn.InstanceNorm2d(4, affine=True)), torch.randn(N, 2, 5, 4)
    ),
    "instance_norm that tracks": lambda: Case(
        convolutions(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
        torch.randn(N, 2, 5, 4),
    ),
    "instance_norm with running statistics": lambda: Case(
        convolutions(nn.InstanceNorm2d(4, affine=True, track_running_stats=True).eval()),
        torch.randn(N, 2, 5, 4),
    ),
    "batch_norm with running statistics": lambda: Case(
        convolutions(nn.BatchNorm2d(4).eval()), torch.randn(N, 2, 5, 4)
    ),
    "batch_norm of vectors": lambda: Case(stack(nn.BatchNorm1d(6).eval()), torch.randn(N, 4)),
    "prelu": lambda: Case(stack(nn.PReLU()), torch.randn(N, T, 4)),
    "prelu by channel": lambda: Case(convolutions(nn.PReLU(4)), torch.randn(N, 2, 5, 4)),
}
