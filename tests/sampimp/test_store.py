"""What is written is what is read, whatever was cut off on the way."""

import hashlib
import importlib.util
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from sampimp import schema
from sampimp.errors import RecordError
from sampimp.folder import Folder
from sampimp.plan import read_commits
from sampimp.schema import CURVES, VARIABLES, EpochRecord, chunk_shape, digest
from sampimp.store import (
    TrialRecord,
    open_array,
    read_difficulty,
    read_source,
    record_digest,
    write_array,
    write_source,
)

_spec = importlib.util.spec_from_file_location("oracles", Path(__file__).with_name("oracles.py"))
oracles = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(oracles)

SIZES = {"epoch": 3, "layer": 2, "sample": 10, "state": 4, "parameter": 7}
IDENTITY = {"strategy": "rand", "seed": 1, "fingerprint": "f" * 64}
AT_EPOCH = ("importance", "nll", "batch")


def make_records(sizes=SIZES, states=range(4), seed=0):
    """Random values, epoch by epoch."""
    rng = np.random.default_rng(seed)
    records = []
    for epoch in range(sizes["epoch"] + 1):
        arrays = {}
        if epoch:
            for name in AT_EPOCH:
                shape = tuple(sizes[dim] for dim in VARIABLES[name].dims[1:])
                arrays[name] = rng.random(shape, dtype=np.float32)
            arrays |= {name: np.float64(rng.random()) for name in CURVES}
        if epoch in states:
            arrays["parameters"] = rng.random(sizes["parameter"], dtype=np.float32)
        records.append(EpochRecord(epoch=epoch, arrays=arrays, seconds=0.5 * epoch))
    return records


def make_record(folder, sizes=SIZES, states=range(4), identity=IDENTITY):
    return TrialRecord(Folder.of(folder), identity, sizes, list(states))


def read_raw(folder):
    """Read every array with Zarr alone."""
    group = zarr.open_group(str(folder / "record.zarr"), mode="r")
    return dict(group.arrays())


def check_equal(folder, records, sizes=SIZES):
    raw = {name: array[:] for name, array in read_raw(folder).items()}
    for name in AT_EPOCH:
        np.testing.assert_array_equal(raw[name], [r.arrays[name] for r in records[1:]])
    for name in CURVES:
        np.testing.assert_array_equal(raw[name], [r.arrays[name] for r in records[1:]])
    with_parameters = [r.arrays["parameters"] for r in records if "parameters" in r.arrays]
    np.testing.assert_array_equal(raw["parameters"], with_parameters)


# Records.


def test_a_record_round_trips(tmp_path):
    record, records = make_record(tmp_path), make_records()
    for epoch_record in records:
        record.write(epoch_record)
    check_equal(tmp_path, records)
    for name, array in read_raw(tmp_path).items():
        assert array.dtype == VARIABLES[name].dtype
        assert array.metadata.dimension_names == VARIABLES[name].dims
        assert array.attrs["units"] == VARIABLES[name].units
        assert np.isnan(array.fill_value)


def test_what_is_not_written_yet_is_nan(tmp_path):
    record, records = make_record(tmp_path), make_records()
    assert all(np.isnan(array[:]).all() for array in read_raw(tmp_path).values())
    for epoch_record in records[:2]:
        record.write(epoch_record)
    for name, array in read_raw(tmp_path).items():
        done = 2 if name == "parameters" else 1
        assert np.isfinite(array[:done]).all()
        assert np.isnan(array[done:]).all()


def test_only_some_states_may_be_stored(tmp_path):
    record, records = make_record(tmp_path, states=[0, 2, 3]), make_records(states=[0, 2, 3])
    for epoch_record in records:
        record.write(epoch_record)
    check_equal(tmp_path, records)
    assert read_raw(tmp_path)["parameters"].shape == (3, 7)


def test_without_states_there_are_no_parameters(tmp_path):
    record = make_record(tmp_path, states=[])
    for epoch_record in make_records(states=[]):
        record.write(epoch_record)
    assert set(read_raw(tmp_path)) == {*AT_EPOCH, *CURVES}


def test_a_later_variable_is_added_to_a_finished_record(tmp_path):
    record, records = make_record(tmp_path), make_records()
    for epoch_record in records:
        record.write(epoch_record)
    values = np.random.default_rng(1).random((2, 10), dtype=np.float32)
    returned = write_array(Folder.of(tmp_path), "snapshot_importance", SIZES, 1, values)
    assert returned == digest(values)
    snapshot = read_raw(tmp_path)["snapshot_importance"][:]
    np.testing.assert_array_equal(snapshot[1], values)
    assert np.isnan(snapshot[[0, 2]]).all()
    check_equal(tmp_path, records)


# Alignment: one write is whole chunks that no other write touches.

some_sizes = st.fixed_dictionaries(
    {
        "epoch": st.integers(1, 60),
        "layer": st.integers(1, 70),
        "sample": st.integers(1, 2_000_000),
        "state": st.integers(1, 60),
        "parameter": st.integers(1, 100_000_000),
    }
)


@settings(deadline=None, max_examples=100)
@given(some_sizes, st.sampled_from(sorted(VARIABLES)))
def test_a_chunk_is_one_epoch_and_not_too_large(sizes, name):
    dims, chunk = VARIABLES[name].dims, chunk_shape(name, sizes)
    assert len(chunk) == len(dims)
    if len(dims) == 1:
        assert chunk == (sizes["epoch"],)
        return
    assert chunk[0] == 1
    assert chunk[1:-1] == tuple(sizes[dim] for dim in dims[1:-1])
    assert chunk[-1] <= sizes[dims[-1]]
    values = int(np.prod(chunk))
    assert values <= 2**20
    if chunk[-1] < sizes[dims[-1]]:  # split, and no more than has to be
        assert values + np.prod(chunk[:-1]) > 2**20


def chunk_files(folder):
    """Return the digest of every chunk's file by (variable, chunk's position)."""
    root = folder / "record.zarr"
    return {
        (path.relative_to(root).parts[0], tuple(map(int, path.relative_to(root).parts[2:]))): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in root.glob("*/c/**/*")
        if path.is_file()
    }


@settings(deadline=None, max_examples=12)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(4, 64)
)
def test_one_write_touches_whole_chunks_of_its_own(
    tmp_path_factory, epochs, layers, samples, parameters, most_values
):
    sizes = {
        "epoch": epochs,
        "layer": layers,
        "sample": samples,
        "state": epochs + 1,
        "parameter": parameters,
    }
    folder = tmp_path_factory.mktemp("trial")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "CHUNK_VALUES", most_values)
        record = make_record(folder, sizes, range(epochs + 1))
        before = chunk_files(folder)
        assert before == {}
        for epoch_record in make_records(sizes, range(epochs + 1)):
            record.write(epoch_record)
            after, expected = chunk_files(folder), set()
            for name in epoch_record.arrays:
                if name in CURVES:
                    expected.add((name, (0,)))
                    continue
                dims = VARIABLES[name].dims
                first = epoch_record.epoch - (name != "parameters")
                count = -(-sizes[dims[-1]] // chunk_shape(name, sizes)[-1])
                middle = (0,) * (len(dims) - 2)
                expected |= {(name, (first, *middle, last)) for last in range(count)}
            assert {key for key in after if after[key] != before.get(key)} == expected
            before = after
    check_equal(folder, make_records(sizes, range(epochs + 1)), sizes)


WRITER = """
    import sys, time
    from pathlib import Path
    import numpy as np
    from sampimp.schema import EpochRecord
    from sampimp.store import Folder, TrialRecord

    out, seed = Path(sys.argv[1]), int(sys.argv[2])
    sizes = {"epoch": 3, "layer": 2, "sample": 10, "state": 0, "parameter": 7}
    identity = {"seed": seed, "fingerprint": "f"}
    record = TrialRecord(Folder.of(out / "trials" / f"trial-{seed}"), identity, sizes, [])
    (out / f"ready-{seed}").touch()
    while len(list(out.glob("ready-*"))) < 2:
        time.sleep(0.005)
    for epoch in (1, 2, 3):
        nll = np.arange(10, dtype=np.float32) + 100 * seed + epoch
        arrays = {"nll": nll, "importance": np.stack([nll, -nll]), "test_nll": nll.mean()}
        record.write(EpochRecord(epoch=epoch, arrays=arrays))
        record.checkpoint(epoch, b"state")
    record.commit(None)
"""


def test_two_processes_write_two_trials_at_once(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path)]
    writers = [subprocess.Popen([*command, str(seed)]) for seed in (1, 2)]
    try:
        assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    finally:
        for writer in writers:
            writer.kill()
    commits = read_commits(Folder.of(tmp_path))
    assert sorted(commits) == ["trial-1", "trial-2"]
    for seed in (1, 2):
        raw, commit = read_raw(tmp_path / "trials" / f"trial-{seed}"), commits[f"trial-{seed}"]
        nll = np.add.outer([1, 2, 3], np.arange(10)).astype(np.float32) + 100 * seed
        np.testing.assert_array_equal(raw["nll"][:], nll)
        np.testing.assert_array_equal(raw["importance"][:], np.stack([nll, -nll], axis=1))
        np.testing.assert_array_equal(raw["test_nll"][:], nll.mean(1))
        assert commit["seed"] == seed
        assert commit["digests"]["nll"] == [digest(values) for values in nll]


# Checkpoints.


def checkpointed(folder, epochs=3):
    """A trial that has written some epochs, with a checkpoint after each."""
    record, records = make_record(folder), make_records()
    record.write(records[0])
    for epoch in range(1, epochs + 1):
        record.write(records[epoch])
        record.checkpoint(epoch, b"state %d" % epoch)
    return record


def test_the_newest_two_checkpoints_are_kept(tmp_path):
    checkpointed(tmp_path)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["epoch-000002", "epoch-000003"]
    assert make_record(tmp_path).newest_checkpoint() == (3, b"state 3")


def test_epochs_are_ordered_as_numbers(tmp_path):
    record = make_record(tmp_path)
    for epoch in (9, 10, 99, 100):
        record.checkpoint(epoch, b"state %d" % epoch)
    assert make_record(tmp_path).newest_checkpoint() == (100, b"state 100")


def test_a_new_trial_has_no_checkpoint(tmp_path):
    assert make_record(tmp_path).newest_checkpoint() is None


DAMAGES = {
    "torn state": lambda folder: (folder / "state.pt").write_bytes(b"stat"),
    "empty state": lambda folder: (folder / "state.pt").write_bytes(b""),
    "changed state": lambda folder: (folder / "state.pt").write_bytes(b"state 4"),
    "no state": lambda folder: (folder / "state.pt").unlink(),
    "no manifest": lambda folder: (folder / "MANIFEST.json").unlink(),
    "empty manifest": lambda folder: (folder / "MANIFEST.json").write_bytes(b""),
    "truncated manifest": lambda folder: (folder / "MANIFEST.json").write_bytes(
        (folder / "MANIFEST.json").read_bytes()[:40]
    ),
    "manifest of zeros": lambda folder: (folder / "MANIFEST.json").write_bytes(bytes(300)),
    "not utf-8": lambda folder: (folder / "MANIFEST.json").write_bytes(b'{"a": "\xff\xfe"}'),
    "other fingerprint": lambda folder: (folder / "MANIFEST.json").write_text(
        (folder / "MANIFEST.json").read_text().replace("f" * 64, "e" * 64)
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_checkpoint_that_does_not_verify_falls_back_to_the_one_before(tmp_path, name):
    checkpointed(tmp_path)
    DAMAGES[name](tmp_path / "checkpoints" / "epoch-000003")
    again = make_record(tmp_path)
    assert again.newest_checkpoint() == (2, b"state 2")
    assert len(again.history.seconds) == 2  # the history is that of the same checkpoint
    DAMAGES[name](tmp_path / "checkpoints" / "epoch-000002")
    assert make_record(tmp_path).newest_checkpoint() is None


def test_a_trial_that_goes_on_from_a_checkpoint_commits_the_same(tmp_path):
    whole = checkpointed(tmp_path / "whole")
    whole.commit(None)
    # Killed after epoch 3 was written, and before its checkpoint.
    cut = checkpointed(tmp_path / "cut", epochs=2)
    cut.write(make_records()[3])
    again = make_record(tmp_path / "cut")
    epoch, _ = again.newest_checkpoint()
    for epoch_record in make_records()[epoch + 1 :]:
        again.write(epoch_record)
    again.commit(None)
    check_equal(tmp_path / "cut", make_records())
    one, other = (
        json.loads((tmp_path / name / "COMMIT.json").read_text()) for name in ("whole", "cut")
    )
    assert one == other


# Commits.


def test_a_trial_counts_once_it_is_committed(tmp_path):
    trial = tmp_path / "trials" / "one"
    record = checkpointed(trial)
    assert read_commits(Folder.of(tmp_path)) == {}
    assert not (trial / "COMMIT.json").exists()
    record.commit(None)
    commit = read_commits(Folder.of(tmp_path))["one"]
    newest = (trial / "COMMIT.json").stat().st_mtime_ns
    others = [p for p in trial.rglob("*") if p.is_file() and p.name != "COMMIT.json"]
    assert all(path.stat().st_mtime_ns <= newest for path in others)
    assert commit["epochs"] == 3
    assert commit["diverged_epoch"] is None
    assert commit["fingerprint"] == IDENTITY["fingerprint"]
    assert commit["seconds"] == [0.5, 1.0, 1.5]
    raw = {name: array[:] for name, array in read_raw(trial).items()}
    for name in (*AT_EPOCH, "parameters"):
        assert commit["digests"][name] == [digest(values) for values in raw[name]]
    for name in CURVES:
        assert commit["curves"][name] == raw[name].tolist()


def test_a_diverged_trial_keeps_what_it_has(tmp_path):
    record, records = make_record(tmp_path), make_records()
    for epoch_record in records[:3]:
        record.write(epoch_record)
    record.commit(2)
    commit = json.loads((tmp_path / "COMMIT.json").read_text())
    assert commit["diverged_epoch"] == commit["epochs"] == 2
    raw = read_raw(tmp_path)
    np.testing.assert_array_equal(raw["nll"][1], records[2].arrays["nll"])
    assert np.isnan(raw["nll"][2]).all()


def test_the_records_digest_follows_its_samples_alone():
    commit = {"digests": {"importance": ["1"], "nll": ["2"], "parameters": ["3"]}}
    other = {"digests": {"importance": ["1"], "nll": ["2"]}, "seconds": [5]}
    assert record_digest(commit) == record_digest(other)
    for name in ("importance", "nll"):
        changed = {"digests": commit["digests"] | {name: ["9"]}}
        assert record_digest(changed) != record_digest(commit)


def test_difficulty_is_the_final_nll_or_tau(tmp_path):
    record, records = make_record(tmp_path), make_records()
    for epoch_record in records:
        record.write(epoch_record)
    nll = read_difficulty(Folder.of(tmp_path), "final_nll")
    np.testing.assert_array_equal(nll, records[-1].arrays["nll"].astype(np.float64))
    tau = read_difficulty(Folder.of(tmp_path), "overall_importance")
    # tau: over layers and over epochs
    beta = np.array([r.arrays["importance"] for r in records[1:]], np.float64)
    np.testing.assert_allclose(tau, beta.sum((0, 1)), rtol=1e-12)
    assert nll.dtype == tau.dtype == np.float64


# Data sets.


@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 40, 40), (5,)])
def test_a_data_set_round_trips(tmp_path, shape):
    source = oracles.make_source(shape=shape)
    assert read_source(Folder.of(tmp_path)) is None
    write_source(Folder.of(tmp_path), source)
    again = read_source(Folder.of(tmp_path))
    assert again.digest == source.digest
    assert (again.name, again.class_names, again.full_scale) == (
        source.name,
        source.class_names,
        source.full_scale,
    )
    for name in ("train_values", "train_labels", "test_values", "test_labels"):
        np.testing.assert_array_equal(getattr(again, name), getattr(source, name))
        assert getattr(again, name).dtype == getattr(source, name).dtype


def test_a_data_set_written_over_another_replaces_it(tmp_path):
    write_source(Folder.of(tmp_path), oracles.make_source(samples=30))
    source = oracles.make_source(samples=12, seed=1)
    write_source(Folder.of(tmp_path), source)
    assert read_source(Folder.of(tmp_path)).digest == source.digest


@pytest.mark.parametrize("name", ["train_values", "train_labels", "test_values", "test_labels"])
def test_a_data_set_of_other_values_is_refused(tmp_path, name):
    source = oracles.make_source()
    write_source(Folder.of(tmp_path), source)
    array = zarr.open_array(str(tmp_path / name), mode="r+")
    array[0] = (array[0] + 1) % 3
    with pytest.raises(RecordError, match=rf"digest {source.digest}(.|\n)*{tmp_path}"):
        read_source(Folder.of(tmp_path))


def test_a_data_set_that_was_cut_off_is_none(tmp_path):
    write_source(Folder.of(tmp_path), oracles.make_source())
    group = zarr.open_group(str(tmp_path), mode="r+")
    del group.attrs["digest"]
    assert read_source(Folder.of(tmp_path)) is None


def test_an_array_is_opened_for_reading_only(tmp_path):
    make_record(tmp_path).write(make_records()[1])
    array = open_array(str(tmp_path), "record.zarr/nll")
    np.testing.assert_array_equal(array[0], make_records()[1].arrays["nll"])
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0
