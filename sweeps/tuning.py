"""Perform units of work on a Ray cluster, in one call of Ray Tune's `fit`.

`sampimp.sweeps.searcher` decides which unit is next, and `sampimp.sweeps.trial` is a unit as Tune
sees it. Tune's own state is discarded: the store alone determines which units are committed.

Map: `tune_units`.
"""

from collections.abc import Mapping
from pathlib import Path

import ray
from ray import tune
from ray.exceptions import OutOfMemoryError

from sampimp.data import Source
from sampimp.errors import ResourceError
from sampimp.store.location import Folder
from sampimp.store.plan import Plan
from sampimp.store.plan_files import find_plan
from sampimp.sweeps.cluster import check_shared, check_workers
from sampimp.sweeps.machines import Cluster
from sampimp.sweeps.progress import Progress
from sampimp.sweeps.scratch import scratch_folder
from sampimp.sweeps.searcher import UnitSearcher
from sampimp.sweeps.trial import Trial


def tune_units(
    searcher: UnitSearcher,
    progress: Progress,
    *,
    folder: Folder,
    plan: Plan,
    sources: Mapping[str, Source],
    worker: Mapping[str, float],
    workers: int = 1,
    cluster: Cluster,
    slots: int,
    at_once: int,
) -> None:
    """Perform the units that the searcher suggests.

    Parameters
    ----------
    searcher, progress
        Which unit is next, and what is shown.
    folder, plan, sources
        The study's store, its plan, and its data sets by key.
    worker
        CPUs and GPUs of a worker, as "CPU" and "GPU".
    workers
        Number of workers of a unit.
    cluster
        The machines, for messages.
    slots
        Number of units that run at a time once all machines have started, for messages.
    at_once
        Largest number of units that run, or wait for a machine, at a time. The autoscaler starts
        machines for units that wait, and a machine that joins later takes some of them.

    Raises
    ------
    StoreError
        A node of the cluster cannot use the store.
    ResourceError
        Units that ran at the same time needed more memory than the machine has.
    """
    if folder.is_local:
        check_shared(Path(str(folder)) / find_plan(folder).file)
    else:
        check_workers(folder)
    trainable = tune.with_parameters(
        Trial,
        out=str(folder),
        plan=plan.to_json(),
        sources={key: ray.put(source) for key, source in sources.items()},
    )
    resources = tune.PlacementGroupFactory([dict(worker)] * workers)
    with scratch_folder() as scratch, progress:
        tuner = tune.Tuner(
            tune.with_resources(trainable, resources),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=-1,  # until the searcher returns FINISHED
                max_concurrent_trials=at_once,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="study",
                storage_path=scratch,
                callbacks=[progress],
                # Tune does not restart a trial whose machine fails before the trial's first report,
                # and counts a machine's failure as the trial's own: the searcher restarts trials.
                failure_config=tune.FailureConfig(max_failures=0),
                # A trial writes its checkpoints into the study's store; Tune keeps none.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        )
        try:
            tuner.fit()
        except RuntimeError as error:  # Tune counts every other death as a trial's failure
            if not isinstance(error.__cause__, OutOfMemoryError):
                raise
            raise ResourceError(
                expected=f"memory for the trials that run at a time, {slots}",
                got=str(error.__cause__).split("\n")[0],
                where=str(cluster),
                todo="run fewer at a time (--max-concurrent), or on machines with more memory; "
                "nothing is lost, the same command continues",
            ) from None
