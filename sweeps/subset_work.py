"""Trainings on subsets of the samples of a committed run, and searches for subsets, as work.

    subset    trainings on the samples that a rule selects: one step for each budget and seed
    search    the subset that `sampimp.subsets.metagradient` finds: one step for each round

What is judged on the test set selects from all samples; what is judged on the validation split, by
which rules and their parameters are chosen, selects from the others.

Map: `SubsetWork`, `SearchWork`; `pool_of` (samples to select from).
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from sampimp.schema import ALL_SAMPLES, StepRecord
from sampimp.store.influence_layouts import SearchLayout, SubsetLayout
from sampimp.store.influence_records import require_record
from sampimp.store.score_files import read_scores
from sampimp.store.variables import read_difficulty
from sampimp.subsets.metagradient import MetagradientSearch
from sampimp.subsets.rules import Pool, parse_rule, select
from sampimp.subsets.training import train_subset
from sampimp.subsets.validation import validation_samples
from sampimp.sweeps.influence_work import RunWork
from sampimp.training.loop import evaluate

SCORE_KINDS = {"tau": "overall_importance", "nll": "final_nll"}
"""Of a rule's score, the name that `read_difficulty` gives it."""


def pool_of(split: str, labels: np.ndarray) -> np.ndarray:
    """Return the positions of the samples to select from, sorted, for "validation" or "test"."""
    every = np.arange(len(labels))
    if split == "test":
        return every
    return np.setdiff1d(every, validation_samples(labels))


class SubsetWork(RunWork):
    """Trainings on the samples that a rule selects, for each budget and seed."""

    layout: SubsetLayout

    def start(self, checkpoint: tuple[int, bytes] | None) -> None:
        """Begin with the first training, or after that of a checkpoint."""
        config, data, _ = self.run.open()
        self._trial, self._data = config, data
        self._positions_P = pool_of(self.identity["judged_on"], data.train_labels)
        self._pool = self._scored_pool()
        self._step = checkpoint[0] if checkpoint else 0

    def _scored_pool(self) -> Pool:
        """Return the pool with the scores that the unit's rules read."""
        run, scores = self.run, {}
        for variant in self.identity["variants"]:
            if variant == ALL_SAMPLES:
                continue
            name = parse_rule(variant).score
            if name in SCORE_KINDS:
                trial = run.folder / "trials" / self.config["trial_id"]
                scores[name] = read_difficulty(trial, SCORE_KINDS[name], run.layout)
            elif name is not None:
                scores[name] = read_scores(run.folder, self.identity["scores"])
        return Pool(labels=self._data.train_labels, scores=scores).part(self._positions_P)

    def _select(self, variant: str, seed: int) -> np.ndarray:
        """Return the positions of the samples that a training uses."""
        if variant == ALL_SAMPLES:
            return self._positions_P
        if parse_rule(variant).kind.is_searched:
            return self._searched()
        return self._positions_P[select(variant, self._pool, self.identity["count"], seed)]

    def _searched(self) -> np.ndarray:
        name = self.identity["search"]
        record = require_record(self.run.folder, name, "search", self.run.layout)
        return np.flatnonzero(record.array("found").read(0))

    def advance(self) -> StepRecord | None:
        """Train once, and evaluate."""
        if self._step == self.layout.steps:
            return None
        begun = time.perf_counter()
        budget, place = divmod(self._step, self.layout.seed)
        seed = self.identity["seeds"][place]
        chosen = self._select(self.identity["variants"][budget], seed)
        config = replace(self._trial, seed=seed, order_seed=seed)
        model = train_subset(config, self._data, chosen, self.identity["budgets"][budget])
        self.run.check_network(model)
        nll_N, error = evaluate(model, *self._judged_samples())
        nll = float(nll_N.mean())
        selected = np.zeros(self.layout.sample, bool)
        selected[chosen] = True
        self._step += 1
        return StepRecord(
            step=self._step,
            arrays={
                "subset_error": np.float64(error if np.isfinite(nll) else np.nan),
                "subset_nll": np.float64(nll if np.isfinite(nll) else np.nan),
                "selected": selected,
            },
            seconds=time.perf_counter() - begun,
        )

    def _judged_samples(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and labels of the samples that the network is judged on."""
        inputs, labels = self._data[2:]
        if self.identity["judged_on"] == "validation":
            held_out = validation_samples(self._data.train_labels)
            inputs, labels = (values[held_out] for values in self._data[:2])
        device = self._trial.training.device
        return torch.from_numpy(inputs).to(device), torch.from_numpy(labels).to(device)

    def state(self) -> bytes:
        """Return the number of trainings; each begins anew."""
        return str(self._step).encode()

    def outcome(self, diverged: bool) -> tuple[int | None, Mapping[str, Any]]:
        """Return when the record was completed: of a rule's scores, the newest ones count."""
        return None, {"time": time.time()}

    def release(self) -> None:
        """Drop the data."""
        del self._data, self._pool


class SearchWork(RunWork):
    """A search for a subset by exchange, one round a step."""

    layout: SearchLayout

    def start(self, checkpoint: tuple[int, bytes] | None) -> None:
        """Begin with the first round, or after that of a checkpoint."""
        config, data, _ = self.run.open()
        self._positions_P = pool_of(self.identity["judged_on"], data.train_labels)
        inputs, labels = (values[self._positions_P] for values in data[:2])
        part = data._replace(train_inputs=inputs, train_labels=labels)
        self._search = MetagradientSearch(config, part, self.identity["count"])
        if checkpoint is not None:
            self._search.restore(checkpoint[1])

    def advance(self) -> StepRecord | None:
        """Perform a round; the last one adds the subset."""
        if self._search.round == self.layout.round:
            return None
        begun = time.perf_counter()
        arrays: dict[str, np.ndarray] = {"search_error": np.array(self._search.advance())}
        if self._search.round == self.layout.round:
            found = np.zeros(self.layout.sample, bool)
            found[self._positions_P[self._search.best]] = True
            arrays["found"] = found
        seconds = time.perf_counter() - begun
        return StepRecord(step=self._search.round, arrays=arrays, seconds=seconds)

    def state(self) -> bytes:
        """Return the search's state."""
        return self._search.state()

    def release(self) -> None:
        """Drop the data."""
        del self._search
