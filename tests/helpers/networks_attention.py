"""Tiny networks with attention, and a language model."""

from collections.abc import Callable
from typing import Any

import torch
from network_case import Calls, Case, N, T, positions_first, tokens
from torch import Tensor, nn
from torch.nn import functional


def self_attention(model: nn.Module, x: Tensor) -> Tensor:
    return model.out(model.attention(x, x, x, need_weights=False)[0])


def masked_attention(model: nn.Module, x: Tensor, padding: Tensor) -> tuple[Tensor, ...]:
    causal = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    return model.attention(x, x, x, key_padding_mask=padding, attn_mask=causal)


def cross_attention(model: nn.Module, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return model.out(model.attention(x, keys, values)[0])


def attention(function: Callable[..., Any], **options: Any) -> nn.Module:
    layer = nn.MultiheadAttention(4, 2, **{"batch_first": True} | options)
    return Calls(function, attention=layer, out=nn.Linear(4, 3))


def encoder_layer(**options: Any) -> nn.Module:
    defaults = {"dim_feedforward": 5, "dropout": 0.0, "batch_first": True}
    return nn.TransformerEncoderLayer(4, 2, **defaults | options)


def decoder_layer(**options: Any) -> nn.Module:
    return nn.TransformerDecoderLayer(4, 2, 5, **{"dropout": 0.0, "batch_first": True} | options)


class Gpt(nn.Module):
    """A language model with learned positions, whose head shares the weight of the embedding."""

    def __init__(self, words: int = 6, width: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(T, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 5, dropout=dropout, batch_first=True)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        hidden = self.words(x) + self.places(torch.arange(x.shape[1], device=x.device))
        logits = self.head(self.block(hidden, src_mask=mask.to(hidden.dtype), is_causal=True))
        return functional.cross_entropy(logits[:, :-1].transpose(1, 2), x[:, 1:], reduction="none")


ATTENTION: dict[str, Callable[[], Case]] = {
    "attention": lambda: Case(attention(self_attention), torch.randn(N, T, 4)),
    "attention without bias": lambda: Case(
        attention(self_attention, bias=False), torch.randn(N, T, 4)
    ),
    "attention, masked": lambda: Case(
        attention(masked_attention),
        torch.randn(N, T, 4),
        torch.arange(T) >= torch.tensor([[4], [3], [2]]),
    ),
    "attention to others": lambda: Case(
        attention(cross_attention, add_bias_kv=True),
        torch.randn(N, T, 4),
        *(torch.randn(N, 3, 4) for _ in range(2)),
    ),
    "attention to others of other widths": lambda: Case(
        attention(cross_attention, kdim=3, vdim=2),
        torch.randn(N, T, 4),
        torch.randn(N, 5, 3),
        torch.randn(N, 5, 2),
    ),
    "attention to the same": lambda: Case(  # keys and values are one tensor
        attention(lambda s, x, m: cross_attention(s, x, m, m)),
        torch.randn(N, T, 4),
        torch.randn(N, 3, 4),
    ),
    "attention, positions first": lambda: Case(
        Calls(
            lambda s, x: positions_first(lambda x: s.a(x, x, x)[0], x),
            a=nn.MultiheadAttention(4, 2),
        ),
        torch.randn(N, T, 4),
        batch_dim=1,
    ),
    "attention with dropout": lambda: Case(
        attention(self_attention, dropout=0.3), torch.randn(N, T, 4), random=True
    ),
    "encoder layer": lambda: Case(encoder_layer(), torch.randn(N, T, 4)),
    "encoder layer, norms first": lambda: Case(
        encoder_layer(norm_first=True, activation="gelu"), torch.randn(N, T, 4)
    ),
    "encoder layer with dropout": lambda: Case(
        encoder_layer(dropout=0.3), torch.randn(N, T, 4), random=True
    ),
    "encoder layer, evaluated": lambda: Case(
        encoder_layer(dropout=0.3).eval(), torch.randn(N, T, 4)
    ),
    "encoder layer, positions first": lambda: Case(
        Calls(lambda s, x: positions_first(s.e, x), e=encoder_layer(batch_first=False)),
        torch.randn(N, T, 4),
        batch_dim=1,
    ),
    "encoder": lambda: Case(
        nn.TransformerEncoder(encoder_layer(), 2, nn.LayerNorm(4), enable_nested_tensor=False),
        torch.randn(N, T, 4),
    ),
    "decoder layer": lambda: Case(decoder_layer(), torch.randn(N, T, 4), torch.randn(N, 3, 4)),
    "decoder layer, positions first": lambda: Case(
        Calls(
            lambda s, x, m: positions_first(s.d, x, m),
            d=decoder_layer(batch_first=False, norm_first=True),
        ),
        torch.randn(N, T, 4),
        torch.randn(N, 3, 4),
        batch_dim=1,
    ),
    "language model": lambda: Case(Gpt(), tokens(N, T)),
}
