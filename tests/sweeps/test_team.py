"""Trials of two workers: equal to one worker up to rounding, and restarted after a death."""

import json
import os
import signal
import threading
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
from processes import command_of, descendants
from rich.console import Console

import sampimp
from sampimp.data import load_source
from sampimp.errors import ConfigError, RecordError, ResourceError
from sampimp.store.location import Folder
from sampimp.store.plan import read_commits
from sampimp.sweeps import run
from sampimp.sweeps.machines import Cluster, Machines
from sampimp.sweeps.options import parse
from sampimp.sweeps.preflight import check_cluster
from sampimp.sweeps.study import concurrent_trials, make_plan
from sampimp.sweeps.team import RunMaker, Team

TWO = ("--workers-per-trial", "2", "--strategies", "nlo", "--seeds", "1")
"""The reference run, and a trial that sorts by it and reuses the processes."""


def helpers() -> list[int]:
    """Return the processes of the helpers of trials in the Ray cluster of this process."""
    return [pid for pid, _ in descendants(os.getpid()) if command_of(pid).startswith("ray::Helper")]


@pytest.fixture(scope="module")
def together(cluster, tiny, tmp_path_factory):
    """The store of a study of two workers a trial, undisturbed."""
    out = tmp_path_factory.mktemp("workers") / "study"
    console = Console(file=StringIO(), width=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "join_cluster", lambda address: cluster)
        code = run.run_study(parse([*tiny, *TWO, "--out", str(out)]), console)
    assert code == 0, console.file.getvalue()
    return out


def test_two_workers_record_the_values_of_one_worker(together, finished):
    cube, expected = (sampimp.open_cube(out)["digits"] for out in (together, finished.out))
    trial = {"strategy": "shuffle", "seed": 1}
    cube, expected = cube.sel(trial).compute(), expected.sel(trial).compute()
    np.testing.assert_array_equal(cube.batch, expected.batch)
    np.testing.assert_array_equal(cube.parameters[0], expected.parameters[0])
    assert not np.array_equal(cube.parameters[-1], expected.parameters[-1])  # there were two
    # Every sample of every epoch, whoever computed it; test_collective.py has the same
    # in float64. In float32 rounding grows with each step: the largest difference was 3e-6.
    for name in ("importance", "nll"):
        np.testing.assert_allclose(cube[name], expected[name], rtol=1e-3, err_msg=name)
    for name in ("train_nll", "test_nll"):
        np.testing.assert_allclose(cube[name], expected[name], rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(cube.parameters, expected.parameters, atol=1e-5)


def test_a_strategy_that_sorts_is_complete_too(together):
    commits = read_commits(Folder.of(together))
    assert {commit["strategy"] for commit in commits.values()} == {"shuffle", "nlo"}
    cube = sampimp.open_cube(together)["digits"].sel(seed=1).compute()
    for name in ("importance", "nll", "batch", "train_error", "test_nll", "parameters"):
        assert not np.isnan(cube[name]).any(), name


def test_a_trial_whose_workers_die_ends_with_the_same_numbers(together, tiny, run_study, tmp_path):
    out = tmp_path / "study"
    died = []

    def wait_for(pattern: str) -> Path:
        while not (paths := list(out.glob(pattern))):
            time.sleep(0.002)
        return paths[0]

    def kill_both() -> None:
        wait_for("trials/*/checkpoints/*/MANIFEST.json")
        died.extend(helpers())
        os.kill(died[0], signal.SIGKILL)
        # The trial itself, by the process of its second attempt; it owns the helper.
        died.append(json.loads(wait_for("trials/*/attempts/0002.json").read_text())["pid"])
        os.kill(died[1], signal.SIGKILL)

    killer = threading.Thread(target=kill_both, daemon=True)
    killer.start()
    code, text = run_study(out, *tiny, *TWO)
    assert code == 0, text
    killer.join()
    again = [line.partition(" is tried again: ")[2] for line in text.splitlines()]
    assert [reason for reason in again if reason] == [
        "expected all workers of the trial to run, got a worker whose process or machine died",
        "its process or its machine died",
    ]
    # Counted as deaths, of which many are allowed, and not as failures of the trial.
    assert not list(out.glob("trials/*/errors/*")), text
    cube, wanted = (sampimp.open_cube(folder)["digits"].to_dataset() for folder in (out, together))
    for name in wanted.variables:
        np.testing.assert_array_equal(cube[name].values, wanted[name].values, name)
    deadline = time.monotonic() + 30
    while helpers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not helpers()  # none outlives its trial


def test_workers_with_different_parameters_are_an_error(cluster, tmp_path):
    config = parse(["--preset", "digits", "--hidden", "4", "--epochs", "1"])
    source = load_source("digits")
    plan = make_plan(config, {"digits": source})
    team = Team(str(tmp_path), plan, {"digits": ray.put(source)})
    run = team.start({"position": 0, "reference_id": None}, None)
    another = SimpleNamespace(remote=lambda: ray.put("another digest"))
    team._helpers = [SimpleNamespace(advance=another)]
    with pytest.raises(RecordError, match="the same parameters on every worker"):
        next(team.records(run))


def test_a_worker_with_another_network_does_not_train(cluster, tmp_path, monkeypatch):
    (tmp_path / "own_nets.py").write_text(
        "from torch import nn\n\n\ndef make(shape, classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    source = load_source("digits")
    options = ("--strategies", "rand", "--seeds", "1", "--epochs", "2")
    config = parse(["--preset", "digits", "--model", "own_nets:make", *options])
    plan = make_plan(config, {"digits": source})
    reference = ray.put(source)

    def make(plan):
        maker = RunMaker(str(tmp_path / "study"), plan, {"digits": reference})
        return maker.make({"position": 0, "reference_id": None}, None)

    assert make(plan).model[1].out_features == 10
    info = plan.datasets["digits"]
    older = replace(info, network=replace(info.network, source="0" * 64))
    with pytest.raises(ConfigError, match="another network; different: source") as caught:
        make(replace(plan, datasets={"digits": older}))
    assert "on every machine" in str(caught.value)


def test_the_number_of_workers_is_part_of_a_trials_identity():
    source = load_source("digits")
    one, two = (
        make_plan(parse(["--preset", "digits", "--workers-per-trial", k]), {"digits": source})
        for k in ("1", "2")
    )
    assert (one.training.workers, two.training.workers) == (1, 2)
    ids = [{trial.trial_id for trial in plan.resolve({}) if trial.trial_id} for plan in (one, two)]
    assert not ids[0] & ids[1]
    assert json.loads(json.dumps(two.to_json()))["training"]["workers"] == 2
    with pytest.raises(ConfigError, match=r"workers 1 \(requested: 2\)"):
        one.joined(two, "here")


def made(count, cpus, gpus):
    return Cluster("made", (Machines(count, cpus=cpus, gpus=gpus),), started_here=True)


@pytest.mark.parametrize(
    ("arguments", "cpus", "gpus", "slots"),
    [
        (("--workers-per-trial", "4"), 9, 0, 4),  # 18 workers on two machines
        (("--workers-per-trial", "2", "--cpus-per-trial", "3"), 13, 0, 4),  # 8 workers of 3 CPUs
        (("--workers-per-trial", "2", "--gpus-per-trial", "1"), 64, 7, 7),
        (("--gpus-per-trial", "0.25"), 64, 2, 16),
    ],
)
def test_trials_at_a_time_count_all_workers(arguments, cpus, gpus, slots):
    config, machines = parse([*arguments]), made(2, cpus, gpus)
    check_cluster(config, machines)
    assert concurrent_trials(config, machines) == slots


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--workers-per-trial", "3"), "1 CPUs for each of 3 workers\n +Got room for 2"),
        (
            ("--workers-per-trial", "2", "--gpus-per-trial", "1"),
            "1 CPUs and 1 GPU for each of 2 workers\n +Got room for 1",
        ),
    ],
)
def test_a_cluster_too_small_for_all_workers_is_refused(arguments, expected):
    with pytest.raises(ResourceError, match=expected):
        check_cluster(parse([*arguments]), made(1, 2, 1))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--workers-per-trial", "0"),
        ("--workers-per-trial", "2", "--gpus-per-trial", "0.5"),
        ("--workers-per-trial", "2", "--gpus-per-trial", "1.5"),
    ],
)
def test_workers_share_no_gpu(arguments):
    with pytest.raises(ConfigError, match="whole GPUs for each of several"):
        parse([*arguments])
