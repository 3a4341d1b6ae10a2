"""Layouts: samples on any axis, alone or joined with positions."""

import pytest
import torch
from torch import nn
from two_layers import OPTIMIZERS, D, N, T, TwoLayers, assert_same, data, expected, record, squares

from sampimp.importance.recorder import ImportanceRecorder

pytestmark = pytest.mark.usefixtures("double_on_one_thread")


class OnJoinedRows(nn.Module):
    """A layer on samples and positions that are joined on one axis.

    Positions come first ("inner", row r % N) or samples ("outer", row r // T).
    """

    def __init__(self, layer, inner):
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.out, self.inner = layer, nn.Linear(3, 2), inner

    def forward(self, x):  # (N, T, ...)
        x = x.transpose(0, 1) if self.inner else x
        rows = self.layer(x.flatten(0, 1))
        rows = rows[0] if isinstance(rows, tuple) else rows
        rows = rows.flatten(2).mean(2) if rows.dim() > 2 and rows.shape[1] == 3 else rows
        rows = rows.mean(1) if rows.dim() > 2 else rows
        h = rows.unflatten(0, x.shape[:2])
        return self.out((h.transpose(0, 1) if self.inner else h).tanh())


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.bilinear = nn.Bilinear(4, 4, 3)

    def forward(self, x):
        return self.bilinear(x, x.exp())


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0]).mean(1)


JOINED_LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "convolution": (lambda: nn.Conv1d(2, 3, 3), (2, 5)),
    "convolution of images": (lambda: nn.Conv2d(2, 3, 3), (2, 5, 5)),
    "transposed convolution": (lambda: nn.ConvTranspose1d(2, 3, 3), (2, 5)),
    "GroupNorm": (lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.Conv1d(4, 3, 1)), (4, 5)),
    "RNN": (lambda: nn.RNN(4, 3, batch_first=True), (5, 4)),
    "LSTM": (lambda: nn.LSTM(4, 3, batch_first=True), (5, 4)),
    "GRU": (lambda: nn.GRU(4, 3, 2, batch_first=True), (5, 4)),
    "attention": (Attention, (5, 4)),
    "Bilinear": (Pair, (4,)),
    "LayerNorm": (lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)), (4,)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("count", [2, N])
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("case", JOINED_LAYERS)
def test_layers_with_samples_and_positions_on_one_axis_are_exact(case, inner, count, name):
    make, shape = JOINED_LAYERS[case]
    net, x = OnJoinedRows(make(), inner), data(N, count, *shape)
    optimizer = OPTIMIZERS[name](net.parameters())
    want = expected(net, squares(net(x)) / N, optimizer)
    recorder = ImportanceRecorder(net, optimizer)
    with recorder.step(range(N), epoch=1):
        squares(net(x)).mean().backward()
        optimizer.step()
    for beta, layer in zip(recorder.pop_epoch(1, N), recorder.layers, strict=True):
        torch.testing.assert_close(beta, want[layer], rtol=1e-9, atol=1e-15)


class Transposed(TwoLayers):
    """A network whose output has the samples on the last axis."""

    def __init__(self):
        super().__init__(None)
        self.w = nn.Parameter(torch.randn(3, D))

    def forward(self, x):
        return self.w @ self.a(x).tanh().transpose(-1, -2)


@pytest.mark.parametrize("positions", [(), (T,)])
def test_weight_from_the_left_is_exact(positions):
    net, x = Transposed(), data(*positions, N, D)
    z = net(x)
    losses = z.square().movedim(-1, 0).flatten(1).sum(1)
    want = expected(net, losses)
    assert_same(record(net, lambda z: z.square().sum(), x, batch_dim=len(positions)), want)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layer_of_as_many_steps_as_samples_is_exact(kind):
    class Positions(TwoLayers):
        def forward(self, x):
            h = self.rnn(self.a(x))[0]
            return self.b(h[torch.arange(N), [2, 0, 3, 5, 1, 4]])

    net = Positions(None)
    net.rnn = kind(D, D, batch_first=True)
    x = data(N, N, D)
    want = expected(net, squares(net(x)) / N)
    assert_same(record(net, lambda z: squares(z).mean(), x), want)


def test_sparse_embedding_is_exact():
    def run(sparse):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Embedding(9, D, sparse=sparse), nn.Flatten(), nn.Linear(3 * D, 2))
        index = torch.arange(N)[:, None] + torch.tensor([0, 1, 1])
        return record(net, lambda z: squares(z).mean(), index)

    assert_same(run(True), run(False))
