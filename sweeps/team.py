"""The workers of one trial: the process that Tune started, and those that it leads.

    Tune reserves a placement group of k bundles, puts the trial into the first
    the trial puts k - 1 helpers into the others, and all meet in one process group
    each epoch: every helper trains its share of each batch, in step with the trial
    the trial alone writes, checkpoints and commits what was gathered

Ray Train is made for this and does not fit here. In 2.60 its trainer reserves a placement group of
its own beside Tune's: where Tune had reserved the workers' CPUs it waited for them without end, and
where Tune had not, nothing keeps trials from waiting for each other's. It also starts a controller
and all workers anew for each trial, where a trial's processes are kept here for the next one.

Map: `RunMaker` (what every worker does for itself), `Helper` (a worker that is led), `Team` (what
the trial sees).
"""

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import ray
import torch
from ray.exceptions import RayActorError
from ray.util import get_current_placement_group, get_node_ip_address
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from sampimp.config import TrialConfig
from sampimp.data import Dataset, Source, scale_inputs
from sampimp.errors import RecordError, ResourceError
from sampimp.schema import EpochRecord, digest
from sampimp.store.location import Folder
from sampimp.store.plan import Plan
from sampimp.store.variables import read_difficulty
from sampimp.training.collective import SINGLE_PROCESS, ProcessGroup, TorchProcessGroup
from sampimp.training.identity import require_network
from sampimp.training.loop import TrainingRun
from sampimp.training.models import flatten_parameters
from sampimp.training.strategies import SORT_KEY, Schedule, make_schedule

Sources = Mapping[str, "ray.ObjectRef[Source]"]

DEATH_NOTICE = 60.0
"""Seconds to wait for the reason why a worker is gone: Ray takes up to half a minute to miss a
machine, where its peers see a closed connection at once."""


class WorkerDiedError(ResourceError):
    """A worker beside the first is gone, and the trial with it."""


class RunMaker:
    """Make the training runs of planned trials, one after the other.

    Parameters
    ----------
    out, plan
        The study's store, and its plan.
    sources
        Its data sets by key.
    """

    def __init__(self, out: str, plan: Plan, sources: Sources) -> None:
        self._folder, self._plan, self._sources = Folder.of(out), plan, sources
        self._data: tuple[str, Dataset] | None = None

    def make(
        self,
        config: Mapping[str, Any],
        checkpoint: tuple[int, bytes] | None,
        workers: ProcessGroup = SINGLE_PROCESS,
    ) -> TrainingRun:
        """Return the run of the trial that the searcher handed out, at its checkpoint."""
        trial = self._plan.trials()[config["position"]]
        schedule = self._schedule(trial, config["reference_id"])
        run = TrainingRun(trial, self._read_data(trial), schedule, process_group=workers)
        network = self._plan.datasets[trial.dataset].network
        require_network(self._plan.training.model, run.model, network)
        if checkpoint is not None:
            epoch, state = checkpoint
            run.restore(state, epoch)
        return run

    def _read_data(self, trial: TrialConfig) -> Dataset:
        if self._data is None or self._data[0] != trial.dataset:
            self._data = None  # before the next one is made: two may not fit
            source = ray.get(self._sources[trial.dataset])
            scaling = self._plan.training.input_scaling
            self._data = trial.dataset, scale_inputs(source, scaling)
        return self._data[1]

    def _schedule(self, trial: TrialConfig, reference_id: str | None) -> Schedule:
        layout = self._plan.layout(trial.dataset)
        difficulty = None
        if reference_id:
            reference = self._folder / "trials" / reference_id
            difficulty = read_difficulty(reference, SORT_KEY[trial.strategy], layout)
        batch_size = self._plan.training.batch_size
        return make_schedule(
            trial.strategy, layout.sample, batch_size, trial.order_seed, difficulty
        )


class Helper:
    """One of a trial's workers beside the first, in a process of its own; a Ray actor."""

    def __init__(self, out: str, plan: Plan, sources: Sources) -> None:
        self._maker, self._device = RunMaker(out, plan, sources), plan.training.device

    def join(self, store: tuple[str, int], rank: int, size: int) -> None:
        """Meet the other workers."""
        self._workers = TorchProcessGroup.join(
            store, get_node_ip_address(), rank, size, self._device
        )

    def start(self, config: Mapping[str, Any], checkpoint: tuple[int, bytes] | None) -> None:
        """Get ready for a trial."""
        self._run = self._maker.make(config, checkpoint, self._workers)
        self._records = self._run.records()

    def advance(self) -> str:
        """Compute this worker's part of the next record; return the parameters' digest."""
        next(self._records, None)
        return parameter_digest(self._run)

    def release(self) -> None:
        """Let go of the trial and of its memory."""
        del self._run, self._records
        release_memory(self._device)


class Team:
    """All workers of a trial, led by the process that Tune started.

    They stay for the next trial, and go with this process, which owns them.

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
        assert group is not None  # Tune's
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
        others = [
            helper.join.remote((host, store.port), rank, size)
            for rank, helper in enumerate(self._helpers, start=1)
        ]
        self._workers = TorchProcessGroup.join(store, host, 0, size, self._device)
        _results(others)

    def start(self, config: Mapping[str, Any], checkpoint: tuple[int, bytes] | None) -> TrainingRun:
        """Get every worker ready for a trial; return the run of this one."""
        others = [helper.start.remote(config, checkpoint) for helper in self._helpers]
        run = self._maker.make(config, checkpoint, self._workers)
        _results(others)
        return run

    def records(self, run: TrainingRun) -> Iterator[EpochRecord]:
        """Yield the records of this worker's run, which hold the samples of all.

        Raises
        ------
        WorkerDiedError
            One of them died.
        RecordError
            The workers' parameters have come apart.
        """
        records = run.records()
        while True:
            others = [helper.advance.remote() for helper in self._helpers]
            try:
                record = next(records, None)
            except Exception as error:
                if others:
                    _raise_cause(others, error)
                raise
            if record is None:
                return
            digests = _results(others)
            own = parameter_digest(run) if digests else None
            if apart := [rank for rank, other in enumerate(digests, start=1) if other != own]:
                raise RecordError(
                    expected="the same parameters on every worker",
                    got=f"other ones than the first's on worker {', '.join(map(str, apart))}",
                    where=f"{run.config.strategy}, seed {run.config.seed}, epoch {record.epoch}",
                    todo="give all workers of a trial one kind of machine, or train with "
                    "--workers-per-trial 1",
                )
            yield record

    def release(self) -> None:
        """Let every worker go of the trial and of its memory; the caller drops its run before.

        Nobody waits for it: the trial is committed, and a worker that is gone is missed by the
        next one.
        """
        for helper in self._helpers:
            helper.release.remote()
        release_memory(self._device)


def parameter_digest(run: TrainingRun) -> str:
    """Return the digest of a run's parameters."""
    return digest(flatten_parameters(run.model).cpu().numpy())


def release_memory(device: str) -> None:
    """Give a GPU's memory back, which other trials on it may need; the process stays."""
    if device == "cuda":
        torch.cuda.empty_cache()


def _results(others: list[Any]) -> list[Any]:
    try:
        return ray.get(others)
    except RayActorError as error:
        # Not as it is: Tune would take it for the death of the trial's own process.
        raise WorkerDiedError(
            expected="every worker of the trial to live",
            got="one whose process or machine died",
            where="the workers beside the first",
            todo="nothing: the trial goes on from its newest checkpoint",
        ) from error


def _raise_cause(others: list[Any], error: Exception) -> NoReturn:
    """Raise the death of a worker if that is behind an error, else what a worker says, else it."""
    ended, _ = ray.wait(others, num_returns=len(others), timeout=DEATH_NOTICE)
    causes: list[Exception] = []
    for other in ended:
        try:
            _results([other])
        except Exception as cause:
            causes.append(cause)
    deaths = [cause for cause in causes if isinstance(cause, WorkerDiedError)]
    raise [*deaths, *causes, error][0] from error
