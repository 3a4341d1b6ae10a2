"""Trainings on subsets through Ray Tune: the bytes of trainings without it, waiting, and deaths."""

import shutil
import threading
from io import StringIO

import oracles
import pytest
from processes import SUBSET, Driver, command_of, kill
from rich.console import Console

import sampimp
from sampimp.data import load_source
from sampimp.store.location import Folder
from sampimp.store.plan import read_commits
from sampimp.store.plan_files import require_plan
from sampimp.sweeps import derived_command, searcher, subset
from sampimp.sweeps.derived_study import run_here
from sampimp.sweeps.options import parse
from sampimp.sweeps.study import make_plan
from sampimp.sweeps.subset_study import SubsetRequest, prepare_subsets

REQUEST = {"rules": ("tau-high", "strata"), "sizes": (0.1, 0.3), "seeds": (1, 2)}
ARGUMENTS = [word for name, values in REQUEST.items() for word in (f"--{name}", *map(str, values))]


def digests(out):
    commits = read_commits(Folder.of(out), "influence")
    return {name: (commit["digests"], commit["curves"]) for name, commit in commits.items()}


def test_a_run_is_waited_for_and_a_bisection_follows(cluster, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(searcher, "POLL_EVERY", 0.2)
    console = Console(file=StringIO(), width=200)
    monkeypatch.setattr(derived_command, "Console", lambda **options: console)
    out = tmp_path / "study"
    shutil.copytree(finished.out, out)
    folder = Folder.of(out)
    runs = require_plan(folder).resolve(read_commits(folder))
    run = next(trial for trial in runs if trial.label == "digits-rand-seed2")
    place = folder / "trials" / str(run.trial_id)
    commit = place.read_json("COMMIT.json")
    place.delete("COMMIT.json")
    later = threading.Timer(2, lambda: place.write_json("COMMIT.json", commit))
    later.start()
    arguments = ["--rules", "tau-high", "--sizes", "0.1", "--seeds", "1", "--runs", "rand:2"]
    # Every round of a bisection connects: this process is connected to the tests' cluster.
    machines = ["--address", "local", "--max-concurrent", "1"]
    try:
        code = subset.main([str(out), *arguments, "--within", "10", *machines])
    finally:
        later.join()
    text = console.file.getvalue()
    assert code == 0, text
    assert "Waiting for digits-rand-seed2: " in text
    assert "torch.utils.data.Subset(train_set, numpy.load(" in text
    assert text.count("units are committed.") > 2
    error = sampimp.open_cube(out)["digits"].subset_error.sel(strategy="rand", seed=2)
    assert error.sel(size=0.1, budget="steps", rule="chosen").notnull().all()
    assert error.sel(budget="steps", rule="tau-high").notnull().sum() > 1


@pytest.mark.timeout(240)
def test_a_killed_worker_and_a_killed_command_leave_the_same_bytes(tmp_path):
    options = ("--preset", "digits", "--hidden", "16", "--epochs", "6", "--batch-size", "10")
    sources = {"digits": load_source("digits")}
    plan = make_plan(
        parse([*options, "--strategies", "shuffle", "--reference-seeds", "1"]), sources
    )
    out = tmp_path / "study"
    oracles.run_trials(oracles.start_study(out, plan, sources), plan, sources)
    shutil.copytree(out, tmp_path / "here")
    request = SubsetRequest(**REQUEST, runs=("shuffle:1",))
    run_here(prepare_subsets(Folder.of(tmp_path / "here"), request))

    def steps():
        return len(list(out.glob("influence/*-subset-*/checkpoints/*/MANIFEST.json")))

    def workers():
        # Named after the class in whose method it is: Tune wraps `Trial` for its first unit.
        names = ("ray::Trial", "ray::ResourceTrainable")
        return [pid for pid in driver.family.alive() if command_of(pid).startswith(names)]

    arguments = [*ARGUMENTS, "--max-concurrent", "1"]
    driver = Driver(out, arguments, door=SUBSET)
    try:
        driver.wait_until(lambda: steps() >= 1)
        kill(workers()[0])
        before = steps()
        driver.wait_until(lambda: steps() >= before + 3)
        assert workers()
    finally:
        driver.close(0)  # the whole command dies, with its Ray
    expected = digests(tmp_path / "here")
    assert len(digests(out)) < len(expected)
    driver = Driver(out, arguments, door=SUBSET)
    try:
        code, text = driver.communicate()
    finally:
        driver.close()
    assert code == 0, text
    assert digests(out) == expected
    assert "torch.utils.data.Subset" in text
