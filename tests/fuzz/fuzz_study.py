"""The study that the fuzzer changes: tiny, with every kind of file; and data sets beside it.

Map: `make_study`, `start_run`; `REQUEST` (of the stored trainings on subsets), `quick_report`.
"""

import contextlib
import random
from unittest import mock

import influence_made
import numpy as np
import oracles
from PIL import Image

import sampimp
from sampimp.analysis.explorer.explorer_writer import write_explorer
from sampimp.analysis.report import write
from sampimp.schema import digest_json
from sampimp.store.plan import read_commits
from sampimp.store.plan_files import store_plan
from sampimp.store.record import TrialRecord
from sampimp.store.score_files import write_scores
from sampimp.store.sharded import consolidate
from sampimp.store.snapshots import write_snapshot
from sampimp.sweeps.fixed_point_work import fixed_point_parts
from sampimp.sweeps.full_study import write_study_report
from sampimp.sweeps.influence_study import compute_influence
from sampimp.sweeps.subset_study import SubsetRequest
from sampimp.training.loop import TrainingRun
from sampimp.training.strategies import make_schedule

REQUEST = SubsetRequest(rules=("tau-high",), sizes=(0.5,), seeds=(1, 2), runs=("shuffle:1",))
"""What the stored trainings on subsets are an answer to."""


def make_study(out):
    """Make the study, of two drivers, and the data sets."""
    sources = {"one": oracles.make_source(shape=(1, 4, 4))}
    finished, grid = {"shuffle": (1,), "rand": (1,), "sio": (1,)}, {"shuffle": (1, 2)}
    options = {"epochs": 3, "optimizer": "momentum"}
    plan = oracles.make_plan(sources, finished, **options)
    folder = oracles.start_study(out / "study", plan, sources)
    store_plan(folder, plan)
    oracles.run_trials(folder, plan, sources)
    trials = plan.resolve(read_commits(folder))
    run = next(trial for trial in trials if trial.label == "one-shuffle-seed1")
    _write_influence(folder, plan, run)
    _write_subsets(folder, plan, run)
    _write_snapshots(folder, plan, run)
    consolidate(folder)
    plan, _ = store_plan(folder, oracles.make_plan(sources, grid, **options))
    trials = plan.resolve(read_commits(folder))
    _begin_trial(folder, plan, next(t for t in trials if t.commit is None), sources["one"])
    folder.write_bytes("withdrawn/plans-0001.json", b"a damaged plan")
    write_explorer(str(folder))
    with quick_report(random.Random(0)):
        write_study_report(str(folder), mock.MagicMock())
    _make_data_sets(out)


def _write_influence(folder, plan, run):
    """Write a record of each kind that has targets, and states."""

    def write_record(kind, targets, **more):
        influence_made.write_made(folder, plan, run, kind, targets, **more)

    compute_influence(folder, ["mean"], strategy="shuffle", seed=1)  # with states
    write_record("influence", ["class:1", "mean-error"], growth={"class:1": 2})
    write_record("probes", ["probe:0", "probe:1", "probe:0@L1", "probe:0@L2", "probe:0@Out"])
    write_record("fixed-point", ["mean"], **fixed_point_parts(plan.training, 24))
    retrained = {"jitter": 1e-3, "renormalised": False, "denominator": "batch size kept"}
    removals = ["none", "random:3", "top:7"]
    write_record("retrain", ["mean"], **retrained, removals=removals, repeats=2)


def _write_subsets(folder, plan, run):
    """Write what a comparison of rules on one run leaves, a search and scores."""
    scores = write_scores(folder, np.linspace(0, 1, 24))
    search = {"judged_on": "test", "count": 12, "rounds": 2}
    _write_derived(folder, plan, run, "search", search)
    _write_trainings(folder, plan, run, "full", 1.0, ("steps", "convergence"))
    for rule in ("random", "balanced", "tau-high"):
        _write_trainings(folder, plan, run, rule, 0.5, ("steps", "epochs"))
        _write_trainings(folder, plan, run, rule, 0.5, ("steps", "epochs"), "validation")
    _write_trainings(folder, plan, run, "scores:mine", 0.5, ("steps",), scores=scores)


def _write_trainings(folder, plan, run, rule, size, budgets, split="test", scores=None):
    parts = {
        "judged_on": split,
        "judges": 9,
        "rule": rule,
        "variants": [rule] * len(budgets),
        "size": size,
        "count": round(size * 24),
        "budgets": list(budgets),
        "seeds": [1, 2],
        "scores": scores,
        "search": None,
    }
    _write_derived(folder, plan, run, "subset", parts)


def _write_derived(folder, plan, run, kind, parts):
    """Write a record of a kind that has no targets."""
    identity = influence_made.identity_of(run, kind, [], **parts)
    for name in ("targets", "units", "smoothing", "fingerprint"):
        del identity[name]
    identity["fingerprint"] = digest_json(identity)
    record, layout = influence_made.begin(folder, plan, run, identity)
    for step in influence_made.steps_of(layout):
        record.write(step)
    record.describe({})
    record.commit(None, {"time": 1.75e9})


def _write_snapshots(folder, plan, run):
    layout = plan.layout("one")
    values = np.ones(layout.shape("importance")[1:], np.float32)
    digests = write_snapshot(folder / "trials" / run.trial_id, layout, 2, values)
    folder.write_json("snapshots.json", {run.trial_id: {"2": digests}})


def _begin_trial(folder, plan, trial, source):
    """Write two epochs of a trial, with checkpoints, and an error."""
    place, identity = folder / "trials" / trial.trial_id, oracles.identity_of(trial)
    record = TrialRecord(place, identity, plan.layout("one"))
    record.describe({"machine": {"cpus": 2}, "order_seed": 0})
    training, records = start_run(plan, trial, source)
    for _ in range(3):
        epoch = next(records)
        record.write(epoch)
        if epoch.step:
            record.checkpoint(epoch.step, training.state())
    record.fail(RuntimeError("an error of the study"))


def _make_data_sets(out):
    """Make an .npz file, and a folder of images of several formats."""
    rng = np.random.default_rng(0)
    arrays = {"train_inputs": rng.random((8, 3)), "train_labels": np.arange(8) % 2}
    np.savez(out / "a.npz", **arrays, test_inputs=rng.random((2, 3)), test_labels=np.arange(2))
    for part in ("train", "test"):
        for name in ("a", "b"):
            (out / "images" / part / name).mkdir(parents=True)
            pixels = rng.integers(0, 255, (6, 5, 3), dtype=np.uint8)
            for suffix in ("png", "gif", "tiff"):
                Image.fromarray(pixels).save(out / "images" / part / name / f"x.{suffix}")


def start_run(plan, trial, source):
    """Return the training run of a trial, and its records."""
    data = sampimp.data.scale_inputs(source, "unit")
    size = plan.training.batch_size
    schedule = make_schedule(trial.config.strategy, len(data.train_labels), size, 0, None)
    run = TrainingRun(trial.config, data, schedule)
    return run, run.records()


@contextlib.contextmanager
def quick_report(draw):
    """Let reports have one or no figure of each kind, and one of the results that take long."""
    from sampimp.analysis.results import analyse

    slow = ("clusters", "parameter_paths", "removal_effects", "method_scores", "subset_errors")
    slow += ("importance_against_nll", "importance_groups", "influential_samples", "stability")
    slow += ("influence_by_layer", "removal_sizes", "selected_samples", "importance_histogram")
    kept = draw.choice(slow)

    def refuse(*arguments, **options):
        raise sampimp.errors.MissingDataError("all results", "a quick report", "fuzz", "wait")

    def draw_one(cube, results, progress, plans, prefix):
        chosen = [draw.choice(plans)] if draw.random() < 0.3 else []
        return draw_figures(cube, results, progress, chosen, prefix)

    draw_figures = write.draw_figures
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(write, "draw_figures", draw_one))
        for name in slow:
            if name != kept:
                patches.enter_context(mock.patch.object(analyse, name, refuse))
        yield
