"""Tiny networks with parameters of their own, and with tied, frozen, unused or derived ones."""

from collections.abc import Callable
from typing import Any

import torch
from network_case import Calls, Case, N, T, frozen, parameter, positions_first, stack, tokens
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune


def in_half(module: nn.Module) -> nn.Module:
    """Add a hook that halves the output gradient of a module, and return the module."""

    def halve(_: nn.Module, __: Any, output: Tensor) -> None:
        output.register_hook(lambda gradient: 0.5 * gradient)

    module.register_forward_hook(halve)
    return module


class Vit(nn.Module):
    """Bare parameters: a class token, positions, a scale and a shift."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Linear(2, 4), nn.Linear(4, 3)
        self.token, self.places = parameter(1, 1, 4), parameter(1, T + 1, 4)
        self.scale, self.shift = parameter(4), parameter(4)

    def forward(self, x: Tensor) -> Tensor:
        token = self.token.expand(len(x), -1, -1)
        hidden = torch.cat([token, self.patches(x)], 1) + self.places
        return self.head((hidden * self.scale - self.shift).tanh()[:, 0] + hidden.mean(1))


def pruned() -> nn.Module:
    model = stack()
    prune.random_unstructured(model[0], "weight", amount=0.5)
    return model


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


PARAMETERS: dict[str, Callable[[], Case]] = {
    # Parameters that belong to no layer.
    "bare parameters": lambda: Case(Vit(), torch.randn(N, T, 2)),
    "a scale of one number": lambda: Case(
        Calls(lambda s, x: s.a * x + s.b, a=parameter(), b=parameter(1)), torch.randn(N, T)
    ),
    "a shift in place": lambda: Case(
        Calls(lambda s, x: x.clone().add_(s.a, alpha=2).sub_(s.b), a=parameter(4), b=parameter(1)),
        torch.randn(N, T, 4),
    ),
    "quotient and power": lambda: Case(
        Calls(lambda s, x: (x / s.a.exp()).abs() ** s.b, a=parameter(4), b=parameter(4)),
        torch.randn(N, T, 4),
    ),
    "a token in place of some": lambda: Case(
        Calls(lambda s, x, m: torch.where(m[..., None], s.token, x), token=parameter(4)),
        torch.randn(N, T, 4),
        torch.tensor([[True] * T, [False] * T, [True, False] * 2]),
    ),
    "as many positions as samples": lambda: Case(
        Calls(lambda s, x: s.l(x + s.places), places=parameter(N, 4), l=nn.Linear(4, 3)),
        torch.randn(N, N, 4),
    ),
    "distances and a temperature": lambda: Case(
        Calls(lambda s, x: torch.cdist(x, s.w) * s.t.exp(), w=parameter(3, 4), t=parameter()),
        torch.randn(N, 4),
    ),
    "a row of constants for each sample": lambda: Case(  # as BERT makes its types of tokens
        Calls(
            lambda s, x: s.l(
                x + s.types(torch.ones(x.shape[:2], dtype=torch.long, device=x.device))
            ),
            types=nn.Embedding(2, 4),
            l=nn.Linear(4, 3),
        ),
        torch.randn(N, T, 4),
    ),
    "a row of constants for each sample, positions first": lambda: Case(
        Calls(
            lambda s, x: positions_first(
                lambda x: (
                    x
                    * s.types(
                        torch.arange(2, device=x.device)
                        .repeat(T // 2)[:, None]
                        .expand(T, x.shape[1])
                    )
                ),
                x,
            ),
            types=nn.Embedding(2, 4),
        ),
        torch.randn(N, T, 4),
        batch_dim=1,
    ),
    "an initial state": lambda: Case(
        Calls(lambda s, x: s.c(x, s.h.expand(len(x), 3)), h=parameter(3), c=nn.GRUCell(4, 3)),
        torch.randn(N, 4),
    ),
    "a table that is indexed": lambda: Case(
        Calls(lambda s, x, i: x * s.w[i], w=parameter(6, 4)), torch.randn(N, 4), tokens(N)
    ),
    "a table of as many rows as samples": lambda: Case(
        Calls(lambda s, x, i: x * s.w[i], w=parameter(N, 4)),
        torch.randn(N, 4),
        torch.tensor([1, 2, 0]),
    ),
    "one parameter as weight and bias": lambda: Case(
        Calls(lambda s, x: functional.linear(x, s.p[:, :4], s.p[:, 4]), p=parameter(3, 5)),
        torch.randn(N, 4),
    ),
    "gradients that a hook changes": lambda: Case(
        nn.Sequential(in_half(nn.Linear(4, 5)), nn.Tanh(), in_half(nn.Linear(5, 2))),
        torch.randn(N, 4),
    ),
    # Parameters that are tied, frozen, not used, or made of others.
    "tied": lambda: Case(tied(), torch.randn(N, 4)),
    "a table that is the last layer too": lambda: Case(
        Calls(lambda s, i: s.e(i).tanh() @ s.e.weight.T, e=nn.Embedding(6, 4)), tokens(N, T)
    ),
    "called twice": lambda: Case(
        Calls(lambda s, x: s.out(s.l(s.l(x).tanh())), l=nn.Linear(4, 4), out=nn.Linear(4, 3)),
        torch.randn(N, T, 4),
    ),
    "normalised twice": lambda: Case(
        Calls(lambda s, x: s.n(x) + s.n(x.tanh()), n=nn.LayerNorm(4)), torch.randn(N, T, 4)
    ),
    "convolved twice": lambda: Case(
        Calls(lambda s, x: s.c(s.c(x).tanh()), c=nn.Conv1d(2, 2, 2)), torch.randn(N, 2, 5)
    ),
    "never called": lambda: Case(
        Calls(lambda s, x: s.out(x), idle=nn.Linear(2, 2), out=nn.Linear(4, 3)), torch.randn(N, 4)
    ),
    "frozen": lambda: Case(
        frozen(stack(nn.LayerNorm(6)), "0.weight", "1.bias"), torch.randn(N, T, 4)
    ),
    "weight_norm": lambda: Case(
        nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 2)),
        torch.randn(N, 4),
    ),
    "spectral_norm": lambda: Case(
        parametrizations.spectral_norm(nn.Conv1d(2, 3, 2)).eval(), torch.randn(N, 2, 5)
    ),
    "orthogonal": lambda: Case(
        parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley"), torch.randn(N, 4)
    ),
    "pruned": lambda: Case(pruned(), torch.randn(N, 4)),
}
