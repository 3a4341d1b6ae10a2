"""The benchmarks run and report. No test asserts a speed."""

import importlib
import importlib.metadata
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def step():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("step")
    sys.path.remove(str(BENCHMARKS))
    del sys.modules["step"]


@pytest.fixture
def models(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("models")
    del sys.modules["models"]


@pytest.fixture
def one_thread():
    """Restore the number of threads, which a benchmark sets to one."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_the_step_benchmark_writes_its_results(step, tmp_path, capsys):
    out = tmp_path / "step.json"
    results = step.main(step.Config(inputs=(20,), rounds=3, steps=1, out=out))
    assert [row.name for row in results] == list(step.available())
    assert {"plain PyTorch", "sampimp study", "sampimp recorder"} <= set(step.available())
    plain = results[0]
    assert (plain.ratio, plain.lower, plain.upper) == (1, 1, 1)
    assert all(row.milliseconds > 0 and row.lower <= row.ratio <= row.upper for row in results)
    stored = json.loads(out.read_text())
    assert [row["name"] for row in stored["results"]] == [row.name for row in results]
    assert stored["machine"]["torch"] == importlib.metadata.version("torch")
    assert "sampimp recorder" in capsys.readouterr().out


def test_the_table_is_markdown(step, tmp_path):
    rows = [
        step.summarise(784, "plain PyTorch", [0.002, 0.004, 0.006], [0.002, 0.004, 0.006]),
        step.summarise(784, "sampimp recorder", [0.003, 0.005, 0.009], [0.002, 0.004, 0.006]),
    ]
    # ratios 1.5, 1.25, 1.5: median 1.5, quartiles 1.375 and 1.5
    assert (rows[1].ratio, rows[1].lower, rows[1].upper) == pytest.approx((1.5, 1.375, 1.5))
    step.write(tmp_path / "step.md", rows, {"torch": "2.13.0"})
    assert (
        "| 784 | sampimp recorder | 5.00 | 1.500 | 1.375 to 1.500 |"
        in (tmp_path / "step.md").read_text()
    )


def test_a_missing_package_leaves_its_row_out(step, monkeypatch):
    monkeypatch.setitem(step.CONTENDERS, "absent", (step.Plain, "no_such_package_here"))
    assert "absent" not in step.available()


@pytest.mark.usefixtures("one_thread")
def test_contenders_that_disagree_are_not_timed(step, monkeypatch):
    class Wrong(step.Sampimp):
        def importance(self, index):
            return 2 * super().importance(index)

    batch = step.make_batches(20, seed=1)[0]
    step.check_agreement([step.Plain, step.Study, step.Sampimp], batch, seed=1)
    with pytest.raises(RuntimeError, match="importance by Wrong differs"):
        step.check_agreement([step.Plain, step.Sampimp, Wrong], batch, seed=1)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["mlp", "cnn", "lstm", "gru", "transformer", "tied"])
def test_recording_needs_hardly_more_memory(models, monkeypatch, name):
    """Unlike time, the peak of allocated bytes is the same in every run.

    Attention copies its input, and autograd saves only the copy: recording saves the input too.
    Keeping the gradient of the logits would make the ratio for tied weights 1.5.
    """

    def tied(size):
        words = torch.randint(0, 20_000, (size, 32))
        return models.SmallGPT(tokens=32, words=20_000, width=48), words, words

    monkeypatch.setitem(models.CASES, "tied", (partial(tied, 4), torch.optim.SGD, 4))
    case = next(case for case in models.CASES if case.startswith(name))
    plain, recorded = (models.allocated(case, records, threads=1) for records in (False, True))
    assert recorded < (1.1 if name == "transformer" else 1.02) * plain


@pytest.mark.usefixtures("one_thread")
def test_the_influence_benchmark_scores_and_continues(monkeypatch, tmp_path):
    """Tiny runs of every kind of section; TSLOO of 200 digits after 2 epochs is nearly perfect."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    influence = importlib.import_module("influence")
    sections = ("exactness", "adamw", "lasting", "methods", "paper", "cost")
    config = influence.Config(
        scratch=tmp_path, sections=sections, out=tmp_path / "page.md", workers=0, smoke=True
    )
    influence.main(config)
    page = config.out.read_text()
    assert page.count("Not measured.") == len(influence.SECTIONS) - len(sections)
    rows = json.loads((tmp_path / "rows-exactness.json").read_text())["rows"]
    assert rows[0]["value"] < rows[0]["asked"] == 1e-12
    (smoothed, *_) = (
        row
        for row in json.loads((tmp_path / "rows-adamw.json").read_text())["rows"]
        if "in the pullback" in row["check"]
    )
    assert smoothed["value"] > 0.9
    stored = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.npz")}
    influence.main(replace(config, sections=("adamw", "paper")))
    assert config.out.read_text().count("Not measured.") == page.count("Not measured.")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.npz")} == stored


def test_the_durability_benchmark_compares_both(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    durability = importlib.import_module("durability")
    for synced in (True, False):
        assert durability.train_seconds(tmp_path / str(synced), 1, synced, epochs=2) > 0
    assert durability.measure_verification(tmp_path / "files", files=3, workers=2) > 0
