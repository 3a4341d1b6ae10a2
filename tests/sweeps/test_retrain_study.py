"""Retrainings in a study, without Ray: values, resumption with the same bytes, and errors."""

import shutil
from dataclasses import replace

import numpy as np
import oracles
import pytest

import sampimp
from sampimp.data import scale_inputs
from sampimp.errors import ConfigError, RecordError
from sampimp.influence.retraining import final_values, random_subsets, single_removals
from sampimp.influence.targets import make_targets
from sampimp.store.commits import create_commit, require_commit
from sampimp.store.location import Folder
from sampimp.store.plan import read_commits
from sampimp.store.record import TrialRecord
from sampimp.sweeps import retrain, status
from sampimp.sweeps.derived_study import run_here
from sampimp.sweeps.retrain_study import RetrainRequest, prepare_retrain
from sampimp.sweeps.retrain_work import RetrainWork, removal_masks
from sampimp.training.strategies import make_schedule

REMOVALS = ("random:2", "top:3", "subset-0.75:4", "sample:5..6", "class:1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A study of two runs; tests copy it."""
    sources = {"one": oracles.make_source(name="one")}
    plan = oracles.make_plan(sources, {"shuffle": (1, 2)})
    folder = oracles.start_study(tmp_path_factory.mktemp("trained"), plan, sources)
    oracles.run_trials(folder, plan, sources)
    return folder, plan, scale_inputs(sources["one"], plan.training.input_scaling)


@pytest.fixture
def study(trained, tmp_path):
    folder, plan, data = trained
    shutil.copytree(str(folder), tmp_path / "study")
    return Folder.of(tmp_path / "study"), plan, data


def request(removals=REMOVALS, **more):
    settings = {"targets": ("mean", "class:2"), "runs": ("shuffle:1",), **more}
    return RetrainRequest(removals=removals, **settings)


def compute(folder, **more):
    run_here(prepare_retrain(folder, request(**more)))
    return sampimp.open_cube(folder)["one"].to_dataset().sel(strategy="shuffle", seed=1)


def commits_of(folder):
    return read_commits(folder, "influence")


def test_effects_are_those_of_retrainings_without_the_store(study):
    folder, plan, data = study
    run = compute(folder)
    config, count = plan.trials()[0], len(data.train_labels)
    schedule = make_schedule("shuffle", count, plan.training.batch_size, 0)
    targets = make_targets(["mean", "class:2"], data, ["L1", "L2", "Out"])
    importance = sampimp.open_cube(folder)["one"]["importance"]
    tau = importance.sel(strategy="shuffle", seed=1).values.astype(np.float64).sum((0, 1))
    random, top = single_removals(tau, 2, 3, 0)
    masks = {f"random:{row.argmax()}": row for row in random}
    masks |= {f"top:{row.argmax()}": row for row in top}
    subsets = random_subsets(count, 0.75, 4, 0)
    masks |= {f"subset-0.75:{number}": row for number, row in enumerate(subsets)}
    masks |= {f"sample:{number}": np.arange(count) == number for number in (5, 6)}
    masks["class:1"] = data.train_labels == 1
    assert set(run["removal"].values) == set(masks)
    assert run["repeat"].values.tolist() == [0, 1]
    for repeat in (0, 1):
        whole = final_values(config, data, schedule, targets, None, repeat)
        np.testing.assert_array_equal(run["baseline"].sel(repeat=repeat), whole)
        for name, mask in masks.items():
            values = final_values(config, data, schedule, targets, mask, repeat)
            effect = run["effect"].sel(removal=name, repeat=repeat)
            np.testing.assert_array_equal(effect, values - whole)
            np.testing.assert_array_equal(run["removed"].sel(removal=name), mask)
    test_nll = run["test_nll"].values[-1]  # of the run itself
    assert run["baseline"].sel(target="mean", repeat=0).item() == pytest.approx(test_nll, 1e-12)
    assert run["effect"].attrs["denominator"] == "batch size kept"


def test_what_is_stored_is_not_trained_again(study, monkeypatch):
    folder, _, _ = study
    compute(folder)
    before = commits_of(folder)
    monkeypatch.setattr(RetrainWork, "start", None)
    compute(folder, removals=("class:1", "random:2"))
    compute(folder, removals=("class:1", "top:1"), repeats=1, targets=("class:2",))
    assert commits_of(folder).keys() == before.keys()
    monkeypatch.undo()
    compute(folder, removals=("class:1", "sample:4"))
    added = [c["removals"] for name, c in commits_of(folder).items() if name not in before]
    assert added == [["sample:4"]]
    compute(folder, removals=("sample:4",), targets=("class:0",))  # a target that was not computed
    added = [c["removals"] for name, c in commits_of(folder).items() if name not in before]
    assert sorted(added) == [["none", "sample:4"], ["sample:4"]]


def test_the_denominator_of_the_mean_is_stated(study):
    run = compute(study[0], removals=("class:1",), renormalised=True)
    assert run["effect"].attrs["denominator"] == "number of samples that remain in the batch"


@pytest.mark.parametrize("method", ["write", "checkpoint", "commit"])
def test_interrupted_retrainings_continue_with_the_same_bytes(study, tmp_path, monkeypatch, method):
    folder, _, _ = study
    shutil.copytree(str(folder), tmp_path / "parts")
    other = Folder.of(tmp_path / "parts")
    expected = compute(folder).compute()
    original, calls = getattr(TrialRecord, method), []

    def failing(record, *arguments):
        calls.append(method)
        if len(calls) % 5 == 1:
            raise KeyboardInterrupt
        original(record, *arguments)
        if len(calls) % 5 == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrialRecord, method, failing)
    for _ in range(60):
        try:
            compute(other)
        except KeyboardInterrupt:
            continue
        break
    monkeypatch.undo()
    for name, commit in commits_of(folder).items():
        again = commits_of(other)[name]
        assert (again["digests"], again["curves"]) == (commit["digests"], commit["curves"])
    run = compute(other).compute()
    assert run.identical(expected.assign_attrs(run.attrs))
    assert status.main([str(other), "--verify"]) == 0


def test_a_run_that_cannot_be_repeated_is_an_error(study, monkeypatch):
    from sampimp.sweeps import retrain_work

    original = retrain_work.retrained_model

    def perturbed(*arguments, **options):
        model = original(*arguments, **options)
        for parameter in model.parameters():
            parameter.data += 1e-6
        return model

    monkeypatch.setattr(retrain_work, "retrained_model", perturbed)
    with pytest.raises(RecordError, match="bit for bit") as error:
        compute(study[0])
    assert "a largest difference of " in error.value.got


def test_removals_by_name():
    labels = np.array([0, 1, 1, 2, 0, 1])
    names = ["none", "subset-0.5:2", "class:1", "sample:3", "subset-0.5:0"]
    masks = removal_masks(names, labels)
    subsets = random_subsets(6, 0.5, 3, 0)
    np.testing.assert_array_equal(
        masks, [np.zeros(6, bool), subsets[2], labels == 1, np.arange(6) == 3, subsets[0]]
    )


@pytest.mark.parametrize(
    ("removals", "words"),
    [
        (("random",), "one of random:30"),
        (("nothing:3",), "one of random:30"),
        (("random:2..4",), "one of random:30"),
        (("sample:24",), "numbers from 0 to 23"),
        (("sample:5..3",), "numbers from 0 to 23"),
        (("class:3",), "numbers from 0 to 2"),
        (("random:25",), "at most 24 removals"),
        (("top:25",), "at most 24 removals"),
        (("subset-0.999:3",), "removes at least one"),
        (("sample:3", "sample:2..4"), "each once"),
        ((), "one or more removals"),
    ],
)
def test_a_removal_that_is_not_possible_is_named(study, removals, words):
    with pytest.raises(ConfigError, match=words):
        prepare_retrain(study[0], request(removals))


def test_bad_numbers_and_targets(study):
    with pytest.raises(ConfigError, match="at least 1 repeat"):
        request(repeats=0)
    with pytest.raises(ConfigError, match="a jitter between 0 and 1"):
        request(jitter=0.0)
    with pytest.raises(ConfigError, match="functions of the network's outputs"):
        prepare_retrain(study[0], request(targets=("mean", "probe:2")))


def test_a_run_that_is_not_committed_has_as_many_units(study):
    folder, plan, _ = study
    trial = plan.resolve(read_commits(folder))[1]
    place = folder / "trials" / str(trial.trial_id)
    commit = require_commit(place)
    place.delete("COMMIT.json")
    units = prepare_retrain(folder, request(runs=("shuffle:2",))).units
    before = units.resolve()
    assert {unit.awaits for unit in before} == {"one-shuffle-seed2"}
    assert {unit.folder for unit in before} == {None}
    create_commit(place, commit)
    after = units.resolve()
    assert [(u.label, u.steps) for u in after] == [(u.label, u.steps) for u in before]
    assert all(unit.folder and unit.awaits is None for unit in after)
    place.delete("COMMIT.json")
    create_commit(place, {**commit, "diverged_epoch": 2})
    diverged = prepare_retrain(folder, request()).units  # of the other run
    assert all(unit.folder for unit in diverged.resolve())
    assert {unit.awaits for unit in units.resolve()} == {None}
    assert {unit.folder for unit in units.resolve()} == {None}


def test_a_dry_run_of_the_command(study, capsys):
    folder, _, _ = study
    arguments = ["--removals", "random:2", "class:1", "--repeats", "3", "--dry-run"]
    assert retrain.main([str(folder), *arguments]) == 0
    out = capsys.readouterr().out
    assert "Missing   one-shuffle-seed1-retrain, 12 retrainings: none, random:" in out
    assert "Time      about" in out
    assert retrain.main([str(folder), "--removals", "sample:99"]) == 2
    assert "numbers from 0 to 23" in capsys.readouterr().err
    assert not commits_of(folder)


def test_a_study_of_another_version_is_refused(study):
    folder, plan, _ = study
    folder.write_json("study.json", replace(plan, code="0.0.9").to_json())
    with pytest.raises(ConfigError, match="a study of version"):
        prepare_retrain(folder, request())
