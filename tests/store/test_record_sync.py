"""When a trial that goes on is made durable, and what is kept until then."""

import pytest
from trial_records import make_record, make_records, resume

from sampimp.errors import StoreError
from sampimp.schema import Layout
from sampimp.store import record as record_module
from sampimp.store.attempts import CHECKPOINTS, read_manifest
from sampimp.store.location import Folder

LAYOUT = Layout(epoch=9, layer=2, sample=10, parameter=7, states=(0,))


class Clock:
    """Stands for the module `time` of the record."""

    now = 0.0

    def monotonic(self):
        return self.now

    def time(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(record_module, "time", clock)
    return clock


def kept(folder):
    """Return the epochs of the checkpoints, and which of them were durable when written."""
    checkpoints = Folder.of(folder) / CHECKPOINTS
    manifests = [read_manifest(checkpoints / name) for name in checkpoints.folders()]
    return {manifest["epoch"]: manifest["durable"] for manifest in manifests}


def train(record, clock, epochs, seconds):
    for epoch_record in make_records(LAYOUT)[epochs.start : epochs.stop]:
        record.write(epoch_record)
        clock.now += seconds
        record.checkpoint(epoch_record.epoch, b"state")


def test_short_epochs_are_synced_every_15_s(tmp_path, clock):
    record = make_record(tmp_path, LAYOUT)
    record.write(make_records(LAYOUT)[0])
    train(record, clock, range(1, 3), seconds=7)
    assert kept(tmp_path) == {1: False, 2: False}
    train(record, clock, range(3, 4), seconds=7)  # after 21 s
    assert kept(tmp_path) == {2: False, 3: True}
    train(record, clock, range(4, 6), seconds=7)
    assert kept(tmp_path) == {3: True, 4: False, 5: False}  # until a newer one is durable
    train(record, clock, range(6, 7), seconds=7)
    assert kept(tmp_path) == {5: False, 6: True}


def test_long_epochs_are_all_synced(tmp_path, clock):
    record = make_record(tmp_path, LAYOUT)
    record.write(make_records(LAYOUT)[0])
    train(record, clock, range(1, 5), seconds=16)
    assert kept(tmp_path) == {3: True, 4: True}


def test_a_sync_that_fails_leaves_nothing_that_relies_on_it(tmp_path, clock, monkeypatch):
    record = make_record(tmp_path, LAYOUT)
    record.write(make_records(LAYOUT)[0])
    train(record, clock, range(1, 3), seconds=16)
    train(record, clock, range(3, 5), seconds=1)
    assert kept(tmp_path) == {2: True, 3: False, 4: False}

    def refuse(folder):
        raise StoreError("a disk", "an input/output error", str(folder), "replace it")

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "sync", refuse)
        with pytest.raises(StoreError, match="input/output"):
            train(record, clock, range(5, 6), seconds=16)
    assert kept(tmp_path) == {2: True}


def test_a_run_that_continues_first_makes_its_checkpoint_durable(tmp_path, clock, monkeypatch):
    record = make_record(tmp_path)
    for epoch_record in make_records()[:3]:
        record.write(epoch_record)
    record.checkpoint(2, b"state")  # not durable: the process died, and the machine did not
    synced = []
    monkeypatch.setattr(Folder, "sync", lambda folder: synced.append(folder.path))
    assert resume(tmp_path)[0] == 2
    assert len(synced) == 1
