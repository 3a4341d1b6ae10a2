"""The whole command, from an empty folder to the report, with failures and divergence."""

import json
import os
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from rich.console import Console
from torch.nn import functional

import sampimp
from sampimp.analysis import explorer
from sampimp.data import load_source
from sampimp.errors import MissingPackageError, StoreError
from sampimp.store.location import Folder
from sampimp.store.plan import PlannedTrial
from sampimp.store.plan_files import read_plan
from sampimp.sweeps import full_study, searcher
from sampimp.sweeps.options import parse
from sampimp.sweeps.run import conclude
from sampimp.sweeps.study import make_plan
from sampimp.training.models import build_model, flatten_parameters, load_parameters

NOISE = ("warning", "traceback", "ray::", "(pid=", "raylet", "tune", "deprecat", "trial name")
"""Words that belong into a log and not onto a terminal."""


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return the modification time and bytes of each file of a study, without its analysis."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "analysis" not in path.relative_to(folder).parts
    }


def assert_quiet(text: str) -> None:
    assert not [word for word in NOISE if word in text.lower()], text


def test_one_command_trains_everything_and_reports(finished):
    assert finished.code == 0, finished.text
    assert_quiet(finished.text)
    lines = finished.text.splitlines()
    assert lines[0] == f"5 trials of 3 epochs on digits, into {finished.out}."
    assert lines[1].startswith("Ray cluster at 127.0.0.1:")
    assert lines[1].endswith(": 1 node, 2 CPUs, 0 GPUs.")
    assert "5 of 5 trials are committed." in lines
    report = finished.out / "analysis" / "report.html"
    assert lines[-1] == f"Report: {report}"
    assert report.stat().st_size > 100_000
    page = finished.out / "analysis" / "explore" / "index.html"
    assert f"Samples: {page}" in lines
    assert page.is_file()
    assert '<a href="explore/index.html#node=digits">' in report.read_text()
    for words in ("strategy", "NLO", "Rand", "test error (mean ± s.e.)", "verdict"):
        assert words in finished.text
    # The tables are readable in 80 columns; a path, and a line of a log, are not cut.
    table = lines[lines.index("digits") : -1]
    assert max(map(len, table)) <= 80


def test_everything_planned_is_in_the_cube(finished):
    tree = sampimp.open_cube(finished.out)
    assert list(tree.children) == ["digits"]
    cube = tree["digits"].to_dataset()
    assert cube.strategy.values.tolist() == ["shuffle", "rand", "nlo"]
    assert cube.seed.values.tolist() == [1, 2]
    planned = np.array([[True, False], [True, True], [True, True]])
    np.testing.assert_array_equal(cube.trial.values != "", planned)
    for name in ("importance", "nll", "batch", "train_error", "test_nll", "parameters"):
        measured = ~np.isnan(cube[name]).any(cube[name].dims[2:])
        np.testing.assert_array_equal(measured.values, planned, name)
    assert np.isnan(cube.diverged_epoch).all()
    # Each batch of 25 has 25 samples, in every epoch.
    batches = cube.batch.sel(strategy="nlo", seed=2).values.astype(int)
    assert all((np.bincount(epoch) == 25).all() for epoch in batches)
    # These networks reach 4.5 % after 50 epochs; after 3, the error is well below chance (90 %).
    assert float(cube.test_error.sel(strategy="rand", epoch=3).max()) < 0.5


def test_the_same_command_again_does_nothing(finished, run_untrained):
    before = files(finished.out)
    code, text = run_untrained(finished.out, *finished.arguments)
    assert code == 0
    assert text.splitlines()[-1] == "5 of 5 trials are committed."
    assert files(finished.out) == before


def test_more_seeds_and_strategies_are_added(tiny, finished, run_study, tmp_path):
    out = tmp_path / "study"
    shutil.copytree(finished.out, out)
    before = files(out)
    code, text = run_study(out, *tiny, "--strategies", "rand", "sim", "--seeds", "3")
    assert code == 0
    assert text.splitlines()[-1] == "7 of 7 trials are committed."
    plan = read_plan(Folder.of(out))
    assert plan.grid == {"shuffle": (1,), "rand": (1, 2, 3), "nlo": (1, 2), "sim": (3,)}
    after = files(out)
    assert {name for name in before if before[name] != after[name]} == {"study.json"}
    assert {name for name in after if name.startswith("plans/")} == {
        *("plans/0001.json", "plans/0002.json")
    }
    cube = sampimp.open_cube(out)["digits"]
    assert not np.isnan(cube.nll.sel(strategy="sim", seed=3)).any()
    # All seeds of rand share one draw of the batches; the initialisation alone differs.
    batch = cube.batch.sel(strategy="rand").values
    np.testing.assert_array_equal(batch[2], batch[0])
    assert not np.array_equal(*cube.parameters.sel(strategy="rand", state=0).values[[0, 2]])


def test_another_network_and_optimizer_are_a_study_too(run_study, tiny, tmp_path):
    """A plain loop from the first stored state ends at the last stored state."""
    out = tmp_path / "study"
    more = ("--model", "lstm", "--optimizer", "adamw", "--learning-rate", "0.001")
    code, text = run_study(out, *tiny, *more, "--strategies", "nlo", "--seeds", "1")
    assert code == 0, text
    cube = sampimp.open_cube(out)["digits/lstm"].load()
    assert cube.strategy.values.tolist() == ["shuffle", "nlo"]
    assert cube.layer.values.tolist() == ["recurrent", "Out"]
    run = cube.sel(strategy="nlo", seed=1)
    assert (run.importance > 0).all()

    model = build_model("lstm", (1, 8, 8), (), 10, seed=0)
    load_parameters(model, torch.from_numpy(run.parameters.values[0]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001, weight_decay=1e-5)
    source = load_source("digits")
    inputs = torch.from_numpy(source.train_values).float() / 16
    labels = torch.from_numpy(source.train_labels).long()
    for batches in run.batch.values:
        for number in range(60):
            rows = torch.from_numpy(batches == number)
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(inputs[rows]).double(), labels[rows])
            loss.backward()
            optimizer.step()
    last = flatten_parameters(model).detach().numpy()
    np.testing.assert_allclose(last, run.parameters.values[-1], atol=1e-4)
    moved = np.abs(run.parameters.values[-1] - run.parameters.values[0])
    assert np.median(moved) > 1e-2  # a hundred times the tolerance


def test_a_dry_run_prints_the_plan_and_writes_nothing(tiny, tmp_path, run_untrained):
    out = tmp_path / "not" / "there"
    options = "--strategies nlo --seeds 1 2 --activation softplus --dry-run"
    code, text = run_untrained(out, *tiny, *options.split())
    assert code == 0
    assert list(tmp_path.iterdir()) == []
    # 16 (64 + 1) + 10 (16 + 1) = 1,210 parameters.
    assert (
        "digits: 1,500 + 297 samples, 10 classes, network of 1,210 parameters, softplus\n" in text
    )
    assert "shuffle          seeds 1\n" in text
    assert "nlo              seeds 1, 2\n" in text
    assert "3 in all, 3 of them missing" in text
    assert "2 trials at a time" in text
    assert "Epoch     digits: about" in text
    assert "Storage   at most 0.3 MB" in text


@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
def test_a_dry_run_imports_no_ray_and_asks_no_cluster(tiny, tmp_path, address):
    out = tmp_path / "study"
    code = (
        "import sys; from sampimp.sweeps import full_study; "
        "code = full_study.main(sys.argv[1:]); print('ray' in sys.modules); sys.exit(code)"
    )
    more = ("--address", address) if address else ("--address", "local")
    result = subprocess.run(
        [sys.executable, "-c", code, *tiny, *more, "--dry-run", "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].startswith("This machine: 1 node, ")
    asked = f"The Ray cluster at {address} was not asked: the time is that of this machine."
    assert (lines[1] == asked) is (address is not None)
    assert lines[-1] == "False"
    assert not out.exists()


def test_the_first_line_and_a_mistake_in_the_data_need_neither_torch_nor_ray(tmp_path):
    code = (
        "import sys; from sampimp.sweeps import full_study; from rich.console import Console\n"
        "printed = Console.print\n"
        "def spy(*words, **how):\n"
        "    printed(*words, **how)\n"
        "    printed(words[0], [name for name in ('torch', 'ray') if name in sys.modules])\n"
        "Console.print = spy\n"
        "sys.exit(full_study.main(sys.argv[1:]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "--datasets", "npz:none.npz", "--out", "mine"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={name: text for name, text in os.environ.items() if name != "RAY_ADDRESS"},
    )
    assert result.returncode == 2
    lines = result.stdout.splitlines()
    assert lines[:2] == ["41 trials of 50 epochs on npz:none.npz, into mine.", "[]"]
    assert "no such file" in result.stderr
    assert "['torch']" in result.stderr  # the data were read without Ray
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_an_existing_study_changes_nothing(tiny, finished, run_untrained):
    before = files(finished.out)
    code, text = run_untrained(finished.out, *tiny, "--strategies", "sim", "--dry-run")
    assert code == 0
    assert "10 in all, 5 of them missing" in text  # sim with its five seeds
    assert files(finished.out) == before


def test_ctrl_c_is_reported(monkeypatch, tmp_path, capsys):
    """`make chaos` shows that the same command then ends with the same numbers."""

    def interrupt(config, console):
        raise KeyboardInterrupt

    monkeypatch.setattr(full_study, "run_or_describe", interrupt)
    assert full_study.main(["--preset", "digits", "--out", str(tmp_path)]) == 130
    text = "".join(capsys.readouterr())
    assert text == "Interrupted. Committed trials are kept; the same command continues.\n"


def test_without_the_packages_of_the_report_the_study_keeps_its_exit_code(
    monkeypatch, tmp_path, capsys
):
    def miss(out, console):
        raise MissingPackageError("the Python package jinja2", "none", "here", "install it")

    monkeypatch.setattr(full_study, "run_or_describe", lambda config, console: 1)
    monkeypatch.setattr(full_study, "write_study_report", miss)
    assert full_study.main(["--preset", "digits", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "report is not written" in error
    assert "Expected the Python package jinja2" in error


@pytest.mark.parametrize("error", [StoreError("room", "a full disk", "x", "y"), KeyError("z")])
def test_without_its_page_of_samples_the_study_keeps_its_exit_code(
    monkeypatch, tmp_path, capsys, error
):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(full_study, "run_or_describe", lambda config, console: 0)
    monkeypatch.setattr(full_study, "write_study_report", lambda out, console: None)
    monkeypatch.setattr(explorer, "write_explorer", fail)
    assert full_study.main(["--preset", "digits", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().err
    assert "page of samples is not written" in printed
    assert ("a full disk" if isinstance(error, StoreError) else "KeyError('z')") in printed


def test_a_failed_trial_blocks_only_the_trials_that_wait_for_it(
    tiny, run_study, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(searcher, "RETRIES", 1)  # each takes a new process, so seconds
    arguments = (*tiny, "--strategies", "nlo", "rand", "--seeds", "1")
    out = tmp_path / "study"
    plan = make_plan(parse(list(arguments)), {"digits": load_source("digits")})
    (reference,) = (trial for trial in plan.resolve({}) if plan.is_reference(trial.config))
    in_the_way = out / "trials" / reference.trial_id / "checkpoints"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("a file where a folder must be")
    Folder.of(out).write_json("study.json", plan.to_json())

    code, text = run_study(out, *arguments)
    assert code == 1
    lines = text.splitlines()
    reasons = [line for line in lines if line.startswith("digits-shuffle-seed1 ")]
    assert [line.partition(":")[0] for line in reasons] == [
        "digits-shuffle-seed1 is tried again",
        "digits-shuffle-seed1 failed",
    ]
    assert all("checkpoints" in line or "expected" in line for line in reasons), reasons
    words = in_the_way.parent / "errors" / "0002.json"
    assert "Traceback" in json.loads(words.read_text())["traceback"]
    assert "1 of 3 trials are committed." in lines
    assert "1 are missing: digits-shuffle-seed1." in lines
    assert "`sampimp status OUT` says why; the same command again retries them." in lines
    assert "1 are blocked: digits-nlo-seed1." in lines
    assert_quiet(text)
    assert_quiet("".join(capfd.readouterr()))
    cube = sampimp.open_cube(out)["digits"]
    assert not np.isnan(cube.importance.sel(strategy="rand", seed=1)).any()
    assert np.isnan(cube.importance.sel(strategy=["shuffle", "nlo"], seed=1)).all()

    in_the_way.unlink()
    code, text = run_study(out, *arguments)
    assert (code, text.splitlines()[-1]) == (0, "3 of 3 trials are committed.")


def test_divergence_is_recorded_and_blocks_the_trials_that_wait(tiny, run_study, tmp_path):
    out = tmp_path / "study"
    arguments = (*tiny, "--learning-rate", "1e20", "--strategies", "nlo", "rand", "--seeds", "1")
    code, text = run_study(out, *arguments)
    assert code == 1
    assert "2 of 3 trials are committed." in text
    assert "2 diverged: digits-shuffle-seed1 (epoch 1), digits-rand-seed1 (epoch 1)." in text
    assert "1 are blocked: digits-nlo-seed1." in text
    assert "They sort by shuffle, seed 1, which did not finish, or diverged" in text
    assert "retries" not in text
    cube = sampimp.open_cube(out)["digits"]
    assert cube.diverged_epoch.sel(strategy=["shuffle", "rand"], seed=1).values.tolist() == [1, 1]
    # Epochs after the divergence are not measured.
    assert np.isnan(cube.train_nll.sel(strategy="rand", seed=1, epoch=[2, 3])).all()
    before = files(out)
    assert run_study(out, *arguments)[0] == 1
    assert files(out) == before


def test_exit_code_is_0_only_when_nothing_is_missing(tiny):
    trials = make_plan(
        parse([*tiny, "--strategies", "rand", "--seeds", "1", "2"]),
        {"digits": load_source("digits")},
    ).trials()

    def code(*commits: dict | None) -> int:
        planned = [
            PlannedTrial(trial, "an id", "a fingerprint", None, commit)
            for trial, commit in zip(trials, commits, strict=True)
        ]
        return conclude(planned, Console(file=StringIO()))

    done, diverged = {"diverged_epoch": None}, {"diverged_epoch": 2}
    assert code(done, done) == 0
    assert code(done, diverged) == 0
    assert code(diverged, diverged) == 0
    assert code(diverged, None) == 1


def test_the_tests_start_their_cluster(cluster):
    assert ray.get_runtime_context().gcs_address.startswith("127.0.0.1:")


@pytest.mark.parametrize("arguments", [["--help"], ["-h"]])
def test_help_names_every_option(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(arguments)
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for option in (
        *("datasets", "strategies", "seeds", "epochs", "batch-size", "learning-rate", "hidden"),
        *("out", "data-dir", "address", "cpus-per-trial", "gpus-per-trial", "max-concurrent"),
        *("dry-run", "snapshot-every", "parameters-every", "preset"),
    ):
        assert f"--{option} " in text
    assert "--threads" not in text  # a trial's threads are its CPUs
