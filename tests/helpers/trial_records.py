"""Small trial records with random values, and readers of what was written."""

import numpy as np
import zarr

from sampimp.schema import CURVES, EpochRecord, Layout
from sampimp.store.location import Folder
from sampimp.store.record import TrialRecord
from sampimp.store.variables import StoredVariable

LAYOUT = Layout(epoch=3, layer=2, sample=10, parameter=7, states=(0, 1, 2, 3))


IDENTITY = {"strategy": "rand", "seed": 1, "fingerprint": "f" * 64}


AT_EPOCH = ("importance", "nll", "batch")


def make_records(layout=LAYOUT, seed=0):
    """Return epoch records with random values."""
    rng = np.random.default_rng(seed)
    records = []
    for epoch in range(layout.epoch + 1):
        arrays = {}
        if epoch:
            for name in AT_EPOCH:
                arrays[name] = rng.random(layout.shape(name)[1:], dtype=np.float32)
            arrays |= {name: np.float64(rng.random()) for name in CURVES}
        if epoch in layout.states:
            arrays["parameters"] = rng.random(layout.parameter, dtype=np.float32)
        records.append(EpochRecord(epoch=epoch, arrays=arrays, seconds=0.5 * epoch))
    return records


def make_record(folder, layout=LAYOUT, identity=IDENTITY):
    return TrialRecord(Folder.of(folder), identity, layout)


def read_raw(folder, record="record.zarr"):
    """Open every array of a record by Zarr, without this package."""
    group = zarr.open_group(str(folder / record), mode="r")
    return dict(group.arrays())


def check_equal(folder, records):
    raw = {name: array[:] for name, array in read_raw(folder).items()}
    for name in AT_EPOCH:
        np.testing.assert_array_equal(raw[name], [r.arrays[name] for r in records[1:]])
    if (folder / "COMMIT.json").exists():
        for name in CURVES:
            np.testing.assert_array_equal(raw[name], [r.arrays[name] for r in records[1:]])
    with_parameters = [r.arrays["parameters"] for r in records if "parameters" in r.arrays]
    np.testing.assert_array_equal(raw["parameters"], with_parameters)


# Checkpoints.
def checkpointed(folder, epochs=3):
    """Return a trial that has written some epochs, with a checkpoint after each."""
    record, records = make_record(folder), make_records()
    record.write(records[0])
    for epoch in range(1, epochs + 1):
        record.write(records[epoch])
        record.checkpoint(epoch, b"state %d" % epoch)
    return record


def resume(folder):
    """Begin another attempt and write all epochs after the newest checkpoint that verifies."""
    record = make_record(folder)
    epoch, _ = record.newest_checkpoint() or (-1, None)
    for epoch_record in make_records()[epoch + 1 :]:
        record.write(epoch_record)
    return epoch, record


def read_whole(folder, layout=LAYOUT):
    """Read every variable through its commit."""
    trial = Folder.of(folder)
    commit = trial.read_json("COMMIT.json")
    return {
        name: np.stack(
            [
                StoredVariable.of(trial, name, layout, commit).read(position)
                for position in range(layout.shape(name)[0])
            ]
        )
        for name in (*AT_EPOCH, "parameters")
    }
