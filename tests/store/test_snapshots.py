"""Snapshot importance is stored beside a finished record."""

import numpy as np
import pytest
import zarr
from trial_records import LAYOUT, check_equal, make_record, make_records, read_raw
from zarr.errors import ContainsGroupError

from sampimp.errors import RecordError
from sampimp.schema import digest
from sampimp.store.location import Folder
from sampimp.store.snapshots import stored_snapshots, write_snapshot


def test_snapshots_are_written_beside_a_finished_record(tmp_path):
    record, records = make_record(tmp_path), make_records()
    for epoch_record in records:
        record.write(epoch_record)
    values = np.random.default_rng(1).random((2, 10), dtype=np.float32)
    digests = write_snapshot(Folder.of(tmp_path), LAYOUT, 2, values)
    assert digests == [digest(values)]
    snapshot = read_raw(tmp_path, "snapshots.zarr")["snapshot_importance"][:]
    np.testing.assert_array_equal(snapshot[1], values)
    assert np.isnan(snapshot[[0, 2]]).all()
    check_equal(tmp_path, records)
    stored = stored_snapshots(Folder.of(tmp_path), LAYOUT, {"2": digests})
    np.testing.assert_array_equal(stored.read(1), values)
    assert np.isnan(stored.read(0)).all()
    with pytest.raises(RecordError, match="snapshot_importance, epoch 1"):
        stored_snapshots(Folder.of(tmp_path), LAYOUT, {"1": digests}).read(0)


def test_workers_may_begin_the_snapshots_of_a_trial_together(tmp_path, monkeypatch):
    values = np.random.default_rng(1).random((2, 2, 10), dtype=np.float32)
    write_snapshot(Folder.of(tmp_path), LAYOUT, 1, values[0])
    # The second worker looked for the array before the first had made it.
    monkeypatch.setattr(zarr.Group, "__contains__", lambda group, name: False)
    write_snapshot(Folder.of(tmp_path), LAYOUT, 3, values[1])
    # The third worker looked for the group too early.
    open_group, modes = zarr.open_group, []

    def too_late(store, *, mode, **options):
        modes.append(mode)
        if mode == "a":
            raise ContainsGroupError("there is one")
        return open_group(store, mode=mode, **options)

    monkeypatch.setattr(zarr, "open_group", too_late)
    write_snapshot(Folder.of(tmp_path), LAYOUT, 2, values[0])
    assert modes == ["a", "r+"]
    monkeypatch.undo()
    snapshot = read_raw(tmp_path, "snapshots.zarr")["snapshot_importance"][:]
    np.testing.assert_array_equal(snapshot, values[[0, 0, 1]])
