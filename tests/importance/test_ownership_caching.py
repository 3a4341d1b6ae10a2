"""When a proof holds for later steps, and which steps are proved again.

Steps with the same operations and flow of tensors share a proof until the next epoch. All tests
compare the importance of every step with the definition, so a proof that is kept for too long
gives a wrong number or no refusal.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional
from two_layers import (
    D,
    N,
    T,
    ThreeLayers,
    TwoLayers,
    batches,
    data,
    expected,
    squares,
    train,
    train_by_step,
)

from sampimp.errors import UnsupportedError
from sampimp.importance.ownership.proof import Proof
from sampimp.importance.recorder import ImportanceRecorder

pytestmark = pytest.mark.usefixtures("double_on_one_thread")


@pytest.fixture
def proofs(monkeypatch):
    """Return the list of the proofs that have been run."""
    proofs = []
    run = Proof.run

    def run_and_note(self, *args):
        proofs.append(self)
        return run(self, *args)

    monkeypatch.setattr(Proof, "run", run_and_note)
    return proofs


def test_sequence_of_operations_is_proved_once_an_epoch(proofs):
    train(TwoLayers(lambda h: h), batches(N, N, N, N, 4, 2, 1), epochs=3)
    assert len(proofs) == 3


def test_new_sequence_of_operations_is_proved(proofs):
    calls = iter([torch.tanh] * 2 + [torch.sin] * 2 + [torch.tanh] * 2)
    net = TwoLayers(lambda h: next(calls)(h))
    train(net, batches(N, N, N))  # two calls a batch: one for the oracle
    assert len(proofs) == 2


def test_step_that_moves_samples_by_values_is_proved_each_time(proofs):
    def between(h):
        order = torch.randperm(len(h))
        return h[order].tanh()[order.argsort()]

    torch.manual_seed(3)
    train(TwoLayers(between), batches(N, N, N, 3))
    assert len(proofs) == 4


def test_layers_below_a_head_of_zeros_are_proved_again(proofs):
    net = TwoLayers(lambda h: h)
    nn.init.zeros_(net.b.weight)
    train(net, batches(N, N, N, N))
    assert len(proofs) == 2  # the first step moves the head away from zero


def test_mixing_behind_a_gate_that_starts_at_zero_is_refused():
    net = TwoLayers(lambda h: h)
    net.gate = nn.Parameter(torch.zeros(()))
    net.between = lambda h: h + net.gate * h.mean(0)
    with pytest.raises(UnsupportedError, match="row depends on several samples"):
        train(net, batches(N, N, N))


@pytest.mark.parametrize("start", ["warm-up", "accumulated"])
def test_gate_is_proved_until_it_opens(start):
    net = TwoLayers(lambda h: h)
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
                    squares(net(x)).mean().backward()
                optimizer.step()
            optimizer.param_groups[0]["lr"] = 0.1 * (step > 0)

    with pytest.raises(UnsupportedError, match="row depends on several samples"):
        steps()


def test_step_after_an_overflow_is_proved(proofs):
    net, x = TwoLayers(lambda h: h).float(), data(N, D).float()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38, backoff_factor=1e-38)
    want = expected(net, squares(net(x)) / N)
    for epoch in (1, 2, 3):
        with recorder.step(range(N), epoch=epoch):
            optimizer.zero_grad()
            scaler.scale(1e3 * squares(net(x)).mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        if epoch == 2:
            got = dict(zip(recorder.layers, recorder.pop_epoch(2, N), strict=True))
            for layer, beta in got.items():
                torch.testing.assert_close(beta, 1e6 * want[layer].float(), rtol=1e-4, atol=1e-3)
    assert len(proofs) == 3


def order_of(step, size=N):
    """Return the batch's order in steps 0 and 1, and a random order in each later step."""
    generator = torch.Generator().manual_seed(step)
    return torch.arange(size) if step < 2 else torch.randperm(size, generator=generator)


def permutation_matrix(step):
    return torch.eye(N)[order_of(step).tolist()]


def halves(h, step):
    """Exchange the halves of the batch, from step 2 on."""
    first, second = h.chunk(2)
    return torch.cat([first, second] if step < 2 else [second, first])


MOVED_LATER = {
    "by an index": (lambda h, k: h[order_of(k)], lambda h, k: h[order_of(k).argsort()]),
    "by an index, with one more row": (
        lambda h, k: torch.cat([h, torch.zeros(1, D)])[order_of(k)],
        lambda h, k: torch.cat([h, torch.zeros(1, D)])[order_of(k).argsort()],
    ),
    "as rows of a table": (
        lambda h, k: functional.embedding(order_of(k), h),
        lambda h, k: functional.embedding(order_of(k).argsort(), h),
    ),
    "by a matrix": (
        lambda h, k: permutation_matrix(k) @ h,
        lambda h, k: permutation_matrix(k).T @ h,
    ),
    "halves exchanged": (halves, halves),
    "by a loop": (
        lambda h, k: torch.stack([h[i] for i in order_of(k).tolist()]),
        lambda h, k: torch.stack([h[i] for i in order_of(k).argsort().tolist()]),
    ),
}


@pytest.mark.parametrize("case", MOVED_LATER)
def test_rows_that_move_in_later_steps_are_exact(case):
    train_by_step(ThreeLayers(*MOVED_LATER[case]))


MIXED_LATER = {
    "a factor that is zero at first": lambda h, k: h + (0.0 if k < 2 else 0.3) * h.mean(0),
    "a mean that is detached at first": lambda h, k: (
        h - (h.mean(0).detach() if k < 2 else h.mean(0))
    ),
    "the second of two tensors": lambda h, k: h + (h.exp(), h.mean(0, keepdim=True))[k > 1],
    "a weight that is one at first": lambda h, k: (
        (w := 1.0 if k < 2 else 0.5) * h + (1 - w) * h.flip(0)
    ),
}


@pytest.mark.parametrize("case", MIXED_LATER)
def test_mixing_that_begins_in_a_later_step_is_refused(case):
    with pytest.raises(UnsupportedError, match="row depends on several samples"):
        train_by_step(ThreeLayers(MIXED_LATER[case]))


def test_negative_axes_are_part_of_the_signature():
    net = ThreeLayers(lambda h, k: h.softmax(-1 if k < 2 else -2))
    with pytest.raises(UnsupportedError, match="row depends on several samples"):
        train_by_step(net)


def test_alternating_heads_are_exact():
    class Heads(ThreeLayers):
        def forward(self, x):
            h = self.a(x).tanh()
            return (self.m(h), self.b(h))[self.step % 2 if self.step > 1 else 0]

    train_by_step(Heads(None), steps=6)


def test_layout_that_is_ambiguous_at_first_is_exact_later():
    class Tokens(ThreeLayers):
        def forward(self, x):
            rows = self.a(x.transpose(0, 1).reshape(-1, D)).view(T, N, D).transpose(0, 1)
            label = [[1, 4, 0, 2, 3, 1], [0, 0, 0, 1, 1, 1]][self.step > 1]
            return self.b(rows[torch.arange(N), label])

    train_by_step(Tokens(None), x=lambda step: data(N, T, D) + step)
