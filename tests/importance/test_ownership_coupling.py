"""A loss that couples samples is refused, or its derivative is taken as a constant."""

import pytest
import torch
from torch.nn import functional
from two_layers import D, N, TwoLayers, assert_same, data, expected, record, squares

from sampimp.errors import UnsupportedError
from sampimp.importance.output_hooks import _JointOutputs
from sampimp.importance.ownership.coupling import PASS_THROUGH
from sampimp.importance.recorder import ImportanceRecorder

pytestmark = pytest.mark.usefixtures("double_on_one_thread")

COUPLED = {
    "root of the mean squared error": lambda z: squares(z).mean().sqrt(),
    "logarithm of a mean": lambda z: squares(z).mean().log(),
    "variance penalty": lambda z: squares(z).mean() + squares(z).var(),
    "Dice over the batch": lambda z: 1 - 2 * z.sigmoid()[:, 0].sum() / (1 + z.sigmoid().sum()),
    "focal factor of the mean": lambda z: (1 - (-squares(z).mean()).exp()) ** 2 * squares(z).mean(),
    "contrastive": lambda z: functional.cross_entropy(z @ z.T, torch.arange(N)),
    "contrastive, both ways": lambda z: (
        functional.cross_entropy(z @ z.T, torch.arange(N))
        + functional.cross_entropy((z @ z.T).T, torch.arange(N))
    ),
    "products of pairs": lambda z: (squares(z[::2]) * squares(z[1::2])).sum(),
    "logsumexp": lambda z: squares(z).logsumexp(0),
}


def test_the_copies_of_hooked_outputs_are_known_to_pass_gradients_on():
    assert {f"{_JointOutputs.__name__}Backward"} == PASS_THROUGH


@pytest.mark.parametrize("case", COUPLED)
def test_coupled_loss_is_refused(case):
    with pytest.raises(UnsupportedError, match="a loss that is a sum over samples"):
        record(TwoLayers(lambda h: h), COUPLED[case], data(N, D))


@pytest.mark.parametrize("case", COUPLED)
def test_derivative_of_a_coupled_loss_can_be_taken_as_a_constant(case):
    net, x = TwoLayers(lambda h: h), data(N, D)
    z = net(x)
    (delta,) = torch.autograd.grad(COUPLED[case](z), z, retain_graph=True)
    want = expected(net, (z * delta).sum(1))
    assert_same(record(net, COUPLED[case], x, coupled_loss="constant"), want)


def labels():
    return torch.arange(N) % 2


SUMS = {
    "cross-entropy": lambda z: functional.cross_entropy(z, labels(), reduction="none") / N,
    "cross-entropy of weighted classes": lambda z: (
        functional.cross_entropy(z, labels(), torch.tensor([1.0, 3.0]), reduction="none")
        / (4 * N / 2)
    ),
    "cross-entropy with smoothed labels": lambda z: (
        functional.cross_entropy(z, labels(), label_smoothing=0.1, reduction="none") / N
    ),
    "absolute error": lambda z: z.abs().sum(1),
    "squared error": lambda z: squares(z),
    "hinge": lambda z: functional.multi_margin_loss(z, labels(), reduction="none") / N,
    "Huber": lambda z: functional.huber_loss(z, torch.zeros_like(z), reduction="none").sum(1),
    "a detached factor of the batch": lambda z: squares(z) / squares(z).detach().mean(),
    "weights by sample": lambda z: squares(z) * torch.linspace(0, 1, N),
    "other weights by sample": lambda z: squares(z) * (1 + torch.arange(N)),
}


@pytest.mark.parametrize("case", SUMS)
def test_loss_that_is_a_sum_over_samples_is_exact(case):
    net, x = TwoLayers(lambda h: h), data(N, D)
    want = expected(net, SUMS[case](net(x)))
    assert_same(record(net, lambda z: SUMS[case](z).sum(), x), want)


def losses_of(z, reduction):
    """Two of PyTorch's losses by row, which most losses are made of."""
    return (
        functional.cross_entropy(z, labels(), reduction=reduction),
        functional.cross_entropy(z, 1 - labels(), reduction=reduction),
    )


JOINED = {
    "losses": lambda z: torch.stack(losses_of(z, "sum")).sum(),
    "losses in a keyword": lambda z: torch.stack(tensors=losses_of(z, "sum")).sum(),
    "losses of rows": lambda z: torch.cat(losses_of(z, "none")).sum(),
    "losses of groups": lambda z: torch.stack(
        [losses_of(z, "none")[k][labels() == group].sum() for k in range(2) for group in range(2)]
    ).sum(),
    "outputs": lambda z: functional.cross_entropy(
        torch.cat([z, z]), torch.cat([labels(), 1 - labels()]), reduction="sum"
    ),
}


@pytest.mark.parametrize("case", JOINED)
def test_loss_of_a_list_of_tensors_is_exact(case):
    net, x = TwoLayers(lambda h: h), data(N, D)
    want = expected(net, sum(losses_of(net(x), "none")))
    assert_same(record(net, JOINED[case], x), want)


def hinge_on_pairs(z):
    scores = z[:, 0]
    return (1 - (scores[:, None] - scores[None])).relu().mean()


def largest_of_a_written_tensor(z):
    losses = torch.zeros(N)
    losses[:] = squares(z)
    return losses.topk(2)[0].mean()


PIECEWISE = {
    "hinge on differences of scores": hinge_on_pairs,
    "the mean of the largest": lambda z: squares(z).topk(3)[0].mean(),
    "the median": lambda z: squares(z).median(),
    "the largest": lambda z: squares(z).max(),
    "ranks as weights": lambda z: (squares(z).sort()[0] * torch.arange(N)).sum(),
    "margin ranking": lambda z: functional.margin_ranking_loss(
        z[:3, 0], z[3:, 0], torch.ones(3), margin=0.5
    ),
    "triplets": lambda z: functional.triplet_margin_loss(z, z.roll(1, 0), z.roll(2, 0)),
    "a mean with an upper bound": lambda z: (
        z.abs().mean().clamp(max=2 * float(z.detach().abs().mean()))
    ),
    "losses written into a tensor": largest_of_a_written_tensor,
}


@pytest.mark.parametrize("case", PIECEWISE)
def test_piecewise_linear_coupling_is_refused(case):
    net, x = TwoLayers(lambda h: h), data(N, D)
    with pytest.raises(UnsupportedError, match="a loss that is a sum over samples"):
        record(net, PIECEWISE[case], x)


ACCEPTED = {
    "a change in place": lambda z: z.mul_(2).square().sum(),
    "a hinge": lambda z: (1 - z).relu().sum(),
    "the largest of classes": lambda z: (z.max(1)[0] - z[:, 0]).sum(),
    "sorted losses": lambda z: squares(z).sort()[0].sqrt().sum(),
    "a factor that is a Python number": lambda z: squares(z).sum() * float(z.detach().norm()),
    "a detached factor": lambda z: squares(z).sum() * z.detach().mean(),
    "with dropout": lambda z: functional.dropout(squares(z), 0.5).sum(),
    "losses added to a tensor": lambda z: torch.zeros(N).add_(squares(z)).sum(),
    "a loss in a dictionary": lambda z: {"loss": squares(z)}["loss"].sum(),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_loss_on_the_tape_that_is_a_sum_is_accepted(case):
    record(TwoLayers(lambda h: h), ACCEPTED[case], data(N, D))


NOT_BY_ROW = {
    "scores of one list": lambda z: functional.cross_entropy(
        z[:, 0].view(1, -1), torch.tensor([2])
    ),
    "scores without an axis": lambda z: functional.cross_entropy(z[:, 0], torch.tensor(2)),
    "transposed scores": lambda z: functional.cross_entropy(
        z.transpose(0, 1), torch.tensor([1, 3])
    ),
    "the reciprocal of a loss": lambda z: torch.div(1.0, functional.mse_loss(z, torch.ones(N, 2))),
}


@pytest.mark.parametrize("case", NOT_BY_ROW)
def test_loss_by_row_on_other_rows_is_checked(case):
    with pytest.raises(UnsupportedError, match="a loss that is a sum over samples"):
        record(TwoLayers(lambda h: h), NOT_BY_ROW[case], data(N, D))


def test_loss_of_two_calls_of_the_model_is_checked():
    net, x = TwoLayers(lambda h: h), data(N, D)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)

    def step():
        with recorder.step(range(N), epoch=1):
            first, second = net(x), net(x + 1)
            (functional.mse_loss(second, torch.ones(N, 2)) * first.var()).backward()

    with pytest.raises(UnsupportedError, match="a loss that is a sum over samples"):
        step()


def test_sum_is_recorded_as_one_though_coupling_is_allowed():
    net, x = TwoLayers(lambda h: h), data(N, D)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer, coupled_loss="constant")
    with recorder.step(range(N), epoch=1):
        squares(net(x)).mean().backward()
        optimizer.step()
    assert recorder.to_dataset().importance.attrs["loss"] == "sum over samples"


def test_step_after_a_refusal_is_checked():
    net, x = TwoLayers(lambda h: h), data(N, D)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)

    def step():
        with recorder.step(range(N), epoch=1):
            optimizer.zero_grad()
            squares(net(x)).topk(3)[0].mean().backward()
            optimizer.step()

    for _ in range(2):
        with pytest.raises(UnsupportedError, match="a loss that is a sum over samples"):
            step()


def test_loss_with_an_infinite_second_derivative_is_checked_by_changes():
    def kernel(z):
        return torch.exp(-(z[:, None] - z[None]).norm(dim=-1)).sum()

    with pytest.raises(UnsupportedError, match="a loss that is a sum over samples"):
        record(TwoLayers(lambda h: h), kernel, data(N, D))


def test_small_coupling_beside_a_large_term_is_refused():
    def loss(z):
        return 1e6 * z[0].square().sum() + (z[1] * z[2]).sum()

    with pytest.raises(UnsupportedError, match="a loss that is a sum over samples"):
        record(TwoLayers(lambda h: h).float(), loss, data(N, D).float())


def test_loss_without_a_second_derivative_is_recorded_as_unchecked():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return z.square().sum()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, delta):
            return 2 * delta * ctx.saved_tensors[0]

    net, x = TwoLayers(lambda h: h), data(N, D)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)

    def step():
        with recorder.step(range(N), epoch=1):
            Once.apply(net(x)).backward()
            optimizer.step()

    with pytest.warns(UserWarning, match="no second derivative"):
        step()
    assert recorder.to_dataset().importance.attrs["loss"].startswith("not checked")
