"""The records of influence and of retraining: what identifies them, and their shapes.

    OUT/influence/mnist-shuffle-seed1-influence-5e0f11aa/    targets of one run
    OUT/influence/mnist-shuffle-seed1-probes-0c77d3e1/       squares of random probes
    OUT/influence/mnist-shuffle-seed1-fixed-point-77ab01e9/  -H^-1 g for targets of one run
    OUT/influence/mnist-shuffle-seed1-states-90ab12cd/       optimizer states, for momentum and Adam
    OUT/influence/mnist-shuffle-seed1-retrain-1f0c9a2b/      retrainings of one run
    OUT/influence/mnist-shuffle-seed1-search-5be01c44/       a subset, found by exchange
    OUT/influence/mnist-shuffle-seed1-subset-e2107f90/       trainings on subsets alone

They have the machinery of a trial's record (`sampimp.store.record`). The identity of a record is
in its commit: kind, run, fingerprint and the digest of the record that it was computed from. A
record of influence is written from the last epoch to the first.

Map: `KINDS`; `INFLUENCE_FOLDER`; `InfluenceLayout`, `StatesLayout`, `FixedPointLayout`,
`RetrainingLayout`, `SearchLayout`, `SubsetLayout`;
`layout_of` (from a commit), `record_id` (the name of the folder), `probe_layer`, `labelled_target`
and `smoothing_label`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sampimp.schema import Layout, RecordLayout

INFLUENCE_FOLDER = "influence"
"""Folder of a study with these records."""

KINDS = ("states", "influence", "probes", "fixed-point", "retrain", "search", "subset")
"""Kinds of records, as their folders are named."""

UNTOUCHED = "none"
"""Name of the removal that removes no sample: the baseline of the effects."""

OVERALL = ""
"""In `InfluenceLayout.probes`, the key of the probes over all layers."""


def probe_layer(target: str) -> str | None:
    """Return the layer of a probe, "" for a probe over all layers, None for another target.

    Examples
    --------
    >>> probe_layer("probe:5@L2"), probe_layer("probe:5"), probe_layer("class:5")
    ('L2', '', None)
    """
    kind, _, rest = target.partition(":")
    return rest.partition("@")[2] if kind == "probe" else None


def smoothing_label(smoothing: Mapping[str, float]) -> str:
    """Return a smoothing in words; empty for the exact derivative.

    Examples
    --------
    >>> smoothing_label({"eps": 1e-4, "gate_width": 0.0})
    'eps=0.0001'
    """
    return ", ".join(f"{name}={width:g}" for name, width in smoothing.items() if width)


def labelled_target(target: str, smoothing: Mapping[str, float]) -> str:
    """Return the name of a target in the cube, with the smoothing of its derivative.

    Examples
    --------
    >>> labelled_target("mean", {"eps": 1e-4, "gate_width": 0.0})
    'mean (eps=0.0001)'
    >>> labelled_target("mean", {"eps": 0.0, "gate_width": 0.0})
    'mean'
    """
    label = smoothing_label(smoothing)
    return f"{target} ({label})" if label else target


def record_id(run: str, kind: str, fingerprint: str) -> str:
    """Return the name of a record's folder.

    Examples
    --------
    >>> record_id("mnist-shuffle-seed1", "influence", "5e0f11aa" + 56 * "0")
    'mnist-shuffle-seed1-influence-5e0f11aa'
    """
    return f"{run}-{kind}-{fingerprint[:8]}"


@dataclass(frozen=True, kw_only=True)
class InfluenceLayout(RecordLayout):
    """The shape of the record of a block of targets, written from the last epoch to the first.

    Examples
    --------
    >>> layout = InfluenceLayout(epoch=3, layer=2, sample=10, targets=("mean", "class:1"))
    >>> layout.variables, layout.shape("influence"), layout.chunk("influence")
    (['influence', 'influence_total', 'adjoint_norm'], (3, 2, 2, 10), (1, 2, 2, 10))
    >>> list(layout.positions("influence")), layout.positions("influence_total")
    ([3, 2, 1], (3,))
    >>> probes = InfluenceLayout(epoch=3, layer=2, sample=10, targets=("probe:0", "probe:1"))
    >>> probes.variables
    ['adjoint_norm', 'arriving_importance', 'final_importance_total']
    """

    epoch: int
    layer: int
    sample: int
    targets: tuple[str, ...]
    """Names of the targets: none of them probes, or all."""

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each dimension."""
        return {
            "epoch": self.epoch,
            "target": len(self.targets),
            "layer": self.layer,
            "sample": self.sample,
        }

    @property
    def probes(self) -> Counter[str]:
        """Number of probes by layer; `OVERALL` is the key of those over all layers."""
        layers = (probe_layer(target) for target in self.targets)
        return Counter(layer for layer in layers if layer is not None)

    @property
    def variables(self) -> list[str]:
        """Names of the record's variables; of probes only their squares."""
        probes = self.probes
        if not probes:
            return ["influence", "influence_total", "adjoint_norm"]
        names = ["adjoint_norm"]
        if OVERALL in probes:
            names += ["arriving_importance", "final_importance_total"]
        if set(probes) != {OVERALL}:
            names.append("final_importance")
        return names

    @property
    def steps(self) -> int:
        """The number of epochs; step 1 goes through the last."""
        return self.epoch

    def positions(self, name: str) -> Sequence[int]:
        """Return the step that writes each position of a variable."""
        return range(self.epoch, 0, -1) if self.is_stepwise(name) else (self.steps,)


@dataclass(frozen=True, kw_only=True)
class StatesLayout(RecordLayout):
    """The record of a forward replay: one file for each state, from the start on."""

    epoch: int

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each dimension."""
        return {"state": self.epoch + 1}

    @property
    def variables(self) -> list[str]:
        """The states alone."""
        return ["training_state"]

    @property
    def steps(self) -> int:
        """The number of epochs; step 0 is the start."""
        return self.epoch

    def positions(self, name: str) -> Sequence[int]:
        """Return the step that writes each state."""
        return range(self.epoch + 1)

    def describe(self, name: str, position: int) -> str:
        """Return a position in words."""
        return f"{name}, state {position}"


@dataclass(frozen=True, kw_only=True)
class FixedPointLayout(RecordLayout):
    """The record of influence at the fixed point; each step is one target and one curvature.

    Solution number `target * curvature + c` (from 0) is that of a target with curvature c.
    """

    target: int
    curvature: int
    damping: int
    sample: int

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each dimension."""
        return {"solution": self.steps, "damping": self.damping, "sample": self.sample}

    @property
    def variables(self) -> list[str]:
        """The solutions alone."""
        return ["fixed_point_influence"]

    @property
    def steps(self) -> int:
        """The number of solutions."""
        return self.target * self.curvature


@dataclass(frozen=True, kw_only=True)
class RetrainingLayout(RecordLayout):
    """The record of a block of removals; each step is one retraining.

    Retraining number `removal * repeat + r` (from 0) is repeat r of a removal.
    """

    removal: int
    repeat: int
    target: int
    sample: int

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each dimension."""
        return {
            "removal": self.removal,
            "repeat": self.repeat,
            "retraining": self.steps,
            "target": self.target,
            "sample": self.sample,
        }

    @property
    def variables(self) -> list[str]:
        """The targets after each retraining, and what it left out."""
        return ["final_value", "removed"]

    @property
    def steps(self) -> int:
        """The number of retrainings."""
        return self.removal * self.repeat


@dataclass(frozen=True, kw_only=True)
class SearchLayout(RecordLayout):
    """The record of a search for a subset; each step is one round."""

    round: int
    sample: int

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each dimension."""
        return {"round": self.round, "sample": self.sample}

    @property
    def variables(self) -> list[str]:
        """The target of each round, and the subset."""
        return ["search_error", "found"]

    @property
    def steps(self) -> int:
        """The number of rounds."""
        return self.round


@dataclass(frozen=True, kw_only=True)
class SubsetLayout(RecordLayout):
    """The record of trainings on subsets of one size, by one rule; each step is one training.

    Training number `budget * seed + s` (from 0) is that of a budget with seed number s.
    """

    budget: int
    seed: int
    sample: int

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each dimension."""
        return {"training": self.steps, "sample": self.sample}

    @property
    def variables(self) -> list[str]:
        """The results of each training, and what it used."""
        return ["subset_error", "subset_nll", "selected"]

    @property
    def steps(self) -> int:
        """The number of trainings."""
        return self.budget * self.seed


def layout_of(commit: Mapping[str, Any], run: Layout) -> RecordLayout:
    """Return the shape of a record.

    Parameters
    ----------
    commit
        Its COMMIT.json, or its identity.
    run
        The shape of its run's record.
    """
    if commit["kind"] == "states":
        return StatesLayout(epoch=run.epoch)
    if commit["kind"] == "fixed-point":
        return FixedPointLayout(
            target=len(commit["targets"]),
            curvature=len(commit["curvatures"]),
            damping=len(commit["dampings"]),
            sample=run.sample,
        )
    if commit["kind"] == "retrain":
        return RetrainingLayout(
            removal=len(commit["removals"]),
            repeat=commit["repeats"],
            target=len(commit["targets"]),
            sample=run.sample,
        )
    if commit["kind"] == "search":
        return SearchLayout(round=commit["rounds"], sample=run.sample)
    if commit["kind"] == "subset":
        return SubsetLayout(
            budget=len(commit["budgets"]), seed=len(commit["seeds"]), sample=run.sample
        )
    return InfluenceLayout(
        epoch=run.epoch, layer=run.layer, sample=run.sample, targets=tuple(commit["targets"])
    )
