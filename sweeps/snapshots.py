"""Snapshot importance: every sample at the fixed parameters of the end of an epoch.

A Ray Data job over the stored parameters: each row names one epoch of one trial, `map_batches`
scores all samples there and writes them, one writer for each whole chunk. It needs nothing but the
store, so it can be asked for long after a study is done. What is scored is not scored again.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import ray
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sampimp.capture import snapshot_importance
from sampimp.cube import SNAPSHOTS
from sampimp.data import Dataset, Source, scale_inputs
from sampimp.errors import ConfigError, StoreError
from sampimp.models import build_mlp, load_parameters
from sampimp.plan import Plan, read_commits, read_plan
from sampimp.store import Folder, open_array, read_source, write_array


def score_snapshots(
    out: str, every: int, console: Console, *, cpus: float = 1, gpus: float = 0
) -> int:
    """Score every so many epochs of every committed trial that stored their parameters.

    Parameters
    ----------
    out
        The study.
    every
        Epochs between two snapshots.
    console
        Where progress is shown.
    cpus, gpus
        What scoring one epoch takes at a time.

    Returns
    -------
    int
        Epochs scored now, those that were there already not counted.

    Raises
    ------
    StoreError
        There is no study.
    ConfigError
        Parameters of these epochs were not stored.
    """
    folder = Folder.of(out)
    plan = read_plan(folder)
    if plan is None:
        raise StoreError(
            expected="a study, with a study.json",
            got="no such file",
            where=str(folder),
            todo="pass the folder or URL that was given to full_study.py as --out",
        )
    epochs = check_epochs(plan, every)
    scored = {key: list(value) for key, value in (folder.read_json(SNAPSHOTS) or {}).items()}
    rows = [
        {"trial": trial.trial_id, "dataset": trial.config.dataset, "epoch": epoch}
        for trial in plan.resolve(read_commits(folder))
        if trial.commit is not None
        for epoch in epochs
        if epoch <= trial.commit["epochs"] and epoch not in scored.get(trial.trial_id or "", ())
    ]
    if not rows:
        return 0
    sources = {key: ray.put(_require_source(folder, key)) for key in plan.datasets}
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    blocks = min(len(rows), 4 * max(1, int(ray.cluster_resources().get("CPU", 1) // cpus)))
    job = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
        _Scorer,
        fn_constructor_kwargs={"out": str(folder), "plan": plan.to_json(), "sources": sources},
        batch_size=1,
        num_cpus=cpus,
        num_gpus=gpus,
        compute=ray.data.ActorPoolStrategy(
            size=max(1, min(len(rows), int(ray.cluster_resources().get("CPU", 1) // cpus)))
        ),
    )
    columns = (TextColumn("Scoring snapshots"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=len(rows))
        for row in job.iter_rows():
            scored.setdefault(row["trial"], []).append(int(row["epoch"]))
            progress.advance(task)
    folder.write_json(SNAPSHOTS, {trial: sorted(epochs) for trial, epochs in scored.items()})
    return len(rows)


def check_epochs(plan: Plan, every: int) -> list[int]:
    """Return the epochs to score, or raise ConfigError if their parameters are not stored."""
    epochs = list(range(every, plan.training.epochs + 1, every)) if every > 0 else []
    lacking = sorted(set(epochs) - set(plan.training.stored_states()))
    if not epochs or lacking:
        raise ConfigError(
            expected=f"a number from 1 to {plan.training.epochs} whose multiples have parameters",
            got=f"{every}" + (f"; no parameters of epoch {lacking[0]}" if lacking else ""),
            where="option --every",
            todo=f"parameters are stored every {plan.training.parameters_every} epochs: choose a "
            "multiple of that",
        )
    return epochs


def _require_source(folder: Folder, key: str) -> Source:
    source = read_source(folder / "datasets" / f"{key}.zarr")
    if source is None:
        raise StoreError(
            expected="the study's data set",
            got="none, or one that is not complete",
            where=f"{folder}/datasets/{key}.zarr",
            todo="run full_study.py once more with the same options: it stores it again",
        )
    return source


class _Scorer:
    """What a worker keeps between rows: the network, and the data set it scored last."""

    def __init__(
        self, out: str, plan: Mapping[str, Any], sources: Mapping[str, "ray.ObjectRef[Source]"]
    ) -> None:
        self._folder = Folder.of(out)
        self._plan = Plan.from_json(plan)
        self._sources = sources
        self._data: tuple[str, Dataset] | None = None
        torch.set_num_threads(self._plan.training.threads)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for trial, dataset, epoch in zip(
            batch["trial"], batch["dataset"], batch["epoch"], strict=True
        ):
            self._score(str(trial), str(dataset), int(epoch))
        return batch

    def _score(self, trial: str, dataset: str, epoch: int) -> None:
        info, training = self._plan.datasets[dataset], self._plan.training
        if self._data is None or self._data[0] != dataset:
            source = ray.get(self._sources[dataset])
            self._data = dataset, scale_inputs(source, training.input_scaling)
        folder = self._folder / "trials" / trial
        stored = open_array(folder.root, f"{folder.path}/record.zarr/parameters")
        flat_P = np.asarray(stored[training.stored_states().index(epoch)])
        model = build_mlp(info.input_shape, training.hidden, len(info.class_names), seed=0)
        load_parameters(model, torch.from_numpy(flat_P))
        device = torch.device(training.device)
        importance = snapshot_importance(
            model.to(device),
            torch.from_numpy(self._data[1].train_inputs).to(device),
            torch.from_numpy(self._data[1].train_labels).to(device),
            rate=training.learning_rate / training.batch_size,
        )
        sizes = {
            "epoch": training.epochs,
            "layer": len(info.layer_names),
            "sample": info.sample_count,
        }
        write_array(folder, "snapshot_importance", sizes, epoch - 1, importance.float().numpy())
