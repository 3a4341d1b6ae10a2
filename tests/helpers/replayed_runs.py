"""A tiny run in float64 that is trained by the optimizer itself, and can be replayed."""

from copy import deepcopy

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from sampimp.influence.linear_stack import LinearStackStep
from sampimp.influence.targets import MeanTarget, nll
from sampimp.training.activations import ACTIVATIONS

SAMPLES, EPOCHS = 12, 3


class TinyRun:
    """Two hidden layers, 12 samples, 3 epochs of batches of 4 or 2 samples, a rate per epoch."""

    def __init__(
        self, optimizer_class, settings, *, activation="gelu", clip_norm=None, weights=None
    ):
        generator = torch.Generator().manual_seed(5)
        self.inputs = torch.randn(SAMPLES, 5, generator=generator, dtype=torch.float64)
        self.labels = torch.randint(0, 3, (SAMPLES,), generator=generator)
        self.activation = ACTIVATIONS[activation]
        self.rate, self.clip_norm = settings["lr"], clip_norm
        self.weights = torch.ones(SAMPLES, dtype=torch.float64) if weights is None else weights
        with torch.random.fork_rng():
            torch.manual_seed(1)
            linear = [nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 3)]
        make = self.activation.make
        self.model = nn.Sequential(linear[0], make(), linear[1], make(), linear[2]).double()
        self.optimizer = optimizer_class(self.model.parameters(), **settings)
        self.parameters = list(self.model.parameters())
        self.layers, self.epochs, self.sample_count = ["0", "2", "4"], EPOCHS, SAMPLES
        self.epoch_labels = [10, 11, 12]
        self.states = {1: self._state()}
        for epoch in range(1, EPOCHS + 1):
            for step in self.begin(epoch):
                self.train(step)
            self.states[epoch + 1] = self._state()

    def _state(self):
        return deepcopy((self.model.state_dict(), self.optimizer.state_dict()))

    def load_start(self, epoch):
        model, optimizer = deepcopy(self.states[epoch])
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)

    def begin(self, epoch):
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate / epoch
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch))
        return order.split(5)

    def train(self, step):
        self.optimizer.zero_grad()
        losses = functional.cross_entropy(
            self.model(self.inputs[step]), self.labels[step], reduction="none"
        )
        ((losses * self.weights[step]).sum() / len(step)).backward()
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()

    def check_end(self, epoch):
        stored = self.states[epoch + 1][0].values()
        assert all(map(torch.equal, self.model.state_dict().values(), stored))

    def derivatives(self, step, smoothing):
        return LinearStackStep(
            self.model[::2],
            [self.activation] * 2,
            self.inputs[step],
            self.labels[step],
            len(step),
            smoothing.gate_width,
        )

    def samples(self, step):
        return step.numpy()


def tiny_targets():
    """Return the mean NLL of nine test samples, and the NLL of the first."""
    generator = torch.Generator().manual_seed(6)
    inputs = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (9,), generator=generator)
    return [
        MeanTarget("mean", "nat", nll, inputs, labels),
        MeanTarget("sample:0", "nat", nll, inputs[:1], labels[:1]),
    ]


def differences_by_weight(make_run, targets, size=1e-5):
    """Return dT/dv of every target and sample, by training with each weight changed.

    Differences of fourth order: Adam and RMSprop divide by small roots, so that a term in size^2
    of a plain central difference reaches 1e-6.
    """
    result = np.zeros((len(targets), SAMPLES))
    for sample in range(SAMPLES):
        for steps, factor in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
            weights = torch.ones(SAMPLES, dtype=torch.float64)
            weights[sample] += steps * size
            model = make_run(weights=weights).model
            values = np.array([target.value(model) for target in targets])
            result[:, sample] += factor * values / (12 * size)
    return result
