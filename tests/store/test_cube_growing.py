"""A cube that is opened while its study grows: each trial is NaN or complete."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import oracles

import sampimp
from sampimp.errors import StoreError
from sampimp.schema import CURVES
from sampimp.store.datasets import write_source
from sampimp.store.location import Folder
from sampimp.store.plan import read_commits
from sampimp.store.record import TrialRecord


def grow(folder, plan, sources, done):
    """Write a study step by step, with overlapping attempts; `done` has its records."""
    folder.write_json("study.json", plan.to_json())
    for key, source in sources.items():
        write_source(folder / "datasets" / f"{key}.zarr", source)

    def begin(trial):
        place = folder / "trials" / trial.trial_id
        return TrialRecord(place, oracles.identity_of(trial), plan.layout(trial.config.dataset))

    for _ in range(2):  # the references, then the strategies that sort by them
        for trial in plan.resolve(read_commits(folder)):
            if trial.trial_id is None or trial.commit is not None:
                continue
            start, *epochs = done[trial.label]
            zeros = [
                replace(r, arrays={n: np.zeros_like(v) for n, v in r.arrays.items()})
                for r in (start, *epochs)
            ]
            first = begin(trial)
            first.write(start)
            first.write(epochs[0])
            first.checkpoint(1, b"state")
            second = begin(trial)
            assert second.newest_checkpoint() == (1, b"state")
            first._require_newest = lambda: None  # it checked just before the second began
            first.write(zeros[2])
            for record in epochs[1:]:
                second.write(record)
            second.commit(None)
            third = begin(trial)  # started by a driver that did not see the commit
            third.write(zeros[0])
            third.write(zeros[1])


def test_a_growing_study_opens_at_any_time_with_trials_nan_or_complete(tmp_path):
    sources = {"one": oracles.make_source()}
    plan = oracles.make_plan(sources, {"shuffle": (1, 2), "nlo": (1, 2), "sim": (1,)})
    model = oracles.start_study(tmp_path / "model", plan, sources)
    done = oracles.run_trials(model, plan, sources)
    folder, complete = Folder.of(tmp_path / "growing"), set()
    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(grow, folder, plan, sources, done)
        finished = False
        while not finished:
            finished = writer.done()  # before opening: the last cube is complete
            try:
                node = sampimp.open_cube(folder)["one"].compute()
            except StoreError:  # there is no study before study.json
                assert not complete
                continue
            for strategy, seed in itertools.product(node["strategy"].values, (1, 2)):
                cell, label = node.sel(strategy=strategy, seed=seed), f"one-{strategy}-seed{seed}"
                if not cell["trial"].item():
                    assert label not in complete
                    assert all(cell[name].isnull().all() for name in ("importance", "parameters"))
                    continue
                complete.add(label)
                start, *epochs = done[label]
                for name in ("importance", "nll", "batch", *CURVES):
                    expected = [record.arrays[name] for record in epochs]
                    np.testing.assert_array_equal(cell[name], expected)
                expected = [record.arrays["parameters"] for record in (start, *epochs)]
                np.testing.assert_array_equal(cell["parameters"], expected)
        writer.result()
    assert complete == set(done)


def test_a_trial_committed_later_appears_when_the_study_is_opened_again(tmp_path):
    sources = {"one": oracles.make_source()}
    plan = oracles.make_plan(sources, {"shuffle": (1,), "nlo": (1,)})
    folder = oracles.start_study(tmp_path, plan, sources)
    empty = sampimp.open_cube(tmp_path)["one"]
    assert empty["nll"].sizes == {"strategy": 2, "seed": 1, "epoch": 3, "sample": 24}
    done = oracles.run_trials(folder, plan, sources)
    assert empty["nll"].isnull().all()  # an open cube does not change
    full = sampimp.open_cube(tmp_path)["one"]
    assert full["nll"].notnull().all()
    np.testing.assert_array_equal(
        full["nll"].sel(strategy="nlo", seed=1, epoch=3), done["one-nlo-seed1"][3].arrays["nll"]
    )


def test_a_data_set_not_yet_stored_has_no_labels(tmp_path):
    sources = {"one": oracles.make_source()}
    plan = oracles.make_plan(sources, {"shuffle": (1,)})
    folder = Folder.of(tmp_path)
    folder.write_json("study.json", plan.to_json())
    node = sampimp.open_cube(tmp_path)["one"]
    assert node["importance"].shape == (1, 1, 3, 3, 24)
    assert node["importance"].isnull().all()
    assert not {"label", "image"} & set(node.variables)
    write_source(folder / "datasets" / "one.zarr", sources["one"])
    np.testing.assert_array_equal(
        sampimp.open_cube(tmp_path)["one"]["label"], sources["one"].train_labels
    )
