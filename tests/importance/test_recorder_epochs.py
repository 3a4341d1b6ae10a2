"""`on_epoch` of a recorder: when it is called, with what, and what its exceptions do."""

import numpy as np
import oracles
import pytest
import torch
import xarray as xr
from recording import SGD, batch, train_step

from sampimp.importance.recorder import ImportanceRecorder

pytestmark = pytest.mark.usefixtures("one_thread")


class Loop:
    """A loop over six samples, of which some epochs use four."""

    def __init__(self, on_epoch):
        self.model, (self.inputs, self.labels) = oracles.tiny_mlp(), batch()
        self.optimizer = SGD(self.model.parameters(), lr=0.2)
        self.recorder = ImportanceRecorder(self.model, self.optimizer, on_epoch=on_epoch)

    def train(self, epoch, *batches):
        for rows in batches:
            with self.recorder.step(rows, epoch=epoch):
                train_step(self.model, self.optimizer, self.inputs[rows], self.labels[rows])


def test_each_epoch_is_reported_once_with_its_values():
    reported = []
    loop = Loop(lambda epoch, dataset: reported.append((epoch, dataset)))
    loop.train(1, [0, 1, 2], [3, 4, 5])
    assert reported == []
    loop.train(2, [3, 1])
    assert [epoch for epoch, _ in reported] == [1]
    loop.train(2, [0, 5])
    loop.train(3, [5, 4, 3, 2, 1, 0])
    whole = loop.recorder.to_dataset()
    loop.recorder.to_dataset()
    loop.recorder.end_epoch()
    assert [epoch for epoch, _ in reported] == [1, 2, 3]
    for epoch, dataset in reported:
        assert dataset["importance"].dims == ("layer", "sample")
        xr.testing.assert_identical(
            dataset["importance"].drop_attrs(), whole["importance"].sel(epoch=epoch).drop_attrs()
        )
    assert [float(dataset["coverage"]) for _, dataset in reported] == [1, 4 / 6, 1]


def test_an_epoch_that_goes_on_after_its_end_is_reported_as_a_whole():
    reported = []
    loop = Loop(lambda epoch, dataset: reported.append((epoch, float(dataset["coverage"]))))
    loop.train(1, [0, 1, 2, 3, 4, 5])
    loop.train(2, [0, 1, 2])
    loop.recorder.to_dataset()
    loop.train(2, [3, 4, 5])
    loop.recorder.end_epoch()
    assert reported == [(1, 1), (2, 0.5), (2, 1)]


def test_an_exception_reaches_the_loop_and_recording_can_go_on():
    epochs = []

    def stop(epoch, dataset):
        epochs.append(epoch)
        if epoch == 1:
            raise StopIteration("enough")

    loop, plain = Loop(stop), Loop(None)
    loop.train(1, [0, 1, 2, 3, 4, 5])
    with pytest.raises(StopIteration, match="enough"):
        loop.recorder.end_epoch()
    loop.train(2, [0, 1, 2, 3, 4, 5])
    for epoch in (1, 2):
        plain.train(epoch, [0, 1, 2, 3, 4, 5])
    xr.testing.assert_identical(loop.recorder.to_dataset(), plain.recorder.to_dataset())
    assert epochs == [1, 2]
    assert all(map(torch.equal, loop.model.parameters(), plain.model.parameters()))


def test_a_callback_may_forget_the_epoch():
    kept = {}
    loop = Loop(lambda epoch, _: kept.update({epoch: loop.recorder.pop_epoch(epoch, 6)}))
    plain = Loop(None)
    for epoch in (1, 2, 3):
        loop.train(epoch, [0, 2, 4], [1, 3, 5])
        plain.train(epoch, [0, 2, 4], [1, 3, 5])
    assert loop.recorder.to_dataset().sizes["epoch"] == 0
    expected = plain.recorder.to_dataset()["importance"]
    np.testing.assert_array_equal(np.stack([kept[e].float() for e in (1, 2, 3)]), expected)
