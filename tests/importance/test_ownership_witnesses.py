"""Data that the block reorders: followed, or refused where labels or values contradict them."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from sampimp import ImportanceRecorder
from sampimp.errors import UnsupportedError

N, D, CLASSES, RATE = 6, 5, 3, 0.1
ORDER = torch.tensor([2, 5, 0, 3, 1, 4])


def network(width=D):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(width, 7), nn.Tanh(), nn.Linear(7, CLASSES)).double()


def batch():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, CLASSES, (N,), generator=generator)


def expected(net, x, loss):
    """Return beta of each layer and sample for `loss(output, sample)`, from single samples."""
    want = {}
    for name, layer in (("0", net[0]), ("2", net[2])):
        gradients = [
            torch.autograd.grad(loss(net(x[n : n + 1]), n) / N, list(layer.parameters()))
            for n in range(N)
        ]
        want[name] = torch.stack(
            [sum((RATE * part).square().sum() for part in parts) for parts in gradients]
        )
    return want


def record(net, objective, index=None):
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    recorder, before = ImportanceRecorder(net, optimizer), copy.deepcopy(net.state_dict())
    with recorder.step(torch.arange(N) if index is None else index, epoch=1):
        optimizer.zero_grad()
        objective()
        optimizer.step()
    net.load_state_dict(before)
    return dict(zip(recorder.layers, recorder.pop_epoch(1, N), strict=True))


def require_equal(got, want):
    for name, beta in want.items():
        torch.testing.assert_close(got[name], beta, rtol=1e-9, atol=1e-15)


def written_by_rows(x):
    y = torch.empty_like(x)
    for place, sample in enumerate(ORDER.tolist()):
        y[place].copy_(x[sample])
    return y


def written_by_indices(x):
    y = x.clone()
    for place, sample in enumerate(ORDER.tolist()):
        y[place][:] = x[sample]
    return y


def written_into(take):
    def write(x):
        y = torch.zeros(N + 2, D, dtype=x.dtype)[:N].clone()
        take(y).copy_(take(x[ORDER]))
        return y

    return write


STATIC = torch.zeros(N + 2, D, dtype=torch.float64)


def static_buffer(x):
    STATIC[:N].copy_(x[ORDER])
    return STATIC[:N]


FOLLOWED = {
    "a created column": lambda x: torch.cat([x[ORDER], torch.zeros_like(x[:, :2])], 1),
    "a created column of zeros": lambda x: torch.cat([x[ORDER], x.new_zeros(N, 1)], 1),
    "features sorted": lambda x: x[ORDER].sort(1)[0],
    "largest features": lambda x: x[ORDER].topk(3, dim=1)[0],
    "rows written one by one": written_by_rows,
    "rows written by an index of a view": written_by_indices,
    "written into a view": written_into(lambda y: y.view(-1)),
    "written into a transposed view": written_into(lambda y: y.T),
    "a static buffer": static_buffer,
    "features first": lambda x: x.T.contiguous()[:, ORDER].T,
    "two views": lambda x: torch.cat([x, x]).view(2, N, D)[:, ORDER].reshape(2 * N, D)[:N],
}


@pytest.mark.parametrize("case", FOLLOWED)
def test_reordered_data_are_exact(case):
    x, y = batch()
    reorder = FOLLOWED[case]
    plain = reorder(x)[ORDER.argsort()].clone()
    STATIC.zero_()
    net = network(plain.shape[1])
    want = expected(net, plain, lambda output, n: functional.cross_entropy(output, y[n : n + 1]))
    got = record(net, lambda: functional.cross_entropy(net(reorder(x)), y[ORDER]).backward())
    require_equal(got, want)


@torch.jit.script
def compiled(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return x[order]


def overwritten_columns(x):
    y = x.clone()
    for feature in range(D):
        y[:, feature] = x[ORDER, feature]
    return y


def overwritten_data(x):
    y = x.clone()
    y.data.copy_(x[ORDER])
    return y


HIDDEN = {
    "a compiled function": lambda x: compiled(x, ORDER),
    "a list of samples": lambda x: torch.stack([SAMPLES[n] for n in ORDER.tolist()]),
    "vmap": lambda x: torch.vmap(lambda n: x[n])(ORDER),
}
COPIED = {
    "Variable": lambda x: torch.autograd.Variable(x[ORDER]),
    "new_tensor": lambda x: x.new_tensor(x[ORDER]),
    "NumPy": lambda x: torch.from_numpy(x.numpy()[ORDER.numpy()]),
    "DLPack": lambda x: torch.from_dlpack(x[ORDER]),
    "Parameter": lambda x: nn.Parameter(x[ORDER], requires_grad=False),
    "NumPy, normalised": lambda x: torch.from_numpy(x.numpy()[ORDER.numpy()]) / 2,
    "data": overwritten_data,
    "columns": overwritten_columns,
}
SAMPLES = [row.clone() for row in batch()[0]]


@pytest.mark.parametrize("case", HIDDEN | COPIED)
def test_labels_in_another_order_than_the_data_are_refused(case):
    (x, y), net = batch(), network()
    reorder = (HIDDEN | COPIED)[case]
    with pytest.raises(UnsupportedError, match=r"same order|could not be matched"):
        record(net, lambda: functional.cross_entropy(net(reorder(x)), y[ORDER]).backward())


@pytest.mark.parametrize("case", COPIED)
def test_values_of_other_samples_are_refused(case):
    (x, _), net = batch(), network()
    with pytest.raises(UnsupportedError, match="could not be matched"):
        record(net, lambda: net(COPIED[case](x)).square().sum(1).mean().backward())


def test_labels_in_both_orders_are_those_of_mixup():
    (x, y), net = batch(), network()

    def loss(output, order):
        return 0.7 * functional.cross_entropy(output, y) + 0.3 * functional.cross_entropy(
            output, y[order]
        )

    def alone(output, n):
        own, other = y[n : n + 1], y[ORDER][n : n + 1]
        return 0.7 * functional.cross_entropy(output, own) + 0.3 * functional.cross_entropy(
            output, other
        )

    mixed = 0.7 * x + 0.3 * x[ORDER]
    want = expected(net, mixed, alone)
    got = record(net, lambda: loss(net(0.7 * x + 0.3 * x[ORDER]), ORDER).backward())
    require_equal(got, want)


def test_outputs_and_labels_may_be_selected_alike():
    (x, y), net = batch(), network()
    want = expected(net, x, lambda output, n: functional.cross_entropy(output, y[n : n + 1]))
    for order in (ORDER, torch.arange(N).flip(0)):
        got = record(net, lambda: functional.cross_entropy(net(x)[order], y[order]).backward())  # noqa: B023
        require_equal(got, want)


def test_a_batch_that_is_reordered_before_it_is_cut_into_passes_is_exact():
    (x, y), net = batch(), network()
    want = expected(net, x, lambda output, n: functional.cross_entropy(output, y[n : n + 1]))
    order = torch.tensor([2, 1, 0, 5, 3, 4])  # within each half

    def objective():
        for part, labels in zip(x[order].chunk(2), y[order].chunk(2), strict=True):
            (functional.cross_entropy(net(part), labels) / 2).backward()

    require_equal(record(net, objective, index=list(torch.arange(N).chunk(2))), want)


def test_samples_of_another_pass_are_refused():
    (x, y), net = batch(), network()

    def objective():
        for part, labels in zip(x[ORDER].chunk(2), y[ORDER].chunk(2), strict=True):
            (functional.cross_entropy(net(part), labels) / 2).backward()

    with pytest.raises(UnsupportedError, match="could not be matched"):
        record(net, objective, index=list(torch.arange(N).chunk(2)))


def test_time_before_samples_is_followed():
    torch.manual_seed(3)
    sequences = torch.randn(3, N, D, dtype=torch.float64)  # (time, sample, feature)
    gru, head, y = nn.GRU(D, 4).double(), nn.Linear(4, CLASSES).double(), batch()[1]
    net = nn.ModuleDict({"gru": gru, "head": head})
    want = []
    for n in range(N):
        loss = functional.cross_entropy(head(gru(sequences[:, n : n + 1])[1][0]), y[n : n + 1]) / N
        gradients = torch.autograd.grad(loss, list(gru.parameters()))
        want.append(sum((RATE * gradient).square().sum() for gradient in gradients))
    for reorder in (lambda z: z[:, ORDER], lambda z: torch.index_select(z, 1, ORDER)):
        got = record(
            net,
            lambda: functional.cross_entropy(
                head(gru(reorder(sequences))[1][0]),  # noqa: B023
                y[ORDER],
            ).backward(),
        )
        torch.testing.assert_close(got["gru"], torch.stack(want), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("pooling", ["mask", "matrix"])
def test_rows_that_masks_assign_to_samples_are_proved_in_each_step(pooling):
    layer, head, y = nn.Linear(D, 7).double(), nn.Linear(7, CLASSES).double(), batch()[1]
    net = nn.ModuleDict({"layer": layer, "head": head})
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    recorder = ImportanceRecorder(net, optimizer)
    want = []
    for step, sizes in enumerate(([2] * N, [3, 2, 2, 1, 2, 2])):
        x = torch.randn(2 * N, D, generator=torch.Generator().manual_seed(step)).double()
        bag = torch.repeat_interleave(torch.arange(N), torch.tensor(sizes))
        for n, rows in enumerate(x.split(sizes)):
            pooled = torch.tanh(layer(rows)).sum(0, keepdim=True)
            loss = functional.cross_entropy(head(pooled), y[n : n + 1]) / N
            gradients = torch.autograd.grad(loss, list(layer.parameters()))
            want.append(sum((RATE * gradient).square().sum() for gradient in gradients))
        masks = (bag == torch.arange(N)[:, None]).double()
        with recorder.step(torch.arange(N) + N * step, epoch=1):
            optimizer.zero_grad()
            h = torch.tanh(layer(x))
            if pooling == "mask":
                pooled = torch.stack([(h * mask[:, None]).sum(0) for mask in masks])
            else:
                pooled = (masks[:, :, None] * h).sum(1)
            functional.cross_entropy(head(pooled), y).backward()
            optimizer.step()
    got = dict(zip(recorder.layers, recorder.pop_epoch(1, 2 * N), strict=True))
    torch.testing.assert_close(got["layer"], torch.stack(want), rtol=1e-9, atol=1e-15)


def test_a_result_that_depends_on_positions_is_not_remembered():
    (x, _), net = batch(), network()
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    recorder = ImportanceRecorder(net, optimizer)

    def step(order, number):
        with recorder.step(np.arange(N) + N * number, epoch=1):
            optimizer.zero_grad()
            net(torch.zeros_like(x).index_add(0, order, x)).square().sum(1).mean().backward()
            optimizer.step()

    step(torch.arange(N), 0)
    with pytest.raises(UnsupportedError, match="could not be matched"):
        step(torch.arange(N).roll(1), 1)


def test_vmap_over_the_samples_is_refused_by_name():
    (x, y), net = batch(), network(N)
    with pytest.raises(UnsupportedError):
        record(
            net,
            lambda: functional.cross_entropy(
                torch.vmap(net)(torch.cat([x, x[:, :1]], 1)), y
            ).backward(),
        )
