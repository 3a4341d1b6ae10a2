"""The script for GPUs on a CPU: with PyTorch and its wheels alone, and when parts fail."""

import importlib
import importlib.metadata
import os
import subprocess
import sys
import venv
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
TABLES = {"exactness.md", "cost.md", "graph.md", "paper.md"}


@pytest.fixture
def load(monkeypatch):
    """Import modules of benchmarks/, and forget them and what they import afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)
    for name in set(sys.modules) - before:
        if str(ROOT / "benchmarks") in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]
    for name in ("networks", "oracles"):
        sys.modules.pop(name, None)


@pytest.fixture
def bare(tmp_path, load):
    """Return a Python with PyTorch, what PyTorch needs, and the packages of `make gpu-wheels`."""
    wheels = load("gpu_wheels")
    venv.create(tmp_path / "bare", symlinks=True, with_pip=False)
    (site,) = (tmp_path / "bare" / "lib").glob("python*/site-packages")
    for name in wheels.with_requirements(("torch", *wheels.PACKAGES)):
        distribution = importlib.metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files if not file.name.endswith(".pth")}
        for top in tops - {"..", "__pycache__"}:
            if not (site / top).exists():  # some distributions share a namespace package
                (site / top).symlink_to(distribution.locate_file(top))
    return tmp_path / "bare" / "bin" / "python"


def test_it_runs_without_ray_and_without_a_package_index(bare, tmp_path):
    out = tmp_path / "out"
    variables = {"OUT": str(out), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    missing = ("ray", "pip", "zarr", "xarray", "sklearn", "pytest")
    for name in missing:
        found = subprocess.run([bare, "-c", f"import {name}"], env=variables, capture_output=True)
        assert b"ModuleNotFoundError" in found.stderr, name
    command = [bare, BENCHMARKS / "gpu.py", "--device", "cpu", "--quick"]
    done = subprocess.run(
        command,
        env={"PATH": os.environ["PATH"], **variables},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {file.name for file in out.iterdir()} == {*TABLES, "log.txt"}
    assert (out / "log.txt").read_text() == done.stdout
    summary = done.stdout.rpartition("\nAfter ")[2]
    for name in ("exactness", "cost", "graph", "paper"):
        assert f"  {name}: done in " in summary
    assert "  exactness: holds" in summary
    assert "FAILED" not in done.stdout
    assert "Spearman correlation of tau 1.0000" in summary  # the same device
    for table in TABLES - {"paper.md"}:
        assert "needs CUDA" in (out / table).read_text()


def test_a_wrong_importance_is_named_and_counts(load, tmp_path, monkeypatch, capsys):
    exactness = load("gpu_exactness")
    rule = importlib.import_module("sampimp.importance.optimizers").SGDRule
    right = rule.after
    monkeypatch.setattr(rule, "after", lambda self, step: (1 + 1e-6) * right(self, step))
    monkeypatch.setattr(exactness, "FORMS", {})
    assert not exactness.run("cpu", True, tmp_path)
    rows = (tmp_path / "exactness.md").read_text().splitlines()
    of_sgd, of_adamw = (
        next(row for row in rows if row.startswith(f"| float64, all layers, {name} |"))
        for name in ("sgd", "adamw")
    )
    assert "FAILED, first linear: error 2.0e-06" in of_sgd  # of a square
    assert of_adamw.endswith("| holds |")
    assert "DOES NOT HOLD" in capsys.readouterr().out


def test_a_refused_layer_is_a_failure_unless_every_gpu_refuses_it(load, tmp_path):
    exactness = load("gpu_exactness")

    def refuse():
        raise exactness.UnsupportedError("a", "b", "c", "d")

    report = exactness.Report(tmp_path / "table.md", "", ("",) * 5, "cpu")
    checks = exactness.Checks(report, "what", 1e-9)
    checks.check("gru, with dropout between layers", refuse)
    checks.check("linear", lambda: 1e-10)
    assert checks.close()
    checks.check("linear", refuse)
    assert not checks.close()
    checks = exactness.Checks(report, "what", 1e-9)
    checks.check("linear", lambda: float("nan"))
    assert not checks.close()


def test_a_part_that_stops_does_not_affect_the_others(load, tmp_path, monkeypatch, capsys):
    gpu = load("gpu")
    log = gpu.Log(tmp_path / "log.txt")
    # A worker of the part holds its output open, as a compiler's may.
    sleeps = "import subprocess, sys, time; print('first row', flush=True); "
    sleeps += "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    crashes = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    for name, code, limit in (
        ("slow", f"{sleeps}; time.sleep(60)", 1.0),
        ("crash", crashes, 30.0),
        ("leaves a worker", sleeps, 30.0),
    ):
        ended_well = gpu.run_part(name, [sys.executable, "-c", code], limit, log)
        assert ended_well == (name == "leaves a worker")
    assert log.summary[0].startswith("slow: stopped after its limit of 1 s")
    assert log.summary[1].startswith("crash: FAILED with status -11")
    assert log.summary[2].startswith("leaves a worker: done in")
    assert capsys.readouterr().out == (tmp_path / "log.txt").read_text()


def test_a_part_that_raises_is_in_the_summary(load, tmp_path, monkeypatch, capsys):
    gpu, paper = load("gpu"), load("gpu_paper")
    monkeypatch.setattr(paper, "load_source", lambda name: 1 / 0)
    assert gpu.run_here("paper", "cpu", False, tmp_path) == 1
    assert "Summary: paper: ZeroDivisionError: division by zero" in capsys.readouterr().out


def test_captured_steps_start_from_the_same_parameters_and_keep_every_batch(load, monkeypatch):
    """A replacement for CUDA's graph runs the step again."""
    graph = load("gpu_graph")
    for name in ("graph", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, lambda: type("", (), {"wait_stream": print})())

    class Captured(graph.Captured):
        def __init__(self, trainer):
            super().__init__(trainer)
            self._graph.replay = lambda: self._beta_LN.copy_(
                trainer.step_on(self._inputs, self._labels)
            )

    monkeypatch.setattr(graph, "Captured", Captured)
    data = graph.make_data("cpu", 5)
    assert graph.compare("SGD", data) == "parameters equal, importance equal"
    monkeypatch.setattr(graph, "COMPARED", 3)
    monkeypatch.setattr(Captured, "step", lambda self: None)
    assert "parameters apart by" in graph.compare("SGD", data)


def test_the_wheels_are_pinned(load):
    wheels = load("gpu_wheels")
    names = wheels.with_requirements(wheels.PACKAGES)
    assert {"numpy", "pygments", "typeguard"} <= set(names)
    assert not {"torch", "ray", "zarr"} & set(names)
    assert all("==" in pin for pin in wheels.pins(names))


def test_spearman_of_equal_and_reversed_orders_is_plus_and_minus_one(load):
    spearman, left = load("gpu_paper").spearman, np.array([1.0, 5.0, 2.0])
    assert spearman(left, left**3) == pytest.approx(1)
    assert spearman(left, 1 / left) == pytest.approx(-1)


def test_the_reference_is_a_run_of_the_paper(load):
    paper = load("gpu_paper")
    assert paper.REFERENCE.stat().st_size < 250_000
    with np.load(paper.REFERENCE) as stored:
        assert stored["test_error"].shape == stored["train_error"].shape == (50,)
        assert stored["tau"].shape == (50_000,)
        assert np.isfinite(stored["tau"]).all()
        assert stored["test_error"][-1] < 0.02
        assert len(str(stored["data"])) == 64
