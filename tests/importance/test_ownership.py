"""Which sample a row belongs to: proved, or refused; never another sample's, nor several's."""

from contextlib import nullcontext
from functools import partial

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sampimp.errors import ConfigError, UnsupportedError
from sampimp.importance.ownership.proof import Proof
from sampimp.importance.recorder import ImportanceRecorder

pytestmark = pytest.mark.usefixtures("double_on_one_thread")

N, T, D = 6, 5, 4


class Net(nn.Module):
    """An inner and an outer layer, and whatever a case does between them."""

    def __init__(self, between, last=None):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, 2)
        self.gamma = nn.Parameter(torch.randn(D))
        self.between, self.last = between, last or (lambda z: z)

    def forward(self, x):
        return self.last(self.b(self.between(self.a(x).tanh())))


def data(*shape):
    torch.manual_seed(2)
    return torch.randn(*shape)


def square(z):
    return z.square().flatten(1).sum(1)


def record(net, loss, x, size=N, **options):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer, **options)
    with recorder.step(range(size), epoch=1):
        loss(net(x)).backward()
        optimizer.step()
    return dict(zip(recorder.layers, recorder.pop_epoch(1, size), strict=True))


def expected(net, losses, optimizer=None):
    """Return importance by the gradient of each sample's loss, from the definition."""
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=0.1)
    gradients = oracles.gradients_by_loss(net, losses)
    return oracles.importance_by_update(net, optimizer, gradients)


def assert_same(got, want):
    for layer, beta in got.items():
        torch.testing.assert_close(beta, want[layer], rtol=1e-9, atol=1e-15)


def centred_pairs(h):
    """Differences of all pairs by broadcasting, each sample's against the others'."""
    return (h[:, None] - h[None]).abs().mean(1)


def dispatched(h):
    """Tokens dispatched to as many slots as there are samples."""
    weights = torch.softmax(h @ torch.ones(D, N), 0)
    return torch.einsum("ne,ed->nd", weights, torch.einsum("ne,nd->ed", weights, h))


def squared_distance(h):
    return h * functional.mse_loss(h, torch.zeros_like(h))


def attention(h):
    return functional.scaled_dot_product_attention(h[None], h[None], h[None])[0]


def batch_rows_replaced(h):
    h = h.clone()
    h[0] = h[1:].mean(0)
    return h


MIXING = {
    "mean": lambda h: h - h.mean(0),
    "mean of all": lambda h: h - h.mean(),
    "var_mean": lambda h: h - torch.var_mean(h, 0)[1],
    "std_mean": lambda h: h / (1 + torch.std_mean(h, 0)[0]),
    "nanmean": lambda h: h + h.nanmean(0),
    "nansum": lambda h: h + torch.nansum(h, 0),
    "aminmax": lambda h: h - torch.aminmax(h, dim=0)[0],
    "quantile": lambda h: h - torch.quantile(h, 0.3, dim=0),
    "median": lambda h: h - h.median(0)[0],
    "kthvalue": lambda h: h - h.kthvalue(2, 0)[0],
    "cummax": lambda h: h + h.cummax(0)[0],
    "logcumsumexp": lambda h: torch.logcumsumexp(h, 0),
    "cumsum": lambda h: h.cumsum(0),
    "softmin": lambda h: functional.softmin(h, 0),
    "softmax": lambda h: h.softmax(0),
    "normalize": lambda h: functional.normalize(h, dim=0),
    "renorm": lambda h: h / h.norm(),
    "einsum of one": lambda h: h + torch.einsum("nd->d", h),
    "einsum of two": lambda h: h + torch.einsum("nd,me->de", h, h)[0],
    "index_add": lambda h: h.index_add(0, torch.arange(N).roll(1), h),
    "a distance as a factor": squared_distance,
    "pooling": lambda h: functional.avg_pool1d(h.T[None], 3, 1, 1)[0].T,
    "max pooling": lambda h: functional.max_pool1d(h.T[None], 3, 1, 1)[0].T,
    "a Fourier transform": lambda h: torch.fft.fft(h, dim=0).real,
    "layer_norm over samples": lambda h: functional.layer_norm(h.T, (N,)).T,
    "batch_norm without a module": lambda h: functional.batch_norm(h, None, None, training=True),
    "a convolution over samples": lambda h: (
        functional.conv1d(h.T[None], torch.ones(D, D, 3), padding=1)[0].T
    ),
    "pairs": centred_pairs,
    "cdist": lambda h: torch.cdist(h, h)[:, :D],
    "a matrix of samples": lambda h: (h @ h.T).softmax(1) @ h,
    "bmm": lambda h: torch.bmm(h[None] @ h.T[None], h[None])[0],
    "tensordot": lambda h: torch.tensordot(h @ h.T, h, 1),
    "sparse": lambda h: torch.sparse.mm(torch.ones(N, N).to_sparse(), h),
    "attention": attention,
    "slots": dispatched,
    "differences": lambda h: torch.cat([h[:1], h.diff(dim=0)]),
    "a neighbour": lambda h: h + h.roll(1, 0),
    "upside down": lambda h: h + h.flip(0),
    "a row that is replaced": batch_rows_replaced,
    "interpolation": lambda h: functional.interpolate(h.T[None], N + 2)[0].T[:N],
    "a covariance": lambda h: h @ torch.cov(h.T),
    "a determinant": lambda h: h * torch.linalg.det(h.T @ h),
    "a solve": lambda h: torch.linalg.solve(h.T @ h + torch.eye(D), h.T).T,
    "a shape that joins others": lambda h: h.T.reshape(N, D) + functional.pad(h, (0, 0, 1, 0))[:N],
    "unfold": lambda h: functional.pad(h, (0, 0, 2, 0)).unfold(0, 3, 1).mean(-1),
    "one sample's": lambda h: h * h[0],
    "a scalar of the batch": lambda h: h * h.sum().tanh(),
}


MIXES = r"several samples( depend|, so)|which mixes them"


@pytest.mark.parametrize("case", MIXING)
def test_what_mixes_samples_before_the_last_layer_is_refused(case):
    net = Net(MIXING[case])
    before = [parameter.clone() for parameter in net.parameters()]
    with pytest.raises(UnsupportedError, match=MIXES):
        record(net, lambda z: square(z).mean(), data(N, D))
    assert all(map(torch.equal, before, net.parameters()))


@pytest.mark.parametrize("case", MIXING)
def test_what_mixes_samples_behind_the_last_layer_is_refused(case):
    net = Net(lambda h: h)
    net.b = nn.Linear(D, D)
    net.last = MIXING[case]
    with pytest.raises(UnsupportedError, match=MIXES):
        record(net, lambda z: square(z).mean(), data(N, D))


COUPLED = {
    "root of the mean squared error": lambda z: square(z).mean().sqrt(),
    "logarithm of a mean": lambda z: square(z).mean().log(),
    "variance penalty": lambda z: square(z).mean() + square(z).var(),
    "Dice over the batch": lambda z: 1 - 2 * z.sigmoid()[:, 0].sum() / (1 + z.sigmoid().sum()),
    "focal factor of the mean": lambda z: (1 - (-square(z).mean()).exp()) ** 2 * square(z).mean(),
    "contrastive": lambda z: functional.cross_entropy(z @ z.T, torch.arange(N)),
    "contrastive, both ways": lambda z: (
        functional.cross_entropy(z @ z.T, torch.arange(N))
        + functional.cross_entropy((z @ z.T).T, torch.arange(N))
    ),
    "pairs": lambda z: (square(z[::2]) * square(z[1::2])).sum(),
    "logsumexp": lambda z: square(z).logsumexp(0),
}


@pytest.mark.parametrize("case", COUPLED)
def test_a_loss_that_is_no_sum_over_samples_is_refused(case):
    with pytest.raises(UnsupportedError, match="a loss that is a sum over samples"):
        record(Net(lambda h: h), COUPLED[case], data(N, D))


@pytest.mark.parametrize("case", COUPLED)
def test_its_outer_derivative_may_be_meant_as_a_constant(case):
    net, x = Net(lambda h: h), data(N, D)
    z = net(x)
    (delta,) = torch.autograd.grad(COUPLED[case](z), z, retain_graph=True)
    want = expected(net, (z * delta).sum(1))
    assert_same(record(net, COUPLED[case], x, coupled_loss="constant"), want)


def labels():
    return torch.arange(N) % 2


SUMS = {
    "cross-entropy": lambda z: functional.cross_entropy(z, labels(), reduction="none") / N,
    "... of weighted classes": lambda z: (
        functional.cross_entropy(z, labels(), torch.tensor([1.0, 3.0]), reduction="none")
        / (4 * N / 2)
    ),
    "... smoothed": lambda z: (
        functional.cross_entropy(z, labels(), label_smoothing=0.1, reduction="none") / N
    ),
    "absolute": lambda z: z.abs().sum(1),
    "squared": lambda z: square(z),
    "hinge": lambda z: functional.multi_margin_loss(z, labels(), reduction="none") / N,
    "Huber": lambda z: functional.huber_loss(z, torch.zeros_like(z), reduction="none").sum(1),
    "weights of the batch that are detached": lambda z: square(z) / square(z).detach().mean(),
    "weights by sample": lambda z: square(z) * torch.linspace(0, 1, N),
    "other weights by sample": lambda z: square(z) * (1 + torch.arange(N)),
}


@pytest.mark.parametrize("case", SUMS)
def test_a_loss_that_is_a_sum_over_samples_is_exact(case):
    net, x = Net(lambda h: h), data(N, D)
    want = expected(net, SUMS[case](net(x)))
    assert_same(record(net, lambda z: SUMS[case](z).sum(), x), want)


def from_middle(h):
    """Return samples in an order that is made of values, and back."""
    order = h.detach()[:, 0].argsort()
    return h[order].tanh()[order.argsort()]


def one_by_one(h):
    return torch.stack([row.tanh() for row in h.unbind(0)])


def masked(h):
    chosen = h.detach()[:, 0] > 0
    return torch.zeros_like(h).masked_scatter(chosen[:, None], h[chosen] * 2) + h


UNMIXED = {
    "plain": lambda h: h,
    "detached statistics": lambda h: (h - h.detach().mean(0)) / h.detach().std(0),
    "detached attention": lambda h: h * (h.detach() @ h.detach().T).softmax(1)[:, :1],
    "an order and back": from_middle,
    "one by one": one_by_one,
    "some by a mask": masked,
    "a permutation matrix and back": lambda h: (
        torch.eye(N).roll(1, 0).T @ (torch.eye(N).roll(1, 0) @ h)
    ),
    "split and joined": lambda h: torch.cat([h[:2].tanh(), h[2:].exp()]),
    "transposed": lambda h: (h.T * 2).T.contiguous(),
    "a sum of nothing": lambda h: h + 0 * h.detach().sum(),
}


@pytest.mark.parametrize("case", UNMIXED)
def test_what_mixes_no_samples_is_exact(case):
    net, x = Net(UNMIXED[case]), data(N, D)
    want = expected(net, square(net(x)) / N)
    assert_same(record(net, lambda z: square(z).mean(), x), want)


# Layers whose rows are samples and positions.


class Folded(nn.Module):
    """A layer on rows of samples and positions, joined in one of two ways."""

    def __init__(self, layer, inner):
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.out, self.inner = layer, nn.Linear(3, 2), inner

    def forward(self, x):  # (N, T, ...)
        own = x.transpose(0, 1) if self.inner else x
        rows = self.layer(own.flatten(0, 1))
        rows = rows[0] if isinstance(rows, tuple) else rows
        rows = rows.flatten(2).mean(2) if rows.dim() > 2 and rows.shape[1] == 3 else rows
        rows = rows.mean(1) if rows.dim() > 2 else rows
        found = rows.unflatten(0, own.shape[:2])
        return self.out((found.transpose(0, 1) if self.inner else found).tanh())


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


FOLDED = {
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


OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.1),
    "AdamW": partial(torch.optim.AdamW, lr=0.1, eps=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("count", [2, N])
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("case", FOLDED)
def test_samples_and_positions_on_one_axis_are_exact(case, inner, count, optimizer):
    make, shape = FOLDED[case]
    net, x = Folded(make(), inner), data(N, count, *shape)
    made = OPTIMIZERS[optimizer](net.parameters())
    want = expected(net, square(net(x)) / N, made)
    recorder = ImportanceRecorder(net, made)
    with recorder.step(range(N), epoch=1):
        square(net(x)).mean().backward()
        made.step()
    for beta, layer in zip(recorder.pop_epoch(1, N), recorder.layers, strict=True):
        torch.testing.assert_close(beta, want[layer], rtol=1e-9, atol=1e-15)


# Couplings that are piecewise linear, which have no second derivative.


def hinge_on_pairs(z):
    scores = z[:, 0]
    return (1 - (scores[:, None] - scores[None])).relu().mean()


def set_values(z):
    losses = torch.zeros(N)
    losses[:] = square(z)
    return losses.topk(2)[0].mean()


PIECEWISE = {
    "hinge on differences of scores": hinge_on_pairs,
    "the mean of the largest": lambda z: square(z).topk(3)[0].mean(),
    "the median": lambda z: square(z).median(),
    "the largest": lambda z: square(z).max(),
    "ranks as weights": lambda z: (square(z).sort()[0] * torch.arange(N)).sum(),
    "margin ranking": lambda z: functional.margin_ranking_loss(
        z[:3, 0], z[3:, 0], torch.ones(3), margin=0.5
    ),
    "triplets": lambda z: functional.triplet_margin_loss(z, z.roll(1, 0), z.roll(2, 0)),
    "a bound on the mean": lambda z: z.abs().mean().clamp(max=2 * float(z.detach().abs().mean())),
    "written into a tensor": set_values,
}


@pytest.mark.parametrize("case", PIECEWISE)
def test_a_loss_that_couples_samples_piecewise_is_refused(case):
    net, x = Net(lambda h: h), data(N, D)
    with pytest.raises(UnsupportedError, match="a loss that is a sum over samples"):
        record(net, PIECEWISE[case], x)


PLAIN_LOSSES = {
    "in place": lambda z: z.mul_(2).square().sum(),
    "a hinge": lambda z: (1 - z).relu().sum(),
    "the largest of classes": lambda z: (z.max(1)[0] - z[:, 0]).sum(),
    "sorted": lambda z: square(z).sort()[0].sqrt().sum(),
    "a factor by a value": lambda z: square(z).sum() * float(z.detach().norm()),
    "a factor that is detached": lambda z: square(z).sum() * z.detach().mean(),
    "with dropout": lambda z: functional.dropout(square(z), 0.5).sum(),
    "written into a tensor": lambda z: torch.zeros(N).add_(square(z)).sum(),
    "a dictionary": lambda z: {"loss": square(z)}["loss"].sum(),
}


@pytest.mark.parametrize("case", PLAIN_LOSSES)
def test_a_loss_that_is_known_as_a_function_is_not_refused(case):
    record(Net(lambda h: h), PLAIN_LOSSES[case], data(N, D))


# How often it is proved, and what is left behind.


@pytest.fixture
def proofs(monkeypatch):
    """Count the proofs."""
    found = []
    run = Proof.run

    def counted(self, *args):
        found.append(self)
        return run(self, *args)

    monkeypatch.setattr(Proof, "run", counted)
    return found


def train(net, batches, epochs=1, **options):
    """Train, and compare the importance of every step with the definition's."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer, **options)
    for epoch in range(epochs):
        want, start = [], 0
        for x in batches:
            random = torch.get_rng_state()
            want.append(expected(net, square(net(x)) / len(x)))
            torch.set_rng_state(random)
            with recorder.step(range(start, start + len(x)), epoch=epoch):
                optimizer.zero_grad()
                square(net(x)).mean().backward()
                optimizer.step()
            start += len(x)
        whole = {layer: torch.cat([one[layer] for one in want]) for layer in want[0]}
        got = recorder.pop_epoch(epoch, start)
        assert_same(dict(zip(recorder.layers, got, strict=True)), whole)


def batches(*sizes):
    return [size * data(size, D) for size in sizes]


def test_a_pass_is_proved_once_an_epoch(proofs):
    train(Net(lambda h: h), batches(N, N, N, N, 4, 2, 1), epochs=3)
    assert len(proofs) == 3


def test_another_sequence_of_operations_is_proved(proofs):
    calls = iter([torch.tanh] * 2 + [torch.sin] * 2 + [torch.tanh] * 2)
    net = Net(lambda h: next(calls)(h))
    train(net, batches(N, N, N))  # each batch is also run for the oracle
    assert len(proofs) == 2


def test_samples_that_are_moved_by_values_are_proved_each_time(proofs):
    def between(h):
        order = torch.randperm(len(h))
        return h[order].tanh()[order.argsort()]

    torch.manual_seed(3)
    train(Net(between), batches(N, N, N, 3))
    assert len(proofs) == 4


@pytest.mark.parametrize(
    "between",
    [
        lambda h: torch.stack([h[i] for i in torch.randperm(len(h)).tolist()]),
        lambda h: h.gather(0, torch.randperm(len(h))[:, None].expand_as(h)),
        lambda h: h.roll(int(torch.randint(len(h), ())), 0),
        lambda h: torch.eye(len(h))[torch.randperm(len(h))] @ h,
        lambda h: h.index_select(0, h.detach()[:, 0].argsort()),
    ],
)
def test_rows_of_the_loss_in_another_order_each_time_are_the_datas(between):
    torch.manual_seed(3)
    net, x = Net(between), data(N, D)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    recorder = ImportanceRecorder(net, optimizer)
    plain = Net(lambda h: h)
    plain.load_state_dict(net.state_dict())
    optimizer.param_groups[0]["lr"] = 0.1
    for epoch in range(4):
        plain.load_state_dict(net.state_dict())
        want = expected(plain, square(plain(x)) / N)
        with recorder.step(range(N), epoch=epoch):
            optimizer.zero_grad()
            square(net(x)).mean().backward()
            optimizer.step()
        assert_same(dict(zip(recorder.layers, recorder.pop_epoch(epoch, N), strict=True)), want)


def test_what_is_behind_a_head_of_zeros_is_proved_later(proofs):
    net = Net(lambda h: h)
    nn.init.zeros_(net.b.weight)
    train(net, batches(N, N, N, N))
    assert len(proofs) == 2  # the first step has moved the head


def test_mixing_behind_a_gate_that_starts_at_zero_is_found():
    net = Net(lambda h: h)
    net.gate = nn.Parameter(torch.zeros(()))
    net.between = lambda h: h + net.gate * h.mean(0)
    with pytest.raises(UnsupportedError, match="several samples depend"):
        train(net, batches(N, N, N))


def test_an_order_of_data_that_changes_is_followed():
    """As of packed sequences that are sorted by length."""
    net = Net(lambda h: h)
    inner = net.forward
    net.forward = lambda x: inner(x[(order := torch.randperm(len(x)))])[order.argsort()]
    torch.manual_seed(3)
    train(net, batches(N, N, N))


class Counting(nn.Module):
    """Draws random numbers and counts its calls, which a checkpoint repeats."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, h):
        self.calls += 1
        return functional.dropout(self.linear(h), 0.5)


def test_a_proof_leaves_nothing_behind():
    def run(records):
        torch.manual_seed(1)
        net = nn.Sequential(Counting(), nn.Linear(D, 2))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        recorder = ImportanceRecorder(net, optimizer)
        net[1].weight.register_hook(lambda g: g * torch.rand(()).clamp(1.0, 1.0))
        for step in range(3):
            index = range(step * N, (step + 1) * N)
            with recorder.step(index, epoch=1) if records else nullcontext():
                optimizer.zero_grad()
                h = checkpoint(net[0], data(N, D), use_reentrant=False)
                square(net[1](h)).mean().backward()
                optimizer.step()
        return [*net.state_dict().values(), torch.get_rng_state()]

    assert all(map(torch.equal, run(True), run(False)))


def test_two_recorders_do_not_disturb_each_others_proofs():
    net, x = Net(lambda h: h), data(N, D)
    want = expected(net, square(net(x)) / N)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorders = [ImportanceRecorder(net, optimizer) for _ in range(2)]
    with recorders[0].step(range(N), epoch=1), recorders[1].step(range(N), epoch=1):
        square(net(x)).mean().backward()
        optimizer.step()
    for recorder in recorders:
        assert_same(dict(zip(recorder.layers, recorder.pop_epoch(1, N), strict=True)), want)


@pytest.mark.parametrize(
    "change", [torch.relu_, lambda h: h.mul_(0.5), lambda h: h.add_(1), lambda h: h.clamp_(min=0)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_change_in_place_of_what_a_linear_layer_returns_is_exact(change, bias):
    class Positions(Net):
        def forward(self, x):
            return self.b(change(self.a(x)))

    net = Positions(None)
    net.a = nn.Linear(D, D, bias=bias)
    train(net, [data(N, T, D) for _ in range(3)])


@pytest.mark.parametrize("positions", [N, 2 * N])
@pytest.mark.parametrize("learned", ["table", "product"])
def test_positions_in_a_plain_attribute_are_refused(positions, learned):
    class Positions(Net):
        def __init__(self):
            super().__init__(None)
            self.place = nn.Embedding(positions, D)
            self.index = torch.arange(positions)
            self.basis = torch.eye(positions)

        def forward(self, x):
            table = self.place(self.index)
            table = table if learned == "table" else self.basis @ self.place.weight
            return self.b(self.a(x + table).tanh())

    with pytest.raises(UnsupportedError, match="register_buffer"):
        record(Positions(), lambda z: square(z).mean(), data(N, positions, D))


def test_a_loss_without_a_second_derivative_is_said_to_be_unchecked():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return z.square().sum()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, delta):
            return 2 * delta * ctx.saved_tensors[0]

    net, x = Net(lambda h: h), data(N, D)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)

    def step():
        with recorder.step(range(N), epoch=1):
            Once.apply(net(x)).backward()
            optimizer.step()

    with pytest.warns(UserWarning, match="no second derivative"):
        step()
    assert recorder.to_dataset().importance.attrs["loss"].startswith("not checked")


def test_what_another_optimizer_moves_has_no_importance_here():
    net, x = Net(lambda h: h), data(N, D)
    want = expected(net, square(net(x)) / N)
    first = torch.optim.SGD(net.a.parameters(), lr=0.1)
    second = torch.optim.Adam([*net.b.parameters(), net.gamma])
    recorder = ImportanceRecorder(net, first)

    def step():
        with recorder.step(range(N), epoch=1):
            square(net(x)).mean().backward()
            second.step()
            first.step()

    with pytest.warns(UserWarning, match="Adam moves b as well"):
        step()
    result = recorder.to_dataset().importance.sel(epoch=1)
    torch.testing.assert_close(torch.tensor(result.sel(layer="a").values), want["a"].float())
    assert result.sel(layer="b").isnull().all()


class Transposed(Net):
    """Ends with samples on the last axis."""

    def __init__(self):
        super().__init__(None)
        self.w = nn.Parameter(torch.randn(3, D))

    def forward(self, x):
        return self.w @ self.a(x).tanh().transpose(-1, -2)


@pytest.mark.parametrize("positions", [(), (T,)])
def test_a_weight_from_the_left_is_exact_where_data_say_whose_the_columns_are(positions):
    net, x = Transposed(), data(*positions, N, D)
    z = net(x)
    losses = z.square().movedim(-1, 0).flatten(1).sum(1)
    want = expected(net, losses)
    assert_same(record(net, lambda z: z.square().sum(), x, batch_dim=len(positions)), want)


def test_steps_that_overflow_are_proved_later(proofs):
    net, x = Net(lambda h: h).float(), data(N, D).float()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38, backoff_factor=1e-38)
    want = expected(net, square(net(x)) / N)
    for epoch in (1, 2, 3):
        with recorder.step(range(N), epoch=epoch):
            optimizer.zero_grad()
            scaler.scale(1e3 * square(net(x)).mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        if epoch == 2:
            got = dict(zip(recorder.layers, recorder.pop_epoch(2, N), strict=True))
            for layer, beta in got.items():
                torch.testing.assert_close(beta, 1e6 * want[layer].float(), rtol=1e-4, atol=1e-3)
    assert len(proofs) == 3


def test_a_sparse_table_is_exact():
    def run(sparse):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Embedding(9, D, sparse=sparse), nn.Flatten(), nn.Linear(3 * D, 2))
        index = torch.arange(N)[:, None] + torch.tensor([0, 1, 1])
        return record(net, lambda z: square(z).mean(), index)

    assert_same(run(True), run(False))


def test_a_learning_rate_that_is_a_tensor_is_written(tmp_path):
    net = Net(lambda h: h)
    optimizer = torch.optim.SGD(net.parameters(), lr=torch.tensor(0.1))
    recorder = ImportanceRecorder(net, optimizer)
    with recorder.step(range(N), epoch=1):
        square(net(data(N, D))).mean().backward()
        optimizer.step()
    result = recorder.to_dataset()
    assert result.importance.attrs["learning_rate"] == pytest.approx(0.1)
    result.to_zarr(tmp_path / "result.zarr")


def test_names_of_samples_are_refused_with_what_to_do():
    net = Net(lambda h: h)
    recorder = ImportanceRecorder(net, torch.optim.SGD(net.parameters(), lr=0.1))
    with (
        pytest.raises(ConfigError, match=r"whole numbers(.|\n)*enumerate"),
        recorder.step([f"image-{i}" for i in range(N)], epoch=1),
    ):
        pass


def test_identifiers_that_are_no_positions_are_refused_with_what_to_do():
    net = Net(lambda h: h)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)
    with recorder.step([10**13 + i for i in range(N)], epoch=1):
        square(net(data(N, D))).mean().backward()
        optimizer.step()
    with pytest.raises(ConfigError, match=r"6 samples(.|\n)*return_inverse"):
        recorder.to_dataset()


# What changes from step to step, after the first was proved.


class Inner(nn.Module):
    """A layer between two moves of its input, which change with the step."""

    def __init__(self, there, back=lambda h, step: h):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.m, self.b = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 2)
        self.there, self.back, self.step = there, back, 0

    def forward(self, x):
        h = self.there(self.a(x).tanh(), self.step)
        return self.b(self.back(self.m(h).tanh(), self.step))


def train_by_step(net, steps=5, x=lambda step: data(N, D) + step, **options):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer, **options)
    want = []
    for step in range(steps):
        net.step = step
        want.append(expected(net, square(net(x(step))) / N))
        with recorder.step(range(step * N, (step + 1) * N), epoch=1):
            optimizer.zero_grad()
            square(net(x(step))).mean().backward()
            optimizer.step()
    whole = {layer: torch.cat([one[layer] for one in want]) for layer in want[0]}
    got = recorder.pop_epoch(1, steps * N)
    assert_same(dict(zip(recorder.layers, got, strict=True)), whole)


def order_of(step, size=N):
    """Return the batch's order in two steps, and then others."""
    generator = torch.Generator().manual_seed(step)
    return torch.arange(size) if step < 2 else torch.randperm(size, generator=generator)


def matrix(step):
    return torch.eye(N)[order_of(step).tolist()]


def halves(h, step):
    first, second = h.chunk(2)
    return torch.cat([first, second] if step < 2 else [second, first])


MOVED_LATER = {
    "by an index": (lambda h, k: h[order_of(k)], lambda h, k: h[order_of(k).argsort()]),
    "with a row more": (
        lambda h, k: torch.cat([h, torch.zeros(1, D)])[order_of(k)],
        lambda h, k: torch.cat([h, torch.zeros(1, D)])[order_of(k).argsort()],
    ),
    "as a table": (
        lambda h, k: functional.embedding(order_of(k), h),
        lambda h, k: functional.embedding(order_of(k).argsort(), h),
    ),
    "by a matrix": (lambda h, k: matrix(k) @ h, lambda h, k: matrix(k).T @ h),
    "by halves": (halves, halves),
    "by a loop": (
        lambda h, k: torch.stack([h[i] for i in order_of(k).tolist()]),
        lambda h, k: torch.stack([h[i] for i in order_of(k).argsort().tolist()]),
    ),
}


@pytest.mark.parametrize("case", MOVED_LATER)
def test_rows_that_are_moved_in_later_steps_are_their_samples(case):
    train_by_step(Inner(*MOVED_LATER[case]))


MIXED_LATER = {
    "a factor that was zero": lambda h, k: h + (0.0 if k < 2 else 0.3) * h.mean(0),
    "what was detached": lambda h, k: h - (h.mean(0).detach() if k < 2 else h.mean(0)),
    "another of two": lambda h, k: h + (h.exp(), h.mean(0, keepdim=True))[k > 1],
    "a weight that was one": lambda h, k: (w := 1.0 if k < 2 else 0.5) * h + (1 - w) * h.flip(0),
}


@pytest.mark.parametrize("case", MIXED_LATER)
def test_mixing_that_begins_in_a_later_step_is_refused(case):
    with pytest.raises(UnsupportedError, match="several samples depend"):
        train_by_step(Inner(MIXED_LATER[case]))


def test_heads_that_take_turns_are_exact():
    class Heads(Inner):
        def forward(self, x):
            h = self.a(x).tanh()
            return (self.m(h), self.b(h))[self.step % 2 if self.step > 1 else 0]

    train_by_step(Heads(None), steps=6)


def test_joined_rows_of_which_few_have_a_gradient_are_told_apart_later():
    class Tokens(Inner):
        def forward(self, x):
            rows = self.a(x.transpose(0, 1).reshape(-1, D)).view(T, N, D).transpose(0, 1)
            label = [[1, 4, 0, 2, 3, 1], [0, 0, 0, 1, 1, 1]][self.step > 1]
            return self.b(rows[torch.arange(N), label])

    train_by_step(Tokens(None), x=lambda step: data(N, T, D) + step)


@pytest.mark.parametrize("start", ["warm-up", "accumulated"])
def test_a_gate_is_proved_until_it_has_opened(start):
    net = Net(lambda h: h)
    net.gate = nn.Parameter(torch.zeros(()))
    net.between = lambda h: h + net.gate * torch.softmax(h @ h.T, 1) @ h
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0 if start == "warm-up" else 0.1)
    recorder = ImportanceRecorder(net, optimizer)

    def steps():
        for step in range(4):
            parts = [data(N, D), data(N, D) + 1] if start == "accumulated" else [data(N, D)]
            index = [range(N * i, N * (i + 1)) for i in range(len(parts))]
            with recorder.step(index, epoch=1):
                optimizer.zero_grad()
                for x in parts:
                    square(net(x)).mean().backward()
                optimizer.step()
            optimizer.param_groups[0]["lr"] = 0.1 * (step > 0)

    with pytest.raises(UnsupportedError, match="several samples depend"):
        steps()


# Data that the block puts into another order.


def cut_and_mixed(x, order):
    x = x.clone()
    x[:, 2:] = x[order][:, 2:]
    return x


def filled(x, order):
    return torch.empty_like(x).copy_(x[order])


def by_no_grad(x, order):
    with torch.no_grad():
        return x[order] * 2


REORDERED = {
    "without gradients": by_no_grad,
    "with noise": lambda x, order: x[order] + 0.1 * torch.randn_like(x),
    "with a mask": lambda x, order: x[order] * (torch.rand(N, 1) > 0.3),
    "copied": filled,
    "as a table": lambda x, order: functional.embedding(order, x),
    "twice": lambda x, order: x[order][torch.arange(N)],
    "with a column of ones": lambda x, order: torch.cat([x[order][:, 1:], torch.ones(N, 1)], 1),
    "chosen": lambda x, order: torch.where(x[order] > 0, x[order], 0 * x[order]),
}


@pytest.mark.parametrize("case", REORDERED)
def test_data_in_another_order_are_followed(case):
    net, x, order = Net(lambda h: h), data(N, D), torch.tensor([2, 0, 3, 5, 1, 4])
    torch.manual_seed(4)
    moved = REORDERED[case](x, order)
    want = expected(net, square(net(moved)) / N)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)
    with recorder.step(range(N), epoch=1):
        torch.manual_seed(4)
        square(net(REORDERED[case](x, order))).mean().backward()
        optimizer.step()
    for layer, beta in zip(recorder.layers, recorder.pop_epoch(1, N), strict=True):
        torch.testing.assert_close(beta[order], want[layer], rtol=1e-9, atol=1e-15)


def test_what_keeps_a_part_of_each_sample_is_that_samples():
    net, x, order = Net(lambda h: h), data(N, D), torch.tensor([2, 0, 3, 5, 1, 4])
    want = expected(net, square(net(cut_and_mixed(x, order))) / N)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)
    with recorder.step(range(N), epoch=1):
        square(net(cut_and_mixed(x, order))).mean().backward()
        optimizer.step()
    assert_same(dict(zip(recorder.layers, recorder.pop_epoch(1, N), strict=True)), want)


@pytest.mark.parametrize("count", [2, 7])
@pytest.mark.parametrize("joined", [True, False])
def test_rows_of_no_sample_are_given_to_none(count, joined):
    net, x, others = Net(lambda h: h), data(N, D), data(count * N, D)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)

    def step():
        with recorder.step(range(N), epoch=1):
            if joined:
                square(net(torch.cat([x, others]))).mean().backward()
            else:
                (square(net(x)).mean() + square(net(others)).mean()).backward()

    with pytest.raises(UnsupportedError, match=r"data whose rows|none between the loss"):
        step()


# Single findings.


LISTWISE = {
    "scores of one list": lambda z: functional.cross_entropy(
        z[:, 0].view(1, -1), torch.tensor([2])
    ),
    "scores without an axis": lambda z: functional.cross_entropy(z[:, 0], torch.tensor(2)),
    "transposed": lambda z: functional.cross_entropy(z.transpose(0, 1), torch.tensor([1, 3])),
    "a reciprocal": lambda z: torch.div(1.0, functional.mse_loss(z, torch.ones(N, 2))),
}


@pytest.mark.parametrize("case", LISTWISE)
def test_a_loss_by_row_of_what_is_no_row_is_looked_at(case):
    with pytest.raises(UnsupportedError, match="a loss that is a sum over samples"):
        record(Net(lambda h: h), LISTWISE[case], data(N, D))


def test_a_loss_of_two_calls_is_looked_at():
    net, x = Net(lambda h: h), data(N, D)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)

    def step():
        with recorder.step(range(N), epoch=1):
            first, second = net(x), net(x + 1)
            (functional.mse_loss(second, torch.ones(N, 2)) * first.var()).backward()

    with pytest.raises(UnsupportedError, match="a loss that is a sum over samples"):
        step()


def test_a_plain_loss_is_called_so_though_a_coupled_one_may_come():
    net, x = Net(lambda h: h), data(N, D)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer, coupled_loss="constant")
    with recorder.step(range(N), epoch=1):
        square(net(x)).mean().backward()
        optimizer.step()
    assert recorder.to_dataset().importance.attrs["loss"] == "sum over samples"


def test_a_backward_pass_that_comes_to_no_use_is_none_of_the_recorders():
    """As a discriminator's, before the generator's."""
    net, judge, x = Net(lambda h: h), nn.Linear(2, 1), data(N, D)
    want = expected(net, judge(net(x)).square().sum(1) / N)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)
    with recorder.step(range(N), epoch=1):
        z = net(x)
        judge(z.detach()).square().mean().backward()
        judge(z).square().sum(1).mean().backward()
        optimizer.step()
    assert_same(dict(zip(recorder.layers, recorder.pop_epoch(1, N), strict=True)), want)


def test_axes_from_the_end_are_told_apart():
    net = Inner(lambda h, k: h.softmax(-1 if k < 2 else -2))
    with pytest.raises(UnsupportedError, match="several samples depend"):
        train_by_step(net)


def test_a_step_that_is_refused_leaves_the_next_to_be_checked():
    net, x = Net(lambda h: h), data(N, D)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)

    def step():
        with recorder.step(range(N), epoch=1):
            optimizer.zero_grad()
            square(net(x)).topk(3)[0].mean().backward()
            optimizer.step()

    for _ in range(2):
        with pytest.raises(UnsupportedError, match="a loss that is a sum over samples"):
            step()


def test_data_of_two_passes_that_are_moved_before_the_first_are_refused():
    net, order = Net(lambda h: h), torch.tensor([2, 0, 3, 5, 1, 4])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)

    batches = [data(N, D), data(N, D) + 1]

    def step(moved_before):
        with recorder.step([range(N), range(N, 2 * N)], epoch=1):
            optimizer.zero_grad()
            given = [x[order] for x in batches] if moved_before else batches
            for x in given:
                square(net(x if moved_before else x[order])).mean().backward()
            optimizer.step()

    step(moved_before=False)
    with pytest.raises(UnsupportedError, match="data whose rows"):
        step(moved_before=True)


@pytest.mark.parametrize("sort", [torch.msort, lambda x: x.sort(0)[0], lambda x: x.topk(N, 0)[0]])
def test_data_sorted_by_feature_are_refused(sort):
    net, x = Net(lambda h: h), data(N, D)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)

    def step():
        with recorder.step(range(N), epoch=1):
            square(net(sort(x))).mean().backward()

    with pytest.raises(UnsupportedError, match="data whose rows"):
        step()


@pytest.mark.parametrize("first", [0, 1])
def test_a_step_that_is_not_finite_is_said_to_be_none(first):
    net, x = Net(lambda h: h), data(N, D)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)
    for step in range(2):
        with recorder.step(range(step * N, step * N + N), epoch=1):
            optimizer.zero_grad()
            (square(net(x)).mean() * (float("nan") if step >= first else 1)).backward()
            optimizer.step()
    result = recorder.to_dataset().importance
    assert result.attrs["not_finite_epochs"] == [1]
    assert result.sel(epoch=1, layer="a")[first * N :].isnull().all()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_of_as_many_steps_as_samples_is_each_samples(kind):
    class Positions(Net):
        def forward(self, x):
            h = self.rnn(self.a(x))[0]
            return self.b(h[torch.arange(N), [2, 0, 3, 5, 1, 4]])

    net = Positions(None)
    net.rnn = kind(D, D, batch_first=True)
    x = data(N, N, D)
    want = expected(net, square(net(x)) / N)
    assert_same(record(net, lambda z: square(z).mean(), x), want)


def test_a_mean_over_samples_behind_a_recurrent_layer_is_refused():
    class Mean(Net):
        def forward(self, x):
            return self.b(self.rnn(x)[0].mean(0))

    net = Mean(None)
    net.rnn = nn.LSTM(D, D, batch_first=True)
    with pytest.raises(UnsupportedError, match=r"several samples|its samples elsewhere"):
        record(net, lambda z: square(z).mean(), data(N, N, D))


def test_a_loss_whose_second_derivative_is_not_finite_is_looked_at_otherwise():
    def kernel(z):
        return torch.exp(-(z[:, None] - z[None]).norm(dim=-1)).sum()

    with pytest.raises(UnsupportedError, match="a loss that is a sum over samples"):
        record(Net(lambda h: h), kernel, data(N, D))


def test_a_small_coupling_beside_a_large_term_is_found():
    def loss(z):
        return 1e6 * z[0].square().sum() + (z[1] * z[2]).sum()

    with pytest.raises(UnsupportedError, match="a loss that is a sum over samples"):
        record(Net(lambda h: h).float(), loss, data(N, D).float())


@pytest.mark.parametrize("hook", [lambda g: g / g.norm(), lambda g: g - g.mean(0)])
def test_a_hook_that_joins_the_samples_gradients_is_refused(hook):
    class Hooked(Net):
        def forward(self, x):
            h = self.a(x)
            h.register_hook(hook)
            return self.b(h.tanh())

    with pytest.raises(UnsupportedError, match="several samples depend"):
        record(Hooked(None), lambda z: square(z).mean(), data(N, D))


def test_recorders_of_two_models_in_a_row_both_record():
    first, second = nn.Linear(D, D), nn.Linear(D, 2)
    both = nn.Sequential(first, nn.Tanh(), second)
    x = data(N, D)
    want = expected(both, both(x).square().sum(1) / N)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (first, second)]
    recorders = [
        ImportanceRecorder(model, optimizer)
        for model, optimizer in zip((first, second), optimizers, strict=True)
    ]
    with recorders[0].step(range(N), epoch=1), recorders[1].step(range(N), epoch=1):
        both(x).square().sum(1).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    for recorder, layer in zip(recorders, ("0", "2"), strict=True):
        torch.testing.assert_close(recorder.pop_epoch(1, N)[0], want[layer], rtol=1e-9, atol=0)


def test_gradients_that_somebody_retains_are_the_users_passs():
    def run(records):
        net = Net(lambda h: h)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        recorder = ImportanceRecorder(net, optimizer)
        with recorder.step(range(N), epoch=1) if records else nullcontext():
            z = net(data(N, D))
            z.retain_grad()
            square(z).mean().backward()
            optimizer.step()
        return z.grad

    assert torch.equal(run(True), run(False))


def test_pieces_by_a_tensor_are_exact():
    net = Net(lambda h: torch.stack([one.mean(0) for one in torch.tensor_split(h, CUTS)]))
    x = data(2 * N, D)
    want = expected(net, square(net(x)) / N)
    assert_same(record(net, lambda z: square(z).mean(), x), want)


CUTS = torch.tensor([1, 3, 5, 8, 10])


# Networks of which every dimension is the number of samples.


def by_row(h):
    return h / h.square().mean(-1, keepdim=True).add(1).sqrt()


BLOCKS = {
    "linear": lambda n: nn.Linear(n, n),
    "no bias": lambda n: nn.Linear(n, n, bias=False),
    "norm": lambda n: nn.LayerNorm(n),
    "conv": lambda n: nn.Conv1d(n, n, 3, padding=1),
    "groups": lambda n: nn.GroupNorm(1, n),
    "rnn": lambda n: First(nn.RNN(n, n, batch_first=True)),
    "lstm": lambda n: First(nn.LSTM(n, n, batch_first=True)),
    "gru": lambda n: First(nn.GRU(n, n, batch_first=True)),
    "attention": lambda n: First(nn.MultiheadAttention(n, 1, batch_first=True)),
    "turned": lambda n: Turned(nn.Linear(n, n)),
    "scale": lambda n: Scale(n),
    "places": lambda n: Places(n),
    "prelu": lambda n: nn.PReLU(n),
    "folded": lambda n: Joined(nn.Linear(n, n)),
    "rows": lambda n: Applied(by_row),
    "tanh": lambda n: nn.Tanh(),
}


class First(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, h):
        attends = isinstance(self.inner, nn.MultiheadAttention)
        return self.inner(h, h, h)[0] if attends else self.inner(h)[0]


class Turned(First):
    """Mixes positions, as an MLP-Mixer does."""

    def forward(self, h):
        return self.inner(h.transpose(1, 2)).transpose(1, 2)


class Joined(First):
    def forward(self, h):
        return self.inner(h.reshape(-1, h.shape[-1])).view_as(h)


class Applied(First):
    def forward(self, h):
        return self.inner(h)


class Scale(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(n, 1)), nn.Parameter(torch.randn(n))

    def forward(self, h):
        return h * self.scale + self.shift


class Places(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.place = nn.Embedding(n, n)

    def forward(self, h):
        return h + self.place(torch.arange(h.shape[1]))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.integers(2, 5),
    st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=4),
    st.sampled_from(["all", "last", "mean"]),
    st.sampled_from(sorted(OPTIMIZERS)),
)
def test_networks_whose_dimensions_are_all_alike_are_exact(n, names, end, optimizer):
    torch.manual_seed(n)
    net = nn.Sequential(nn.Linear(n, n), *(BLOCKS[name](n) for name in names), nn.Linear(n, n))
    take = {"all": lambda z: z, "last": lambda z: z[:, -1], "mean": lambda z: z.mean(1)}[end]
    made = OPTIMIZERS[optimizer](net.parameters())
    recorder = ImportanceRecorder(net, made)
    for step in range(3):
        x = torch.randn(n, n, n)
        want = expected(net, square(take(net(x))) / n, made)
        with recorder.step(range(n), epoch=step):
            made.zero_grad()
            square(take(net(x))).mean().backward()
            made.step()
        assert_same(dict(zip(recorder.layers, recorder.pop_epoch(step, n), strict=True)), want)
