"""Trainings on subsets in a study, without Ray: values, choices, resumption, states and damage."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
import xarray as xr

import sampimp
from sampimp.data import scale_inputs
from sampimp.store.commits import create_commit, require_commit
from sampimp.store.location import Folder
from sampimp.store.plan import read_commits
from sampimp.store.record import TrialRecord
from sampimp.store.score_files import read_scores
from sampimp.store.sharded import consolidate
from sampimp.store.subset_choice import best_rule, best_variant
from sampimp.store.zarr_arrays import open_array
from sampimp.subsets.rules import BASELINES, Pool, parse_rule, select
from sampimp.subsets.training import train_subset
from sampimp.subsets.validation import VALIDATION_SEEDS, validation_samples
from sampimp.sweeps import status, subset_work
from sampimp.sweeps.derived_study import run_here
from sampimp.sweeps.influence_study import compute_influence
from sampimp.sweeps.subset_results import diverged_trainings
from sampimp.sweeps.subset_study import SubsetRequest, prepare_subsets
from sampimp.sweeps.subset_units import Comparison
from sampimp.sweeps.subset_work import SubsetWork
from sampimp.training.loop import evaluate

RULES = ("tau-high", "nll-low", "strata", "power:0.5")
SIZES = (0.25, 0.5)
SEEDS = (1, 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A study of two runs; tests copy it."""
    sources = {"one": oracles.make_source(name="one")}
    plan = oracles.make_plan(sources, {"shuffle": (1, 2)})
    folder = oracles.start_study(tmp_path_factory.mktemp("trained"), plan, sources)
    oracles.run_trials(folder, plan, sources)
    return folder, plan, scale_inputs(sources["one"], plan.training.input_scaling)


@pytest.fixture(scope="module")
def compared(trained, tmp_path_factory):
    """The study with `RULES` compared; tests copy it, or read it alone."""
    out = tmp_path_factory.mktemp("compared") / "study"
    shutil.copytree(str(trained[0]), out)
    compute(Folder.of(out))
    return Folder.of(out)


@pytest.fixture
def study(trained, tmp_path):
    folder, plan, data = trained
    shutil.copytree(str(folder), tmp_path / "study")
    return Folder.of(tmp_path / "study"), plan, data


@pytest.fixture
def copied(compared, tmp_path):
    """A copy of the compared study."""
    shutil.copytree(str(compared), tmp_path / "compared")
    return Folder.of(tmp_path / "compared")


def request(rules=RULES, **more):
    settings = {"sizes": SIZES, "seeds": SEEDS, "runs": ("shuffle:1",), **more}
    return SubsetRequest(rules=rules, **settings)


def compute(folder, **more):
    run_here(prepare_subsets(folder, request(**more)))
    return cube_of(folder)


def cube_of(folder, seed=1):
    return sampimp.open_cube(folder)["one"].to_dataset().sel(strategy="shuffle", seed=seed)


def commits_of(folder):
    return read_commits(folder, "influence")


def pool_of_run(folder, data, seed=1):
    """Return labels, tau and NLL of all samples, read from the cube."""
    run = sampimp.open_cube(folder)["one"].to_dataset().sel(strategy="shuffle", seed=seed)
    tau = run["importance"].values.astype(np.float64).sum((0, 1))
    return Pool(
        labels=data.train_labels, scores={"tau": tau, "nll": run["nll"].values[-1].astype(float)}
    )


def result_of(plan, data, chosen, budget, seed, judges):
    """Train on a subset without the store; return its error and mean NLL."""
    config = replace(plan.trials()[0], seed=seed, order_seed=seed)
    model = train_subset(config, data, chosen, budget)
    nll, error = evaluate(model, *(torch.from_numpy(values) for values in judges))
    return error, nll.mean()


def test_values_in_the_cube_are_those_of_trainings_without_the_store(trained, compared):
    folder, plan, data = trained
    cube, pool = cube_of(compared), pool_of_run(folder, data)
    assert cube["rule"].values.tolist()[:4] == ["full", "chosen", "random", "balanced"]
    assert set(cube["rule"].values) == {"full", "chosen", *BASELINES, *RULES}
    assert cube["size"].values.tolist() == [*SIZES, 1.0]
    assert cube["training_seed"].values.tolist() == list(SEEDS)
    for rule in (*BASELINES, *RULES):
        for size in SIZES:
            for budget in ("steps", "epochs"):
                cell = cube.sel(rule=rule, size=size, budget=budget)
                for seed in SEEDS:
                    variant = str(cell.subset_variant.item())
                    assert parse_rule(variant).name == parse_rule(rule).name
                    chosen = select(variant, pool, round(24 * size), seed)
                    training = cell.sel(training_seed=seed)
                    assert np.flatnonzero(training.selected).tolist() == chosen.tolist()
                    expected = result_of(plan, data, chosen, budget, seed, data[2:])
                    actual = training.subset_error.item(), training.subset_nll.item()
                    assert actual == expected
    assert cube.sel(size=1.0).drop_sel(rule="full").subset_error.isnull().all()
    for budget in ("steps", "epochs", "convergence"):
        for seed in SEEDS:
            full = cube.sel(rule="full", size=1.0, budget=budget, training_seed=seed)
            expected = result_of(plan, data, np.arange(24), budget, seed, data[2:])
            assert (full.subset_error.item(), full.subset_nll.item()) == expected
            assert full.selected.all()
    assert "diverged" not in cube.subset_error.attrs


def test_validation_chooses_parameters_and_the_rule(trained, compared):
    folder, plan, data = trained
    cube = cube_of(compared)
    held_out = validation_samples(data.train_labels)
    rest = np.setdiff1d(np.arange(24), held_out)
    pool = pool_of_run(folder, data).part(rest)
    judges = [values[held_out] for values in data[:2]]
    for size in SIZES:
        for budget in ("steps", "epochs"):
            errors = {}
            for rule in (*BASELINES, *RULES):
                for variant in parse_rule(rule).variants:
                    errors[variant] = np.array(
                        [
                            result_of(
                                plan,
                                data,
                                rest[select(variant, pool, round(24 * size), seed)],
                                budget,
                                seed,
                                judges,
                            )[0]
                            for seed in VALIDATION_SEEDS
                        ]
                    )
                    stored = cube.validation_error.sel(variant=variant, size=size, budget=budget)
                    assert stored.item() == pytest.approx(errors[variant].mean(), 1e-12)
            cell = cube.sel(size=size, budget=budget)
            cuts = {name: errors[name] for name in parse_rule("strata").variants}
            best_cut = best_variant(cuts)
            assert cell.subset_variant.sel(rule="strata").item() == best_cut
            by_rule = {rule: errors[rule] for rule in (*BASELINES, *RULES) if rule != "strata"}
            names = sorted(by_rule | {"strata": cuts[best_cut]})
            ordered = {name: (by_rule | {"strata": cuts[best_cut]})[name] for name in names}
            best = best_rule(
                {"random": ordered["random"], "balanced": ordered["balanced"]} | ordered,
                len(judges[1]),
            )
            for name in ("subset_error", "subset_nll", "selected", "subset_variant"):
                chosen, expected = (cell[name].sel(rule=rule) for rule in ("chosen", best))
                np.testing.assert_array_equal(chosen, expected)


def test_one_store_of_a_study_leaves_subsets_out(compared, tmp_path):
    (done,) = consolidate(compared, tmp_path)
    names = ("subset_error", "subset_nll", "selected", "subset_variant", "validation_error")
    assert set(names) <= set(done.left_out)
    store = xr.open_zarr(done.path)
    assert not {*names, "rule", "size", "budget", "training_seed", "variant"} & set(store.variables)
    assert "importance" in store


def test_no_test_label_has_a_part_in_a_selection(trained, compared, tmp_path):
    source = oracles.make_source(name="one")
    permuted = replace(source, test_labels=np.random.default_rng(5).permutation(source.test_labels))
    plan = oracles.make_plan({"one": permuted}, {"shuffle": (1, 2)})
    folder = oracles.start_study(tmp_path / "permuted", plan, {"one": permuted})
    oracles.run_trials(folder, plan, {"one": permuted})
    cube, expected = compute(folder), cube_of(compared)
    assert (source.test_labels != permuted.test_labels).any()
    assert (cube.subset_error != expected.subset_error).any()
    for name in ("selected", "subset_variant", "validation_error"):
        np.testing.assert_array_equal(cube[name], expected[name])


def test_only_what_is_missing_is_trained(copied, monkeypatch):
    before = commits_of(copied)

    def added():
        return [commit for name, commit in commits_of(copied).items() if name not in before]

    with monkeypatch.context() as patch:
        patch.setattr(SubsetWork, "start", None)
        expected = cube_of(copied).compute()
        assert compute(copied).identical(expected)
        compute(copied, rules=("strata",), sizes=(0.5,), seeds=(2,))
    assert not added()
    compute(copied, seeds=(1, 2, 3))
    assert {tuple(c["seeds"]) for c in added()} == {(3,)}
    assert {c["judged_on"] for c in added()} == {"test"}
    assert len(added()) == len(SIZES) * (len(RULES) + 2) + 1
    before |= commits_of(copied)
    compute(copied, sizes=(0.25, 0.75))
    assert {c["size"] for c in added()} == {0.75}
    before |= commits_of(copied)
    compute(copied, rules=("nll-high",))
    assert {c["rule"] for c in added()} == {"nll-high"}
    before |= commits_of(copied)
    compute(copied, rules=("tau-low", "nll-high"), seeds=(3,))
    assert {(c["rule"], c["judged_on"]) for c in added()} == {
        ("tau-low", "validation"),
        ("tau-low", "test"),
        ("nll-high", "test"),
    }
    assert (
        cube_of(copied)
        .subset_error.sel(rule="tau-high", size=0.25, training_seed=3)
        .notnull()[:2]
        .all()
    )


def test_rules_with_open_parameters_wait_for_the_validation(study):
    folder, _, _ = study
    units = prepare_subsets(folder, request(rules=("power", "power:0.25"), sizes=(0.5,))).units
    blocked = {unit.label for unit in units.resolve() if unit.folder is None}
    assert blocked == {"one-shuffle-seed1-subset-power-0.5"}
    labels = [unit.label for unit in units.resolve()]
    assert len(set(labels)) == len(labels)  # power:0.25 is validated once
    compute(folder, rules=("power", "power:0.25"), sizes=(0.5,))
    assert all(unit.commit is not None for unit in units.resolve())
    assert [unit.label for unit in units.resolve()] == labels


def test_a_cut_that_leaves_too_few_is_no_candidate(study):
    folder, _, _ = study
    cube = compute(folder, rules=("strata",), sizes=(0.8,), seeds=(1,))
    assert {name for name in cube["variant"].values if "strata" in name} == {
        "strata:0",
        "strata:0.1",
    }
    assert cube.subset_error.sel(rule="strata", size=0.8, budget="steps").notnull().all()


@pytest.mark.parametrize("method", ["write", "checkpoint", "commit"])
def test_interrupted_trainings_continue_with_the_same_bytes(study, compared, monkeypatch, method):
    folder, _, _ = study
    original, calls = getattr(TrialRecord, method), []

    def failing(record, *arguments):
        calls.append(method)
        if len(calls) % 7 == 1:
            raise KeyboardInterrupt
        original(record, *arguments)
        if len(calls) % 7 == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrialRecord, method, failing)
    for _ in range(120):
        try:
            compute(folder)
        except KeyboardInterrupt:
            continue
        break
    monkeypatch.undo()
    expected = commits_of(compared)
    assert commits_of(folder).keys() == expected.keys()
    for name, commit in commits_of(folder).items():
        for part in ("digests", "curves", "variants"):
            assert commit[part] == expected[name][part]
    assert status.main([str(folder), "--verify"]) == 0


def test_a_search_gives_the_subset_that_it_found(study, monkeypatch):
    folder, _, data = study
    monkeypatch.setattr("sampimp.subsets.metagradient.ROUNDS", 3)
    monkeypatch.setattr("sampimp.sweeps.subset_units.ROUNDS", 3)
    units = prepare_subsets(folder, request(rules=("metagradient",), sizes=(0.5,))).units
    by_label = {unit.label.removeprefix("one-shuffle-seed1-"): unit for unit in units.resolve()}
    assert by_label["subset-metagradient-0.5"].folder is None
    assert by_label["search-0.5"].folder is not None
    unjudged = Comparison(rule="metagradient", size=0.4, is_validated=False)  # of a bisection
    units = prepare_subsets(folder, request(rules=("metagradient",)), [unjudged]).units
    assert [unit.label.removeprefix("one-shuffle-seed1-") for unit in units.resolve()] == [
        *("search-0.4", "subset-full-1", "subset-metagradient-0.4")
    ]
    cube = compute(folder, rules=("metagradient",), sizes=(0.5,))
    selected = cube.selected.sel(rule="metagradient", size=0.5, budget=["steps", "epochs"]).values
    assert (selected == selected[0, 0]).all()
    assert selected[0, 0].sum() == 12
    searches = [c for c in commits_of(folder).values() if c["kind"] == "search"]
    assert sorted(c["judged_on"] for c in searches) == ["test", "validation"]
    assert all(len(c["curves"]["search_error"]) == 3 for c in searches)
    held_out = validation_samples(data.train_labels)
    judged = 0
    for name, commit in commits_of(folder).items():
        if commit["kind"] == "subset" and commit["judged_on"] == "validation":
            place = f"influence/{name}/record.zarr/selected"
            masks = np.asarray(open_array(folder.root, place)[:])
            assert masks.sum(1).tolist() == [12] * len(masks)
            assert not masks[:, held_out].any()
            judged += 1
    assert judged == 3  # with random and balanced


def test_a_run_that_is_not_committed_is_waited_for(study):
    folder, plan, _ = study
    trial = plan.resolve(read_commits(folder))[1]
    place = folder / "trials" / str(trial.trial_id)
    commit = place.read_json("COMMIT.json")
    place.delete("COMMIT.json")
    prepared = prepare_subsets(folder, request(runs=("shuffle:2",)))
    before = prepared.units.resolve()
    assert {unit.awaits for unit in before} == {"one-shuffle-seed2"}
    assert {unit.folder for unit in before} == {None}
    assert [words.partition(":")[0] for words in prepared.waiting_words(before)] == [
        "Waiting for one-shuffle-seed2"
    ]
    place.write_json("COMMIT.json", commit)
    after = prepared.units.resolve()
    assert [(u.label, u.steps) for u in after] == [(u.label, u.steps) for u in before]
    assert any(unit.folder for unit in after)
    assert {unit.awaits for unit in after} == {None}


def test_own_scores_are_those_of_each_run(study):
    folder, _, _ = study
    for seed in (1, 2):
        compute_influence(folder, ["probe:2"], seed=seed)
    more = {"rules": ("final-importance",), "sizes": (0.25,), "seeds": (1,)}
    compute(folder, runs=("shuffle:1", "shuffle:2"), **more)

    def highest(seed):
        cube = cube_of(folder, seed)
        chosen = cube.selected.sel(rule="final-importance", size=0.25, budget="steps")
        scores = cube["final_importance_total"].values
        assert set(np.flatnonzero(chosen.sel(training_seed=1))) == set(np.argsort(-scores)[:6])
        return scores

    assert not np.allclose(highest(1), highest(2))
    # More probes make other scores: the trainings by the newest ones are shown.
    old = highest(1)
    compute_influence(folder, ["probe:16"])
    compute(folder, **more)
    assert not np.allclose(highest(1), old)
    names = {c["scores"] for c in commits_of(folder).values() if c["kind"] == "subset"}
    assert len(names) == 4  # None, and three
    assert all(read_scores(folder, name).shape == (24,) for name in names if name)


def test_a_training_that_diverges_is_kept_as_such(study, monkeypatch, capsys):
    folder, _, _ = study
    original = subset_work.train_subset

    def diverging(config, data, selected, budget):
        model = original(config, data, selected, budget)
        if config.seed == 2 and len(selected) == 6 and budget == "steps":
            next(model.parameters()).data.fill_(torch.nan)
        return model

    monkeypatch.setattr(subset_work, "train_subset", diverging)
    cube = compute(folder, rules=("tau-high",))
    for name in ("subset_error", "subset_nll"):
        results = cube[name].sel(rule="tau-high", size=0.25, budget="steps")
        assert results.isnull().values.tolist() == [False, True]
    assert cube.selected.sel(rule="tau-high", size=0.25, budget="steps").sum(
        "sample"
    ).values.tolist() == [6, 6]
    expected = [
        f"shuffle:1, rule {rule}, size 0.25, steps, seed 2"
        for rule in ("balanced", "random", "tau-high")
    ]
    assert cube.subset_error.attrs["diverged"] == expected == diverged_trainings(folder)
    # A diverged validation counts as an error of 1 in that seed.
    assert (cube.validation_error.sel(size=0.25, budget="steps") >= 0.5).all()
    assert status.main([str(folder)]) == 0
    before = commits_of(folder)
    monkeypatch.setattr(SubsetWork, "start", None)
    compute(folder, rules=("tau-high",))
    assert commits_of(folder) == before


def test_records_of_subsets_are_verified_withdrawn_and_trained_again(copied, capsys):
    assert status.main([str(copied), "--verify"]) == 0
    out = capsys.readouterr().out
    count = len(commits_of(copied))
    assert f"{count} records of influence, retraining and subsets ({count} subset): " in out
    assert re.search(f"retraining and subsets +{count} +every byte", out)
    expected = cube_of(copied).compute()
    name = next(n for n, c in commits_of(copied).items() if c["rule"] == "tau-high")
    chunks = Path(str(copied)).glob(f"influence/{name}/record.zarr/selected/c/**/0")
    chunk = next(path for path in chunks if path.is_file())
    chunk.write_bytes(b"damage")
    assert status.main([str(copied), "--withdraw"]) == 1
    assert f"{name} is damaged: record.zarr/selected/c/" in capsys.readouterr().out
    assert name not in commits_of(copied)
    again = compute(copied).compute()
    for variable in ("subset_error", "subset_nll", "selected"):
        np.testing.assert_array_equal(again[variable], expected[variable])
    assert status.main([str(copied), "--verify"]) == 0


def test_records_of_a_run_that_was_trained_anew_do_not_count(copied, capsys):
    trial = next(name for name in read_commits(copied) if "seed1" in name)
    place = copied / "trials" / trial
    commit = require_commit(place)
    digests = {**commit["digests"], "nll": [["0" * 64]] * len(commit["digests"]["nll"])}
    place.delete("COMMIT.json")
    create_commit(place, {**commit, "digests": digests})
    assert "subset_error" not in sampimp.open_cube(copied)["one"]
    assert status.main([str(copied)]) == 0
    assert f"{len(commits_of(copied))} outdated" in capsys.readouterr().out
    units = prepare_subsets(copied, request()).units.resolve()
    assert all(unit.commit is None for unit in units)
