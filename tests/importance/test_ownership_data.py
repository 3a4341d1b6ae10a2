"""Data that the block reorders are followed, or refused where they cannot be."""

import copy

import pytest
import torch
from torch.nn import functional
from torch.utils._pytree import tree_leaves
from two_layers import D, N, TwoLayers, assert_same, batches, data, expected, squares, train

from sampimp.errors import UnsupportedError
from sampimp.importance.recorder import ImportanceRecorder

pytestmark = pytest.mark.usefixtures("double_on_one_thread")

ORDER = torch.tensor([2, 0, 3, 5, 1, 4])


def cutmix(x, order):
    """Replace half of each sample's features by those of another sample."""
    x = x.clone()
    x[:, 2:] = x[order][:, 2:]
    return x


def copied(x, order):
    return torch.empty_like(x).copy_(x[order])


def without_gradients(x, order):
    with torch.no_grad():
        return x[order] * 2


REORDERED = {
    "without gradients": without_gradients,
    "with noise": lambda x, order: x[order] + 0.1 * torch.randn_like(x),
    "with a mask": lambda x, order: x[order] * (torch.rand(N, 1) > 0.3),
    "copied": copied,
    "as rows of a table": lambda x, order: functional.embedding(order, x),
    "indexed twice": lambda x, order: x[order][torch.arange(N)],
    "with a column of ones": lambda x, order: torch.cat([x[order][:, 1:], torch.ones(N, 1)], 1),
    "zero by a condition": lambda x, order: torch.where(x[order] > 0, x[order], 0.0),
    "a feature written by name": lambda x, order: x[order].scatter(
        1, torch.zeros(N, 1, dtype=torch.long), value=0.5
    ),
    "minus the median": lambda x, order: x[order] - x[order].median(0)[0],
    "chosen by a condition": lambda x, order: torch.where(x[order] > 0, x[order], 0 * x[order]),
}


@pytest.mark.parametrize("case", REORDERED)
def test_reordered_data_are_followed(case):
    net, x, order = TwoLayers(lambda h: h), data(N, D), ORDER
    torch.manual_seed(4)
    moved = REORDERED[case](x, order)
    want = expected(net, squares(net(moved)) / N)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)
    with recorder.step(range(N), epoch=1):
        torch.manual_seed(4)
        squares(net(REORDERED[case](x, order))).mean().backward()
        optimizer.step()
    for layer, beta in zip(recorder.layers, recorder.pop_epoch(1, N), strict=True):
        torch.testing.assert_close(beta[order], want[layer], rtol=1e-9, atol=1e-15)


SHARES, OTHERS = torch.linspace(0.1, 0.9, N)[:, None], torch.linspace(-2, 2, N * D).view(N, D)
MIXTURES = {
    "cutmix": cutmix,
    "mixup": lambda x, order: 0.7 * x + 0.3 * x[order],
    "mixup by shares": lambda x, order: SHARES * x + (1 - SHARES) * x[order],
    "mixup of a copy": lambda x, order: torch.lerp(x, x.clone()[order], 0.3),
}


@pytest.mark.parametrize("case", MIXTURES)
def test_row_that_keeps_a_part_of_its_sample_belongs_to_it(case):
    net, x = TwoLayers(lambda h: h), data(N, D)
    want = expected(net, squares(net(MIXTURES[case](x, ORDER))) / N)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)
    with recorder.step(range(N), epoch=1):
        squares(net(MIXTURES[case](x, ORDER))).mean().backward()
        optimizer.step()
    assert_same(dict(zip(recorder.layers, recorder.pop_epoch(1, N), strict=True)), want)


OF_TWO_ORDERS = {
    "a factor of the batch": lambda x: x[ORDER] * SHARES,
    "a mask of the batch": lambda x: x[ORDER].masked_fill(OTHERS > 0, 0.0),
    "another batch": lambda x: x[ORDER] + OTHERS,
    "two orders": lambda x: x[ORDER] * SHARES[ORDER.argsort()],
    "nested tensors": lambda x: torch.nested.nested_tensor(list(x)).to_padded_tensor(0.0),
}


@pytest.mark.parametrize("case", OF_TWO_ORDERS)
def test_data_in_two_orders_are_refused(case):
    net, x = TwoLayers(lambda h: h), data(N, D)
    recorder = ImportanceRecorder(net, torch.optim.SGD(net.parameters(), lr=0.1))

    def step():
        with recorder.step(range(N), epoch=1):
            squares(net(OF_TWO_ORDERS[case](x))).mean().backward()

    with pytest.raises(UnsupportedError, match="data whose rows"):
        step()


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_samples_are_refused(layout):
    net = torch.nn.Linear(D, 2)
    samples = torch.nested.nested_tensor([data(n + 1, D) for n in range(N)], layout=layout)
    recorder = ImportanceRecorder(net, torch.optim.SGD(net.parameters(), lr=0.1))

    def step():
        with recorder.step(range(N), epoch=1):
            net(samples).to_padded_tensor(0.0).square().mean().backward()

    with pytest.raises(UnsupportedError, match="a nested tensor"):
        step()


def test_what_a_step_makes_can_be_saved_and_loaded(tmp_path):
    net, x = TwoLayers(lambda h: h), data(N, D)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)
    with recorder.step(range(N), epoch=1):
        moved, numbers = x[ORDER], torch.arange(N)
        outputs = net(moved)
        squares(outputs).mean().backward()
        optimizer.step()
        state = copy.deepcopy(net.state_dict())
        average = [parameter.detach().mul(0.9) for parameter in net.parameters()]
    made = [x, moved, moved * 2, numbers, outputs.detach(), state, average]
    torch.save(made, tmp_path / "made.pt")
    for tensor in tree_leaves(made):
        assert not vars(tensor)
    assert torch.equal(torch.load(tmp_path / "made.pt")[1], moved)


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
def test_rows_of_the_loss_in_a_changing_order_are_matched_with_the_data(between):
    torch.manual_seed(3)
    net, x = TwoLayers(between), data(N, D)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    recorder = ImportanceRecorder(net, optimizer)
    plain = TwoLayers(lambda h: h)  # the same network in the batch's order
    plain.load_state_dict(net.state_dict())
    optimizer.param_groups[0]["lr"] = 0.1
    for epoch in range(4):
        plain.load_state_dict(net.state_dict())
        want = expected(plain, squares(plain(x)) / N)
        with recorder.step(range(N), epoch=epoch):
            optimizer.zero_grad()
            squares(net(x)).mean().backward()
            optimizer.step()
        assert_same(dict(zip(recorder.layers, recorder.pop_epoch(epoch, N), strict=True)), want)


def test_order_of_data_that_changes_is_followed():
    """Packed sequences, for example, are sorted by length."""
    net = TwoLayers(lambda h: h)
    inner = net.forward
    net.forward = lambda x: inner(x[(order := torch.randperm(len(x)))])[order.argsort()]
    torch.manual_seed(3)
    train(net, batches(N, N, N))


@pytest.mark.parametrize("count", [2, 7])
@pytest.mark.parametrize("joined", [True, False])
def test_rows_of_no_sample_are_refused(count, joined):
    net, x, others = TwoLayers(lambda h: h), data(N, D), data(count * N, D)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)

    def step():
        with recorder.step(range(N), epoch=1):
            if joined:
                squares(net(torch.cat([x, others]))).mean().backward()
            else:
                (squares(net(x)).mean() + squares(net(others)).mean()).backward()

    with pytest.raises(UnsupportedError, match=r"data whose rows|none between the loss"):
        step()


def test_data_of_two_passes_reordered_before_the_first_are_refused():
    net, order = TwoLayers(lambda h: h), ORDER
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)

    batches = [data(N, D), data(N, D) + 1]

    def step(moved_before):
        with recorder.step([range(N), range(N, 2 * N)], epoch=1):
            optimizer.zero_grad()
            inputs = [x[order] for x in batches] if moved_before else batches
            for x in inputs:
                squares(net(x if moved_before else x[order])).mean().backward()
            optimizer.step()

    step(moved_before=False)
    with pytest.raises(UnsupportedError, match="data whose rows"):
        step(moved_before=True)


@pytest.mark.parametrize("sort", [torch.msort, lambda x: x.sort(0)[0], lambda x: x.topk(N, 0)[0]])
def test_data_sorted_by_feature_are_refused(sort):
    net, x = TwoLayers(lambda h: h), data(N, D)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)

    def step():
        with recorder.step(range(N), epoch=1):
            squares(net(sort(x))).mean().backward()

    with pytest.raises(UnsupportedError, match="data whose rows"):
        step()
