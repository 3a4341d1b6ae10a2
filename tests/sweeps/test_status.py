"""The state of each trial from the store, the grid, and damaged trials."""

import io
import itertools
import json
import os
import re

import numpy as np
import oracles
import pytest
from rich.console import Console

import sampimp
from sampimp.config import TrainingConfig, TrialConfig
from sampimp.errors import RecordError
from sampimp.schema import REFERENCES, STRATEGIES
from sampimp.store.plan import PlannedTrial, read_commits
from sampimp.store.record import TrialRecord
from sampimp.store.seals import seal, unseal
from sampimp.store.snapshots import SNAPSHOTS, write_snapshot
from sampimp.sweeps import inspection, status
from sampimp.sweeps.inspection import Status, inspect


class Study:
    """A study of one small data set; the test decides the state of each trial."""

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


def test_the_state_of_each_trial(tmp_path, monkeypatch, capsys):
    grid = {"shuffle": (1, 2, 3), "rand": (1, 2, 3)}
    study = Study(tmp_path, grid, commit=lambda trial: trial.label == "one-shuffle-seed1")
    done = study.trial("one-shuffle-seed2")
    for name in ("shuffle-seed3", "rand-seed3"):  # not begun
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


UNREADABLE = {
    "COMMIT.json": ("shuffle-seed1", b"[]", "got a JSON list"),
    "COMMIT.json of other shape": (
        "shuffle-seed1",
        lambda commit: commit["curves"].update(train_error=[0.0] * 9),
        "3 values of train_error, got 9",
    ),
    "attempts/0001.json": ("rand-seed1", b"", "a JSON file, got 0 bytes"),
    "errors/0001.json": ("rand-seed1", b'{"time": 1, "error": 3}', "a text at .error, got 3"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_file_is_named_and_the_other_trials_are_shown(tmp_path, capsys, name):
    grid = {"shuffle": (1, 2), "rand": (1, 2)}
    study = Study(tmp_path, grid, commit=lambda trial: trial.config.strategy == "shuffle")
    label, content, words = UNREADABLE[name]
    path = tmp_path / "trials" / study.trial(f"one-{label}").trial_id / name.partition(" ")[0]
    path.parent.mkdir(exist_ok=True)
    if callable(content):
        commit = unseal(path.read_bytes(), "COMMIT.json")
        content(commit)
        content = seal(commit)
    path.write_bytes(content)
    code, text, _ = call(capsys, tmp_path)
    assert code == 1
    assert "1 unreadable" in text
    assert words in text
    assert path.name in text
    assert re.search(r"one-rand-seed2 epoch \d of 3", text)


def test_a_clock_that_is_ahead_does_not_make_a_trial_run_for_ever(tmp_path, monkeypatch):
    study = Study(tmp_path, {"shuffle": (1,)}, commit=lambda trial: False)
    study.begin("one-shuffle-seed1").checkpoint(2, b"state")
    now = inspection.time.time()
    monkeypatch.setattr(inspection.time, "time", lambda: now - 30)  # clocks differ a little
    assert study.states()["one-shuffle-seed1"][0] == "running"
    monkeypatch.setattr(inspection.time, "time", lambda: now - 7200)
    state, detail = study.states()["one-shuffle-seed1"]
    assert state == "stopped"
    assert "last sign 2 h 00 from now: its clock, or this one, is wrong" in detail


def test_a_text_of_a_store_cannot_control_the_terminal(tmp_path, capsys):
    study = Study(tmp_path, {"shuffle": (1,)}, commit=lambda trial: False)
    study.begin("one-shuffle-seed1").fail(RecordError("a", "\x1b]0;title\x07", "b", "c"))
    code, text, _ = call(capsys, tmp_path)
    assert code == 3
    assert "got \\x1b]0;title\\x07" in text


def grid_lines(strategies, seeds, width, encoding="utf-8"):
    """Return the lines of a grid whose trials have all states in turn."""
    states = itertools.cycle(inspection.STATES)
    training = TrainingConfig()
    statuses = [
        Status(
            PlannedTrial(
                TrialConfig(
                    dataset="cifar10",
                    strategy=strategy,
                    seed=seed,
                    order_seed=0,
                    training=training,
                ),
                *("an id", "a fingerprint", None, None),
            ),
            next(states),
        )
        for strategy in strategies
        for seed in range(1, 1 + (seeds if strategy in STRATEGIES else 3))
    ]
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    status.print_grid("cifar10", statuses, Console(file=file, width=width, soft_wrap=True))
    file.flush()
    return file.buffer.getvalue().decode(encoding).splitlines()


def test_nine_strategies_and_twenty_seeds_fit_in_80_columns():
    head, *rows = grid_lines((*REFERENCES, *STRATEGIES), 20, width=80)
    assert head.split() == ["cifar10", *map(str, range(1, 21))]
    assert [row.split()[0] for row in rows] == [*REFERENCES, *STRATEGIES]
    assert max(map(len, [head, *rows])) <= 80
    assert rows[0].split() == ["shuffle", "✓", "∞", "▶"]  # the first three states
    # Each symbol is below its seed.
    symbols = {symbol for symbol, _, _ in status.SYMBOLS.values()}
    ends = {match.end() for match in re.finditer(r"\d+", head.removeprefix("cifar10").rjust(80))}
    for row in rows:
        assert {i + 1 for i, letter in enumerate(row.ljust(80)) if letter in symbols} <= {
            end - 80 + len(head) for end in ends
        }


def test_seeds_that_do_not_fit_continue_below():
    lines = grid_lines(("rand", "sim"), 40, width=60)
    assert max(map(len, lines)) <= 60
    heads = [line.split()[1:] for line in lines if line.startswith("cifar10")]
    assert len(heads) > 1
    assert [seed for head in heads for seed in head] == [str(seed) for seed in range(1, 41)]


def test_a_terminal_without_unicode_gets_ascii():
    lines = grid_lines(("rand",), 7, width=80, encoding="ascii")
    assert lines[1].split() == ["rand", "+", "~", ">", "=", "x", ".", "o"]


def test_the_output_has_a_grid_and_its_legend(tmp_path, capsys):
    study = Study(tmp_path, {"shuffle": (1,), "nlo": (1, 2)}, commit=lambda trial: False)
    (study.folder / "trials" / study.trial("one-shuffle-seed1").trial_id).remove()
    code, text, _ = call(capsys, tmp_path)
    assert code == 0  # unfinished, and nothing failed
    lines = [line.rstrip() for line in text.splitlines()]
    start = lines.index("one     1 2")
    assert lines[start + 1 : start + 3] == ["shuffle ·", "nlo     ○ ○"]
    assert "· waiting  ○ blocked" in lines


@pytest.mark.parametrize("reference", ["waiting", "failed"])
def test_a_blocked_trial_names_its_reference_run(tmp_path, reference, capsys):
    study = Study(tmp_path, {"shuffle": (1,), "nlo": (1, 2)}, commit=lambda trial: False)
    (study.folder / "trials" / study.trial("one-shuffle-seed1").trial_id).remove()
    if reference == "failed":
        study.begin("one-shuffle-seed1").fail(ValueError("broken"))
    blocked = ("blocked", f"by one-shuffle-seed1: {reference}")
    states = study.states()
    assert states["one-nlo-seed1"] == states["one-nlo-seed2"] == blocked
    code, text, _ = call(capsys, tmp_path)
    assert code == (3 if reference == "failed" else 0)
    assert f"one-nlo-seed1, one-nlo-seed2 by one-shuffle-seed1: {reference}" in text


def test_a_damaged_trial_is_named_withdrawn_and_trained_again(tmp_path, capsys):
    study = Study(tmp_path, {"shuffle": (1, 2), "nlo": (1,)}, commit=lambda trial: True)
    before = sampimp.open_cube(tmp_path)["one"].compute()
    code, text, _ = call(capsys, tmp_path, "--verify")
    assert code == 0
    assert re.search("committed trials +3 +every byte is as it was written", text)

    damaged = study.trial("one-shuffle-seed2").trial_id
    (chunk,) = (tmp_path / "trials" / damaged / "record.zarr" / "nll" / "c" / "1").iterdir()
    chunk.unlink()
    code, text, _ = call(capsys, tmp_path, "--verify")
    assert code == 1
    assert f"{damaged} is damaged: record.zarr/nll/c/1/0: missing" in text
    assert re.search("committed trials +3 +1 damaged", text)
    assert "--withdraw takes out" in text
    assert study.trial("one-shuffle-seed2").commit is not None  # nothing was changed

    code, text, _ = call(capsys, tmp_path, "--withdraw")
    assert code == 1
    assert "1 committed trials withdrawn" in text
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
    assert f"{trial_id}/snapshots.zarr is damaged: snapshot_importance, epoch 2: " in text
    assert list(json.loads((tmp_path / SNAPSHOTS).read_text())) == list(entries)[:1]


def test_snapshots_of_no_planned_data_set_are_damage(tmp_path, capsys):
    """A name in snapshots.json is that of a folder, and a commit may name any data set."""
    sources = {"one": oracles.make_source()}
    plan = oracles.make_plan(sources, {"shuffle": (1,)})
    folder = oracles.start_study(tmp_path, plan, sources)
    oracles.run_trials(folder, plan, sources)
    (trial,) = plan.resolve(read_commits(folder))
    folder.write_json("snapshots.json", {trial.trial_id: {}})
    for change in ({"dataset": "other"}, {"dataset": ...}, {"dataset": "other", "files": ...}):
        commit = {**trial.commit, "files": {}, **change}
        content = seal({name: entry for name, entry in commit.items() if entry is not ...})
        (folder / "trials" / trial.trial_id).write_bytes("COMMIT.json", content)
        code, text, _ = call(capsys, tmp_path, "--verify")
        assert code == 1
        assert "snapshots.zarr is damaged: snapshots.json names a trial" in text
    folder.write_json("snapshots.json", {"../../outside": {}})
    code, text, _ = call(capsys, tmp_path, "--verify")
    assert code == 1
    assert "snapshots.json is damaged: expected as a name a text" in text.replace(
        "Expected", "expected"
    )


def test_a_folder_without_a_study_is_refused(tmp_path, capsys):
    code, text, error = call(capsys, tmp_path)
    assert (code, text) == (2, "")
    assert "a study, with a study.json" in error
    assert "Traceback" not in error
