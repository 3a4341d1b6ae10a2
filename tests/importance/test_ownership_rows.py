"""Patterns of user code that move, join or mix rows: exact, or refused before the update."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from sampimp.errors import UnsupportedError
from sampimp.importance.recorder import ImportanceRecorder

N, T = 4, 8
ORDER = torch.tensor([2, 0, 3, 1])
BACK = ORDER.argsort()
GROUPS = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3])
PLACES = torch.arange(T)
MASK = torch.zeros(N, T, dtype=torch.bool)
MASK[0, :5] = MASK[2, :3] = True


class Net(nn.Module):
    """Two layers, and the parameters that single cases need."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.place = nn.Embedding(T, 3)
        self.scale = nn.Parameter(torch.randn(2))
        self.square = nn.Parameter(torch.randn(3, 3))
        self.lstm = nn.LSTM(3, 5, N, batch_first=True)
        self.double()

    def forward(self, values):
        return self.b(self.a(values).tanh())


def inputs():
    torch.manual_seed(2)
    return torch.randn(N, 3).double(), torch.randn(N, T, 3).double()


def squares(values):
    """Return the sum of squares of each sample's outputs."""
    return values.reshape(len(values), -1).square().sum(1)


def written_in_another_order(net, x):
    inner = net.a(x[ORDER]).tanh()
    out = torch.empty_like(inner)
    out[ORDER] = inner
    return net.b(out)


def written_by_position(net, s):
    out = torch.zeros(N, T, 4).double()
    for t in range(T):
        out[:, t] = net.a(s[:, t])
    return net.b(out.tanh())


def stacked_by_position(net, s):
    return net.b(torch.stack([net.a(s[:, t]).tanh() for t in range(T)], 1))


def some_reversed(s):
    s, chosen = s.clone(), torch.tensor([True, False, True, False])
    s[chosen] = s[chosen].flip(1)
    return s


def windows(net, s):
    """Apply self-attention in windows of four positions, as in code written by hand."""
    h = net.a(s.view(N, 2, 4, 3).reshape(2 * N, 4, 3))
    query, key = h.reshape(2 * N, 4, 2, 1, 2).permute(2, 0, 3, 1, 4)
    attended = functional.scaled_dot_product_attention(query, key, torch.cat([key, query], -1))
    return net.b(attended.transpose(1, 2).reshape(2 * N, 4, 4)).view(N, 8, 2)


EXACT = {
    "no change of rows": lambda n, x, s: n(x),
    "samples and positions joined": lambda n, x, s: n(s.reshape(N * T, 3)).view(N, T, 2),
    "samples and positions joined at the end": lambda n, x, s: (
        n(s).view(N * T, 2).tanh().unflatten(0, (N, T))
    ),
    "each sample repeated": lambda n, x, s: n(x.repeat_interleave(3, 0)).view(N, 6),
    "reordered and back": lambda n, x, s: n.b(n.a(x[ORDER]).tanh()[BACK]),
    "reordered and back by lists": lambda n, x, s: n.b(
        n.a(x[ORDER.tolist()]).tanh()[BACK.tolist()]
    ),
    "reordered and back by index_select": lambda n, x, s: n.b(
        n.a(x.index_select(0, ORDER.int()))[BACK]
    ),
    "one position of each sample": lambda n, x, s: n.b(n.a(s)[torch.arange(N), ORDER]),
    "slices of positions": lambda n, x, s: n(s[:, 2:5])[..., :1],
    "written position by position": lambda n, x, s: written_by_position(n, s),
    "stacked position by position": lambda n, x, s: stacked_by_position(n, s),
    "reversed in time": lambda n, x, s: n.b(n.a(s).flip(1).cumsum(1).softmax(2)),
    "features joined by keywords": lambda n, x, s: n(
        torch.cat(tensors=[x[:, :1], x[:, 1:]], dim=1)
    ),
    "transposed twice": lambda n, x, s: n.b(
        torch.transpose(input=n.a(x).permute((1, 0)), dim0=0, dim1=-1).movedim([0, 1], [0, 1])
    ),
    "data scaled by statistics of the batch": lambda n, x, s: n((x - x.mean(0)) / x.std(0)),
    "divided by a detached norm": lambda n, x, s: n.b(n.a(x) / n.a(x).detach().norm()),
    "outputs flipped twice": lambda n, x, s: n(x).flip(0).flip(0),
    "a complex scale": lambda n, x, s: n(torch.fft.irfft(torch.fft.rfft(s) * n.scale, n=3)),
    "features reversed": lambda n, x, s: n.b(n.a(x).T.flip(0).T),
    "a key's bias, whose gradient is zero": lambda n, x, s: functional.scaled_dot_product_attention(
        n.a(s), n.a(s), n(s)
    ),
    "mixup": lambda n, x, s: n(0.7 * x + 0.3 * x[ORDER]),
    "mixup by flip": lambda n, x, s: n(0.7 * x + 0.3 * x.flip(0)),
    "some samples reversed": lambda n, x, s: n(some_reversed(s)),
    "positions of a mask": lambda n, x, s: n(s * MASK[torch.arange(N)[:, None], PLACES][..., None]),
    "attention in windows": lambda n, x, s: windows(n, s),
    "the last state of as many layers as samples": lambda n, x, s: n.lstm(s)[1][0][-1],
    "stacked before the samples": lambda n, x, s: n.b(torch.stack([n.a(x)] * N).mean(0)),
    "as many positions as samples, the last one": lambda n, x, s: n.b(
        n.a(s[:, :N]).permute(1, 0, 2)[-1]
    ),
    "metrics that mix samples beside the loss": lambda n, x, s: (
        n(x).softmax(0),
        n(x) @ n(x).T,
        n(x),
    )[2],
    "two views": lambda n, x, s: n(torch.cat([x, x.flip(1)])).view(2, N, 2).transpose(0, 1),
    "copies": lambda n, x, s: n(x.repeat(3, 1)).view(3, N, 2).transpose(0, 1),
    "expanded copies": lambda n, x, s: n(x.expand(8, N, 3)).transpose(0, 1),
    "positions first": lambda n, x, s: n(s.transpose(0, 1)).transpose(0, 1),
    "positions first, as many as samples": lambda n, x, s: n(s[:, :N].transpose(0, 1)).transpose(
        0, 1
    ),
    "positions first, joined with samples": lambda n, x, s: (
        n(s.transpose(0, 1).reshape(-1, 3)).view(T, N, 2).transpose(0, 1)
    ),
    "some positions": lambda n, x, s: (
        torch.zeros(N).double().index_add(0, MASK.nonzero()[:, 0], n(s[MASK]).square().sum(1))
    ),
    "one sample after the other": lambda n, x, s: torch.stack(
        [n(s[i, :count]).square().sum() for i, count in enumerate((4, 8, 4, 8))]
    ),
    "flipped and back": lambda n, x, s: n.b(n.a(x.flip(0)).flip(0)),
    "rolled and back": lambda n, x, s: n.b(n.a(x.roll(1, 0)).roll(-1, 0)),
    "written in another order": lambda n, x, s: written_in_another_order(n, x),
}
# With the sample of each row of the loss, where the block reorders the data.
REORDERED = {
    "halves exchanged": (lambda n, x, s: n(torch.cat([x[2:], x[:2]])), [2, 3, 0, 1]),
    "copied in another order": (
        lambda n, x, s: n.b(torch.zeros(N, 4).double().index_copy(0, ORDER, n.a(x))),
        BACK.tolist(),
    ),
    "gathered": (
        lambda n, x, s: n(x.gather(0, ORDER[:, None].expand(N, 3))),
        ORDER.tolist(),
    ),
    "flat positions shuffled": (
        lambda n, x, s: n(s.reshape(N * T, 3)[torch.arange(N * T).flip(0)]).view(N, T, 2),
        [3, 2, 1, 0],
    ),
    "flipped": (lambda n, x, s: n(x.flip(0)), [3, 2, 1, 0]),
    "reordered between the layers": (lambda n, x, s: n.b(n.a(x)[ORDER]), ORDER.tolist()),
}
ORDER_UNKNOWN = "data whose rows could not be matched"
MIXED = "row depends on several samples"
COUPLED = "mixes the outputs of several samples"
REFUSED = {
    "nodes of graphs": (
        lambda n, x, s: n.b(
            torch.zeros(N, 4).double().index_add(0, GROUPS, n.a(s[:, :2].reshape(8, 3)))
        ),
        ORDER_UNKNOWN,
    ),
    "sorted by feature": (lambda n, x, s: n(x.sort(0)[0]), ORDER_UNKNOWN),
    "positions that are not a buffer": (lambda n, x, s: n(s + n.place(PLACES)), "register_buffer"),
    "one sample twice": (lambda n, x, s: n.b(n.a(x)[torch.tensor([0, 0, 1, 2])]), MIXED),
    "mixed between the layers": (lambda n, x, s: n.b(0.7 * (h := n.a(x)) + 0.3 * h.flip(0)), MIXED),
    "mixed after the last layer": (lambda n, x, s: (h := n(x)) + h[ORDER], COUPLED),
    "centred": (lambda n, x, s: (h := n.a(x)) - h.mean(0), MIXED),
    "normalised along the samples": (lambda n, x, s: functional.normalize(n(x), dim=0), COUPLED),
    "softmax over transposed samples": (lambda n, x, s: n(x).T.softmax(-1).T, COUPLED),
    "softmax over the samples": (lambda n, x, s: n(x).softmax(0), COUPLED),
    "products of rows by einsum": (lambda n, x, s: torch.einsum("id,jd->ij", n(x), n(x)), COUPLED),
    "products of rows by linear": (lambda n, x, s: functional.linear(n(x), n(x)), COUPLED),
    "a weight times a mask that is not a buffer": (
        lambda n, x, s: n.b(functional.linear(x, n.a.weight * HALF)),
        "register_buffer",
    ),
    "a weight written into another tensor": (
        lambda n, x, s: n(functional.linear(functional.linear(x, n.square), rewritten(n.square))),
        "the sum of the samples'",
    ),
}
HALF = torch.rand(4, 3).round().double()


def rewritten(weight):
    out = torch.zeros(3, 3).double()
    out[torch.arange(3)] = weight[torch.arange(3)]
    return out


def record(net, function):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)
    batch = inputs()
    with recorder.step(range(N), epoch=1):
        squares(function(net, *batch)).mean().backward()
        optimizer.step()
    return dict(zip(recorder.layers, recorder.pop_epoch(1, N), strict=True))


def expected(net, function):
    named = dict(net.named_parameters())
    want = {}
    for i, loss in enumerate(squares(function(net, *inputs()))):
        gradients = torch.autograd.grad(
            loss / N, list(named.values()), retain_graph=True, allow_unused=True
        )
        for name, gradient in zip(named, gradients, strict=True):
            layer = want.setdefault(name.rpartition(".")[0] or "model", torch.zeros(N).double())
            layer[i] += 0 if gradient is None else 0.01 * gradient.square().sum()
    return want


@pytest.mark.parametrize("case", EXACT)
def test_exact_patterns_equal_the_definition(case):
    want = expected(Net(), EXACT[case])
    for layer, beta in record(Net(), EXACT[case]).items():
        torch.testing.assert_close(beta, want[layer], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("case", REORDERED)
def test_rows_of_the_loss_are_matched_with_reordered_data(case):
    function, samples = REORDERED[case]
    want = expected(Net(), function)
    for layer, beta in record(Net(), function).items():
        torch.testing.assert_close(beta[samples], want[layer], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("case", REFUSED)
def test_other_patterns_are_refused_before_the_update(case):
    function, words = REFUSED[case]
    net = Net()
    before = [parameter.clone() for parameter in net.parameters()]
    with pytest.raises(UnsupportedError, match=words):
        record(net, function)
    assert all(map(torch.equal, before, net.parameters()))


def test_losses_may_be_sorted():
    expected = record(Net(), lambda n, x, s: n(x))
    for layer, beta in record(Net(), lambda n, x, s: squares(n(x)).sort()[0].sqrt()).items():
        torch.testing.assert_close(beta, expected[layer], rtol=1e-9, atol=1e-15)


def test_samples_may_be_fetched_by_their_index_in_the_block():
    net, (x, _) = Net(), inputs()
    expected = record(net, lambda n, x, s: n(x))
    optimizer = torch.optim.SGD((net := Net()).parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)
    with recorder.step(ORDER, epoch=1):
        squares(net(x[ORDER])).mean().backward()
        optimizer.step()
    for layer, beta in zip(recorder.layers, recorder.pop_epoch(1, N), strict=True):
        torch.testing.assert_close(beta, expected[layer], rtol=1e-9, atol=1e-15)
