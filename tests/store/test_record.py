"""A record is read as it was written, wherever its writer was interrupted."""

import hashlib
import json
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trial_records import (
    AT_EPOCH,
    IDENTITY,
    LAYOUT,
    check_equal,
    checkpointed,
    make_record,
    make_records,
    read_raw,
)

from sampimp import schema
from sampimp.schema import CURVES, VARIABLES, Layout, chunk_shape, digest
from sampimp.store.location import Folder
from sampimp.store.plan import read_commits
from sampimp.store.seals import seal
from sampimp.store.variables import StoredVariable


# Records.
def test_a_record_round_trips(tmp_path):
    record, records = make_record(tmp_path), make_records()
    for epoch_record in records:
        record.write(epoch_record)
    record.commit(None)
    check_equal(tmp_path, records)
    for name, array in read_raw(tmp_path).items():
        assert array.dtype == VARIABLES[name].dtype
        assert array.metadata.dimension_names == VARIABLES[name].dims
        assert array.attrs["units"] == VARIABLES[name].units
        assert np.isnan(array.fill_value)


def test_epochs_not_yet_written_are_nan(tmp_path):
    record, records = make_record(tmp_path), make_records()
    assert all(np.isnan(array[:]).all() for array in read_raw(tmp_path).values())
    for epoch_record in records[:2]:
        record.write(epoch_record)
    for name, array in read_raw(tmp_path).items():
        done = {"parameters": 2, **dict.fromkeys(CURVES, 0)}.get(name, 1)
        assert np.isfinite(array[:done]).all()
        assert np.isnan(array[done:]).all()


def test_states_can_be_stored_at_some_epochs_only(tmp_path):
    layout = replace(LAYOUT, states=(0, 2, 3))
    record, records = make_record(tmp_path, layout), make_records(layout)
    for epoch_record in records:
        record.write(epoch_record)
    check_equal(tmp_path, records)
    assert read_raw(tmp_path)["parameters"].shape == (3, 7)


def test_without_states_there_are_no_parameters(tmp_path):
    layout = replace(LAYOUT, states=())
    record = make_record(tmp_path, layout)
    for epoch_record in make_records(layout):
        record.write(epoch_record)
    assert set(read_raw(tmp_path)) == {*AT_EPOCH, *CURVES}


# Alignment: one write covers whole chunks that no other write touches.
some_sizes = st.fixed_dictionaries(
    {
        "epoch": st.integers(1, 60),
        "layer": st.integers(1, 70),
        "sample": st.integers(1, 2_000_000),
        "state": st.integers(1, 60),
        "parameter": st.integers(1, 100_000_000),
    }
)


@settings(max_examples=100)
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
    if chunk[-1] < sizes[dims[-1]]:  # split into as few chunks as possible
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


@settings(max_examples=12)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(4, 64)
)
def test_one_write_touches_whole_chunks_of_its_own(
    tmp_path_factory, epochs, layers, samples, parameters, most_values
):
    states = tuple(range(epochs + 1))
    layout = Layout(epoch=epochs, layer=layers, sample=samples, parameter=parameters, states=states)
    folder = tmp_path_factory.mktemp("trial")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "CHUNK_VALUES", most_values)
        record = make_record(folder, layout)
        before = chunk_files(folder)
        assert before == {}
        for epoch_record in make_records(layout):
            record.write(epoch_record)
            after, expected = chunk_files(folder), set()
            for name in epoch_record.arrays:
                if name in CURVES:
                    continue  # with the commit
                shape = layout.shape(name)
                first = epoch_record.epoch - (name != "parameters")
                count = -(-shape[-1] // layout.chunk(name)[-1])
                middle = (0,) * (len(shape) - 2)
                expected |= {(name, (first, *middle, last)) for last in range(count)}
            assert {key for key in after if after[key] != before.get(key)} == expected
            before = after
        check_equal(folder, make_records(layout))
        record.commit(None)
        commit = json.loads((folder / "COMMIT.json").read_text())
        for name in (*AT_EPOCH, "parameters"):  # as a reader gets it, whole and in part
            stored = StoredVariable.of(Folder.of(folder), name, layout, commit)
            for position, epoch_record in enumerate(make_records(layout)[name != "parameters" :]):
                values, columns = epoch_record.arrays[name], slice(samples // 3, parameters)
                np.testing.assert_array_equal(stored.read(position), values)
                np.testing.assert_array_equal(stored.read(position, columns), values[..., columns])


WRITER = """
    import sys, time
    from pathlib import Path
    import numpy as np
    from sampimp.schema import EpochRecord
    from sampimp.store.location import Folder
    from sampimp.schema import Layout
    from sampimp.store.record import TrialRecord

    out, seed = Path(sys.argv[1]), int(sys.argv[2])
    layout = Layout(epoch=3, layer=2, sample=10, parameter=7, states=())
    identity = {"seed": seed, "fingerprint": "f"}
    record = TrialRecord(Folder.of(out / "trials" / f"trial-{seed}"), identity, layout)
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
        assert commit["digests"]["nll"] == [[digest(values)] for values in nll]


def test_the_newest_two_checkpoints_are_kept(tmp_path):
    checkpointed(tmp_path)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["epoch-000002-attempt-0001", "epoch-000003-attempt-0001"]
    assert make_record(tmp_path).newest_checkpoint() == (3, b"state 3")


def test_checkpoints_are_ordered_by_epoch_number(tmp_path):
    layout = replace(LAYOUT, epoch=100)
    record = make_record(tmp_path, layout)
    for epoch_record in make_records(layout):
        record.write(epoch_record)
        if epoch_record.epoch in (9, 10, 99, 100):
            record.checkpoint(epoch_record.epoch, b"state %d" % epoch_record.epoch)
    assert make_record(tmp_path, layout).newest_checkpoint() == (100, b"state 100")


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


@pytest.mark.parametrize(
    "change",
    [
        lambda history: history["curves"]["train_nll"].append(1.0),
        lambda history: history["seconds"].pop(),
        lambda history: history["digests"].pop("nll"),
        lambda history: history["digests"]["batch"].pop(),
    ],
)
def test_a_history_of_other_steps_is_not_continued(tmp_path, change):
    """What a later epoch writes would be read as that of another."""
    checkpointed(tmp_path, 2)
    path = tmp_path / "checkpoints" / "epoch-000002-attempt-0001" / "MANIFEST.json"
    manifest = json.loads(path.read_bytes())
    del manifest["seal"]
    change(manifest["history"])
    path.write_bytes(seal(manifest))
    assert make_record(tmp_path).newest_checkpoint() == (1, b"state 1")


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_previous_one(tmp_path, name):
    checkpointed(tmp_path)
    DAMAGES[name](tmp_path / "checkpoints" / "epoch-000003-attempt-0001")
    again = make_record(tmp_path)
    assert again.newest_checkpoint() == (2, b"state 2")
    assert len(again.history.seconds) == 2  # the history is of the same checkpoint
    DAMAGES[name](tmp_path / "checkpoints" / "epoch-000002-attempt-0001")
    record = make_record(tmp_path)
    assert record.newest_checkpoint() is None
    # Those that did not verify are deleted, so that the new ones, of lower epochs, are kept.
    for epoch in (1, 2):
        record.checkpoint(epoch, b"anew %d" % epoch)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [f"epoch-00000{epoch}-attempt-{record.attempt:04d}" for epoch in (1, 2)]


# Commits.
def test_a_trial_is_visible_once_it_is_committed(tmp_path):
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
        assert commit["digests"][name] == [[digest(values)] for values in raw[name]]
    for name in CURVES:
        assert commit["curves"][name] == raw[name].tolist()


def test_a_diverged_trial_keeps_its_epochs(tmp_path):
    record, records = make_record(tmp_path), make_records()
    for epoch_record in records[:3]:
        record.write(epoch_record)
    record.commit(2)
    commit = json.loads((tmp_path / "COMMIT.json").read_text())
    assert commit["diverged_epoch"] == commit["epochs"] == 2
    raw = read_raw(tmp_path)
    np.testing.assert_array_equal(raw["nll"][1], records[2].arrays["nll"])
    assert np.isnan(raw["nll"][2]).all()
