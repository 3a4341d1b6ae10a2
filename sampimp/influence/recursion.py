"""The forward recursion (eq. 5 of the paper): how a sample's weight moves the final parameters.

    d theta_{t+1} / d v_i = d theta_t / d v_i + the update's tangent (`updates`), where
    dG = H_t (d theta_t / d v_i) + g_i, the last term in the steps that use the sample

It costs 1.7 trainings for each sample, so it is for a few samples. It uses neither adjoints nor
probes, and is what the reverse pass is tested against: for any target, dT/dv_i = <dT/d theta, d
theta_E/d v_i>.

Map: `final_tangents`.

References
----------
Gao & Jojic (2017), section 4, eq. 5.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from sampimp.importance.evaluation import restored_modes
from sampimp.importance.per_sample import at_least_float32
from sampimp.influence.linearized_step import ModelState, TakenStep
from sampimp.influence.replay import ReplayableRun, Smoothing
from sampimp.influence.updates import PARAMETER, Block


def final_tangents(
    run: ReplayableRun, samples: Sequence[int], *, smoothing: Smoothing | None = None
) -> list[Tensor]:
    """Return the derivative of the final parameters by the weights of some samples.

    Parameters
    ----------
    run
        The recorded run; it is trained once more.
    samples
        S positions in the training set.
    smoothing
        As for `ReversePass`. Default: none, the exact derivative.

    Returns
    -------
    list of Tensor
        For each of the run's `parameters` the derivative (S, P...), in parameter per unit of
        weight, the weight being that of all steps of all epochs.
    """
    run.load_start(1)
    tangents: list[Block] = [
        {PARAMETER: at_least_float32(parameter).new_zeros((len(samples), *parameter.shape))}
        for parameter in run.parameters
    ]
    with restored_modes(run.model):
        for epoch in range(1, run.epochs + 1):
            for number, step in enumerate(run.begin(epoch)):
                taken = TakenStep.take(run, step, keeps_gradients=number == 0)
                after = ModelState.now(run)
                places = {
                    number: np.flatnonzero(run.samples(step) == sample).tolist()
                    for number, sample in enumerate(samples)
                }
                taken.linearized(run, smoothing or Smoothing()).push(
                    tangents, {number: rows for number, rows in places.items() if rows}
                )
                after.restore(run)
            run.check_end(epoch)
    return [block[PARAMETER] for block in tangents]
