"""Influence at the fixed point of a committed run (-H^-1 g, eq. 4 of the paper), as a unit of work.

Map: `FixedPointWork`; `fixed_point_parts`, which identify its record.
"""

import time
from typing import get_args

from sampimp.config import TrainingConfig
from sampimp.influence.fixed_point import KRYLOV_STEPS, fixed_point_influence
from sampimp.influence.linear_stack import Curvature
from sampimp.influence.trial_run import TrialRun
from sampimp.schema import StepRecord
from sampimp.store.influence_layouts import FixedPointLayout
from sampimp.sweeps.influence_work import RunWork, named_targets

SOLVED_CURVATURES: tuple[Curvature, ...] = get_args(Curvature)
"""The matrices in the place of the Hessian of the formula."""

MULTIPLES = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
"""Dampings, in multiples of the default one (arbitrary; the best of them is reported as such)."""


class FixedPointWork(RunWork):
    """-H^-1 g of a run for some targets; each step is one target and one curvature."""

    layout: FixedPointLayout

    def start(self, checkpoint: tuple[int, bytes] | None) -> None:
        """Load the final parameters; the first step is the one after the checkpoint's."""
        config, data, schedule = self.run.open()
        self._replayed = TrialRun(config, data, schedule, parameters=self.run.parameters)
        self.run.check_network(self._replayed.model)
        self._replayed.load_start(config.training.epochs + 1)
        self._targets = named_targets(self.identity["targets"], data, self._replayed.layers)
        self._next = checkpoint[0] if checkpoint else 0

    def advance(self) -> StepRecord | None:
        """Solve for one target and one curvature."""
        if self._next == self.layout.steps:
            return None
        begun = time.perf_counter()
        target, curvature = divmod(self._next, len(SOLVED_CURVATURES))
        influence = fixed_point_influence(
            self._replayed.loss_parts,
            self._targets[target].gradient(self._replayed.model),
            self.identity["dampings"],
            curvature=self.identity["curvatures"][curvature],
            weight_decay=self.run.plan.training.weight_decay,
            steps=self.identity["krylov_steps"],
        )
        self._next += 1
        return StepRecord(
            step=self._next,
            arrays={"fixed_point_influence": influence.astype("float32")},
            seconds=time.perf_counter() - begun,
        )

    def state(self) -> bytes:
        """Return nothing: the number of the step is enough."""
        return b""

    def release(self) -> None:
        """Drop the run."""
        del self._replayed, self._targets


def fixed_point_parts(training: TrainingConfig, sample_count: int) -> dict[str, object]:
    """Return the entries of a record's identity that say how it is computed.

    The default damping is 1 / (sum of the learning rates of all steps): gradient descent of that
    length has moved along an eigenvector of C with eigenvalue c as far as (C + damping)^-1 does, up
    to a factor of at most 1.3.

    Parameters
    ----------
    training
        How the run was trained.
    sample_count
        Size of the training set.
    """
    batches = -(-sample_count // training.batch_size)
    rates = sum(training.rate(epoch) for epoch in range(1, training.epochs + 1)) * batches
    return {
        "curvatures": list(SOLVED_CURVATURES),
        "dampings": [float(f"{multiple / rates:.6g}") for multiple in MULTIPLES],
        "default_damping": float(f"{1 / rates:.6g}"),
        "krylov_steps": KRYLOV_STEPS,
    }
