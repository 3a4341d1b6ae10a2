"""Small networks with an exchangeable middle part, and their importance by the definition.

Map: `TwoLayers`, `ThreeLayers` (networks), `data`, `batches`, `squares` (inputs and losses),
`record`, `expected` (importance of one step, recorded and by the definition), `train`,
`train_by_step` (both, compared over several steps).
"""

from functools import partial

import oracles
import torch
from torch import nn

from sampimp.importance.recorder import ImportanceRecorder

N, T, D = 6, 5, 4
"""Samples of a batch, positions, and features."""

OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.1),
    "AdamW": partial(torch.optim.AdamW, lr=0.1, eps=0.1),
}


class TwoLayers(nn.Module):
    """Two linear layers, with one function between them and one after them."""

    def __init__(self, between, last=None):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, 2)
        self.gamma = nn.Parameter(torch.randn(D))
        self.between, self.last = between, last or (lambda z: z)

    def forward(self, x):
        return self.last(self.b(self.between(self.a(x).tanh())))


class ThreeLayers(nn.Module):
    """A layer between two functions of the activations and of the step's number."""

    def __init__(self, before, after=lambda h, step: h):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.m, self.b = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 2)
        self.before, self.after, self.step = before, after, 0

    def forward(self, x):
        h = self.before(self.a(x).tanh(), self.step)
        return self.b(self.after(self.m(h).tanh(), self.step))


def data(*shape):
    """Return the same random values for a shape in every call."""
    torch.manual_seed(2)
    return torch.randn(*shape)


def batches(*sizes):
    """Return batches of these sizes, with different values."""
    return [size * data(size, D) for size in sizes]


def squares(z):
    """Return the sum of squares of each sample's outputs, (N,)."""
    return z.square().flatten(1).sum(1)


def record(net, loss, x, size=N, **options):
    """Return {layer: beta (N,)} of one step with SGD, as recorded."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer, **options)
    with recorder.step(range(size), epoch=1):
        loss(net(x)).backward()
        optimizer.step()
    return dict(zip(recorder.layers, recorder.pop_epoch(1, size), strict=True))


def expected(net, losses, optimizer=None):
    """Return {layer: beta (N,)} by the definition, from the gradient of each sample's loss."""
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=0.1)
    gradients = oracles.gradients_by_loss(net, losses)
    return oracles.importance_by_update(net, optimizer, gradients)


def assert_same(got, want):
    """Assert that the importance of each layer is equal to 1e-9 of each value."""
    for layer, beta in got.items():
        torch.testing.assert_close(beta, want[layer], rtol=1e-9, atol=1e-15)


def train(net, batches, epochs=1, **options):
    """Train, and compare the recorded importance of every step with the definition's."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer, **options)
    for epoch in range(epochs):
        want, start = [], 0
        for x in batches:
            state = torch.get_rng_state()
            want.append(expected(net, squares(net(x)) / len(x)))
            torch.set_rng_state(state)
            with recorder.step(range(start, start + len(x)), epoch=epoch):
                optimizer.zero_grad()
                squares(net(x)).mean().backward()
                optimizer.step()
            start += len(x)
        assert_same(_by_layer(recorder, epoch, start), _joined(want))


def train_by_step(net, steps=5, x=lambda step: data(N, D) + step, **options):
    """Train one epoch with a batch for each step and set `net.step`; compare as `train`."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer, **options)
    want = []
    for step in range(steps):
        net.step = step
        want.append(expected(net, squares(net(x(step))) / N))
        with recorder.step(range(step * N, (step + 1) * N), epoch=1):
            optimizer.zero_grad()
            squares(net(x(step))).mean().backward()
            optimizer.step()
    assert_same(_by_layer(recorder, 1, steps * N), _joined(want))


def _by_layer(recorder, epoch, size):
    return dict(zip(recorder.layers, recorder.pop_epoch(epoch, size), strict=True))


def _joined(steps):
    """Return {layer: beta} of all steps, one after the other."""
    return {layer: torch.cat([step[layer] for step in steps]) for layer in steps[0]}
