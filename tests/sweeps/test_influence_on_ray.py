"""Influence through Ray Tune: the bytes of a computation without it, waiting, and deaths."""

import shutil
import threading
from io import StringIO

import oracles
import pytest
from processes import INFLUENCE, Driver, command_of, kill
from rich.console import Console

import sampimp
from sampimp.data import load_source
from sampimp.errors import ConfigError
from sampimp.store.location import Folder
from sampimp.store.plan import read_commits
from sampimp.store.plan_files import require_plan
from sampimp.sweeps import cluster as cluster_module
from sampimp.sweeps import derived_command, influence, searcher
from sampimp.sweeps.influence_study import compute_influence
from sampimp.sweeps.options import parse
from sampimp.sweeps.study import make_plan

TARGETS = ("mean", "class", "probe:4")


@pytest.fixture
def study(finished, tmp_path):
    """A copy of the finished study."""
    shutil.copytree(finished.out, tmp_path / "study")
    return tmp_path / "study"


@pytest.fixture
def command(cluster, monkeypatch):
    """Run the command on the tests' cluster; return its exit code and output."""
    monkeypatch.setattr(cluster_module, "connect", lambda address: cluster)

    def run(*arguments):
        console = Console(file=StringIO(), width=200)
        monkeypatch.setattr(derived_command, "Console", lambda **options: console)
        code = influence.main([*map(str, arguments), "--max-concurrent", "1"])
        return code, console.file.getvalue()

    return run


def digests(out):
    commits = read_commits(Folder.of(out), "influence")
    return {name: commit["digests"] for name, commit in commits.items()}


def test_units_have_the_bytes_of_a_computation_without_ray(study, command, tmp_path):
    shutil.copytree(study, tmp_path / "here")
    compute_influence(tmp_path / "here", TARGETS)
    code, text = command(study, "--targets", *TARGETS)
    assert code == 0, text
    assert digests(study) == digests(tmp_path / "here")
    lines = text.splitlines()
    assert "2 units: 2 done; 6 of 6 epochs" in lines[-3]
    figures = f"Figures: sampimp report {study}"
    assert lines[-2:] == ["2 of 2 units are committed.", figures]
    assert command(study, "--targets", *TARGETS) == (
        0,
        f"All that was asked for is committed already.\n{figures}\n",
    )


def test_a_run_that_is_still_training_is_waited_for(study, command, monkeypatch):
    monkeypatch.setattr(searcher, "POLL_EVERY", 0.2)
    folder = Folder.of(study)
    plan = require_plan(folder)
    runs = {trial.label: trial for trial in plan.resolve(read_commits(folder))}
    place = folder / "trials" / str(runs["digits-rand-seed2"].trial_id)
    commit = place.read_json("COMMIT.json")
    place.delete("COMMIT.json")
    later = threading.Timer(2, lambda: place.write_json("COMMIT.json", commit))
    later.start()
    try:
        code, text = command(study, "--runs", "shuffle:1", "rand:2")
    finally:
        later.join()
    assert code == 0, text
    assert "Waiting for digits-rand-seed2: " in text
    assert "epoch 3 of 3" in text
    cube = sampimp.open_cube(study)["digits"]
    for strategy, seed in (("shuffle", 1), ("rand", 2)):
        run = cube["influence_total"].sel(strategy=strategy, seed=seed, target="mean")
        assert run.notnull().all()
    assert cube["influence_total"].sel(strategy="rand", seed=1).isnull().all()


def test_a_study_ends_with_the_influence_that_it_names(run_study, study, finished):
    commits = {p: p.read_bytes() for p in study.glob("trials/*/COMMIT.json")}
    options = [name for name in finished.arguments if name != "--influence"]
    with pytest.raises(ConfigError, match="from 0 to 9"):
        run_study(study, *options, "--influence", "class:12")
    code, text = run_study(study, *options, "--influence", "mean", "probe:2")
    assert code == 0, text
    assert text.splitlines()[-2:] == [
        "2 of 2 units are committed.",
        "5 of 5 trials are committed.",
    ]
    cube = sampimp.open_cube(study)["digits"]
    assert cube["influence_total"].sel(strategy="shuffle", seed=1).notnull().all()
    assert cube["influence_total"].sel(strategy="nlo").isnull().all()
    assert cube["final_importance_total"].attrs["probes"] == 2
    assert commits == {p: p.read_bytes() for p in study.glob("trials/*/COMMIT.json")}
    _, text = run_study(study, *options, "--influence", "mean", "probe:2")
    assert "units" not in text


def test_a_study_ends_with_the_subsets_that_it_names(run_study, study, finished):
    options = [name for name in finished.arguments if name != "--subsets"]
    code, text = run_study(study, *options, "--subsets", "0.2")
    assert code == 0, text
    cube = sampimp.open_cube(study)["digits"].sel(strategy="shuffle", seed=1)
    errors = cube.subset_error.sel(size=0.2, budget="steps")
    for rule in ("random", "balanced", "tau-high", "chosen"):
        assert errors.sel(rule=rule).notnull().all(), rule
    _, text = run_study(study, *options, "--subsets", "0.2")
    assert "units" not in text


def test_influence_that_cannot_be_computed_is_left_out_of_a_study(run_study, tmp_path, tiny):
    options = [name for name in tiny if name != "--influence"]
    arguments = ["--strategies", "shuffle", "--parameters-every", "0", "--influence", "mean"]
    code, text = run_study(tmp_path / "study", *options, *arguments)
    assert code == 0, text
    assert "Influence is left out: expected stored parameters" in text
    assert text.splitlines()[-1] == "1 of 1 trials are committed."


LONG = (
    *("--preset", "digits", "--hidden", "16", "--epochs", "12", "--batch-size", "5"),
    *("--strategies", "shuffle", "--reference-seeds", "1"),
    *("--optimizer", "momentum", "--learning-rate", "0.01"),
)


@pytest.mark.timeout(240)
def test_a_killed_worker_and_a_killed_command_leave_the_same_bytes(tmp_path):
    sources = {"digits": load_source("digits")}
    plan, out = make_plan(parse([*LONG]), sources), tmp_path / "study"
    oracles.run_trials(oracles.start_study(out, plan, sources), plan, sources)
    shutil.copytree(out, tmp_path / "here")
    compute_influence(tmp_path / "here", TARGETS)

    def steps(kind):
        found = out.glob(f"influence/*-{kind}-*/checkpoints/*/MANIFEST.json")
        return max([0, *(int(path.parent.name.split("-")[1]) for path in found)])

    def workers():
        # Named after the class in whose method it is: Tune wraps `Trial` for its first unit.
        names = ("ray::Trial", "ray::ResourceTrainable")
        return [pid for pid in driver.family.alive() if command_of(pid).startswith(names)]

    arguments = ["--targets", *TARGETS, "--max-concurrent", "1"]
    driver = Driver(out, arguments, door=INFLUENCE)
    try:
        driver.wait_until(lambda: steps("states") >= 2)
        kill(workers()[0])
        driver.wait_until(lambda: steps("influence") >= 2)
        assert workers()
    finally:
        driver.close(0)  # the whole command dies, with its Ray
    assert not [name for name in digests(out) if "-influence-" in name]
    driver = Driver(out, arguments, door=INFLUENCE)
    try:
        code, text = driver.communicate()
    finally:
        driver.close()
    assert code == 0, text
    assert digests(out) == digests(tmp_path / "here")
    (states,) = out.glob("influence/*-states-*/attempts")
    assert len(list(states.iterdir())) == 2
