"""Damage to a record is found before a checkpoint is used, and after the commit."""

import numpy as np
import pytest
from trial_records import AT_EPOCH, LAYOUT, checkpointed, make_records, read_whole, resume

from sampimp.errors import RecordError
from sampimp.store.commits import withdraw
from sampimp.store.integrity import find_damage, record_digest
from sampimp.store.location import Folder
from sampimp.store.variables import StoredVariable


# Damage.
def chunk_of(folder, name, position):
    (chunk,) = [
        p for p in (folder / "record.zarr" / name / "c" / str(position)).rglob("0") if p.is_file()
    ]
    return chunk


@pytest.mark.parametrize("name", [*AT_EPOCH, "parameters"])
def test_epochs_damaged_before_a_checkpoint_are_trained_again(tmp_path, name):
    checkpointed(tmp_path, epochs=3)
    chunk_of(tmp_path, name, 2).unlink()  # epoch 3, or state 2
    epoch, record = resume(tmp_path)
    assert epoch == (-1 if name == "parameters" else 2)  # state 2 is in both checkpoints
    record.commit(None)
    for variable in AT_EPOCH:
        np.testing.assert_array_equal(
            read_whole(tmp_path)[variable], [r.arrays[variable] for r in make_records()[1:]]
        )


def test_damage_after_the_commit_is_named_and_the_trial_withdrawn(tmp_path):
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
    epoch, record = resume(tmp_path)  # every checkpoint has a damaged epoch
    assert epoch == -1
    record.commit(None)
    assert list(find_damage(trial, trial.read_json("COMMIT.json"), LAYOUT)) == []
    np.testing.assert_array_equal(
        read_whole(tmp_path)["nll"], [r.arrays["nll"] for r in make_records()[1:]]
    )
    assert not (tmp_path / "record.zarr").exists()


def test_the_record_digest_depends_on_importance_and_nll_only():
    commit = {"digests": {"importance": ["1"], "nll": ["2"], "parameters": ["3"]}}
    other = {"digests": {"importance": ["1"], "nll": ["2"]}, "seconds": [5]}
    assert record_digest(commit) == record_digest(other)
    for name in ("importance", "nll"):
        changed = {"digests": commit["digests"] | {name: ["9"]}}
        assert record_digest(changed) != record_digest(commit)
