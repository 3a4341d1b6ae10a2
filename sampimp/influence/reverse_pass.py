"""The reverse pass: what each sample did, in each epoch and layer, to the final model.

T is a target, a function of the final parameters; v_i^t is the weight of sample i's loss in step t,
which is 1. Training is one map from the weights to the final parameters; its derivative is found
backward through the recorded run (reverse unrolling, exact up to rounding):

    lambda = dT/d theta_E, sigma = 0                    adjoints of parameters and optimizer state
    for epoch = E .. 1:
        replay the epoch from its stored start; its end must be the stored one
        for step t of the epoch, last first:
            gamma, lambda, sigma = the adjoint of the optimizer's update (`updates`)
            influence of sample i in layer d: dT/d v_i^t [d] = < gamma_d, g_{i,d} >
            lambda += H_t gamma                         Hessian of the step's loss

g_{i,d} is sample i's own part of the step's gradient in layer d, with the factor 1/B of a mean
loss, whose denominator does not change with the weights. To first order, **removing sample i
changes T by minus its influence**, summed over epochs and layers.

Replaying an epoch takes its parameters at every step. As many steps as `memory` holds are kept;
for longer epochs the state at the start of each segment is kept, and the segments are trained once
more.

Map: `ReversePass`, `EpochInfluence` (its result).

References
----------
Gao & Jojic (2017), section 4 (eq. 5, the forward recursion); Maclaurin et al. (2015), reverse
differentiation of training; Hara et al. (2019), SGD-influence.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sampimp.errors import ConfigError, RecordError
from sampimp.importance.evaluation import restored_modes
from sampimp.importance.per_sample import as_matrix, at_least_float32, finest_dtype
from sampimp.influence.derivative_checks import bound
from sampimp.influence.linearized_step import ModelState, TakenStep, group_settings
from sampimp.influence.replay import ReplayableRun, Smoothing
from sampimp.influence.targets import Target, as_targets
from sampimp.influence.updates import PARAMETER, Block, linearized_update
from sampimp.schema import INFLUENCE_VARIABLES, SCHEMA_VERSION, __version__
from sampimp.training.checkpoint_states import load_tensors, restoring, unusable

if TYPE_CHECKING:
    import xarray as xr

SEGMENT_MEMORY = 2**29
"""Bytes for the steps that are kept at a time: 140 steps of the paper's network (arbitrary)."""

LARGEST_GROWTH = 1e6
"""Growth of an adjoint's norm beyond which the derivative says little about a finite removal."""


class InfiniteDerivativeError(RecordError):
    """Going backward, the derivatives grew beyond all numbers."""


@dataclass(frozen=True, kw_only=True)
class EpochInfluence:
    """The influence of the samples in one epoch."""

    epoch: int
    influence: np.ndarray
    """(target, layer, sample), float64 if a parameter is, else float32; NaN for unused samples."""
    adjoint_norm: np.ndarray
    """|lambda| at the start of the epoch, (target,); its growth bounds what the derivative says."""


class ReversePass:
    """Goes backward through a recorded run, for several targets at once.

    Parameters
    ----------
    run
        The run: `sampimp.influence.trial_run.TrialRun` of a study, or
        `sampimp.influence.recorded_loop.RecordedLoop` of a loop of your own.
    targets
        Functions of the final parameters, K of them: `sampimp.influence.targets`, or by name
        functions of the model that return a scalar tensor, such as the mean loss of test samples.
        They are called in evaluation mode. 8 to 16 at once are the cheapest per target.
    smoothing
        Default: none, the exact derivative.
    memory
        Bytes for the steps of an epoch that are kept at a time.

    Raises
    ------
    UnsupportedError
        The optimizer has no linearized update, or a target depends on the parameters by paths that
        autograd does not follow.
    ConfigError
        A target is no function of the model's parameters.
    RecordError
        A target is not finite at the final parameters.
    """

    def __init__(
        self,
        run: ReplayableRun,
        targets: Sequence[Target] | Mapping[str, Callable[[nn.Module], Tensor]],
        *,
        smoothing: Smoothing | None = None,
        memory: int = SEGMENT_MEMORY,
    ) -> None:
        self.run, self.targets = run, as_targets(targets)
        self.smoothing, self._memory = smoothing or Smoothing(), memory
        self._rule = linearized_update(run.optimizer)
        self.next_epoch = run.epochs
        """The epoch that is next; 0 once all are done."""
        run.load_start(run.epochs + 1)
        self._parameters = run.parameters
        self._adjoints = self._begin()
        self.initial_norm = _norms(self._adjoints)
        """|lambda| at the end of training, (target,)."""
        self._has_begun = False

    def _begin(self) -> list[Block]:
        """Return the adjoints at the end of training."""
        adjoints: list[Block] = []
        for parameter in self._parameters:
            shape = (len(self.targets), *parameter.shape)
            adjoints.append({PARAMETER: at_least_float32(parameter).new_zeros(shape)})
        places = {id(p): place for place, p in enumerate(self.run.model.parameters())}
        for number, target in enumerate(self.targets):
            gradients = target.gradient(self.run.model)
            chosen = [gradients[places[id(parameter)]] for parameter in self._parameters]
            if not all(bool(gradient.isfinite().all()) for gradient in chosen):
                raise RecordError(
                    expected="a target with a finite derivative at the final parameters",
                    got="NaN or infinity",
                    where=f"target {target.name}",
                    todo="leave the target out, or choose a bounded one such as mean-error",
                )
            for block, gradient in zip(adjoints, chosen, strict=True):
                block[PARAMETER][number] = gradient
        return adjoints

    @property
    def growth(self) -> np.ndarray:
        """|lambda| now, over its value at the end of training, (target,)."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return _norms(self._adjoints) / self.initial_norm

    def epochs(self) -> Iterator[EpochInfluence]:
        """Go through the remaining epochs, the last one first; end at the final parameters.

        Yields
        ------
        EpochInfluence
            One for each epoch.

        Raises
        ------
        RecordError
            A replayed epoch differs from the recorded one, or a target is no function of the
            parameters.
        InfiniteDerivativeError
            The derivatives are not finite.
        UnsupportedError
            A step cannot be differentiated twice, or its derivative would be a wrong one.
        """
        while self.next_epoch > 0:
            with restored_modes(self.run.model):
                result = self._reverse_epoch(self.next_epoch)
            if not self._has_begun:
                self._require_same_targets()
                self._has_begun = True
            if not np.isfinite(result.adjoint_norm).all():
                raise InfiniteDerivativeError(
                    expected="finite derivatives",
                    got="NaN or infinity: they grow by a factor in every step",
                    where=f"epoch {self.run.epoch_labels[self.next_epoch - 1]}",
                    todo="smooth Adam's division (eps=1e-4), leave gate_width out, or train with a "
                    "lower rate or a smooth activation",
                )
            self.next_epoch -= 1
            yield result
        self.run.load_start(self.run.epochs + 1)

    def _require_same_targets(self) -> None:
        """Raise RecordError if a target has another derivative after steps were taken."""
        self.run.load_start(self.run.epochs + 1)
        norms = _norms(self._begin()).tolist()
        largest = bound(max(torch.finfo(p.dtype).eps for p in self._parameters))
        for target, norm, before in zip(
            self.targets, norms, self.initial_norm.tolist(), strict=True
        ):
            if abs(norm - before) > largest * before:
                raise RecordError(
                    expected="a target that is a function of the model's parameters",
                    got=f"a derivative of norm {norm:.6g} instead of {before:.6g} at the same ones",
                    where=f"target {target.name}",
                    todo="use no random numbers in it, nor values that the model keeps in "
                    "attributes from one batch to the next (running statistics)",
                )

    def to_dataset(self) -> "xr.Dataset":
        """Go through all remaining epochs; return their influence as a labelled Dataset.

        Returns
        -------
        xarray.Dataset
            `influence` (target, epoch, layer, sample), in the target's unit per unit of a sample's
            weight, NaN where an epoch did not use a sample; `adjoint_norm` (target, epoch).
            Removing a sample changes a target by minus its influence, summed over epoch and layer,
            to first order.

        Raises
        ------
        ConfigError
            No epoch remains.
        RecordError, UnsupportedError
            As for `epochs`.
        """
        import xarray as xr  # here, so that a trial's worker does not import it

        results = sorted(self.epochs(), key=lambda result: result.epoch)
        if not results:
            raise ConfigError(
                expected="a reverse pass with epochs to go through",
                got="one that is at its end",
                where="ReversePass.to_dataset",
                todo="make another ReversePass of the run",
            )
        labels = [self.run.epoch_labels[result.epoch - 1] for result in results]
        influence = np.stack([result.influence for result in results], 1)
        norms = np.stack([result.adjoint_norm for result in results], 1)
        described = {
            name: {"units": INFLUENCE_VARIABLES[name].units, "long_name": variable.long_name}
            for name, variable in INFLUENCE_VARIABLES.items()
            if name in ("influence", "adjoint_norm")
        }
        return xr.Dataset(
            {
                "influence": (
                    ("target", "epoch", "layer", "sample"),
                    influence,
                    {
                        **described["influence"],
                        "sign": "effect of a removal = -influence, to first order",
                        "denominator": "the batch size, also where a sample is removed",
                        "smoothing": str(vars(self.smoothing)),
                    },
                ),
                "adjoint_norm": (("target", "epoch"), norms, described["adjoint_norm"]),
            },
            coords={
                # As objects: Zarr 3 has no specification of strings of a fixed length, and warns.
                "target": np.array([target.name for target in self.targets], dtype=object),
                "epoch": labels,
                "layer": np.array(self.run.layers, dtype=object),
                "sample": np.arange(self.run.sample_count),
                "target_units": ("target", [target.units for target in self.targets]),
            },
            attrs={"schema_version": SCHEMA_VERSION, "sampimp_version": __version__},
        )

    def state(self) -> bytes:
        """Return the adjoints after the epochs so far, from which `restore` continues."""
        buffer = io.BytesIO()
        torch.save({"next_epoch": self.next_epoch, "adjoints": self._adjoints}, buffer)
        return buffer.getvalue()

    def restore(self, state: bytes) -> None:
        """Continue from a state of the same run and targets.

        Raises
        ------
        UnusableCheckpointError
            The state is of others, or none.
        """
        what = f"a reverse pass for {len(self.targets)} targets"
        with restoring(what):
            restored = load_tensors(state, self._parameters[0].device)
            epoch, adjoints = restored["next_epoch"], restored["adjoints"]
            if type(epoch) is not int or not 0 <= epoch <= self.run.epochs:
                raise unusable(what, f"next epoch {epoch}")
            if not _fit(adjoints, self._adjoints):
                raise unusable(what, "adjoints of other parameters or targets")
        self.next_epoch, self._adjoints = epoch, adjoints

    # One epoch.

    def _reverse_epoch(self, epoch: int) -> EpochInfluence:
        run = self.run
        shape = (len(self.targets), len(run.layers), run.sample_count)
        values = torch.zeros(shape, dtype=torch.float64)
        used = np.zeros(run.sample_count, bool)
        for taken in self._replayed(epoch):
            samples = run.samples(taken.step)
            inner = taken.linearized(run, self.smoothing).pull(self._adjoints)
            values.index_add_(2, torch.from_numpy(samples), inner.double().cpu())
            used[samples] = True
        values[:, :, torch.from_numpy(~used)] = torch.nan
        return EpochInfluence(
            epoch=epoch,
            influence=values.to(finest_dtype(self._parameters)).numpy(),
            adjoint_norm=_norms(self._adjoints),
        )

    def _replayed(self, epoch: int) -> Iterator[TakenStep]:
        """Yield the steps of an epoch, last first, as they were in training."""
        run = self.run
        run.load_start(epoch)
        steps = list(run.begin(epoch))
        segments = self._segments(len(steps))
        starts = []
        for segment in segments[:-1]:
            starts.append(self._save())
            for step in steps[segment]:
                run.train(step)
        for number in reversed(range(len(segments))):
            if number < len(starts):
                self._load(starts[number])
            kept = [
                TakenStep.take(run, step, keeps_gradients=step is steps[-1])
                for step in steps[segments[number]]
            ]
            if number == len(segments) - 1:
                run.check_end(epoch)
            while kept:
                yield kept.pop()

    def _segments(self, count: int) -> list[slice]:
        """Divide an epoch's steps into segments of equal length that fit into the memory."""
        bytes_of_step = sum(
            parameter.numel() * parameter.element_size() * (1 + len(self._rule.reads(group)))
            for parameter, group in zip(self._parameters, group_settings(self.run), strict=True)
        )
        length = max(1, self._memory // max(1, bytes_of_step))
        number = -(-count // length) or 1
        bounds = [count * place // number for place in range(number + 1)]
        return [slice(*bounds[place : place + 2]) for place in range(number)]

    def _save(self) -> Any:
        return ModelState.now(self.run), deepcopy(self.run.optimizer.state_dict())

    def _load(self, saved: Any) -> None:
        state, optimizer = saved
        state.restore(self.run)
        self.run.optimizer.load_state_dict(optimizer)


def _fit(adjoints: Sequence[Block], begun: Sequence[Block]) -> bool:
    """Return whether stored adjoints have the shapes and types of those at the end of training.

    A block has tensors of the optimizer's state as soon as a step was taken.
    """
    return len(adjoints) == len(begun) and all(
        PARAMETER in block
        and all(
            (values.shape, values.dtype) == (first[PARAMETER].shape, first[PARAMETER].dtype)
            for values in block.values()
        )
        for block, first in zip(adjoints, begun, strict=True)
    )


def _norms(adjoints: Sequence[Block]) -> np.ndarray:
    """Return |lambda| of each target, (target,)."""
    squares = [as_matrix(block[PARAMETER]).double().square().sum(1) for block in adjoints]
    return torch.stack(squares).sum(0).sqrt().cpu().numpy()
