"""Operations that mix samples are refused, before or after the last layer; others are exact."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from two_layers import D, N, T, TwoLayers, assert_same, data, expected, record, squares, train

from sampimp.errors import UnsupportedError

pytestmark = pytest.mark.usefixtures("double_on_one_thread")


def distances_to_others(h):
    """Return the mean distance of each sample to all samples, by broadcasting."""
    return (h[:, None] - h[None]).abs().mean(1)


def soft_slots(h):
    """Dispatch samples softly to as many slots as there are samples, as in a mixture of experts."""
    weights = torch.softmax(h @ torch.ones(D, N), 0)
    return torch.einsum("ne,ed->nd", weights, torch.einsum("ne,nd->ed", weights, h))


def scaled_by_mean_square(h):
    return h * functional.mse_loss(h, torch.zeros_like(h))


def attention(h):
    return functional.scaled_dot_product_attention(h[None], h[None], h[None])[0]


def first_row_replaced(h):
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
    "a mean square as a factor": scaled_by_mean_square,
    "pooling": lambda h: functional.avg_pool1d(h.T[None], 3, 1, 1)[0].T,
    "max pooling": lambda h: functional.max_pool1d(h.T[None], 3, 1, 1)[0].T,
    "a Fourier transform": lambda h: torch.fft.fft(h, dim=0).real,
    "layer_norm over samples": lambda h: functional.layer_norm(h.T, (N,)).T,
    "batch_norm without a module": lambda h: functional.batch_norm(h, None, None, training=True),
    "a convolution over samples": lambda h: (
        functional.conv1d(h.T[None], torch.ones(D, D, 3), padding=1)[0].T
    ),
    "distances of pairs": distances_to_others,
    "cdist": lambda h: torch.cdist(h, h)[:, :D],
    "a matrix of samples": lambda h: (h @ h.T).softmax(1) @ h,
    "bmm": lambda h: torch.bmm(h[None] @ h.T[None], h[None])[0],
    "tensordot": lambda h: torch.tensordot(h @ h.T, h, 1),
    "sparse": lambda h: torch.sparse.mm(torch.ones(N, N).to_sparse(), h),
    "attention": attention,
    "soft slots": soft_slots,
    "differences": lambda h: torch.cat([h[:1], h.diff(dim=0)]),
    "the next sample added": lambda h: h + h.roll(1, 0),
    "the reversed batch added": lambda h: h + h.flip(0),
    "a row replaced by a mean": first_row_replaced,
    "interpolation": lambda h: functional.interpolate(h.T[None], N + 2)[0].T[:N],
    "a covariance": lambda h: h @ torch.cov(h.T),
    "a determinant": lambda h: h * torch.linalg.det(h.T @ h),
    "a solve": lambda h: torch.linalg.solve(h.T @ h + torch.eye(D), h.T).T,
    "a reshape of the transposed batch": lambda h: (
        h.T.reshape(N, D) + functional.pad(h, (0, 0, 1, 0))[:N]
    ),
    "unfold": lambda h: functional.pad(h, (0, 0, 2, 0)).unfold(0, 3, 1).mean(-1),
    "a product with one sample": lambda h: h * h[0],
    "a scalar of the batch": lambda h: h * h.sum().tanh(),
}


MIXES = r"row depends on several samples|several samples, so|which mixes samples"


@pytest.mark.parametrize("case", MIXING)
def test_mixing_before_the_last_layer_is_refused(case):
    net = TwoLayers(MIXING[case])
    before = [parameter.clone() for parameter in net.parameters()]
    with pytest.raises(UnsupportedError, match=MIXES):
        record(net, lambda z: squares(z).mean(), data(N, D))
    assert all(map(torch.equal, before, net.parameters()))


@pytest.mark.parametrize("case", MIXING)
def test_mixing_after_the_last_layer_is_refused(case):
    net = TwoLayers(lambda h: h)
    net.b = nn.Linear(D, D)
    net.last = MIXING[case]
    with pytest.raises(UnsupportedError, match=MIXES):
        record(net, lambda z: squares(z).mean(), data(N, D))


def test_mean_over_samples_after_a_recurrent_layer_is_refused():
    class Mean(TwoLayers):
        def forward(self, x):
            return self.b(self.rnn(x)[0].mean(0))

    net = Mean(None)
    net.rnn = nn.LSTM(D, D, batch_first=True)
    with pytest.raises(UnsupportedError, match=r"several samples|its samples elsewhere"):
        record(net, lambda z: squares(z).mean(), data(N, N, D))


@pytest.mark.parametrize("hook", [lambda g: g / g.norm(), lambda g: g - g.mean(0)])
def test_hook_that_mixes_the_samples_gradients_is_refused(hook):
    class Hooked(TwoLayers):
        def forward(self, x):
            h = self.a(x)
            h.register_hook(hook)
            return self.b(h.tanh())

    with pytest.raises(UnsupportedError, match="row depends on several samples"):
        record(Hooked(None), lambda z: squares(z).mean(), data(N, D))


@pytest.mark.parametrize("positions", [N, 2 * N])
@pytest.mark.parametrize("learned", ["table", "product"])
def test_positions_in_a_plain_attribute_are_refused(positions, learned):
    class Positions(TwoLayers):
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
        record(Positions(), lambda z: squares(z).mean(), data(N, positions, D))


def sorted_and_back(h):
    """Sort the samples by a value, and put them back into the batch's order."""
    order = h.detach()[:, 0].argsort()
    return h[order].tanh()[order.argsort()]


def one_by_one(h):
    return torch.stack([row.tanh() for row in h.unbind(0)])


def changed_by_mask(h):
    chosen = h.detach()[:, 0] > 0
    return torch.zeros_like(h).masked_scatter(chosen[:, None], h[chosen] * 2) + h


UNMIXED = {
    "plain": lambda h: h,
    "detached statistics": lambda h: (h - h.detach().mean(0)) / h.detach().std(0),
    "detached attention": lambda h: h * (h.detach() @ h.detach().T).softmax(1)[:, :1],
    "sorted and back": sorted_and_back,
    "one by one": one_by_one,
    "some samples changed by a mask": changed_by_mask,
    "a permutation matrix and back": lambda h: (
        torch.eye(N).roll(1, 0).T @ (torch.eye(N).roll(1, 0) @ h)
    ),
    "split and joined": lambda h: torch.cat([h[:2].tanh(), h[2:].exp()]),
    "transposed": lambda h: (h.T * 2).T.contiguous(),
    "a detached sum times zero": lambda h: h + 0 * h.detach().sum(),
}


@pytest.mark.parametrize("case", UNMIXED)
def test_operations_that_mix_no_samples_are_exact(case):
    net, x = TwoLayers(UNMIXED[case]), data(N, D)
    want = expected(net, squares(net(x)) / N)
    assert_same(record(net, lambda z: squares(z).mean(), x), want)


@pytest.mark.parametrize(
    "change", [torch.relu_, lambda h: h.mul_(0.5), lambda h: h.add_(1), lambda h: h.clamp_(min=0)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_change_in_place_of_a_linear_layers_output_is_exact(change, bias):
    class ChangedInPlace(TwoLayers):
        def forward(self, x):
            return self.b(change(self.a(x)))

    net = ChangedInPlace(None)
    net.a = nn.Linear(D, D, bias=bias)
    train(net, [data(N, T, D) for _ in range(3)])


CUTS = torch.tensor([1, 3, 5, 8, 10])


def test_tensor_split_by_a_tensor_is_exact():
    net = TwoLayers(lambda h: torch.stack([piece.mean(0) for piece in torch.tensor_split(h, CUTS)]))
    x = data(2 * N, D)
    want = expected(net, squares(net(x)) / N)
    assert_same(record(net, lambda z: squares(z).mean(), x), want)
