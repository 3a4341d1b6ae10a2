"""The status of a study in a bucket: what it reads, and that it says the same as a full read."""

import oracles
import pytest
from memory_bucket import serving

from sampimp.store.commits import read_commit, read_outcome
from sampimp.store.location import Folder
from sampimp.store.plan import read_commits
from sampimp.store.plan_files import require_plan
from sampimp.store.seals import DamagedFileError
from sampimp.sweeps import status
from sampimp.sweeps.inspection import inspect

URL = "s3://studies/many"
GRID = {"shuffle": (1, 2), "nlo": (1,), "rand": (1,)}


@pytest.fixture
def bucket(monkeypatch):
    """A bucket with a study of four trials, one of them not committed."""
    with serving(monkeypatch) as bucket:
        sources = {"one": oracles.make_source()}
        plan = oracles.make_plan(sources, GRID)
        folder = oracles.start_study(URL, plan, sources)
        oracles.run_trials(folder, plan, sources, commit=lambda trial: "rand" not in trial.label)
        yield bucket


def commit_paths(bucket):
    return [path for path in bucket.objects if path.endswith("COMMIT.json")]


def states():
    folder = Folder.of(URL)
    return {each.trial.label: each.state for each in inspect(folder, require_plan(folder))}


def test_the_states_are_those_of_a_full_read(bucket):
    found = states()
    assert found["one-shuffle-seed1"] == found["one-shuffle-seed2"] == found["one-nlo-seed1"]
    assert found["one-nlo-seed1"] == "done"
    assert found["one-rand-seed1"] != "done"


def test_an_outcome_is_the_start_of_the_commit(bucket):
    trials = Folder.of(URL) / "trials"
    for name in read_commits(Folder.of(URL)):
        outcome, commit = read_outcome(trials / name), read_commit(trials / name)
        for key in ("fingerprint", "attempt", "epochs", "diverged_epoch", "strategy", "seed"):
            assert outcome[key] == commit[key]
    assert read_outcome(trials / "absent") is None


def test_of_a_commit_only_the_start_is_read(bucket):
    """A commit as long as that of 50 epochs, damaged beyond its start: nothing reads that."""
    (path,) = (path for path in commit_paths(bucket) if "nlo" in path)
    bucket.objects[path] += b"x" * 50_000
    assert states()["one-nlo-seed1"] == "done"
    record = Folder.of("s3://" + path.removesuffix("/COMMIT.json"))
    assert record.read_bytes("COMMIT.json", first=4096) == bucket.objects[path][:4096]
    with pytest.raises(DamagedFileError):
        read_commit(record)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff" * 5000, b'{\n "diverged_epoch": 7,\n'])
def test_a_commit_that_does_not_start_as_one_is_unreadable(bucket, content):
    (path,) = (path for path in commit_paths(bucket) if "nlo" in path)
    bucket.objects[path] = content
    assert states()["one-nlo-seed1"] == "unreadable"


def test_sizes_are_added_up_on_request(bucket, capsys):
    assert status.main([URL]) == 0
    assert "GB" not in capsys.readouterr().out
    assert status.main([URL, "--size"]) == 0
    assert " MB\n" in capsys.readouterr().out
