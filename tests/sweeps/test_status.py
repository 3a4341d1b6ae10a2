"""What the store says of a study, and what becomes of a damaged trial."""

import json
import os

import numpy as np
import oracles
import pytest

import sampimp
from sampimp.store.plan import read_commits
from sampimp.store.record import TrialRecord
from sampimp.store.snapshots import SNAPSHOTS, write_snapshot
from sampimp.sweeps import inspection, status
from sampimp.sweeps.inspection import inspect


class Study:
    """A study of one small data set whose trials are as a test leaves them."""

    def __init__(self, out, grid, commit):
        self.out = out
        self.sources = {"one": oracles.make_source()}
        self.plan = oracles.make_plan(self.sources, grid)
        self.folder = oracles.start_study(out, self.plan, self.sources)
        self.train(commit)

    def train(self, commit):
        oracles.run_trials(self.folder, self.plan, self.sources, commit=commit)

    def trial(self, label):
        (trial,) = (t for t in self.plan.resolve(read_commits(self.folder)) if t.label == label)
        return trial

    def begin(self, label):
        trial = self.trial(label)
        where = self.folder / "trials" / trial.trial_id
        return TrialRecord(where, oracles.identity_of(trial), self.plan.layout("one"))

    def states(self):
        return {s.trial.label: (s.state, s.detail) for s in inspect(self.folder, self.plan)}


def call(capsys, *arguments):
    code = status.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_where_each_trial_is(tmp_path, monkeypatch, capsys):
    grid = {"shuffle": (1, 2, 3), "rand": (1, 2, 3)}
    study = Study(tmp_path, grid, commit=lambda trial: trial.label == "one-shuffle-seed1")
    done = study.trial("one-shuffle-seed2")
    for name in ("shuffle-seed3", "rand-seed3"):  # nobody has begun these
        trial_id = study.trial(f"one-{name}").trial_id
        (study.folder / "trials" / trial_id).remove()
    study.begin("one-shuffle-seed2").commit(2)
    study.begin("one-rand-seed1").checkpoint(2, b"state")
    study.begin("one-rand-seed2").fail(OSError(28, "No space left on device"))
    assert study.states() == {
        "one-shuffle-seed1": ("done", ""),
        "one-shuffle-seed2": ("diverged", "in epoch 2"),
        "one-shuffle-seed3": ("waiting", ""),
        "one-rand-seed1": (
            "running",
            f"epoch 2 of 3, attempt 2 on {os.uname().nodename}, last sign 0:00 ago",
        ),
        "one-rand-seed2": (
            "failed",
            f"epoch 0 of 3, attempt 2 on {os.uname().nodename}: "
            "OSError(28, 'No space left on device')",
        ),
        "one-rand-seed3": ("waiting", ""),
    }
    assert done.commit is None
    now = inspection.time.time()
    monkeypatch.setattr(inspection.time, "time", lambda: now + 7200)
    assert study.states()["one-rand-seed1"][0] == "stopped"
    code, text, _ = call(capsys, tmp_path)
    assert code == 3
    assert "6 trials: 1 done, 1 diverged, 1 stopped, 1 failed, 2 waiting" in text
    assert "No space left on device" in text
    assert "errors/ATTEMPT.json" in text


@pytest.mark.parametrize("reference", ["waiting", "failed"])
def test_what_a_trial_is_blocked_by(tmp_path, reference, capsys):
    study = Study(tmp_path, {"shuffle": (1,), "nlo": (1, 2)}, commit=lambda trial: False)
    (study.folder / "trials" / study.trial("one-shuffle-seed1").trial_id).remove()
    if reference == "failed":
        study.begin("one-shuffle-seed1").fail(ValueError("broken"))
    blocked = ("blocked", f"by one-shuffle-seed1: {reference}")
    states = study.states()
    assert states["one-nlo-seed1"] == states["one-nlo-seed2"] == blocked
    text = call(capsys, tmp_path)[1]
    assert f"one-nlo-seed1, one-nlo-seed2 by one-shuffle-seed1: {reference}" in text


def test_what_is_damaged_is_named_withdrawn_and_trained_again(tmp_path, capsys):
    study = Study(tmp_path, {"shuffle": (1, 2), "nlo": (1,)}, commit=lambda trial: True)
    before = sampimp.open_cube(tmp_path)["one"].compute()
    code, text, _ = call(capsys, tmp_path, "--verify")
    assert code == 0
    assert "3 committed trials verified: every chunk is as it was written." in text

    damaged = study.trial("one-shuffle-seed2").trial_id
    (chunk,) = (tmp_path / "trials" / damaged / "record.zarr" / "nll" / "c" / "1").iterdir()
    chunk.unlink()
    code, text, _ = call(capsys, tmp_path, "--verify")
    assert code == 1
    assert f"{damaged} is damaged: nll, epoch 2: " in text
    assert "3 committed trials verified: 1 are damaged." in text
    assert "--withdraw takes them out" in text
    assert study.trial("one-shuffle-seed2").commit is not None  # nothing was changed

    code, text, _ = call(capsys, tmp_path, "--withdraw")
    assert code == 1
    assert "1 withdrawn" in text
    assert study.trial("one-shuffle-seed2").commit is None
    assert np.isnan(sampimp.open_cube(tmp_path)["one"].nll.sel(strategy="shuffle", seed=2)).all()
    study.train(commit=lambda trial: trial.commit is None)
    assert call(capsys, tmp_path, "--verify")[0] == 0
    after = sampimp.open_cube(tmp_path)["one"].compute()
    for name in ("importance", "nll", "batch", "parameters", "test_error"):
        np.testing.assert_array_equal(after[name], before[name])


def test_snapshots_are_verified_and_withdrawn_too(tmp_path, capsys):
    study = Study(tmp_path, {"shuffle": (1, 2)}, commit=lambda trial: True)
    entries = {}
    for seed in (1, 2):
        trial_id = study.trial(f"one-shuffle-seed{seed}").trial_id
        values = np.full((3, 24), seed, np.float32)
        where = study.folder / "trials" / trial_id
        entries[trial_id] = {"2": write_snapshot(where, study.plan.layout("one"), 2, values)}
    study.folder.write_json(SNAPSHOTS, entries)
    assert call(capsys, tmp_path, "--verify")[0] == 0
    (chunk,) = (tmp_path / "trials" / trial_id / "snapshots.zarr").rglob("c/1/0/0")
    chunk.write_bytes(b"")
    code, text, _ = call(capsys, tmp_path, "--withdraw")
    assert code == 1
    assert f"{trial_id} is damaged: snapshot_importance, epoch 2: " in text
    assert list(json.loads((tmp_path / SNAPSHOTS).read_text())) == list(entries)[:1]


def test_a_folder_without_a_study_is_refused(tmp_path, capsys):
    code, text, error = call(capsys, tmp_path)
    assert (code, text) == (2, "")
    assert "a study, with a study.json" in error
    assert "Traceback" not in error
