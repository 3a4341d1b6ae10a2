"""What is written is what is read, whatever was cut off on the way."""

import hashlib
import json
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import oracles
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.errors import ContainsGroupError

from sampimp import schema
from sampimp.errors import RecordError
from sampimp.schema import CURVES, VARIABLES, EpochRecord, Layout, chunk_shape, digest
from sampimp.store.attempts import SupersededError, claim_attempt
from sampimp.store.datasets import read_source, write_source
from sampimp.store.integrity import find_damage, record_digest, withdraw
from sampimp.store.location import Folder
from sampimp.store.plan import read_commits
from sampimp.store.record import TrialRecord
from sampimp.store.snapshots import stored_snapshots, write_snapshot
from sampimp.store.variables import StoredVariable, read_difficulty
from sampimp.store.zarr_arrays import open_array

LAYOUT = Layout(epoch=3, layer=2, sample=10, parameter=7, states=(0, 1, 2, 3))
IDENTITY = {"strategy": "rand", "seed": 1, "fingerprint": "f" * 64}
AT_EPOCH = ("importance", "nll", "batch")


def make_records(layout=LAYOUT, seed=0):
    """Random values, epoch by epoch."""
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
    """Read every array with Zarr alone."""
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


def test_what_is_not_written_yet_is_nan(tmp_path):
    record, records = make_record(tmp_path), make_records()
    assert all(np.isnan(array[:]).all() for array in read_raw(tmp_path).values())
    for epoch_record in records[:2]:
        record.write(epoch_record)
    for name, array in read_raw(tmp_path).items():
        done = {"parameters": 2, **dict.fromkeys(CURVES, 0)}.get(name, 1)
        assert np.isfinite(array[:done]).all()
        assert np.isnan(array[done:]).all()


def test_only_some_states_may_be_stored(tmp_path):
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


def test_two_workers_may_begin_the_snapshots_of_a_trial(tmp_path, monkeypatch):
    values = np.random.default_rng(1).random((2, 2, 10), dtype=np.float32)
    write_snapshot(Folder.of(tmp_path), LAYOUT, 1, values[0])
    # The second one looked for the array before the first had made it.
    monkeypatch.setattr(zarr.Group, "__contains__", lambda group, name: False)
    write_snapshot(Folder.of(tmp_path), LAYOUT, 3, values[1])
    # And the third one for the group.
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
        for name in (*AT_EPOCH, "parameters"):  # as a reader has it, whole and in part
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
    assert kept == ["epoch-000002-attempt-0001", "epoch-000003-attempt-0001"]
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
    DAMAGES[name](tmp_path / "checkpoints" / "epoch-000003-attempt-0001")
    again = make_record(tmp_path)
    assert again.newest_checkpoint() == (2, b"state 2")
    assert len(again.history.seconds) == 2  # the history is that of the same checkpoint
    DAMAGES[name](tmp_path / "checkpoints" / "epoch-000002-attempt-0001")
    assert make_record(tmp_path).newest_checkpoint() is None


def go_on(folder):
    """Begin another attempt, and train to the end from the newest checkpoint that verifies."""
    record = make_record(folder)
    epoch, _ = record.newest_checkpoint() or (-1, None)
    for epoch_record in make_records()[epoch + 1 :]:
        record.write(epoch_record)
    return epoch, record


def read_whole(folder, layout=LAYOUT):
    """Read every array as its commit says."""
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


def test_a_trial_that_goes_on_from_a_checkpoint_commits_the_same_values(tmp_path):
    whole = checkpointed(tmp_path / "whole")
    whole.commit(None)
    # Killed after epoch 3 was written, and before its checkpoint.
    cut = checkpointed(tmp_path / "cut", epochs=2)
    cut.write(make_records()[3])
    epoch, again = go_on(tmp_path / "cut")
    assert epoch == 2
    again.commit(None)
    one, other = (
        json.loads((tmp_path / name / "COMMIT.json").read_text()) for name in ("whole", "cut")
    )
    assert (one.pop("parts"), one.pop("attempt")) == ([[0, "record.zarr"]], 1)
    parts = [[0, "record.zarr"], [3, "record-2.zarr"]]
    assert (other.pop("parts"), other.pop("attempt")) == (parts, 2)
    assert one == other
    for name, values in read_whole(tmp_path / "whole").items():
        np.testing.assert_array_equal(read_whole(tmp_path / "cut")[name], values)
        first = 3 if name == "parameters" else 2  # state 3 and epoch 3 are the second attempt's
        second = read_raw(tmp_path / "cut", "record-2.zarr")[name]
        assert np.isnan(second[:first]).all()
        np.testing.assert_array_equal(second[first:], values[first:])
    for name in CURVES:  # those of all epochs are with the last attempt
        curve = [r.arrays[name] for r in make_records()[1:]]
        np.testing.assert_array_equal(read_raw(tmp_path / "cut", "record-2.zarr")[name], curve)


# Two attempts at one trial.


def test_every_attempt_has_a_number_of_its_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda _: claim_attempt(Folder.of(tmp_path)), range(24)))
    assert sorted(numbers) == list(range(1, 25))


def test_a_worker_that_comes_back_does_not_touch_what_the_second_one_writes(tmp_path):
    cut_off = checkpointed(tmp_path, epochs=1)
    _, second = go_on(tmp_path)  # at epochs 2 and 3, with values of its own
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for late in (
        lambda: cut_off.write(make_records(seed=9)[2]),
        lambda: cut_off.commit(None),
    ):
        with pytest.raises(SupersededError, match="attempt 1 to be the newest"):
            late()
    # What was on its way when it was cut off arrives: epoch 2 as it had computed it, with others.
    cut_off._require_newest = lambda: None
    cut_off.write(make_records(seed=9)[2])
    cut_off.checkpoint(2, b"another state")
    assert all(
        path.read_bytes() == content
        for path, content in before.items()
        if "record.zarr" not in path.parts
    )
    second.commit(None)
    check_whole = read_whole(tmp_path)
    for name in AT_EPOCH:
        np.testing.assert_array_equal(
            check_whole[name], [r.arrays[name] for r in make_records()[1:]]
        )


def test_one_of_two_attempts_commits(tmp_path):
    first = checkpointed(tmp_path)
    first._require_newest = lambda: None  # it asked just before the second one began
    _, second = go_on(tmp_path)
    first.commit(None)
    with pytest.raises(SupersededError, match="of another attempt"):
        second.commit(None)
    assert json.loads((tmp_path / "COMMIT.json").read_text())["attempt"] == 1
    np.testing.assert_array_equal(
        read_whole(tmp_path)["nll"], [r.arrays["nll"] for r in make_records()[1:]]
    )


def test_records_that_no_epoch_is_in_go_with_the_commit(tmp_path):
    make_record(tmp_path)  # died before it had a checkpoint
    _, second = go_on(tmp_path)
    second.commit(None)
    assert sorted(path.name for path in tmp_path.glob("record*")) == ["record-2.zarr"]


# Damage.


def chunk_of(folder, name, position):
    (chunk,) = [
        p for p in (folder / "record.zarr" / name / "c" / str(position)).rglob("0") if p.is_file()
    ]
    return chunk


@pytest.mark.parametrize("name", [*AT_EPOCH, "parameters"])
def test_damage_before_a_checkpoint_is_found_and_trained_again(tmp_path, name):
    checkpointed(tmp_path, epochs=3)
    chunk_of(tmp_path, name, 2).unlink()  # epoch 3, or state 2
    epoch, record = go_on(tmp_path)
    assert epoch == (-1 if name == "parameters" else 2)  # state 2 is in both checkpoints
    record.commit(None)
    for variable in AT_EPOCH:
        np.testing.assert_array_equal(
            read_whole(tmp_path)[variable], [r.arrays[variable] for r in make_records()[1:]]
        )


def test_damage_after_the_commit_is_named_and_can_be_withdrawn(tmp_path):
    trial = Folder.of(tmp_path)
    checkpointed(tmp_path).commit(None)
    commit = trial.read_json("COMMIT.json")
    assert list(find_damage(trial, commit, LAYOUT)) == []
    chunk_of(tmp_path, "nll", 1).unlink()
    chunk = chunk_of(tmp_path, "importance", 0)
    chunk.write_bytes(chunk.read_bytes()[:-1])
    first, second = find_damage(trial, commit, LAYOUT)
    assert first.startswith("importance, epoch 1: ")
    assert second.startswith("nll, epoch 2: ")
    with pytest.raises(RecordError, match="nll, epoch 2"):
        StoredVariable.of(trial, "nll", LAYOUT, commit).read(1)

    withdraw(trial)
    assert trial.read_json("COMMIT.json") is None
    assert trial.read_json("withdrawn/0001.json") == commit
    epoch, record = go_on(tmp_path)  # no checkpoint is left that all of the record agrees with
    assert epoch == -1
    record.commit(None)
    assert list(find_damage(trial, trial.read_json("COMMIT.json"), LAYOUT)) == []
    np.testing.assert_array_equal(
        read_whole(tmp_path)["nll"], [r.arrays["nll"] for r in make_records()[1:]]
    )
    assert not (tmp_path / "record.zarr").exists()


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
        assert commit["digests"][name] == [[digest(values)] for values in raw[name]]
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
    records = make_records()
    checkpointed(tmp_path).commit(None)
    nll = read_difficulty(Folder.of(tmp_path), "final_nll", LAYOUT)
    np.testing.assert_array_equal(nll, records[-1].arrays["nll"].astype(np.float64))
    tau = read_difficulty(Folder.of(tmp_path), "overall_importance", LAYOUT)
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
