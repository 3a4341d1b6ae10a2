"""Random networks in which every dimension is N, so that no shape tells the samples' axis."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from two_layers import OPTIMIZERS, assert_same, expected, squares

from sampimp.importance.recorder import ImportanceRecorder

pytestmark = pytest.mark.usefixtures("double_on_one_thread")


def normalised_rows(h):
    return h / h.square().mean(-1, keepdim=True).add(1).sqrt()


class FirstOutput(nn.Module):
    """The first output of a recurrent layer or of self-attention."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, h):
        attends = isinstance(self.inner, nn.MultiheadAttention)
        return self.inner(h, h, h)[0] if attends else self.inner(h)[0]


class OverPositions(FirstOutput):
    """A layer that mixes positions, as in an MLP-Mixer."""

    def forward(self, h):
        return self.inner(h.transpose(1, 2)).transpose(1, 2)


class OnJoinedRows(FirstOutput):
    """A layer on samples and positions joined on one axis."""

    def forward(self, h):
        return self.inner(h.reshape(-1, h.shape[-1])).view_as(h)


class Applied(FirstOutput):
    """A function as a module."""

    def forward(self, h):
        return self.inner(h)


class ScaleAndShift(nn.Module):
    """One scale a position and one shift a feature."""

    def __init__(self, n):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(n, 1)), nn.Parameter(torch.randn(n))

    def forward(self, h):
        return h * self.scale + self.shift


class PositionTable(nn.Module):
    """Learned positions, added."""

    def __init__(self, n):
        super().__init__()
        self.place = nn.Embedding(n, n)

    def forward(self, h):
        return h + self.place(torch.arange(h.shape[1]))


BLOCKS = {
    "linear": lambda n: nn.Linear(n, n),
    "no bias": lambda n: nn.Linear(n, n, bias=False),
    "norm": lambda n: nn.LayerNorm(n),
    "conv": lambda n: nn.Conv1d(n, n, 3, padding=1),
    "groups": lambda n: nn.GroupNorm(1, n),
    "rnn": lambda n: FirstOutput(nn.RNN(n, n, batch_first=True)),
    "lstm": lambda n: FirstOutput(nn.LSTM(n, n, batch_first=True)),
    "gru": lambda n: FirstOutput(nn.GRU(n, n, batch_first=True)),
    "attention": lambda n: FirstOutput(nn.MultiheadAttention(n, 1, batch_first=True)),
    "turned": lambda n: OverPositions(nn.Linear(n, n)),
    "scale": lambda n: ScaleAndShift(n),
    "places": lambda n: PositionTable(n),
    "prelu": lambda n: nn.PReLU(n),
    "folded": lambda n: OnJoinedRows(nn.Linear(n, n)),
    "rows": lambda n: Applied(normalised_rows),
    "tanh": lambda n: nn.Tanh(),
}


@settings(max_examples=30, derandomize=True)
@given(
    st.integers(2, 5),
    st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=4),
    st.sampled_from(["all", "last", "mean"]),
    st.sampled_from(sorted(OPTIMIZERS)),
)
def test_networks_with_all_dimensions_equal_to_the_batch_are_exact(n, blocks, end, name):
    torch.manual_seed(n)
    net = nn.Sequential(nn.Linear(n, n), *(BLOCKS[block](n) for block in blocks), nn.Linear(n, n))
    take = {"all": lambda z: z, "last": lambda z: z[:, -1], "mean": lambda z: z.mean(1)}[end]
    optimizer = OPTIMIZERS[name](net.parameters())
    recorder = ImportanceRecorder(net, optimizer)
    for step in range(3):
        x = torch.randn(n, n, n)
        want = expected(net, squares(take(net(x))) / n, optimizer)
        with recorder.step(range(n), epoch=step):
            optimizer.zero_grad()
            squares(take(net(x))).mean().backward()
            optimizer.step()
        assert_same(dict(zip(recorder.layers, recorder.pop_epoch(step, n), strict=True)), want)
