"""Influence in a study, without Ray: its values, resumption with the same bytes, and errors."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from io import StringIO

import numpy as np
import pytest
import torch
from influence_study import make_study, reverse_pass
from rich.console import Console

import sampimp
from sampimp.config import TrainingConfig
from sampimp.errors import ConfigError, RecordError, StoreError
from sampimp.influence.replay import Smoothing
from sampimp.influence.targets import make_targets
from sampimp.influence.trial_run import TrialRun
from sampimp.store.integrity import find_damage
from sampimp.store.location import Folder
from sampimp.store.plan import read_commits
from sampimp.store.record import TrialRecord
from sampimp.sweeps import influence, status
from sampimp.sweeps.influence_study import InfluenceRequest, compute_influence, prepare_influence
from sampimp.sweeps.influence_units import _blocks
from sampimp.sweeps.influence_work import InfluenceWork, named_targets
from sampimp.training.loop import evaluate

EPOCHS = 3
LAYERS = ("L1", "L2", "Out")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A study of one run under SGD; tests copy it."""
    return make_study(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def study(trained, tmp_path):
    """A copy of the study: folder, plan, data."""
    folder, plan, data = trained
    shutil.copytree(str(folder), tmp_path / "study")
    return Folder.of(tmp_path / "study"), plan, data


def epochs_of(plan, data, specs, **options):
    """Return influence (target, epoch, layer, sample) and norms (target, epoch), in memory."""
    done = sorted(reverse_pass(plan, data, specs, **options).epochs(), key=lambda e: e.epoch)
    return np.stack([e.influence for e in done], 1), np.stack([e.adjoint_norm for e in done], 1)


def records_of(folder):
    """Return commit and folder of each influence record by the name of its folder."""
    return {
        name: (commit, folder / "influence" / name)
        for name, commit in read_commits(folder, "influence").items()
    }


def test_stored_influence_is_that_of_a_pass_in_memory(study):
    folder, plan, data = study
    specs = ["mean", "class", "sample:2..3"]
    run = compute_influence(folder, specs)
    influence, norms = epochs_of(plan, data, specs)
    classes = [f"class:{number}" for number in range(3)]
    assert run.target.values.tolist() == ["mean", *classes, "sample:2", "sample:3"]
    np.testing.assert_array_equal(run.influence, influence.astype(np.float32))
    np.testing.assert_array_equal(run.adjoint_norm, norms)
    total = np.zeros((6, 24))
    for epoch in (2, 1, 0):  # in the order of the pass
        total += influence[:, epoch].astype(np.float64).sum(1)
    np.testing.assert_array_equal(run.influence_total, total.astype(np.float32))
    (record,) = records_of(folder).values()
    config = plan.trials()[0]
    pass_ = reverse_pass(plan, data, ["mean"])
    nll, _ = evaluate(pass_.run.model, *map(torch.from_numpy, data[2:]))
    assert record[0]["target_values"][0] == pytest.approx(nll.mean(), rel=1e-12)
    assert record[0]["growth_epochs"] == {}
    assert record[0]["trial"].startswith(f"one-{config.strategy}-seed1-")


def test_squares_of_probes_are_those_of_a_pass_in_memory(study):
    folder, plan, data = study
    run = sampimp.final_importance(folder, probes=3)
    influence, _ = epochs_of(plan, data, ["probe:3"])
    squares = np.square(influence.astype(np.float64))
    np.testing.assert_allclose(run.arriving_importance, squares.mean(0), rtol=1e-6)
    total = influence.astype(np.float64).sum((1, 2))
    np.testing.assert_allclose(run.final_importance_total, (total**2).mean(0), rtol=1e-6)
    for layer in LAYERS:
        influence, _ = epochs_of(plan, data, [f"probe:3@{layer}"])
        total = influence.astype(np.float64).sum((1, 2))
        np.testing.assert_allclose(
            run.final_importance.sel(layer=layer), (total**2).mean(0), rtol=1e-6
        )
    assert run.final_importance.attrs["probes"] == 3


def test_smoothing_is_a_target_of_its_own(tmp_path):
    folder, plan, data = make_study(tmp_path, optimizer="adamw", learning_rate=0.01)
    for smoothing in (None, Smoothing(eps=1e-3)):
        run = compute_influence(folder, smoothing=smoothing)
    assert run.target.values.tolist() == ["mean", "mean (eps=0.001)"]
    for target, smoothing in zip(
        run.target.values, (Smoothing(), Smoothing(eps=1e-3)), strict=True
    ):
        influence, _ = epochs_of(plan, data, ["mean"], smoothing=smoothing)
        np.testing.assert_array_equal(
            run.influence.sel(target=target), influence[0].astype(np.float32)
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "momentum"},
        {"optimizer": "adam", "learning_rate": 0.01},
        {"parameters_every": 2},
        {"parameters_every": 5},
    ],
    ids=["momentum", "adam", "every second", "first and last"],
)
def test_states_are_replayed_where_parameters_do_not_suffice(tmp_path, changes):
    folder, plan, data = make_study(tmp_path, **changes)
    run = compute_influence(folder)
    influence, _ = epochs_of(plan, data, ["mean"])
    np.testing.assert_array_equal(run.influence, influence.astype(np.float32))
    kinds = sorted(commit["kind"] for commit, _ in records_of(folder).values())
    assert kinds == ["influence", "states"]
    compute_influence(folder, ["class:1"])  # from the same states
    kinds = sorted(commit["kind"] for commit, _ in records_of(folder).values())
    assert kinds == ["influence", "influence", "states"]


def test_what_is_stored_is_not_computed_again(study, monkeypatch):
    folder, _, _ = study
    compute_influence(folder, ["mean", "probe:2"])
    before = records_of(folder)
    monkeypatch.setattr(InfluenceWork, "start", None)
    compute_influence(folder, ["probe:2", "mean"])
    assert records_of(folder).keys() == before.keys()
    monkeypatch.undo()
    compute_influence(folder, ["class:0", "mean", "probe:3"])
    added = [c["targets"] for n, (c, _) in records_of(folder).items() if n not in before]
    assert sorted(added) == [["class:0"], ["probe:0", "probe:1", "probe:2"]]


def test_blocks_follow_the_memory(study):
    folder, plan, _ = study
    request = InfluenceRequest(targets=("mean", "class", "probe:20"), runs=("shuffle:1",))
    sizes = {}
    for memory in (2**30, 20_000, 1):
        units = prepare_influence(folder, replace(request, memory=memory)).units.resolve()
        sizes[memory] = [len(unit.config["identity"]["targets"]) for unit in units]
    assert sizes == {2**30: [4, 16, 4], 20_000: [4, 8, 8, 4], 1: [1] * 24}
    assert plan.datasets["one"].parameter_count > 0
    assert _blocks([], 4) == []


def test_a_target_is_found_by_its_name(study):
    _, _, data = study
    specs = ["probe:3@L2", "class", "sample:1..2", "probe:2"]
    expected = {target.name: target for target in make_targets(specs, data, LAYERS)}
    names = list(expected)[::-1]
    for name, target in zip(names, named_targets(names, data, LAYERS), strict=True):
        assert target.name == name
        if name.startswith("probe"):
            assert target == expected[name]


# Interruptions.


def digests(folder):
    return {name: commit["digests"] for name, (commit, _) in records_of(folder).items()}


def check_sound(folder, plan):
    """Compare every chunk with its digest."""
    assert status.main([str(folder), "--verify"]) == 0


@pytest.mark.parametrize("changes", [{}, {"optimizer": "momentum"}], ids=["sgd", "momentum"])
@pytest.mark.parametrize("method", ["write", "checkpoint", "commit"])
def test_an_interrupted_computation_continues_with_the_same_bytes(
    tmp_path, monkeypatch, method, changes
):
    """Two of five calls of the method fail, before they have had their effect or after."""
    specs = ["mean", "class:0", "probe:2", "probe:1@L2"]
    folder, plan, _ = make_study(tmp_path / "whole", **changes)
    compute_influence(folder, specs)
    other, _, _ = make_study(tmp_path / "parts", **changes)
    original, calls = getattr(TrialRecord, method), []

    def failing(record, *arguments):
        calls.append(method)
        if len(calls) % 5 == 1:
            raise KeyboardInterrupt
        original(record, *arguments)
        if len(calls) % 5 == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrialRecord, method, failing)
    for _ in range(40):
        try:
            compute_influence(other, specs)
        except KeyboardInterrupt:
            continue
        break
    monkeypatch.undo()
    assert digests(other) == digests(folder)
    assert len(calls) >= 4
    check_sound(other, plan)
    run, expected = (compute_influence(place, specs).compute() for place in (other, folder))
    assert run.identical(expected.assign_attrs(run.attrs))


COMPUTE = """
import sys
from sampimp.sweeps.influence_study import compute_influence
compute_influence(sys.argv[1], ["mean", "class", "probe:8"])
"""


def test_a_killed_process_continues_with_the_same_bytes(tmp_path):
    make = partial(make_study, hidden=(40, 40), epochs=12, learning_rate=0.05)
    folder, plan, _ = make(tmp_path / "whole")
    compute_influence(folder, ["mean", "class", "probe:8"])
    other, _, _ = make(tmp_path / "parts")
    begin = [sys.executable, "-c", COMPUTE, str(other)]
    deaths = 0
    place = tmp_path / "parts" / "influence"
    for _ in range(30):
        before = len(list(place.glob("*/checkpoints/*/MANIFEST.json")))
        process = subprocess.Popen(begin)
        while process.poll() is None:
            if len(list(place.glob("*/checkpoints/*/state.pt"))) > before and deaths < 2:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                deaths += 1
            time.sleep(0.001)
        if process.returncode == 0:
            break
    assert deaths == 2
    assert digests(other) == digests(folder)
    check_sound(other, plan)


def test_a_damaged_record_is_withdrawn_and_computed_again(study, capsys):
    folder, plan, _ = study
    compute_influence(folder)
    before = digests(folder)
    ((name, (commit, place)),) = records_of(folder).items()
    chunk = "record.zarr/influence/c/1/0/0/0"
    place.write_bytes(chunk, place.read_bytes(chunk)[:-1] + b"x")
    assert status.main([str(folder), "--verify"]) == 1
    assert f"{name} is damaged: {chunk}: " in capsys.readouterr().out
    assert status.main([str(folder), "--withdraw"]) == 1
    assert "1 records of influence, retraining and subsets withdrawn: " in capsys.readouterr().out
    assert "influence" not in sampimp.open_cube(folder)["one"]
    compute_influence(folder)
    assert digests(folder) == before
    check_sound(folder, plan)
    assert not list(find_damage(place, place.read_json("COMMIT.json"), _layout(plan, commit)))


def _layout(plan, commit):
    from sampimp.store.influence_layouts import layout_of

    return layout_of(commit, plan.layout("one"))


def test_a_replay_that_differs_fails_and_is_shown(tmp_path, capsys, monkeypatch):
    folder, _, _ = make_study(tmp_path)
    load_start = TrialRun.load_start

    def perturbed(run, epoch):
        load_start(run, epoch)
        if epoch == 2:
            with torch.no_grad():
                run.parameters[0][0, 0] += 1

    monkeypatch.setattr(TrialRun, "load_start", perturbed)
    with pytest.raises(RecordError, match="bit for bit") as error:
        compute_influence(folder)
    assert "epoch 2" in error.value.where
    assert status.main([str(folder)]) == status.FAILED
    out = capsys.readouterr().out
    assert "1 records of influence, retraining and subsets (1 influence): 1 failed" in out
    assert "step 1 of 3, attempt 1 on" in out
    monkeypatch.undo()
    compute_influence(folder)
    assert status.main([str(folder)]) == 0
    assert "(1 influence): 1 done" in capsys.readouterr().out


def test_large_growth_is_committed_as_such(study, monkeypatch):
    from sampimp.sweeps import influence_work

    folder, plan, data = study
    _, norms = epochs_of(plan, data, ["mean"])
    initial = reverse_pass(plan, data, ["mean"]).initial_norm
    growth = norms[0] / initial[0]
    monkeypatch.setattr(influence_work, "LARGEST_GROWTH", np.sort(growth)[-2])
    run = compute_influence(folder)
    epoch = 1 + int(growth.argmax())
    assert run.influence.attrs["growth"] == [f"shuffle, seed 1, mean: epoch {epoch}"]
    console = Console(file=StringIO(), width=200)
    from sampimp.sweeps.derived_run import _conclude

    (unit,) = prepare_influence(
        folder, InfluenceRequest(targets=("class:0",), runs=("shuffle:1",))
    ).units.resolve()
    ((commit, _),) = records_of(folder).values()
    assert _conclude([unit._replace(commit=commit)], "units", console) == 0
    assert f"mean from epoch {epoch} back" in console.file.getvalue()


# Bad input.


def request(folder, *, runs=("shuffle:1",), targets=("mean",), **more):
    return prepare_influence(
        Folder.of(folder), InfluenceRequest(targets=targets, runs=runs, **more)
    )


@pytest.mark.parametrize(
    ("runs", "got"),
    [(("shuffle",), "'shuffle'"), (("shuffle:2",), "'shuffle:2'"), (("two:shuffle:1",), "'two")],
)
def test_an_unknown_run_is_named(study, runs, got):
    with pytest.raises(ConfigError, match="STRATEGY:SEED or DATASET:STRATEGY:SEED") as error:
        request(study[0], runs=runs)
    assert got in error.value.got


def test_runs_are_named_in_three_ways(tmp_path):
    folder, plan, _ = make_study(tmp_path, grid={"shuffle": (1, 2), "rand": (1,)}, epochs=1)
    labels = {
        name: [unit.label for unit in request(folder, runs=(name,)).units.resolve()]
        for name in ("shuffle:2", "one:rand:1", "all")
    }
    assert labels == {
        "shuffle:2": ["one-shuffle-seed2-influence"],
        "one:rand:1": ["one-rand-seed1-influence"],
        "all": [f"{t.label}-influence" for t in plan.resolve(read_commits(folder))],
    }


@pytest.mark.parametrize("spec", ["class:7", "sample:9", "train:24", "nonsense", "probe:3@L9"])
def test_a_target_that_does_not_exist_is_named(study, spec):
    with pytest.raises(ConfigError) as error:
        request(study[0], targets=("mean", spec))
    assert spec in error.value.got


def test_a_diverged_run_is_refused_and_left_out_of_all(tmp_path):
    folder, _, _ = make_study(tmp_path, learning_rate=1e30)
    with pytest.raises(RecordError, match="trained to its end") as error:
        request(folder)
    assert "one-shuffle-seed1 diverged in epoch 1" in error.value.got
    with pytest.raises(RecordError, match="trained to its end"):
        request(folder, runs=("all",))


def test_parameters_that_were_not_stored_are_named(tmp_path):
    folder, _, _ = make_study(tmp_path, parameters_every=0)
    with pytest.raises(ConfigError, match="--parameters-every 0") as error:
        request(folder)
    assert "--parameters-every 1" in error.value.todo


def test_a_study_of_another_version_is_refused(study):
    folder, plan, _ = study
    folder.write_json("study.json", replace(plan, code="0.0.9").to_json())
    with pytest.raises(ConfigError, match=r"a study of version 0\.0\.9"):
        request(folder)


def test_another_data_set_in_the_place_of_the_study_s_is_refused(study):
    folder, plan, _ = study
    info = replace(plan.datasets["one"], digest="0" * 64)
    folder.write_json("study.json", replace(plan, datasets={"one": info}).to_json())
    with pytest.raises(RecordError, match="data set of the plan"):
        request(folder)
    (folder / "datasets" / "one.zarr").remove()
    with pytest.raises(StoreError, match="the study's data set"):
        request(folder)


def test_no_study_and_no_memory(tmp_path, study):
    with pytest.raises(StoreError, match="a study"):
        request(tmp_path / "none")
    with pytest.raises(ConfigError, match="positive number of GB"):
        request(study[0], memory=0)


def test_a_run_that_is_not_committed_is_named(tmp_path):
    folder, _, _ = make_study(tmp_path, commit=lambda trial: False)
    with pytest.raises(RecordError, match="trained to its end") as error:
        compute_influence(folder)
    assert "Waiting for one-shuffle-seed1: " in error.value.got


def test_a_target_that_is_nan_is_named(study, tmp_path, monkeypatch):
    (tmp_path / "bad_targets.py").write_text(
        "def infinite(model):\n    return next(model.parameters()).sum() * float('nan')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RecordError, match="a target with a finite") as error:
        compute_influence(study[0], ["mean", "bad_targets:infinite"])
    assert "bad_targets:infinite" in error.value.where


def test_a_function_of_ones_own_is_identified_by_its_source(study, tmp_path, monkeypatch):
    file = tmp_path / "own_targets.py"
    file.write_text("def norm(model):\n    return sum((p**2).sum() for p in model.parameters())\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    run = compute_influence(study[0], ["own_targets:norm"])
    assert run.target.values.tolist() == ["own_targets:norm"]
    ((_, (commit, _)),) = records_of(study[0]).items()
    assert set(commit["functions"]) == {"own_targets:norm"}


# The command.


def test_a_dry_run_states_time_and_storage(study, capsys):
    folder, _, _ = study
    arguments = [str(folder), "--targets", "mean", "probe:20", "--dry-run", "--runs", "all"]
    assert influence.main(arguments) == 0
    out = capsys.readouterr().out
    assert "Missing   one-shuffle-seed1-influence, 3 epochs: mean\n" in out
    assert "Missing   one-shuffle-seed1-probes-2, 3 epochs: probe:16, " in out
    assert "Time      about 0 s on this machine" in out or "Time      about 1 s" in out
    assert " MB" in out
    assert not (folder / "influence").folders()


def test_storage_is_an_upper_bound(study):
    folder, _, _ = study
    specs = ("mean", "class", "probe:3")
    prepared = request(folder, targets=specs)
    units = prepared.units.resolve()
    bound = sum(map(prepared.units.bytes_of, units))
    compute_influence(folder, specs)
    sizes = sum((place / "record.zarr").size() for _, place in records_of(folder).values())
    assert sizes < bound + 20_000  # metadata of the arrays


def test_mistakes_end_with_2(study, tmp_path, capsys):
    assert influence.main([str(tmp_path / "none")]) == 2
    assert "Expected a study" in capsys.readouterr().err
    assert influence.main([str(study[0]), "--targets", "class:9"]) == 2
    assert "'class:9'" in capsys.readouterr().err


WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "rich", "tyro"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import sampimp
print(sampimp.compute_influence(sys.argv[1]).target.values.tolist())
"""


def test_computing_here_needs_no_package_of_an_extra(study):
    command = [sys.executable, "-c", WITHOUT, str(study[0])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "['mean']\n", done.stderr


def test_training_defaults_are_the_papers():
    assert TrainingConfig().parameters_every == 1  # what influence needs of SGD
