"""Snapshot importance of a study: every sample at the fixed parameters of an epoch's end.

A Ray Data job over the stored parameters. Each of its rows names one epoch of one trial;
`map_batches` computes the importance of all samples there and writes it, each chunk by one writer.
The job reads the store alone, so that it can run long after the study is done. Epochs that have
snapshot importance are skipped.

Map: `score_snapshots`; `check_epochs`, before it begins; `score_rows`, the function of a Ray
worker.
"""

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import numpy as np
import ray
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from sampimp.config import OPTIMIZERS
from sampimp.data import Dataset, Scaling, Source, scale_inputs
from sampimp.errors import ConfigError
from sampimp.importance.snapshot import snapshot_importance
from sampimp.store.attempts import CHECKPOINTS
from sampimp.store.commits import require_commit
from sampimp.store.location import Folder
from sampimp.store.manifests import write_manifest
from sampimp.store.plan import Plan, read_commits
from sampimp.store.plan_files import require_plan
from sampimp.store.snapshots import SNAPSHOTS, write_snapshot
from sampimp.store.variables import StoredVariable
from sampimp.sweeps.ingest import quiet_ray_data
from sampimp.sweeps.stored_study import check_model, require_source
from sampimp.training.checkpoint_states import load_tensors, restoring
from sampimp.training.identity import require_network
from sampimp.training.loop import use_deterministic_algorithms
from sampimp.training.models import build_model, load_parameters


def score_snapshots(
    out: str,
    every: int,
    console: Console,
    *,
    model: str | None = None,
    cpus: float = 1,
    gpus: float = 0,
) -> int:
    """Compute the snapshot importance of every N-th epoch of every committed trial.

    Parameters
    ----------
    out
        The study's folder or s3:// URL.
    every
        N: the number of epochs between two snapshots.
    console
        Where progress is shown.
    model
        The study's network; required if it is `package.module:function`, which is code to run.
    cpus, gpus
        CPUs and GPUs that the samples of one epoch take.

    Returns
    -------
    int
        Number of epochs computed now.

    Raises
    ------
    StoreError
        There is no study at `out`.
    ConfigError
        Parameters of these epochs are not stored, or `model` is not the network of the study.
    """
    folder = Folder.of(out)
    plan = require_plan(folder)
    check_model(plan, model)
    epochs = check_epochs(plan, every)
    scored: dict[str, dict[str, list[str]]] = folder.read_json(SNAPSHOTS) or {}
    rows = [
        {
            "trial": trial.trial_id,
            "dataset": trial.config.dataset,
            "seed": trial.config.seed,
            "epoch": epoch,
        }
        for trial in plan.resolve(read_commits(folder))
        if trial.commit is not None
        for epoch in epochs
        if epoch <= trial.commit["epochs"]
        and str(epoch) not in scored.get(trial.trial_id or "", ())
    ]
    if not rows:
        return 0
    keys = {str(row["dataset"]) for row in rows}  # another driver may yet store what the plan lists
    sources = {key: ray.put(require_source(folder, key)) for key in keys}
    computed: dict[str, dict[str, list[str]]] = {}
    columns = (TextColumn("Scoring snapshots"), BarColumn(), MofNCompleteColumn())
    with (
        quiet_ray_data(),
        Progress(*columns, TimeRemainingColumn(), console=console) as progress,
    ):
        job = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            partial(score_rows, out=str(folder), plan=plan.to_json(), sources=sources),
            num_cpus=cpus,
            num_gpus=gpus,
        )
        task = progress.add_task("", total=len(rows))
        for row in job.iter_rows():
            computed.setdefault(row["trial"], {})[str(row["epoch"])] = list(row["digests"])
            progress.advance(task)
    scored = folder.read_json(SNAPSHOTS) or {}  # with what another process has added meanwhile
    for name, digests in computed.items():
        scored[name] = scored.get(name, {}) | digests
    folder.write_json(SNAPSHOTS, scored)
    for name in computed:
        write_manifest(folder, f"trials/{name}/snapshots.zarr")
    return len(rows)


def check_epochs(plan: Plan, every: int) -> list[int]:
    """Return the epochs of the snapshots, or raise ConfigError if parameters are not stored."""
    if plan.training.optimizer in ("adam", "adamw"):
        raise ConfigError(
            expected="SGD, where the learning rate alone turns a gradient into an update",
            got=OPTIMIZERS[plan.training.optimizer],
            where="option --every",
            todo="use the in-step importance, which includes the optimizer's state",
        )
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


def score_rows(
    batch: dict[str, np.ndarray],
    *,
    out: str,
    plan: Mapping[str, Any],
    sources: Mapping[str, "ray.ObjectRef[Source]"],
) -> dict[str, np.ndarray]:
    """Compute and write the snapshots of some epochs; return the rows with their digests.

    Parameters
    ----------
    batch
        `trial` (folder), `dataset` (key), `seed` and `epoch`, each [N].
    out, plan
        The study's store, and its plan as JSON.
    sources
        The study's data sets, by key, as Ray objects.
    """
    study, folder = Plan.from_json(plan), Folder.of(out)
    torch.set_num_threads(study.training.threads)
    digests = []
    columns = (batch[name] for name in ("trial", "dataset", "seed", "epoch"))
    for trial, key, seed, epoch in zip(*columns, strict=True):
        data, place = _scaled(sources[key], study.training.input_scaling), folder / "trials"
        digests.append(_score(study, place / str(trial), str(key), int(seed), int(epoch), data))
    return {**batch, "digests": np.array(digests)}


@lru_cache(maxsize=1)  # Ray reuses the process for the next rows; two data sets may not fit
def _scaled(source: "ray.ObjectRef[Source]", scaling: Scaling) -> Dataset:
    return scale_inputs(ray.get(source), scaling)


def _score(plan: Plan, trial: Folder, key: str, seed: int, epoch: int, data: Dataset) -> list[str]:
    info, training, layout = plan.datasets[key], plan.training, plan.layout(key)
    commit = require_commit(trial)
    stored = StoredVariable.of(trial, "parameters", layout, commit)
    flat_P = stored.read(layout.states.index(epoch))
    # With the trial's seed: a network may derive buffers from it, and buffers are not stored.
    model = build_model(
        training.model,
        info.input_shape,
        training.hidden,
        len(info.class_names),
        seed,
        training.activation,
    )
    require_network(training.model, model, info.network)
    _require_constant_buffers(model, trial)
    load_parameters(model, torch.from_numpy(flat_P))
    device = torch.device(training.device)
    if device.type == "cuda":
        use_deterministic_algorithms()
    importance = snapshot_importance(
        model.to(device),
        torch.from_numpy(data.train_inputs).to(device),
        torch.from_numpy(data.train_labels).to(device),
        rate=training.rate(epoch) / training.batch_size,
    )
    return write_snapshot(trial, layout, epoch, importance.float().numpy())


def _require_constant_buffers(model: nn.Module, trial: Folder) -> None:
    """Raise ConfigError if training has changed buffers, which are not stored for each epoch.

    The buffers of the last checkpoint are compared with those at the start.
    """
    buffers = dict(model.named_buffers())
    checkpoints = trial / CHECKPOINTS
    if not buffers or not checkpoints.folders():
        return
    state = checkpoints.read_bytes(f"{checkpoints.folders()[-1]}/state.pt") or b""
    with restoring("the trial's network"):
        stored = dict(load_tensors(state, "cpu")["model"])
    changed = [
        name
        for name, values in buffers.items()
        if name in stored and not torch.equal(values, stored[name])
    ]
    if changed:
        raise ConfigError(
            expected="a network whose buffers do not change in training",
            got=f"changed buffers: {', '.join(changed[:5])}",
            where=str(trial),
            todo="use the in-step importance; snapshots are computed from stored parameters, and "
            "the buffers of each epoch are not stored",
        )
