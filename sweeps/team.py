"""The worker processes of one trial: the process that Tune started, and its helpers.

1. Tune reserves a placement group of k bundles, and starts the trial's process in the first.
2. The trial starts k - 1 helpers in the other bundles; all k processes form one process group.
3. In each epoch, every process computes its share of each batch, in step with the others.
4. The trial's process alone writes, checkpoints and commits the gathered record.

Ray Train does this, but cannot be used: in Ray 2.60 its trainer reserves a placement group in
addition to Tune's. If Tune had reserved the workers' CPUs, the trainer waited for them without end;
if Tune had not, trials could wait for each other's CPUs. Ray Train also starts a controller and all
workers anew for each trial, whereas here the processes of a trial stay for the next one.

Map: `Team`, used by the trial; `Helper`, a helper's Ray actor; `RunMaker`, which makes the training
run of one process.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import ray
import torch
from ray.exceptions import RayActorError
from ray.util import get_current_placement_group, get_node_ip_address
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from sampimp.data import Source
from sampimp.errors import RecordError
from sampimp.schema import EpochRecord, digest
from sampimp.store.location import Folder
from sampimp.store.plan import Plan
from sampimp.sweeps.trial_inputs import TrialInputs
from sampimp.sweeps.work import WorkerDiedError
from sampimp.training.collective import SINGLE_PROCESS, ProcessGroup, TorchProcessGroup
from sampimp.training.identity import require_network
from sampimp.training.loop import TrainingRun
from sampimp.training.models import flatten_parameters

Sources = Mapping[str, "ray.ObjectRef[Source]"]

DEATH_NOTICE = 60.0
"""Seconds to wait for Ray to report a worker's death. Ray takes up to half a minute to notice that
a machine is gone, while the other workers see a closed connection at once."""


class RunMaker:
    """Makes the training runs of planned trials, one after the other.

    Parameters
    ----------
    out, plan
        The study's store, and its plan.
    sources
        The study's data sets, by key, as Ray objects.
    """

    def __init__(self, out: str, plan: Plan, sources: Sources) -> None:
        self._plan = plan
        self._inputs = TrialInputs(Folder.of(out), plan, lambda key: ray.get(sources[key]))

    def make(
        self,
        config: Mapping[str, Any],
        checkpoint: tuple[int, bytes] | None,
        workers: ProcessGroup = SINGLE_PROCESS,
    ) -> TrainingRun:
        """Return the run of the trial that the searcher suggested, restored to its checkpoint."""
        trial = self._plan.trials()[config["position"]]
        schedule = self._inputs.schedule(trial, config["reference_id"])
        run = TrainingRun(trial, self._inputs.data(trial), schedule, process_group=workers)
        network = self._plan.datasets[trial.dataset].network
        require_network(self._plan.training.model, run.model, network)
        if checkpoint is not None:
            epoch, state = checkpoint
            run.restore(state, epoch)
        return run


class Helper:
    """A Ray actor: one of the workers of a trial, other than the trial's own process."""

    def __init__(self, out: str, plan: Plan, sources: Sources) -> None:
        self._maker, self._device = RunMaker(out, plan, sources), plan.training.device

    def join(self, store: tuple[str, int], rank: int, size: int) -> None:
        """Join the process group of the trial."""
        self._workers = TorchProcessGroup.join(
            store, get_node_ip_address(), rank, size, self._device
        )

    def start(self, config: Mapping[str, Any], checkpoint: tuple[int, bytes] | None) -> None:
        """Make the run of a trial."""
        self._run = self._maker.make(config, checkpoint, self._workers)
        self._records = self._run.records()

    def advance(self) -> str:
        """Compute this worker's share of the next record; return the digest of the parameters."""
        next(self._records, None)
        return parameter_digest(self._run)

    def release(self) -> None:
        """Drop the run, and free its memory."""
        del self._run, self._records
        release_memory(self._device)


class Team:
    """All workers of a trial, controlled by the trial's process.

    The helpers stay for the next trial. They end with this process, which owns them.

    Parameters
    ----------
    out, plan, sources
        As for `RunMaker`.
    """

    def __init__(self, out: str, plan: Plan, sources: Sources) -> None:
        self._maker, self._device = RunMaker(out, plan, sources), plan.training.device
        self._workers: ProcessGroup = SINGLE_PROCESS
        self._helpers: list[Any] = []
        size = plan.training.workers
        if size == 1:
            return
        group = get_current_placement_group()
        assert group is not None  # reserved by Tune
        for rank, bundle in list(enumerate(group.bundle_specs))[1:]:
            self._helpers.append(
                ray.remote(Helper)
                .options(
                    num_cpus=bundle.get("CPU", 0),
                    num_gpus=bundle.get("GPU", 0),
                    scheduling_strategy=PlacementGroupSchedulingStrategy(
                        group, placement_group_bundle_index=rank
                    ),
                )
                .remote(out, plan, sources)
            )
        _results([helper.__ray_ready__.remote() for helper in self._helpers])
        host = get_node_ip_address()
        store = TorchProcessGroup.open(host, size)
        answers = [
            helper.join.remote((host, store.port), rank, size)
            for rank, helper in enumerate(self._helpers, start=1)
        ]
        self._workers = TorchProcessGroup.join(store, host, 0, size, self._device)
        _results(answers)

    def start(self, config: Mapping[str, Any], checkpoint: tuple[int, bytes] | None) -> TrainingRun:
        """Make the run of a trial in every worker; return that of this process."""
        answers = [helper.start.remote(config, checkpoint) for helper in self._helpers]
        run = self._maker.make(config, checkpoint, self._workers)
        _results(answers)
        return run

    def records(self, run: TrainingRun) -> Iterator[EpochRecord]:
        """Yield the records of this process's run; they hold the samples of all workers.

        Raises
        ------
        WorkerDiedError
            A helper died.
        RecordError
            The parameters of the workers are no longer equal.
        """
        records = run.records()
        while True:
            answers = [helper.advance.remote() for helper in self._helpers]
            try:
                record = next(records, None)
            except Exception as error:
                if answers:
                    _raise_cause(answers, error)
                raise
            if record is None:
                return
            digests = _results(answers)
            expected = parameter_digest(run) if digests else None
            ranks = [rank for rank, other in enumerate(digests, start=1) if other != expected]
            if ranks:
                raise RecordError(
                    expected="the same parameters on every worker",
                    got=f"different parameters on worker {', '.join(map(str, ranks))}",
                    where=f"{run.config.strategy}, seed {run.config.seed}, epoch {record.epoch}",
                    todo="give all workers of a trial one kind of machine, or train with "
                    "--workers-per-trial 1",
                )
            yield record

    def release(self) -> None:
        """Drop the runs of all helpers, and free memory; the caller drops its own run before.

        The call does not wait: the trial is committed, and if a helper is dead, the next trial
        notices.
        """
        for helper in self._helpers:
            helper.release.remote()
        release_memory(self._device)


def parameter_digest(run: TrainingRun) -> str:
    """Return the digest of a run's parameters."""
    return digest(flatten_parameters(run.model).cpu().numpy())


def release_memory(device: str) -> None:
    """Return unused memory of a GPU, which other trials on it may need; the process stays."""
    if device == "cuda":
        torch.cuda.empty_cache()


def _results(answers: list[Any]) -> list[Any]:
    try:
        return ray.get(answers)
    except RayActorError as error:
        # Tune would take the original error for the death of the trial's own process.
        raise WorkerDiedError(
            expected="all workers of the trial to run",
            got="a worker whose process or machine died",
            where="the workers other than the first",
            todo="nothing: the trial continues from its newest checkpoint",
        ) from error


def _raise_cause(answers: list[Any], error: Exception) -> NoReturn:
    """Re-raise the root cause: a helper's death, then a helper's exception, then `error`."""
    ended, _ = ray.wait(answers, num_returns=len(answers), timeout=DEATH_NOTICE)
    causes: list[Exception] = []
    for answer in ended:
        try:
            _results([answer])
        except Exception as cause:
            causes.append(cause)
    deaths = [cause for cause in causes if isinstance(cause, WorkerDiedError)]
    raise [*deaths, *causes, error][0] from error
