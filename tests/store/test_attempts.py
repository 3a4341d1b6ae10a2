"""Several attempts at one trial: a late writer overwrites nothing, and one attempt commits."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from trial_records import (
    AT_EPOCH,
    checkpointed,
    make_record,
    make_records,
    read_raw,
    read_whole,
    resume,
)

from sampimp.schema import CURVES
from sampimp.store.attempts import SupersededError, claim_attempt, read_trace
from sampimp.store.location import Folder


def test_a_resumed_trial_commits_the_same_values(tmp_path):
    whole = checkpointed(tmp_path / "whole")
    whole.commit(None)
    # Interrupted after epoch 3 was written and before its checkpoint.
    cut = checkpointed(tmp_path / "cut", epochs=2)
    cut.write(make_records()[3])
    epoch, again = resume(tmp_path / "cut")
    assert epoch == 2
    again.commit(None)
    uninterrupted, resumed = (
        json.loads((tmp_path / name / "COMMIT.json").read_text()) for name in ("whole", "cut")
    )
    assert (uninterrupted.pop("parts"), uninterrupted.pop("attempt")) == ([[0, "record.zarr"]], 1)
    parts = [[0, "record.zarr"], [3, "record-2.zarr"]]
    assert (resumed.pop("parts"), resumed.pop("attempt")) == (parts, 2)
    for commit in (uninterrupted, resumed):  # the files of two attempts have other names
        del commit["files"], commit["seal"]
    assert uninterrupted == resumed
    for name, values in read_whole(tmp_path / "whole").items():
        np.testing.assert_array_equal(read_whole(tmp_path / "cut")[name], values)
        first = 3 if name == "parameters" else 2  # the second attempt wrote state 3 and epoch 3
        second = read_raw(tmp_path / "cut", "record-2.zarr")[name]
        assert np.isnan(second[:first]).all()
        np.testing.assert_array_equal(second[first:], values[first:])
    for name in CURVES:  # the last attempt stores the curves of all epochs
        curve = [r.arrays[name] for r in make_records()[1:]]
        np.testing.assert_array_equal(read_raw(tmp_path / "cut", "record-2.zarr")[name], curve)


# Two attempts at one trial.
def test_concurrent_attempts_claim_different_numbers(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda _: claim_attempt(Folder.of(tmp_path)), range(24)))
    assert sorted(numbers) == list(range(1, 25))


def test_of_drivers_that_saw_the_same_one_begins_an_attempt(tmp_path):
    folder, start = Folder.of(tmp_path), threading.Barrier(8)

    def claim(_):
        seen = read_trace(folder)
        start.wait()
        try:
            return claim_attempt(folder, seen)
        except SupersededError:
            return None

    with ThreadPoolExecutor(8) as pool:
        for number in range(1, 6):
            claimed = [attempt for attempt in pool.map(claim, range(8)) if attempt]
            assert claimed == [number]
            assert read_trace(folder) == (number, "")


def test_a_late_writer_is_refused_and_overwrites_nothing(tmp_path):
    cut_off = checkpointed(tmp_path, epochs=1)
    _, second = resume(tmp_path)  # writes epochs 2 and 3
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for late in (
        lambda: cut_off.write(make_records(seed=9)[2]),
        lambda: cut_off.commit(None),
    ):
        with pytest.raises(SupersededError, match="attempt 1 to be the newest"):
            late()
    # A write that was under way when the worker was cut off: epoch 2 with other values.
    cut_off._require_newest = lambda: None
    cut_off.write(make_records(seed=9)[2])
    cut_off.checkpoint(2, b"another state")
    assert all(
        path.read_bytes() == content
        for path, content in before.items()
        if "record.zarr" not in path.parts
    )
    second.commit(None)
    values = read_whole(tmp_path)
    for name in AT_EPOCH:
        np.testing.assert_array_equal(values[name], [r.arrays[name] for r in make_records()[1:]])


def test_exactly_one_of_two_attempts_commits(tmp_path):
    first = checkpointed(tmp_path)
    first._require_newest = lambda: None  # it checked just before the second one began
    _, second = resume(tmp_path)
    first.commit(None)
    with pytest.raises(SupersededError, match="of another attempt"):
        second.commit(None)
    assert json.loads((tmp_path / "COMMIT.json").read_text())["attempt"] == 1
    np.testing.assert_array_equal(
        read_whole(tmp_path)["nll"], [r.arrays["nll"] for r in make_records()[1:]]
    )


def test_the_commit_deletes_records_without_epochs(tmp_path):
    make_record(tmp_path)  # died before its first checkpoint
    _, second = resume(tmp_path)
    second.commit(None)
    assert sorted(path.name for path in tmp_path.glob("record*")) == ["record-2.zarr"]
