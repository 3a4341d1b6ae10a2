"""The table of a run against loops over single samples, and its refusals."""

import math

import numpy as np
import oracles
import pandas as pd
import pytest
import xarray as xr

import sampimp
from sampimp.analysis.example_cube import example_cube, with_influence, with_subsets
from sampimp.analysis.sample_frame import to_frame
from sampimp.data import load_source
from sampimp.errors import ConfigError, MissingDataError

LAYERS = ("L1", "L2", "L3", "Out")
NAMES = [
    *("label", "class_name", "importance"),
    *(f"importance_{layer}" for layer in LAYERS),
    *(f"share_{layer}" for layer in LAYERS),
    *("mean_epoch", "final_nll", "confidence", "variability", "correctness_bound"),
]


@pytest.fixture(scope="module")
def cube():
    return with_subsets(with_influence(example_cube())).compute()


def by_loop(cube, sample, strategy="shuffle", seed=1, epochs=6):
    """Return the numbers of a sample by plain Python."""
    run = cube.sel(strategy=strategy, seed=seed, sample=sample).isel(epoch=slice(epochs))
    beta = run.importance.values.astype(float).tolist()
    nll = run.nll.values.astype(float).tolist()
    tau = sum(map(sum, beta))
    layers = {name: sum(row[k] for row in beta) for k, name in enumerate(run.layer.values.tolist())}
    likelihoods = [math.exp(-value) for value in nll]
    mean = sum(likelihoods) / epochs
    return {
        "label": int(run.label),
        "class_name": ["cat", "horse", "ship"][int(run.label)],
        "importance": tau,
        **{f"importance_{name}": value for name, value in layers.items()},
        **{f"share_{name}": value / tau for name, value in layers.items()},
        "mean_epoch": sum(t * sum(row) for t, row in enumerate(beta, 1)) / tau,
        "final_nll": nll[-1],
        "confidence": mean,
        "variability": math.sqrt(sum((p - mean) ** 2 for p in likelihoods) / epochs),
        "correctness_bound": sum(p > 0.5 for p in likelihoods) / epochs,
    }


@pytest.mark.parametrize(("strategy", "seed"), [("shuffle", 1), ("nlm", 2)])
def test_every_column_is_that_of_a_loop_over_the_sample(cube, strategy, seed):
    frame = to_frame(cube, strategy=strategy, seed=seed)
    assert frame.index.name == "sample"
    assert frame.columns.tolist()[: len(NAMES)] == NAMES
    for sample in (0, 7, 118):
        expected = by_loop(cube, sample, strategy, seed)
        assert frame.loc[sample, "class_name"] == expected.pop("class_name")
        for name, value in expected.items():
            assert frame.loc[sample, name] == pytest.approx(value, rel=1e-9)
    assert (frame.attrs["strategy"], frame.attrs["seed"]) == (strategy, seed)


def test_influence_and_subsets_are_those_of_their_run(cube):
    frame, other = to_frame(cube), to_frame(cube, seed=2)
    assert not any(name.startswith(("influence", "selected")) for name in other)
    run = cube.sel(strategy="shuffle", seed=1)
    for target in ("mean", "class:2", "sample:11"):
        np.testing.assert_array_equal(
            frame[f"influence_{target}"], run.influence_total.sel(target=target)
        )
    assert frame.attrs["units"]["influence_mean"] == "nat per unit of sample weight"
    trainings = {"chosen": (3, 2, 5), "tau-high": (3, 2, 5)}  # sizes, budgets, seeds
    for rule, counts in trainings.items():
        used = run.selected.sel(rule=rule, sample=40).values.sum()
        assert frame.loc[40, f"selected_{rule}"] == pytest.approx(used / math.prod(counts))
    assert "selected_full" not in frame
    assert set(frame.attrs["units"]) == set(frame.columns)


def test_of_a_diverged_run_the_epochs_before_count(cube):
    frame = to_frame(cube, strategy="rsio", seed=2)
    expected = by_loop(cube, 5, "rsio", 2, epochs=2)
    assert frame.loc[5, "importance"] == pytest.approx(expected["importance"])
    assert frame.loc[5, "confidence"] == pytest.approx(expected["confidence"])
    assert (frame.attrs["diverged_epoch"], frame.attrs["epochs"]) == (3, 2)
    assert frame.drop(columns="class_name").notna().all(axis=None)


def test_a_sample_without_importance_has_no_share(cube):
    silent = cube.copy()
    silent["importance"] = cube.importance.where(cube.sample != 4, 0)
    row = to_frame(silent).loc[4]
    assert row["importance"] == 0
    assert row[["share_L1", "share_Out", "mean_epoch"]].isna().all()
    unused = cube.importance.where(~((cube.sample == 4) & (cube.epoch == 2)))
    assert np.isnan(to_frame(cube.assign(importance=unused)).loc[4, "importance"])


def test_names_of_files_are_a_column(cube):
    named = cube.assign_coords(file=("sample", [f"cats/{i}.png" for i in range(120)]))
    assert to_frame(named).loc[3, "file"] == "cats/3.png"
    assert "file" not in to_frame(cube)


def test_the_frame_of_a_study_says_where_it_is_from(tmp_path):
    sources = {"digits": load_source("digits")}
    plan = oracles.make_plan(sources, {"shuffle": (1,)}, hidden=(6,), batch_size=50)
    folder = oracles.start_study(tmp_path, plan, sources)
    with pytest.raises(MissingDataError, match=r"committed run of shuffle, seed 1(.|\n)*missing"):
        to_frame(sampimp.open_cube(folder))
    records = oracles.run_trials(folder, plan, sources)
    tree = sampimp.open_cube(folder)
    frame = to_frame(tree)
    cube = tree["digits"].to_dataset()
    assert frame.equals(to_frame(cube))
    assert frame.equals(sampimp.to_frame(tree["digits"]))
    assert frame.attrs["digest"] == sources["digits"].digest
    assert frame.attrs["trial"] == str(cube.trial.sel(strategy="shuffle", seed=1).values)
    assert (frame.attrs["dataset"], frame.attrs["epochs"]) == ("digits", 3)
    assert frame.attrs["learning_rate"] == 0.3
    (epochs,) = records.values()
    correct = 1 - np.mean([record.arrays["train_error"] for record in epochs[1:]])
    bound = frame["correctness_bound"].mean()
    assert 0.3 * correct < bound <= correct
    frame.to_parquet(tmp_path / "frame.parquet")
    stored = pd.read_parquet(tmp_path / "frame.parquet")
    pd.testing.assert_frame_equal(stored, frame, check_exact=True)
    assert stored.attrs == frame.attrs


@pytest.mark.parametrize(
    ("change", "options", "error", "words"),
    [
        (lambda cube: cube, {"strategy": "sim", "seed": 3}, MissingDataError, "committed run of s"),
        (
            lambda cube: cube,
            {"strategy": "sorted"},
            ConfigError,
            "shuffle_by_seed(.|\n)*Got sorted",
        ),
        (lambda cube: cube, {"seed": 9}, ConfigError, r"1, 2, 3(.|\n)*Got 9"),
        (lambda cube: cube.drop_vars("nll"), {}, MissingDataError, "none with nll; it has imp"),
        (lambda cube: cube.isel(strategy=0), {}, ConfigError, "without the dimension strategy"),
        (
            lambda cube: xr.DataTree.from_dict({"mnist": cube, "cifar10/cnn": cube}),
            {},
            ConfigError,
            r"2 nodes: mnist, cifar10/cnn(.|\n)*to_frame\(tree\['mnist'\]\)",
        ),
        (lambda cube: xr.DataTree(), {}, ConfigError, "0 nodes: none"),
        (
            lambda cube: cube.assign(diverged_epoch=cube["diverged_epoch"].fillna(1)),
            {},
            MissingDataError,
            "diverged in its first epoch",
        ),
    ],
)
def test_what_is_no_run_of_one_node_is_refused(cube, change, options, error, words):
    with pytest.raises(error, match=words):
        to_frame(change(cube), **options)


def test_the_only_node_of_a_tree_is_meant(cube):
    tree = xr.DataTree.from_dict({"folder": xr.Dataset(), "mnist/cnn": cube})
    assert to_frame(tree).equals(to_frame(cube))
