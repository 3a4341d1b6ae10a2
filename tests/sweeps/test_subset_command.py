"""The command `sampimp subset`: bisection, files of indices, what it prints, and its mistakes."""

import gzip
import json
import shutil
from io import StringIO
from pathlib import Path

import numpy as np
import oracles
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import sampimp
from sampimp.errors import ConfigError, RecordError
from sampimp.store.location import Folder
from sampimp.store.plan import read_commits
from sampimp.store.plan_files import require_plan
from sampimp.store.seals import seal
from sampimp.store.subset_choice import crossing
from sampimp.sweeps import derived_command, derived_run, status, subset, subset_work
from sampimp.sweeps.derived_study import run_here
from sampimp.sweeps.subset_results import PRECISION, export_subsets, middle_size, next_sizes
from sampimp.sweeps.subset_scores import read_score_file
from sampimp.sweeps.subset_study import SubsetRequest, prepare_subsets

FAST = ("--rules", "tau-high", "--sizes", "0.25", "0.5", "--seeds", "1", "2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A study of two runs; tests copy it."""
    sources = {"one": oracles.make_source(name="one")}
    plan = oracles.make_plan(sources, {"shuffle": (1, 2)})
    folder = oracles.start_study(tmp_path_factory.mktemp("trained"), plan, sources)
    oracles.run_trials(folder, plan, sources)
    return folder


@pytest.fixture
def study(trained, tmp_path):
    shutil.copytree(str(trained), tmp_path / "study")
    return Folder.of(tmp_path / "study")


@pytest.fixture
def command(monkeypatch):
    """Run the command in this process, without Ray; return exit code, output and errors."""

    def perform(prepared, address, max_concurrent, console, *, dry_run):
        if dry_run:
            return original(prepared, address, max_concurrent, console, dry_run=True)
        run_here(prepared)
        return 0

    original = derived_run.perform_or_describe
    monkeypatch.setattr(derived_run, "perform_or_describe", perform)

    def run(*arguments):
        console = Console(file=StringIO(), width=300)
        monkeypatch.setattr(derived_command, "Console", lambda **options: console)
        code = subset.main(list(map(str, arguments)))
        return code, console.file.getvalue()

    return run


def cube_of(folder, seed=1):
    return sampimp.open_cube(folder)["one"].to_dataset().sel(strategy="shuffle", seed=seed)


@given(true_size=st.floats(0.03, 0.8), start=st.lists(st.floats(0.02, 0.85), max_size=4))
def test_a_bisection_closes_in_on_the_smallest_size(true_size, start):
    """The error falls below the limit at `true_size`, which the bisection does not know."""
    sizes = sorted({float(f"{size:.2g}") for size in [*start, 0.3]})
    for _ in range(subset.BISECTION_ROUNDS):
        errors = np.array([0.5 if size < true_size else 0.1 for size in sizes])
        size = middle_size(np.array(sizes), errors, 0.2, 0.01, 0.9)
        if size is None:
            break
        assert size not in sizes
        sizes = sorted([*sizes, size])
    assert size is None
    errors = np.array([0.5 if size < true_size else 0.1 for size in sizes])
    place = crossing(np.array(sizes), errors, 0.2)
    below, above = min(place.below, 0.9), place.above or 0.01
    # At the end the sizes differ by less than the precision, or by the last of two digits.
    assert below / above < max(PRECISION, 1.1 + 0.02 / above)


def test_a_search_for_the_smallest_size_ends(study, command):
    code, text = command(study, *FAST, "--within", "10")
    assert code == 0, text
    request = SubsetRequest(
        rules=("tau-high",), sizes=(0.25, 0.5), seeds=(1, 2), runs=("shuffle:1",)
    )
    assert not next_sizes(study, request, 0.1)
    never = next_sizes(study, request, -1.0)  # larger ones are tried
    assert {each.rule for each in never} == {"random", "balanced", "tau-high"}
    assert min(each.size for each in never) > 0.5
    commits = read_commits(study, "influence")
    added = {c["size"]: c for c in commits.values() if c["size"] not in (0.25, 0.5, 1)}
    assert added
    assert {commit["judged_on"] for commit in added.values()} == {"test"}
    error = cube_of(study).subset_error
    assert error.sel(rule="chosen", size=list(added)).isnull().all()
    code, again = command(study, *FAST, "--within", "10")
    assert (code, again) == (0, text)
    assert read_commits(study, "influence") == commits


def test_commits_of_other_trainings_are_a_message(study, command):
    """A commit counts by the name of its folder, and may state other trainings."""
    code, text = command(study, *FAST)
    assert code == 0, text
    request = SubsetRequest(
        rules=("tau-high",), sizes=(0.25, 0.5), seeds=(1, 2), runs=("shuffle:1",)
    )
    for name, commit in read_commits(study, "influence").items():
        if commit["rule"] == "full":
            place = study / "influence" / name
            changed = json.loads(place.read_bytes("COMMIT.json")) | {"size": 0.9}
            del changed["seal"]
            place.write_bytes("COMMIT.json", seal(changed))
    with pytest.raises(RecordError, match="the trainings on subsets that this command asks for"):
        next_sizes(study, request, 0.1)
    (study / "influence").remove()
    with pytest.raises(RecordError, match="Got none"):
        export_subsets(study, request)


def test_each_run_has_a_bisection_of_its_own(study, command, tmp_path):
    """With several runs the same trainings are made as by a command for each."""
    sizes = []
    for folder, commands in (("together", ["all"]), ("apart", ["shuffle:1", "shuffle:2"])):
        copy = Folder.of(shutil.copytree(str(study), tmp_path / folder))
        for runs in commands:
            code, text = command(copy, *FAST, "--within", "10", "--runs", runs)
            assert code == 0, text
        commits = read_commits(copy, "influence").values()
        sizes.append({(c["trial"], c["rule"], c["size"], *c["budgets"]) for c in commits})
    assert sizes[0] == sizes[1]
    bisected = [{size[1:] for size in sizes[0] if f"seed{seed}-" in size[0]} for seed in (1, 2)]
    assert bisected[0] != bisected[1]  # else a size of one run is one of the other


def test_errors_are_printed_by_rule_and_size(study, command):
    code, text = command(study, *FAST, "--within", "30")
    assert code == 0, text
    cube = cube_of(study).sel(training_seed=[1, 2])
    for budget in ("steps", "epochs"):
        title = f"one-shuffle-seed1: test error in %, equal {budget}"
        lines = text[text.index(title) :].splitlines()
        assert lines[1].startswith("Mean ± s.e. of 2 seeds; all samples ")
        rows = {line.split()[0]: line.split()[1:] for line in lines[3:12] if line.split()}
        for rule in ("random", "balanced", "tau-high", "chosen"):
            first, second = 100 * cube.subset_error.sel(rule=rule, size=[0.25, 0.5], budget=budget)
            printed = [[float(part) for part in cell.split("±")] for cell in rows[rule]]
            expected = [
                [float(error.mean()), abs(float(error[0] - error[1])) / 2]
                for error in (first.values, second.values)
            ]
            np.testing.assert_allclose(printed, expected, atol=0.051)
        chosen = cube.subset_variant.sel(rule="chosen", size=[0.25, 0.5], budget=budget)
        assert rows["which"] == ["is", *chosen.values]
        full = 100 * cube.subset_error.sel(rule="full", size=1, budget=[budget, "convergence"])
        same, converged = full.mean("training_seed").values
        words = lines[1].replace("±", " ").replace(",", " ").split()
        assert abs(float(words[words.index("samples") + 1]) - same) < 0.051
        assert abs(float(words[words.index("epochs") + 1]) - converged) < 0.051
    error = cube.subset_error.mean("training_seed")
    limit = error.sel(rule="full", size=1, budget="steps").item() + 0.3
    measured = error.sel(rule="random", budget="steps").dropna("size")
    smallest = crossing(measured["size"].values, measured.values, limit).size
    lines = text[text.index("smallest size within 30 points") :].splitlines()
    row = next(line.split() for line in lines if line.split()[:1] == ["random"])
    assert row[1] == ("none" if smallest == 1 else f"{100 * smallest:.3g}")


def test_selected_samples_are_exported(study, command):
    code, text = command(study, *FAST, "--runs", "all")
    assert code == 0, text
    folder = Path(str(study)) / "influence" / "selected"
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 2 * 2 * 2 * 4  # npy and csv, runs, sizes; three rules and the chosen one
    assert f"in {len(names) // 2} files {study}/influence/selected/*.npy" in text
    for seed in (1, 2):
        cube = cube_of(study, seed).sel(budget="steps", training_seed=1)
        for rule in ("tau-high", "random", "balanced", "chosen"):
            for size in (0.25, 0.5):
                place = folder / f"one-shuffle-seed{seed}-{rule}-{size:g}.npy"
                indices = np.load(place)
                mask = cube.selected.sel(rule=rule, size=size).values
                assert indices.tolist() == np.flatnonzero(mask).tolist()
                table = pd.read_csv(place.with_suffix(".csv"), index_col="sample")
                assert table.index.tolist() == indices.tolist()
                assert table["label"].tolist() == cube.label.values[indices].tolist()
                assert table["file"].tolist() == cube.file.values[indices].tolist()
    line = next(line for line in text.splitlines() if "torch.utils.data.Subset" in line)
    part = eval(line.strip(), {"torch": torch, "numpy": np, "train_set": list(range(24))})
    assert len(part) == 6
    assert status.main([str(study), "--verify"]) == 0  # the folder is no record
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert command(study, *FAST, "--runs", "all")[0] == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_subset_without_a_class_is_named(study, command, tmp_path):
    labels = cube_of(study).label.values
    np.save(tmp_path / "mine.npy", np.where(labels == 2, -1.0, 1.0))
    rules = ("--rules", f"scores:{tmp_path}/mine.npy")
    code, text = command(study, *rules, "--sizes", "0.5", "--seeds", "1")
    assert code == 0, text
    assert "-0.5.npy has no sample of class class 2." in text
    cube = cube_of(study)
    (rule,) = (name for name in cube["rule"].values if name.startswith("scores:mine-"))
    mask = cube.selected.sel(rule=rule, size=0.5, budget="steps", training_seed=1).values
    assert set(labels[mask]) == {0, 1}
    assert cube.subset_error.sel(rule=rule, size=0.5, budget="steps").notnull().all()


def test_scores_of_text_and_of_a_variable(study, command, tmp_path):
    values = np.random.default_rng(3).random(24)
    np.savetxt(tmp_path / "mine.txt", values)
    rules = ("--rules", f"scores:{tmp_path}/mine.txt", "variable:label")
    assert command(study, *rules, "--sizes", "0.25", "--seeds", "1")[0] == 0
    cube = cube_of(study).sel(size=0.25, budget="steps", training_seed=1)
    (rule,) = (name for name in cube["rule"].values if name.startswith("scores:mine-"))
    assert set(np.flatnonzero(cube.selected.sel(rule=rule))) == set(np.argsort(-values)[:6])
    assert set(cube.label.values[cube.selected.sel(rule="variable:label").values]) == {2}


def test_diverged_trainings_are_counted(study, command, monkeypatch):
    original = subset_work.train_subset

    def diverging(config, data, selected, budget):
        model = original(config, data, selected, budget)
        if len(selected) == 6 and budget == "steps":
            next(model.parameters()).data.fill_(torch.nan)
        return model

    monkeypatch.setattr(subset_work, "train_subset", diverging)
    for _ in range(2):  # the second command trains nothing, and says the same
        code, text = command(study, *FAST)
        assert code == 0, text
        assert "6 trainings diverged; their error is NaN in the cube" in text
        assert "shuffle:1, rule tau-high, size 0.25, steps, seed 1" in text
    assert command(study, *FAST, "--within", "40")[0] == 0


def test_means_over_fewer_seeds_and_unknown_limits_are_marked(study, command, monkeypatch):
    original = subset_work.train_subset

    def diverging(config, data, selected, budget):
        model = original(config, data, selected, budget)
        if config.seed == 1 and budget == "steps" and len(selected) in (6, 24):
            next(model.parameters()).data.fill_(torch.nan)
        return model

    monkeypatch.setattr(subset_work, "train_subset", diverging)
    code, text = command(study, *FAST, "--within", "40")
    assert code == 0, text
    assert "(1 of 2)" in text
    assert ["random", "unknown", "unknown"] in [line.split() for line in text.splitlines()]
    assert "unknown: a training on all samples diverged" in text


def test_a_dry_run_lists_units_and_stores_nothing(study, command, tmp_path):
    np.save(tmp_path / "mine.npy", np.arange(24.0))
    before = sorted(Path(str(study)).rglob("*"))
    rules = ("--rules", "power", f"scores:{tmp_path}/mine.npy")
    code, text = command(study, *rules, "--sizes", "0.5", "--seeds", "1", "2", "--dry-run")
    assert code == 0
    assert "Missing   one-shuffle-seed1-subset-power0.25-0.5-validation, 4 trainings" in text
    assert "Missing   one-shuffle-seed1-subset-power-0.5, 4 trainings" in text
    assert "Missing   one-shuffle-seed1-subset-full-1, 4 trainings" in text
    assert "Time      about" in text
    assert " MB" in text
    assert sorted(Path(str(study)).rglob("*")) == before


MISTAKES = {
    "no sample": (["--sizes", "0"], "sizes between 0 and 1"),
    "more than all": (["--sizes", "1.5"], "sizes between 0 and 1"),
    "all": (["--sizes", "1"], "all samples are always compared"),
    "not a number": (["--sizes", "nan"], "sizes between 0 and 1"),
    "a size twice": (["--sizes", "0.5", "0.5"], "each once"),
    "sizes of equally many samples": (["--sizes", "0.5", "0.51"], "0.5, 0.51: 12 of 24 each"),
    "below one a class": (["--sizes", "0.1"], "at least 3 of the 24 samples, one for each class"),
    "more than the split leaves": (["--sizes", "0.95"], "those outside the validation split"),
    "a seed twice": (["--seeds", "1", "1"], "seeds of 0 or above, each once"),
    "a negative seed": (["--seeds", "-1"], "seeds of 0 or above, each once"),
    "a huge seed": (["--seeds", str(2**63)], "below 2^63"),
    "no run": (["--runs"], "one or more runs as STRATEGY:SEED"),
    "rules joined": (
        ["--rules", "tau-high,power:1"],
        "write --rules tau-high power:1",
    ),
    "unknown rule": (["--rules", "best"], "a rule among random, balanced"),
    "a cut above what is left": (
        ["--rules", "strata:0.5", "--sizes", "0.8"],
        "a size of at most 11 samples, from which strata:0.5 can select",
    ),
    "unknown run": (["--runs", "nlo:1"], "a run of the study"),
    "within": (["--within", "-1"], "percentage points of the test error"),
    "within nothing": (["--within", "nan"], "percentage points of the test error"),
    "no final importance": (
        ["--rules", "final-importance"],
        "--targets probe:64 --runs one:shuffle:1",
    ),
    "no such variable": (["--rules", "variable:nothing"], "none in the cube, which has label"),
    "a variable by epoch": (["--rules", "variable:nll"], "dimensions epoch, sample of float32"),
    "no such file": (["--rules", "scores:/nowhere.npy"], "an .npy file, or a text file"),
    "a cluster that cannot see the scores": (
        ["--rules", "scores:mine.npy", "--cluster", "CLUSTER"],
        "option --rules scores:mine.npy, with --cluster",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_without_a_traceback(study, command, tmp_path, name):
    arguments, words = MISTAKES[name]
    (tmp_path / "cluster.yaml").write_text("cluster_name: one\n")
    arguments = [a.replace("CLUSTER", f"{tmp_path}/cluster.yaml") for a in arguments]
    if "--sizes" not in arguments:
        arguments += ["--sizes", "0.5"]
    code, text = command(study, *arguments)
    assert code == 2
    assert words in " ".join(text.split())
    for part in ("Expected ", "Got ", "Where ", "To do "):
        assert part in text
    assert "Traceback" not in text
    assert not read_commits(study, "influence")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.arange(23.0), "24 scores, one for each training sample"),
        (np.arange(48.0).reshape(24, 2), "shape (24, 2)"),
        (np.where(np.arange(24) < 18, np.nan, 1.0), "whose score is NaN"),
        (np.full(24, np.inf), "none that is a finite number"),
        (np.arange(24) + 2**62, "whole numbers above 2^53"),
        (np.array(["a"] * 24), "an .npy file, or a text file"),
        (np.array([{}] * 24), "an .npy file, or a text file"),
        (np.arange(24) * 1j, "complex128, which are not real numbers"),
        (np.arange(24).astype("datetime64[D]"), "datetime64[D], which are not real numbers"),
        (np.array(["1"] * 24), "<U1, which are not real numbers"),
        (np.zeros(0), "no number"),
    ],
    ids=[
        "few",
        "table",
        "missing",
        "infinite",
        "large",
        "words",
        "objects",
        "complex",
        "dates",
        "text",
        "none",
    ],
)
def test_scores_that_are_not_one_number_a_sample_are_refused(
    study, command, tmp_path, values, words
):
    np.save(tmp_path / "mine.npy", values, allow_pickle=True)
    code, text = command(study, "--rules", f"scores:{tmp_path}/mine.npy", "--sizes", "0.5")
    assert code == 2
    assert words in " ".join(text.split())


def test_a_file_that_cannot_be_read_is_refused(study, command, tmp_path):
    (tmp_path / "empty.txt").touch()
    whole = gzip.compress(b"1\n" * 500)
    (tmp_path / "damaged.txt.gz").write_bytes(whole[:12] + bytes(20) + whole[32:])
    (tmp_path / "damaged.txt.xz").write_bytes(b"\xfd7zXZ\x00damaged")
    np.savez(tmp_path / "several.npz", np.arange(24.0))
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    np.save(tmp_path / "huge.npy", np.arange(24.0))
    header = (
        (tmp_path / "huge.npy")
        .read_bytes()
        .replace(b"(24,), }" + b" " * 14, b"(240000000000000,), }" + b" ")
    )
    (tmp_path / "huge.npy").write_bytes(header)
    for path in sorted(tmp_path.glob("*.*")):
        code, text = command(study, "--rules", f"scores:{path}", "--sizes", "0.5")
        assert code == 2, path
        assert "an .npy file, or a text file with a number in each line" in text
        assert "pickle" not in text
        assert str(path) in text


def test_a_column_and_a_byte_order_mark_are_read(tmp_path):
    scores = np.arange(24.0)
    np.save(tmp_path / "column.npy", scores[:, None])
    np.savetxt(tmp_path / "marked.txt", scores, encoding="utf-8-sig")
    for name in ("column.npy", "marked.txt"):
        assert np.array_equal(read_score_file(str(tmp_path / name)), scores)


def test_a_dry_run_says_that_nothing_is_missing(study, command):
    assert command(study, *FAST)[0] == 0
    code, text = command(study, *FAST, "--dry-run", "--within", "1")
    assert code == 0
    assert "All that was asked for is committed already" in text
    assert "The sizes that --within searches are not in this estimate" in text


def test_two_files_with_the_same_scores_are_one_rule(study, command, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "mine.npy", np.arange(24.0))
    rules = [f"scores:{tmp_path}/{name}/mine.npy" for name in ("a", "b")]
    rules += ["power:0.5", "power:0.50", "power:5e-1"]
    request = SubsetRequest(rules=rules, sizes=(0.5,), seeds=(1,), runs=("shuffle:1",))
    names = [rule.spec.partition("-")[0] for rule in request.parsed]
    assert names == ["random", "balanced", "scores:mine", "power:0.5"]


@pytest.mark.parametrize("number", [0, -3])
def test_at_least_one_unit_at_a_time(study, number):
    with pytest.raises(ConfigError, match="--max-concurrent"):
        derived_run.machines_for(require_plan(study), None, number)


def test_scores_of_a_run_that_has_none_are_refused(study, command):
    sampimp.compute_influence(str(study), ["probe:2"], seed=1)
    arguments = ("--rules", "final-importance", "--sizes", "0.5", "--runs", "shuffle:2")
    code, text = command(study, *arguments)
    assert code == 2
    assert "NaN for every sample of this run" in text
    assert "--runs one:shuffle:2` first" in text


def test_missing_scores_are_not_searched_beyond(study, command, tmp_path):
    values = np.arange(24.0)
    values[::2] = np.nan
    np.save(tmp_path / "mine.npy", values)
    arguments = ("--rules", f"scores:{tmp_path}/mine.npy", "--sizes", "0.25", "--seeds", "1")
    code, text = command(study, *arguments, "--within", "0")
    assert code == 0, text
    cube = cube_of(study)
    (rule,) = (name for name in cube["rule"].values if name.startswith("scores:mine-"))
    chosen = cube.selected.sel(rule=rule).values
    assert chosen.any()
    assert not chosen[..., ::2].any()


def test_the_units_of_a_request_do_not_change_with_the_rest(study):
    request = SubsetRequest(
        rules=("tau-high",), sizes=(0.25, 0.5), seeds=(1, 2), runs=("shuffle:1",)
    )
    names = [unit.folder for unit in prepare_subsets(study, request).units.resolve()]
    run_here(prepare_subsets(study, request))
    assert set(names) == {f"influence/{name}" for name in read_commits(study, "influence")}
