"""Loops of one's own: recorded, replayed, and differentiated by the samples' weights."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from sampimp import ImportanceRecorder, RecordedLoop, ReversePass
from sampimp.errors import ConfigError, RecordError

SAMPLES, EPOCHS, CLASSES = 12, 3, 3


class Sequence(nn.Module):
    """An LSTM with dropout over (N, 4, 3)."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(3, 5, batch_first=True)
        self.dropout = nn.Dropout(0.3)
        self.out = nn.Linear(5, CLASSES)

    def forward(self, inputs):
        return self.out(self.dropout(self.rnn(inputs)[0][:, -1]))


def convolutional():
    return nn.Sequential(
        nn.Unflatten(1, (1, 4)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.LayerNorm(48),
        nn.Linear(48, CLASSES),
    )


class Attention(nn.Module):
    """One encoder layer with dropout over (N, 4, 3), and a table that is used twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.2, batch_first=True)

    def forward(self, inputs):
        hidden = self.layer(self.embed(inputs)).mean(1)
        return functional.linear(hidden, self.embed.weight.T)


SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW
LOOPS = {
    "lstm, momentum, clipped": (Sequence, SGD, {"lr": 0.2, "momentum": 0.9}, 1, 0.1),
    "convolutions, AdamW": (convolutional, ADAMW, {"lr": 1e-3, "eps": 1e-3}, 1, None),
    "attention, SGD, accumulated": (Attention, SGD, {"lr": 0.3, "weight_decay": 0.01}, 2, None),
}


class Loop:
    """A recorded loop with a scheduler, in float64."""

    def __init__(self, name, weights=None, *, records=True):
        build, optimizer_class, settings, self.passes, self.clip = LOOPS[name]
        torch.manual_seed(0)
        self.inputs = torch.randn(SAMPLES, 4, 3, dtype=torch.float64)
        self.labels = torch.randint(0, CLASSES, (SAMPLES,))
        self.model = build().double()
        self.optimizer = optimizer_class(self.model.parameters(), **settings)
        self.weights = torch.ones(SAMPLES).double() if weights is None else weights
        self.recorder = ImportanceRecorder(self.model, self.optimizer, keep_steps=True)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.starts = {}
        for epoch in range(EPOCHS):
            self.starts[epoch] = self._state()
            for batch in torch.randperm(SAMPLES).split(6):
                parts = batch.chunk(self.passes)
                if records:
                    with self.recorder.step(list(parts), epoch=epoch):
                        self._step(parts)
                else:
                    self._step(parts)
                scheduler.step()
        self.starts[EPOCHS] = self._state()

    def _state(self):
        return deepcopy(
            {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        )

    def losses(self, model, index):
        return functional.cross_entropy(
            model(self.inputs[index]), self.labels[index], reduction="none"
        )

    def _step(self, parts):
        self.optimizer.zero_grad()
        for index in parts:
            losses = self.losses(self.model, index)
            if bool((self.weights[index] != 1).any()):
                losses = losses * self.weights[index]
            (losses.mean() / len(parts)).backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()

    def target(self, model):
        generator = torch.Generator().manual_seed(3)
        inputs = torch.randn(5, 4, 3, generator=generator, dtype=torch.float64)
        return functional.cross_entropy(model(inputs), torch.tensor([0, 1, 2, 0, 1]))

    def recorded(self, **options):
        options = {"clip_norm": self.clip, **options}
        return RecordedLoop(
            self.model, self.optimizer, self.recorder.steps, self.losses, self.starts, **options
        )


@pytest.mark.parametrize("name", LOOPS)
def test_influence_is_the_derivative_of_the_loop_by_the_weights(name):
    loop = Loop(name)
    result = ReversePass(loop.recorded(), {"test": loop.target}).to_dataset()
    actual = result["influence"].sum(["epoch", "layer"]).sel(target="test").values
    size = 1e-5
    for sample in range(0, SAMPLES, 3):
        expected = 0.0
        for steps, factor in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
            weights = torch.ones(SAMPLES).double()
            weights[sample] += steps * size
            model = Loop(name, weights, records=False).model.eval()
            expected += factor * float(loop.target(model).detach()) / (12 * size)
        assert actual[sample] == pytest.approx(expected, abs=1e-7 * np.abs(actual).max())
    assert result["epoch"].values.tolist() == [0, 1, 2]
    assert loop.model.training


def test_states_that_are_no_copies_are_noticed():
    loop = Loop("convolutions, AdamW")
    loop.starts[1] = {**loop.starts[1], "model": loop.starts[3]["model"]}
    with pytest.raises(RecordError, match="deepcopy"):
        list(ReversePass(loop.recorded(), {"test": loop.target}).epochs())


def test_losses_of_another_loop_are_noticed():
    loop = Loop("convolutions, AdamW")
    run = loop.recorded(reduction="sum")
    with pytest.raises(RecordError, match="epoch 2"):
        list(ReversePass(run, {"test": loop.target}).epochs())


def test_what_is_missing_is_named():
    loop = Loop("lstm, momentum, clipped")
    with pytest.raises(ConfigError, match="clip_norm"):
        loop.recorded(clip_norm=None)
    del loop.starts[EPOCHS]
    with pytest.raises(ConfigError, match="none under 3"):
        loop.recorded()
    loop.recorder.steps.clear()
    with pytest.raises(ConfigError, match="keep_steps"):
        loop.recorded()
