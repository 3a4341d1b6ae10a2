"""Tiny networks, one or more for every rule: a table of models with inputs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune, rnn

from sampimp.importance.recorder import ImportanceRecorder

N, T = 3, 4
"""Samples of a batch, and positions."""


class Calls(nn.Module):
    """A model that is one function of itself, which has the parts, and of the inputs."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


class Case:
    """A model and a batch; inputs and outputs have the samples first.

    Parameters
    ----------
    one
        The inputs of one sample; by default a slice of each.
    random
        Whether a pass of a single sample would have other masks.
    options
        Of the recorder.
    """

    def __init__(
        self,
        model: nn.Module,
        *inputs: Tensor,
        one: Callable[[int], tuple[Tensor, ...]] | None = None,
        random: bool = False,
        **options: Any,
    ) -> None:
        self.model, self.inputs, self.random, self.options = model, inputs, random, options
        self.one = one or (lambda i: tuple(x[i : i + 1] for x in inputs))

    def losses(self, sample: int | None = None) -> Tensor:
        """Return the loss of every sample, or of one in a pass of its own."""
        torch.manual_seed(0)  # of dropout
        outputs = self.model(*(self.inputs if sample is None else self.one(sample)))
        return sum(map(losses, (outputs,) if isinstance(outputs, Tensor) else outputs))


def recorded(case: Case, optimizer: torch.optim.Optimizer, scale: Tensor) -> dict[str, Tensor]:
    """Return {layer: beta (sample,)} of a step on the weighted sum of a case's losses."""
    recorder = ImportanceRecorder(case.model, optimizer, **case.options)
    with recorder.step(range(len(scale)), epoch=1):
        optimizer.zero_grad()
        (scale * case.losses()).sum().backward()
        optimizer.step()
    return dict(zip(recorder.layers, recorder.pop_epoch(1, len(scale)), strict=True))


def losses(output: Tensor) -> Tensor:
    """Return losses that depend on each entry of a sample's output in another way."""
    output = output.flatten(1)
    places = torch.linspace(0, 2, output.shape[1], dtype=output.dtype, device=output.device)
    weights = places.cos()
    return (weights * output + 0.3 * output.square()).sum(1)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 6, shape)


def stack(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), *between, nn.Tanh(), nn.Linear(6, 3))


def convolutions(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 2), *between, nn.Tanh(), nn.Conv2d(4, 3, 2))


def case_of_bags(mode: str, **options: Any) -> Case:
    words, starts = torch.tensor([3, 3, 5, 1, 3, 0, 5]), torch.tensor([0, 2, 2])  # one is empty
    ends = [2, 2, 7]
    weights = torch.rand(7) if options.pop("weighted", False) else None
    own = [words, *([] if weights is None else [weights]), starts]

    def forward(model: nn.Module, words: Tensor, *rest: Tensor) -> Tensor:
        return model.out(model.bag(words, rest[-1], *rest[:-1]).tanh())

    def one(i: int) -> tuple[Tensor, ...]:
        part = slice(int(starts[i]), ends[i])
        return *(x[part] for x in own[:-1]), torch.tensor([0])

    bag = nn.EmbeddingBag(6, 4, mode=mode, **options)
    return Case(Calls(forward, bag=bag, out=nn.Linear(4, 3)), *own, one=one)


def positions_first(module: nn.Module, *inputs: Tensor) -> Any:
    """Return the outputs of a module that has positions before samples."""
    return module(*(x.transpose(0, 1) for x in inputs)).transpose(0, 1)


# Recurrent networks. Their states are (layers, samples, units).


def samples_first(output: Any) -> tuple[Tensor, ...]:
    """Return all states of a recurrent network with the samples first."""
    _, states = output
    return tuple(s.transpose(0, 1) for s in (states if isinstance(states, tuple) else (states,)))


def outputs_and_states(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    result = model.rnn(x)
    return model.out(result[0]), *samples_first(result)


def from_states(model: nn.Module, x: Tensor, *states: Tensor) -> Tensor:
    own = tuple(s.transpose(0, 1).contiguous() for s in states)
    return model.out(model.rnn(x, own if len(own) > 1 else own[0])[0])


def changed_in_place(model: nn.Module, x: Tensor) -> Tensor:
    changed = model.rnn(x)[0].mul_(2)
    return model.out(changed + model.rnn(x.flip(1))[0])  # twice: the first must not be missed


def from_learned_states(model: nn.Module, x: Tensor, lengths: Tensor | None = None) -> Any:
    own = tuple(s.expand(-1, len(x), -1).contiguous() for s in model.states)
    own = own if len(own) > 1 else own[0]
    if lengths is None:
        return model.out(model.rnn(x, own)[0])
    return samples_first(model.rnn(rnn.pack_padded_sequence(x, lengths.cpu(), True), own))


def cell_from_learned_states(model: nn.Module, x: Tensor) -> Tensor:
    own = tuple(torch.cat([s] * len(x)) for s in model.states)
    state = model.cell(x[:, 0], own if len(own) > 1 else own[0])
    return state[0] * state[1] if isinstance(state, tuple) else state


def packed(model: nn.Module, x: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
    result = model.rnn(rnn.pack_padded_sequence(x, lengths.cpu(), True, enforce_sorted=False))
    output, _ = rnn.pad_packed_sequence(result[0], batch_first=True, total_length=T)
    return model.out(output), *samples_first(result)


def unrolled(model: nn.Module, x: Tensor) -> Tensor:
    state = None
    for t in range(x.shape[1]):
        state = model.cell(x[:, t], state)
    return model.out(state[0] + state[1] if isinstance(state, tuple) else state)


def in_half(module: nn.Module) -> nn.Module:
    """Return a module of which the gradient that comes to its output is halved."""

    def halve(_: nn.Module, __: Any, output: Tensor) -> None:
        output.register_hook(lambda gradient: 0.5 * gradient)

    module.register_forward_hook(halve)
    return module


def sharing(model: nn.Module, name: str, other: str) -> nn.Module:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, model.get_parameter(other))
    return model


def tied_gates(model: nn.Module, x: Tensor) -> Any:
    cell = model.cell  # each parameter is given to the operation twice
    parameters = cell.weight_ih, cell.weight_ih, cell.bias_ih, cell.bias_ih
    return torch.gru_cell(x, torch.tanh(x), *parameters)


def of_low_rank(model: nn.Module, x: Tensor) -> Tensor:
    return torch.gru_cell(x, x.new_zeros(len(x), 3), model.a @ model.b, w_hh=model.w)


def recurrent_cases(kind: type[nn.Module], cell: type[nn.Module], **own: Any) -> dict[str, Any]:
    """Return the cases of one kind of recurrent network."""

    def model(function: Callable[..., Any], *, width: int = 3, **options: Any) -> nn.Module:
        return Calls(function, rnn=kind(4, 3, **own, **options), out=nn.Linear(width, 2))

    deep = {"num_layers": 2, "bidirectional": True, "batch_first": True, "width": 6}
    states = 2 if kind is nn.LSTM else 1

    def learned(model: nn.Module, *shape: int) -> nn.Module:
        model.states = nn.ParameterList(parameter(*shape) for _ in range(states))
        return model

    lengths = torch.tensor([4, 3, 1])
    unsorted = torch.tensor([3, 1, 4])
    return {
        "positions first": lambda: Case(
            model(lambda s, x: positions_first(lambda x: s.out(s.rnn(x)[0]), x)),
            torch.randn(N, T, 4),
            batch_dim=1,
        ),
        "last state": lambda: Case(
            model(lambda s, x: s.out(samples_first(s.rnn(x))[0]), batch_first=True),
            torch.randn(N, T, 4),
        ),
        "deep, outputs and states": lambda: Case(
            model(outputs_and_states, **deep), torch.randn(N, T, 4)
        ),
        "wide": lambda: Case(  # so that Gram products are less work than the gradients
            Calls(outputs_and_states, rnn=kind(4, 8, batch_first=True, **own), out=nn.Linear(8, 2)),
            torch.randn(N, T, 4),
        ),
        "without bias": lambda: Case(
            model(outputs_and_states, bias=False, num_layers=2, batch_first=True),
            torch.randn(N, T, 4),
        ),
        "from given states": lambda: Case(
            model(from_states, **deep),
            torch.randn(N, T, 4),
            *(torch.randn(N, 4, 3) for _ in range(states)),
        ),
        "from learned states": lambda: Case(
            learned(model(from_learned_states, **deep), 4, 1, 3), torch.randn(N, T, 4)
        ),
        "packed, from learned states": lambda: Case(
            learned(model(from_learned_states, **deep), 4, 1, 3), torch.randn(N, T, 4), lengths
        ),
        "changed in place": lambda: Case(
            model(changed_in_place, num_layers=2, batch_first=True), torch.randn(N, T, 4)
        ),
        "packed": lambda: Case(
            model(packed, num_layers=2, batch_first=True), torch.randn(N, T, 4), lengths
        ),
        "packed, in another order": lambda: Case(
            model(packed, **deep), torch.randn(N, T, 4), unsorted
        ),
        "weight_norm": lambda: Case(
            Calls(
                outputs_and_states,
                rnn=parametrizations.weight_norm(
                    kind(4, 3, batch_first=True, **own), "weight_hh_l0"
                ),
                out=nn.Linear(3, 2),
            ),
            torch.randn(N, T, 4),
        ),
        "tied layers": lambda: Case(
            sharing(
                model(outputs_and_states, num_layers=2, batch_first=True),
                "rnn.weight_hh_l1",
                "rnn.weight_hh_l0",
            ),
            torch.randn(N, T, 4),
        ),
        "with dropout between layers": lambda: Case(
            model(outputs_and_states, dropout=0.3, **deep), torch.randn(N, T, 4), random=True
        ),
        "frozen in part": lambda: Case(
            frozen(model(outputs_and_states, **deep), "rnn.weight_hh_l0", "rnn.bias_ih_l1"),
            torch.randn(N, T, 4),
        ),
        "cell": lambda: Case(
            Calls(unrolled, cell=cell(4, 3, **own), out=nn.Linear(3, 2)), torch.randn(N, T, 4)
        ),
        "cell, from learned states": lambda: Case(
            learned(Calls(cell_from_learned_states, cell=cell(4, 3, **own)), 1, 3),
            torch.randn(N, T, 4),
        ),
    }


# Attention.


def self_attention(model: nn.Module, x: Tensor) -> Tensor:
    return model.out(model.attention(x, x, x, need_weights=False)[0])


def masked_attention(model: nn.Module, x: Tensor, padding: Tensor) -> tuple[Tensor, ...]:
    causal = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    return model.attention(x, x, x, key_padding_mask=padding, attn_mask=causal)


def cross_attention(model: nn.Module, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return model.out(model.attention(x, keys, values)[0])


def attention(function: Callable[..., Any], **options: Any) -> nn.Module:
    own = nn.MultiheadAttention(4, 2, **{"batch_first": True} | options)
    return Calls(function, attention=own, out=nn.Linear(4, 3))


def encoder_layer(**options: Any) -> nn.Module:
    defaults = {"dim_feedforward": 5, "dropout": 0.0, "batch_first": True}
    return nn.TransformerEncoderLayer(4, 2, **defaults | options)


def decoder_layer(**options: Any) -> nn.Module:
    return nn.TransformerDecoderLayer(4, 2, 5, **{"dropout": 0.0, "batch_first": True} | options)


class Gpt(nn.Module):
    """A language model with positions of its own and a head that is the embedding."""

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


# Parameters that are tied, frozen, or made of others.


def frozen(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def pruned() -> nn.Module:
    model = stack()
    prune.random_unstructured(model[0], "weight", amount=0.5)
    return model


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


IMAGES = {1: (N, 2, 6), 2: (N, 2, 5, 4), 3: (N, 2, 4, 3, 3)}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}

CASES: dict[str, Callable[[], Case]] = {
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
        if d < 3 or "stride" in options  # the others differ no more from those of two axes
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
    # Recurrent networks.
    **{
        f"{label}, {name}": build
        for label, cases in {
            "rnn": recurrent_cases(nn.RNN, nn.RNNCell),
            "lstm": recurrent_cases(nn.LSTM, nn.LSTMCell),
            "gru": recurrent_cases(nn.GRU, nn.GRUCell),
        }.items()
        for name, build in cases.items()
    },
    **{
        f"rnn with relu, {name}": build
        for name, build in recurrent_cases(nn.RNN, nn.RNNCell, nonlinearity="relu").items()
        if name in ("cell", "deep, outputs and states")
    },
    "a cell whose parameters are tied": lambda: Case(
        Calls(tied_gates, cell=nn.GRUCell(4, 4)), torch.randn(N, 4)
    ),
    "a cell of low rank": lambda: Case(
        Calls(of_low_rank, a=parameter(9, 2), b=parameter(2, 4), w=parameter(9, 3)),
        torch.randn(N, 4),
    ),
    "lstm with projections": lambda: Case(
        Calls(
            outputs_and_states,
            rnn=nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True, proj_size=2),
            out=nn.Linear(4, 2),
        ),
        torch.randn(N, T, 4),
    ),
    "lstm with projections, without bias, packed": lambda: Case(
        Calls(packed, rnn=nn.LSTM(4, 3, bias=False, proj_size=2), out=nn.Linear(2, 2)),
        torch.randn(N, T, 4),
        torch.tensor([3, 1, 4]),
    ),
    "a layer whose outputs are used in part": lambda: Case(
        Calls(
            lambda s, x: s.out(s.rnn(x)[0][:, :2, 3:]),
            rnn=nn.GRU(4, 3, batch_first=True, bidirectional=True),
            out=nn.Linear(3, 2),
        ),
        torch.randn(N, T, 4),
    ),
    # Attention.
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
    # Parameters of a module's own.
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
"""By name, what builds a case; to be called after `torch.manual_seed`."""
