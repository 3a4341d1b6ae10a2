"""Operations on data that no table lists: they keep each sample on its row, or are refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from two_layers import D, N, data, expected, squares

from sampimp.errors import UnsupportedError
from sampimp.importance.ownership.call import Call
from sampimp.importance.ownership.product_rows import combined_samples
from sampimp.importance.ownership.row_keeping import RowKeeping
from sampimp.importance.ownership.row_notes import NO_SAMPLE, UNKNOWN_SAMPLE
from sampimp.importance.recorder import ImportanceRecorder

pytestmark = pytest.mark.usefixtures("double_on_one_thread")

ORDER = torch.tensor([2, 0, 3, 5, 1, 4])
IDS = torch.tensor([4, 1, 7, 2, 0, 5])
TABLE = torch.linspace(-1, 1, 9 * N).sin().mul(9).sin().view(9, N).double()
MEANS, SQUARE = TABLE[0], TABLE[:N]
MATRIX = torch.eye(N).double()[ORDER]


def first_axis(size):
    return lambda tensor: 0 if tensor.dim() and len(tensor) == size else None


KEEPING = {
    "arithmetic": lambda x: torch.addcmul(x, x, x),
    "a cast": lambda x: x.float(),
    "in place": lambda x: x.clamp_(-1, 1),
    "minus the mean over the batch": lambda x: torch.sub(x, x.mean(0)),
    "the mean over the batch": lambda x: torch.mean(x, 0),
    "along the features": lambda x: torch.cumsum(x, 1),
    "padded": lambda x: functional.pad(x, (0, 2)),
    "noise": lambda x: functional.dropout(x, 0.5),
    "normalised": lambda x: functional.layer_norm(x, x.shape[1:]),
    "complex": lambda x: torch.fft.fft(x),
    "one-hot": lambda x: functional.one_hot((x > 0).long()[:, 0], 2),
    "sparse": lambda x: x.to_sparse(),
    "sparse rows": lambda x: x.to_sparse_csr(),
}
MOVING = {
    "rotated": lambda x: functional.pad(x.T[None], (1, 0), "circular")[0, :, :-1].T,
    "reversed": lambda x: x.__reversed__(),
    "a piece": lambda x: torch.narrow_copy(x, 0, 1, len(x) - 1),
    "sorted": lambda x: torch.unique(x[:, 0]),
    "along the samples": lambda x: torch.cumsum(x, 0),
    "differences": lambda x: torch.diff(x, dim=0),
    "strides": lambda x: torch.as_strided(torch.cat([x, x]), x.shape, x.stride(), x.stride(0)),
    "waves": lambda x: torch.fft.fft(x, dim=0),
    "all distances": lambda x: torch.cdist(x, x),
}


@pytest.mark.parametrize("size", [2, 3, 6])
@pytest.mark.parametrize("case", KEEPING | MOVING)
def test_functions_that_keep_rows_are_told_from_others(case, size):
    x, before = data(size, 4), torch.get_rng_state()
    copy, keeping = x.clone(), RowKeeping()
    function = (KEEPING | MOVING)[case]
    for _ in range(2):  # the second time from memory
        kept = keeping.kept(Call(function, (x,), {}), first_axis(size), size)
        assert all(kept) == (case in KEEPING)
    assert torch.equal(x, copy)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_sparse_data_are_tested(layout):
    x = data(N, 4).relu().to_sparse(layout=layout)
    for function, is_kept in (
        (lambda x: x.to_dense(), True),
        (lambda x: x * 2, True),
        (lambda x: x.to_dense().flip(0), False),
    ):
        assert RowKeeping().kept(Call(function, (x,), {}), first_axis(N), N) == [is_kept]


def test_buffers_are_not_changed():
    x, mean, variance = data(N, D), torch.zeros(D), torch.ones(D)
    arguments = (x, mean, variance, None, None, True)
    assert RowKeeping().kept(Call(functional.batch_norm, arguments, {}), first_axis(N), N) == [True]
    assert not mean.any()
    assert torch.equal(variance, torch.ones(D))


def test_a_vector_of_as_many_features_as_samples_is_no_data():
    for other in (data(N), data(N, N)):
        call = Call(torch.add, (data(N, N), other), {})
        assert RowKeeping().kept(call, first_axis(N), N) == [True]


def test_what_cannot_be_repeated_is_not_tested():
    def raising(x):
        raise RuntimeError

    meta, out = torch.empty(N, D, device="meta"), {"out": torch.empty(N, D)}
    generator = torch.Generator()
    before = generator.get_state()
    for function, x, names in (
        (raising, data(N, D), {}),
        (torch.flip, meta, {"dims": (0,)}),
        (torch.flip, torch.ones(N, D), {"dims": (0,)}),  # all rows are equal
        (torch.flip, data(1, D), {"dims": (0,)}),
        (torch.neg, data(N, D), out),
        (torch.bernoulli, data(N, D).sigmoid(), {"generator": generator}),
    ):
        assert RowKeeping().kept(Call(function, (x,), names), first_axis(len(x)), len(x)) == []
    assert torch.equal(generator.get_state(), before)


def written(x, order):
    out = torch.zeros(x.shape, dtype=x.dtype)
    out[torch.arange(N)] = x[order]
    return out


def replaced(x, order):
    x = x.clone()
    x.data = x[order]
    return x


REORDERINGS = {
    "indexed": lambda x, order: x[order],
    "features of a table by ids": lambda x, order: TABLE[IDS[order]],
    "rotated by narrow_copy": lambda x, order: torch.cat(
        [x.narrow_copy(0, 2, N - 2), x.narrow_copy(0, 0, 2)]
    ),
    "reversed": lambda x, order: reversed(x),
    "written": written,
    "replaced": replaced,
    "a leaf with a gradient": lambda x, order: x.requires_grad_()[order] * 1.0,
    "minus a vector of N features": lambda x, order: x[order] - MEANS,
    "times a square matrix": lambda x, order: x[order] @ SQUARE,
    "by strides": lambda x, order: torch.cat([x, x]).as_strided(x.shape, x.stride(), 12),
    "stacked rows": lambda x, order: torch.stack([x[i] for i in order]),
    "reflected": lambda x, order: torch.eye(N, dtype=x.dtype).flip(0) @ x,
    "reflected and scaled": lambda x, order: 2 * torch.eye(N, dtype=x.dtype).flip(0) @ x,
    "reflected by einsum": lambda x, order: torch.einsum(
        "nd,mn->md", x, torch.eye(N, dtype=x.dtype).flip(0)
    ),
    "reflected by addmm": lambda x, order: torch.addmm(
        MEANS.expand(N, N), torch.eye(N, dtype=x.dtype).flip(0), x
    ),
    "times a matrix": lambda x, order: MATRIX @ x,
    "times a sparse matrix": lambda x, order: torch.sparse.mm(MATRIX.to_sparse(), x),
    "times a transposed matrix": lambda x, order: (x.T @ MATRIX.T).T,
    "times a matrix of the order": lambda x, order: functional.one_hot(order, N).to(x) @ x,
    "times a matrix, by column": lambda x, order: torch.stack([MATRIX @ c for c in x.T], 1),
    "times a matrix, by tensordot": lambda x, order: torch.tensordot(x, MATRIX, ([0], [1])).T,
    "times a matrix, in one batch": lambda x, order: torch.bmm(MATRIX[None], x[None])[0],
}
REVERSED = ("reversed", *(case for case in REORDERINGS if case.startswith("reflected")))
REFUSED = {
    *("rotated by narrow_copy", "reversed", "by strides"),
    *(case for case in REORDERINGS if "matrix" in case and "square" not in case),
}
ORDERS = {
    "rotated by narrow_copy": torch.arange(N).roll(-2),
    **dict.fromkeys(REVERSED, torch.arange(N).flip(0)),
    "by strides": torch.arange(N).roll(-2),
}


class First(nn.Module):
    """A network whose first layer is of one kind."""

    def __init__(self, kind, features):
        super().__init__()
        self.kind = kind
        self.a = nn.Parameter(torch.randn(features, 4))
        self.bilinear = nn.Bilinear(features, features, 4)
        self.b = nn.Linear(4, 3)

    def forward(self, x):
        h = {
            "linear": lambda: functional.linear(x, self.a.T),
            "einsum": lambda: torch.einsum("nd,dk->nk", x, self.a),
            "bilinear": lambda: self.bilinear(x, x.tanh()),
            "product of arithmetic": lambda: (x[:, :, None] * self.a).sum(1),
        }[self.kind]()
        return self.b(h.tanh())


@pytest.mark.parametrize("kind", ["linear", "einsum", "bilinear", "product of arithmetic"])
@pytest.mark.parametrize("case", REORDERINGS)
def test_reordered_data_are_recorded_right_or_refused(case, kind):
    """The samples' losses are in the order of the data after the operation."""
    torch.manual_seed(1)
    x = data(N, N)
    net = First(kind, N)
    order, moved = ORDERS.get(case, ORDER), REORDERINGS[case](x.clone(), ORDER).detach()
    want = expected(net, squares(net(moved)) / N)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)
    x = x.clone()
    try:
        with recorder.step(range(N), epoch=1):
            squares(net(REORDERINGS[case](x, ORDER))).mean().backward()
            optimizer.step()
    except UnsupportedError:
        assert case in REFUSED
        return
    for layer, beta in zip(recorder.layers, recorder.pop_epoch(1, N), strict=True):
        if layer in want:
            torch.testing.assert_close(beta[order], want[layer], rtol=1e-9, atol=1e-15)


PRODUCTS_IN_ORDER = {
    "features": lambda x: x @ SQUARE,
    "features by einsum": lambda x: torch.einsum("nd,dk->nk", x, SQUARE),
    "features in another order": lambda x: x @ MATRIX,
    "identity": lambda x: torch.eye(N, dtype=x.dtype) @ x,
    "weights": lambda x: torch.diag(torch.arange(1.0, N + 1)).to(x) @ x,
    "similarities": lambda x: x @ x.T @ x,
    "attention": lambda x: (x @ x.T).softmax(1) @ x,
    "products of features": lambda x: torch.einsum("nd,ne->nde", x, x).sum(2),
    "a graph from outside": lambda x: SQUARE @ x,
    "by vmap": lambda x: torch.vmap(lambda row: SQUARE @ row)(x),
}


@pytest.mark.parametrize("case", PRODUCTS_IN_ORDER)
def test_products_in_the_order_of_the_batch_are_exact(case):
    torch.manual_seed(1)
    x, net = data(N, N), First("linear", N)
    want = expected(net, squares(net(PRODUCTS_IN_ORDER[case](x))) / N)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)
    with recorder.step(range(N), epoch=1):
        squares(net(PRODUCTS_IN_ORDER[case](x))).mean().backward()
        optimizer.step()
    for layer, beta in zip(recorder.layers, recorder.pop_epoch(1, N), strict=True):
        if layer in want:
            torch.testing.assert_close(beta, want[layer], rtol=1e-9, atol=1e-15)


def test_the_samples_of_a_product_are_told_from_mixtures():
    left = torch.tensor([[0, 0, -3], [1, 0, 0], [0, 0, 0], [1, 1, 0], [0.5, -0.5, 0]])
    right, samples = data(3, 2), torch.tensor([[7], [8], [NO_SAMPLE]])
    found = combined_samples(Call(torch.mm, (left, right), {}), right, samples)
    numbers = [NO_SAMPLE, 7, NO_SAMPLE, UNKNOWN_SAMPLE, UNKNOWN_SAMPLE]
    assert torch.equal(found, torch.tensor(numbers)[:, None].expand(-1, 2))
    assert combined_samples(Call(torch.mm, (left, left), {}), left, samples) is None


class Sorted(nn.Module):
    """A frozen embedding, and a recurrent layer over sequences that are sorted by length."""

    def __init__(self, frozen):
        super().__init__()
        self.table = nn.Embedding.from_pretrained(TABLE, freeze=frozen)
        self.a, self.b = nn.GRU(N, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, ids, lengths, is_sorted=True):
        lengths, order = lengths.sort(descending=True) if is_sorted else (lengths, torch.arange(N))
        packed = nn.utils.rnn.pack_padded_sequence(
            self.table(ids[order]), lengths, batch_first=True, enforce_sorted=is_sorted
        )
        return self.b(self.a(packed)[1][-1][order.argsort()])


@pytest.mark.parametrize("frozen", [True, False])
def test_sequences_sorted_by_length_are_exact(frozen):
    torch.manual_seed(1)
    net, lengths = Sorted(frozen), torch.tensor([3, 5, 2, 6, 4, 1])
    ids = torch.randint(0, 9, (N, 6))
    want = expected(net, squares(net(ids, lengths, is_sorted=False)) / N)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)
    with recorder.step(range(N), epoch=1):
        squares(net(ids, lengths)).mean().backward()
        optimizer.step()
    for layer, beta in zip(recorder.layers, recorder.pop_epoch(1, N), strict=True):
        if layer in want and not (frozen and layer == "table"):
            torch.testing.assert_close(beta, want[layer], rtol=1e-9, atol=1e-15)


def test_a_sorted_vector_is_followed():
    net, ids = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3)), IDS
    want = expected(net, squares(net(ids)) / N)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)
    with recorder.step(range(N), epoch=1):
        squares(net(ids.sort()[0])).mean().backward()
        optimizer.step()
    for layer, beta in zip(recorder.layers, recorder.pop_epoch(1, N), strict=True):
        torch.testing.assert_close(beta, want[layer], rtol=1e-9, atol=1e-15)


def test_a_full_batch_is_fetched_by_the_index_in_any_form():
    torch.manual_seed(1)
    x, index = data(N, D), ORDER
    net = nn.Linear(D, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)
    forms = (
        lambda: x[index],
        lambda: x[index, :],
        lambda: torch.stack([x[i] for i in index]),
        lambda: x.gather(0, index[:, None].expand(-1, D)),
        lambda: x.index_select(0, index),
    )
    for epoch, form in enumerate(forms):
        want = expected(net, squares(net(x[index])) / N)
        with recorder.step(index, epoch=epoch):
            optimizer.zero_grad()
            squares(net(form())).mean().backward()
            optimizer.step()
        (beta,) = recorder.pop_epoch(epoch, N)
        torch.testing.assert_close(beta[index], want["model"], rtol=1e-9, atol=1e-15)
