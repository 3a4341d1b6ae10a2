"""Retrainings of a committed run without some of its samples, as a unit of work.

Each step is one training from the start to the end: one removal, from one start. Where nothing is
removed and the start is the run's own, the result is compared with the stored run, bit for bit.

Removals by name:

    none               no sample; the baseline of the effects
    random:17, top:17  one sample, drawn at random, or among the most important ones
    sample:17          one sample that the user named
    class:3            all samples of a class
    subset-0.95:4      all but a random subset that keeps this share of the samples

Map: `RetrainWork`; `removal_masks` (from names to samples).
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sampimp.errors import RecordError
from sampimp.influence.retraining import random_subsets, retrained_model
from sampimp.schema import StepRecord
from sampimp.store.influence_layouts import UNTOUCHED, RetrainingLayout
from sampimp.store.location import Folder
from sampimp.store.plan import Plan
from sampimp.sweeps.influence_work import RunWork, named_targets
from sampimp.sweeps.trial_inputs import TrialInputs
from sampimp.training.models import flatten_parameters

SUBSET_SEED = 0
"""Seed of the random samples and subsets; fixed, so that a name means the same in every record."""


class RetrainWork(RunWork):
    """Retrainings of a run for a block of removals: step s is one training."""

    layout: RetrainingLayout

    def __init__(
        self, folder: Folder, plan: Plan, inputs: TrialInputs, config: Mapping[str, Any]
    ) -> None:
        super().__init__(folder, plan, inputs, config)
        self._step = 0

    def start(self, checkpoint: tuple[int, bytes] | None) -> None:
        """Begin with the first retraining, or after that of a checkpoint."""
        self._inputs = self.run.open()
        config, data, _ = self._inputs
        layers = self.run.plan.datasets[config.dataset].layer_names
        self._targets = named_targets(self.identity["targets"], data, layers)
        self._removed_RN = removal_masks(self.identity["removals"], data.train_labels)
        self._step = checkpoint[0] if checkpoint else 0

    def advance(self) -> StepRecord | None:
        """Train once; the last step adds which samples each removal removed."""
        if self._step == self.layout.steps:
            return None
        begun = time.perf_counter()
        removal, repeat = divmod(self._step, self.layout.repeat)
        untouched = self.identity["removals"][removal] == UNTOUCHED
        model = retrained_model(
            *self._inputs,
            None if untouched else self._removed_RN[removal],
            repeat,
            jitter=self.identity["jitter"],
            renormalised=self.identity["renormalised"],
        )
        self.run.check_network(model)
        if untouched and repeat == 0:
            self._require_the_run(flatten_parameters(model).float().cpu().numpy())
        values = np.array([target.value(model) for target in self._targets])
        self._step += 1
        arrays: dict[str, np.ndarray] = {"final_value": values}
        if self._step == self.layout.steps:
            arrays["removed"] = self._removed_RN
        seconds = time.perf_counter() - begun
        return StepRecord(step=self._step, arrays=arrays, seconds=seconds)

    def _require_the_run(self, retrained: np.ndarray) -> None:
        """Raise RecordError unless the parameters are those of the run's end."""
        stored = self.run.parameters(self.run.layout.epoch)
        if stored is not None and not np.array_equal(retrained, stored):
            raise RecordError(
                expected="a retraining with all samples that ends at the stored parameters, bit "
                "for bit",
                got=f"a largest difference of {np.abs(retrained - stored).max():.1e}",
                where=f"trials/{self.config['trial_id']}",
                todo="retrain on the kind of processor, and with the version of PyTorch, that "
                "trained it: trial.json names both",
            )

    def state(self) -> bytes:
        """Return the number of retrainings; each begins anew."""
        return str(self._step).encode()

    def release(self) -> None:
        """Drop the data."""
        del self._inputs, self._targets, self._removed_RN


def removal_masks(names: Sequence[str], labels: np.ndarray) -> np.ndarray:
    """Return the samples that each removal removes, shape (removal, sample), bool.

    Examples
    --------
    >>> removal_masks(["none", "top:2", "class:1"], np.array([1, 0, 1])).astype(int)
    array([[0, 0, 0],
           [0, 0, 1],
           [1, 0, 1]])
    """
    masks = np.zeros((len(names), len(labels)), bool)
    counts: dict[str, int] = {}
    for name in names:
        kind, _, number = name.partition(":")
        if kind.startswith("subset-"):
            counts[kind] = max(counts.get(kind, 0), int(number) + 1)
    subsets = {
        kind: random_subsets(len(labels), float(kind.partition("-")[2]), count, SUBSET_SEED)
        for kind, count in counts.items()
    }
    for mask, name in zip(masks, names, strict=True):
        kind, _, number = name.partition(":")
        if kind in subsets:
            mask[:] = subsets[kind][int(number)]
        elif kind == "class":
            mask[:] = labels == int(number)
        elif name != UNTOUCHED:
            mask[int(number)] = True
    return masks
