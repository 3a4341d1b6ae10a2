"""A tiny study trained without Ray, and reverse passes through its run in memory."""

import oracles

from sampimp.data import scale_inputs
from sampimp.influence.reverse_pass import ReversePass
from sampimp.influence.targets import make_targets
from sampimp.influence.trial_run import TrialRun, forward_states
from sampimp.training.strategies import make_schedule


def make_study(out, commit=lambda trial: True, grid=None, **changes):
    """Train a tiny study without Ray."""
    sources = {"one": oracles.make_source(name="one")}
    plan = oracles.make_plan(sources, grid or {"shuffle": (1,)}, **changes)
    folder = oracles.start_study(out, plan, sources)
    oracles.run_trials(folder, plan, sources, commit=commit)
    return folder, plan, scale_inputs(sources["one"], plan.training.input_scaling)


def reverse_pass(plan, data, specs, **options):
    """Return a pass in memory, whose states come from a forward replay."""
    (config, *_) = plan.trials()
    count, size = len(data.train_labels), plan.training.batch_size
    schedule = make_schedule("shuffle", count, size, 0)
    unknown = lambda state: None  # noqa: E731
    states = dict(forward_states(config, data, schedule, parameters=unknown))
    run = TrialRun(config, data, schedule, parameters=unknown, states=states.__getitem__)
    return ReversePass(run, make_targets(specs, data, run.layers), **options)
