"""Committed influence records with random values, for studies made by `oracles`."""

import numpy as np

from sampimp.schema import StepRecord, digest_json, variable
from sampimp.store.influence_layouts import INFLUENCE_FOLDER, layout_of, record_id
from sampimp.store.integrity import record_digest
from sampimp.store.record import TrialRecord

EXACT = {"eps": 0.0, "gate_width": 0.0}


def identity_of(run, kind, targets, **more):
    """Return the identity of a record of a committed trial."""
    identity = {
        "kind": kind,
        "dataset": run.config.dataset,
        "strategy": run.config.strategy,
        "seed": run.config.seed,
        "trial": run.trial_id,
        "record": record_digest(run.commit),
        "targets": list(targets),
        "units": ["nat"] * len(targets),
        "smoothing": EXACT,
        "code": "0",
        **more,
    }
    return {**identity, "fingerprint": digest_json(identity)}


def begin(folder, plan, run, identity):
    """Begin an attempt at a record."""
    name = record_id(run.label, identity["kind"], identity["fingerprint"])
    layout = layout_of(identity, plan.layout(run.config.dataset))
    return TrialRecord(folder / INFLUENCE_FOLDER / name, identity, layout), layout


def steps_of(layout, seed=0):
    """Return random steps; what is written as a whole comes with the last one."""
    rng = np.random.default_rng(seed)
    steps = []
    for step in range("training_state" not in layout.variables, layout.steps + 1):
        arrays = {}
        for name in layout.variables:
            if layout.is_stepwise(name):
                shape = layout.shape(name)[1:]
            elif step == layout.steps:
                shape = layout.shape(name)
            else:
                continue
            if name == "training_state":
                arrays[name] = rng.bytes(step + 10)
            elif variable(name).dtype == "bool":
                arrays[name] = rng.random(shape) < 0.3
            else:
                arrays[name] = rng.random(shape).astype(variable(name).dtype)
        steps.append(StepRecord(step=step, arrays=arrays, seconds=0.5))
    return steps


def write_made(folder, plan, run, kind, targets, seed=0, growth=None, **more):
    """Write and commit a record; return its steps and its folder."""
    record, layout = begin(folder, plan, run, identity_of(run, kind, targets, **more))
    steps = steps_of(layout, seed)
    for step in steps:
        record.write(step)
    record.commit(None, {"growth_epochs": growth or {}})
    return steps, record.folder
