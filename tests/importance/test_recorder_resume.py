"""A recording that is saved and goes on in new objects: the same bits, and refused states."""

import io

import numpy as np
import oracles
import pytest
import torch
import xarray as xr
from recording import SGD, batch, train_step
from torch import nn

from sampimp.errors import ConfigError
from sampimp.importance.recorder import ImportanceRecorder

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = 7


class Calls(nn.Module):
    """A network that calls its layers in another order than it registers them."""

    def __init__(self, hidden=5):
        super().__init__()
        self.last, self.first = nn.Linear(hidden, 3), nn.Linear(4, hidden)
        self.drop = nn.Dropout(0.3)

    def forward(self, inputs):
        return self.last(self.drop(torch.tanh(self.first(inputs))))


class Loop:
    """A loop over seven samples in uneven batches, some of them twice, with Adam and dropout."""

    def __init__(self, make_optimizer=torch.optim.AdamW, hidden=5, **options):
        torch.manual_seed(3)
        self.model, (self.inputs, self.labels) = Calls(hidden).double(), batch(SAMPLES)
        self.optimizer = make_optimizer(self.model.parameters(), lr=0.01)
        self.recorder = ImportanceRecorder(self.model, self.optimizer, **options)

    def train(self, *places):
        """Take steps, named by epoch and number in the epoch."""
        for epoch, step in places:
            rows = [[0, 1, 2], [3, 4], [5, 6, 1], [2]][step]
            if epoch == 2:
                rows = rows[:-1] or [4]
            torch.manual_seed(10 * epoch + step)
            with self.recorder.step(rows, epoch=epoch):
                train_step(self.model, self.optimizer, self.inputs[rows], self.labels[rows])

    def saved(self, sample_count=None):
        """Return a checkpoint as `torch.load` reads it, tensors and numbers alone."""
        file = io.BytesIO()
        checkpoint = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "recorder": self.recorder.state_dict(sample_count),
        }
        torch.save(checkpoint, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def load(self, checkpoint, sample_count=None):
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.recorder.load_state_dict(checkpoint["recorder"], sample_count)
        return self


STEPS = [(epoch, step) for epoch in (1, 2, 3, 4) for step in range(4)]


def values(recorder):
    """Return the result without what says where it was resumed."""
    dataset = recorder.to_dataset(SAMPLES)
    attrs = dict(dataset["importance"].attrs)
    return dataset.drop_attrs(), attrs.pop("resumed_at_epoch"), attrs


@pytest.mark.parametrize("make_optimizer", [SGD, torch.optim.AdamW])
@pytest.mark.parametrize(
    ("interruptions", "resumed_at"),
    [([8], [3]), ([6], [2]), ([5, 6, 15], [2, 2, 4]), ([0], [1]), ([16], [])],
    ids=["after an epoch", "inside an epoch", "three times", "before it began", "at its end"],
)
def test_a_resumed_recording_has_the_bits_of_a_whole_one(make_optimizer, interruptions, resumed_at):
    whole, loop, start = Loop(make_optimizer), Loop(make_optimizer), 0
    whole.train(*STEPS)
    for stop in interruptions:
        loop.train(*STEPS[start:stop])
        loop, start = Loop(make_optimizer).load(loop.saved()), stop
    loop.train(*STEPS[start:])
    expected, _, attrs = values(whole.recorder)
    resumed, epochs, resumed_attrs = values(loop.recorder)
    xr.testing.assert_identical(resumed, expected)
    assert resumed_attrs == attrs
    assert epochs == resumed_at
    assert resumed["layer"].values.tolist() == ["first", "last"]
    assert int(expected["importance"].isnull().any("layer").sum()) == 1  # sample 2 of epoch 2
    for epoch in (1, 2, 3, 4):
        taken = [loop.recorder.pop_epoch(epoch, SAMPLES), whole.recorder.pop_epoch(epoch, SAMPLES)]
        assert taken[0].dtype == torch.float64
        assert torch.equal(*(beta.nan_to_num(-1) for beta in taken))


def test_saving_changes_nothing_and_a_popped_epoch_is_not_held():
    whole, loop = Loop(), Loop()
    for place in STEPS[:7]:
        loop.train(place)
        loop.recorder.state_dict()
    whole.train(*STEPS[:7])
    xr.testing.assert_identical(loop.recorder.to_dataset(), whole.recorder.to_dataset())
    loop.recorder.pop_epoch(1, SAMPLES)
    state = loop.recorder.state_dict()
    assert list(state["epochs"]) == [2]
    assert state["step_count"] == 7
    assert state["epochs"][2]["index"].tolist() == [0, 1, 3, 5, 6]


def test_a_state_inside_a_step_is_that_before_it():
    loop = Loop()
    loop.train(*STEPS[:5])
    before, rows = loop.recorder.state_dict(), [0, 1]
    with loop.recorder.step([rows, [2]], epoch=2):
        loop.optimizer.zero_grad()
        nn.functional.cross_entropy(loop.model(loop.inputs[rows]), loop.labels[rows]).backward()
        inside = loop.recorder.state_dict()  # as a trainer does between accumulated batches
        nn.functional.cross_entropy(loop.model(loop.inputs[[2]]), loop.labels[[2]]).backward()
        loop.optimizer.step()
        with pytest.raises(ConfigError, match="has made its update"):
            loop.recorder.state_dict()
    after = loop.recorder.state_dict()
    for epoch in (1, 2):
        for name in ("index", "importance"):
            held = [state["epochs"][epoch][name] for state in (before, inside)]
            assert torch.equal(*held)
    assert after["step_count"] == 6
    assert after["epochs"][2]["index"].tolist() == [0, 1, 0, 1, 2]


def test_each_epoch_is_reported_once_over_a_resume():
    reported = []

    def report(epoch, dataset):
        reported.append((epoch, float(dataset["coverage"]), dataset["importance"].values))

    whole, first = Loop(), Loop(on_epoch=report)
    first.train(*STEPS[:7])
    second = Loop(on_epoch=report).load(first.saved())
    second.recorder.end_epoch()  # an epoch under way is reported as it is
    second.train(*STEPS[7:8])
    second.recorder.end_epoch()
    third = Loop(on_epoch=report).load(second.saved())
    third.recorder.end_epoch()
    third.train(*STEPS[8:])
    third.recorder.to_dataset()
    whole.train(*STEPS)
    assert [(epoch, round(7 * share)) for epoch, share, _ in reported] == [
        (1, 7), (2, 5), (2, 6), (3, 7), (4, 7),
    ]  # fmt: skip
    expected = whole.recorder.to_dataset()["importance"]
    for epoch, _, importance in reported[:1] + reported[2:]:
        np.testing.assert_array_equal(importance, expected.sel(epoch=epoch))


def test_kept_steps_and_warnings_go_on():
    whole, loop = Loop(keep_steps=True), Loop(keep_steps=True)
    whole.train(*STEPS[:8])
    loop.train(*STEPS[:6])
    loop = Loop(keep_steps=True).load(loop.saved())
    loop.train(*STEPS[6:8])
    assert len(loop.recorder.steps) == 8
    for step, expected in zip(loop.recorder.steps, whole.recorder.steps, strict=True):
        assert step.epoch == expected.epoch
        assert step.index.tolist() == expected.index.tolist()
        assert step.groups == expected.groups
        assert step.training == expected.training == {"", "last", "first", "drop"}
        assert torch.equal(step.gradient_norms, expected.gradient_norms)
        assert step.random_state.equals(expected.random_state)
    assert len({id(step.training) for step in loop.recorder.steps[:6]}) == 1


def test_what_was_found_about_the_steps_is_kept():
    inputs, labels = batch()
    inputs[2] = torch.nan

    def make():
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
        optimizer = SGD(model.parameters(), lr=0.2)
        return model, optimizer, ImportanceRecorder(model, optimizer, batch_norm="undefined")

    model, optimizer, recorder = make()
    for epoch, rows in ((1, [0, 1]), (2, [2, 3, 4])):
        with recorder.step(rows, epoch=epoch):
            train_step(model, optimizer, inputs[rows], labels[rows])
    resumed = make()
    resumed[0].load_state_dict(model.state_dict())
    resumed[2].load_state_dict(recorder.state_dict())
    xr.testing.assert_identical(resumed[2].to_dataset(), recorder.to_dataset())
    attrs = resumed[2].to_dataset()["importance"].attrs
    assert (attrs["not_finite_epochs"], attrs["batch_size"]) == ([2], 3)


# Refusals.


def refused(match, state, loop=None, **options):
    loop = loop or Loop()
    with pytest.raises(ConfigError, match=match) as caught:
        loop.recorder.load_state_dict(state, **options)
    assert caught.value.where == "ImportanceRecorder.load_state_dict"
    assert caught.value.todo


def test_a_state_of_other_objects_is_refused():
    loop = Loop()
    loop.train(*STEPS[:6])
    state = loop.recorder.state_dict(SAMPLES)
    shape = r"first.weight|last.weight of shape \(3, 6\)(.|\n)*Got parameter last.weight .*\(3, 5\)"
    refused(shape, state, Loop(hidden=6))
    refused("other values: 6 steps, epochs 1 to 2", state)
    refused("optimizer 'SGD'(.|\n)*Got 'AdamW'", state, Loop(SGD))
    refused("loss_reduction 'sum'(.|\n)*Got 'mean'", state, Loop(loss_reduction="sum"))
    refused("keep_steps True(.|\n)*Got False", state, Loop(keep_steps=True))
    refused("training set of 9 samples(.|\n)*Got one of 7", state, sample_count=9)
    refused("recorded nothing(.|\n)*6 steps, the last in epoch 2", state, loop)
    refused("Got a dict with epochs", {"epochs": {}})
    refused("Got a list", [1])
    refused("Got sampimp recorder, version 9", {**state, "format": "sampimp recorder, version 9"})
    model = oracles.tiny_mlp((4, 5, 3, 3))
    recorder = ImportanceRecorder(model, SGD(model.parameters(), lr=0.1))
    other = oracles.tiny_mlp((4, 5, 3))
    longer = ImportanceRecorder(other, SGD(other.parameters(), lr=0.1)).state_dict()
    with pytest.raises(ConfigError, match=r"parameter 4.weight(.|\n)*Got no further parameter"):
        recorder.load_state_dict(longer)


def test_a_state_that_is_ahead_of_the_model_or_behind_it_is_refused():
    loop = Loop()
    checkpoints = []
    for part in (STEPS[:5], STEPS[5:8]):
        loop.train(*part)
        checkpoints.append(loop.saved(SAMPLES))
    for model, recorder in ((0, 1), (1, 0)):
        mixed = {**checkpoints[model], "recorder": checkpoints[recorder]["recorder"]}
        steps = checkpoints[recorder]["recorder"]["step_count"]
        with pytest.raises(ConfigError, match=f"Got .* {steps} steps(.|\n)*To do load the model"):
            Loop().load(mixed)
    assert Loop().load(checkpoints[1], SAMPLES).recorder._step_count == 8


def test_an_epoch_that_the_state_holds_does_not_count_twice():
    loop = Loop()
    loop.train(*STEPS[:10])
    resumed = Loop().load(loop.saved())
    with pytest.raises(ConfigError, match=r"Got epoch 2(.|\n)*it holds epochs 1 to 2"):
        resumed.train((2, 0))
    resumed.train(*STEPS[10:])
    assert resumed.recorder.to_dataset()["epoch"].values.tolist() == [1, 2, 3, 4]


def test_a_step_that_failed_after_its_update_is_not_saved_over():
    loop = Loop()
    loop.train(*STEPS[:3])
    step = loop.recorder.step([0, 1], epoch=1)
    step.__enter__()
    train_step(loop.model, loop.optimizer, loop.inputs[:2], loop.labels[:2])
    step.__exit__(GeneratorExit, GeneratorExit(), None)
    with pytest.raises(ConfigError, match="or has failed"):
        loop.recorder.state_dict()
