"""A study that is ready to run: configuration, data sets, plan, and the missing trials.

    configuration -> store checked -> machines -> data sets read -> plan, joined with the plan
    in the store -> trials, matched with the commits in the store

Every start of a study takes these steps, also the first one. The store shows the missing trials.
Ray is not imported here, so that a dry run needs none.

Map: `Study`; `prepare_study`, which makes it; `make_plan`; `thin_states`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape

from sampimp.config import TrialConfig
from sampimp.data import Source, dataset_key
from sampimp.data.names import DATASETS, parse_name
from sampimp.errors import ConfigError, UnsupportedError
from sampimp.importance.snapshot import forward_layers
from sampimp.schema import digest_json
from sampimp.store.datasets import chunk_table, read_source
from sampimp.store.location import Folder
from sampimp.store.plan import DatasetInfo, Plan, PlannedTrial, read_commits
from sampimp.sweeps.machines import Cluster
from sampimp.sweeps.options import StudyConfig
from sampimp.sweeps.preflight import check_out
from sampimp.training.identity import identify_network
from sampimp.training.models import build_model, parameter_layers

LoadSource = Callable[[str, str | None, int | None], Source]
"""From the name of a data set, the folder of MNIST and CIFAR-10, and the size to which images are
resized, to its arrays."""

MOST_STATE_BYTES = 10
"""Bytes of all states, in those of the importance, above which fewer are stored (arbitrary: 3.2 for
the paper's network on MNIST)."""

KEPT_STATES = 5
"""Largest number of states after the initial one that are kept then (arbitrary)."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study, with what its store held when the command began."""

    config: StudyConfig
    folder: Folder
    cluster: Cluster
    sources: Mapping[str, Source]
    """The data sets of the command line, by key."""
    plan: Plan
    """The plan of the command line, joined with that of the store."""
    trials: Sequence[PlannedTrial]
    """The plan, matched with the commits in the store."""

    @property
    def missing(self) -> list[PlannedTrial]:
        """The trials that are not committed."""
        return [trial for trial in self.trials if trial.commit is None]

    @property
    def slots(self) -> int:
        """Number of trials that run at a time once all machines have started."""
        return concurrent_trials(self.config, self.cluster)

    @property
    def bytes_needed(self) -> int:
        """The most that the missing trials take in the store."""
        return sum(trial_bytes(self.plan, trial.config) for trial in self.missing)


def prepare_study(
    config: StudyConfig, find_cluster: Callable[[], Cluster], load: LoadSource, console: Console
) -> Study:
    """Check a study's store, read its data sets, and match its plan with the store.

    Parameters
    ----------
    config
        The options.
    find_cluster
        Returns the machines, or raises ResourceError; called once the store is checked.
    load
        Reads a data set that the store does not have.
    console
        Where progress is shown, and a data set that is not cut into equal batches is named.

    Raises
    ------
    UserError
        Something is wrong with the store, the machines or the data; nothing is written by then.
    """
    folder = Folder.of(config.out)
    stored_plan = check_out(folder)
    cluster = find_cluster()
    sources = _read_sources(config, folder, load, console)
    plan = make_plan(config, sources)
    if config.may_thin_states:
        plan = thin_states(config, plan, stored_plan, console)
    if stored_plan is not None:
        plan = stored_plan.joined(plan, str(folder))
    for key in sources.keys() - (stored_plan.datasets.keys() if stored_plan else set()):
        _note_unequal_batches(plan, key, console)
    return Study(
        config=config,
        folder=folder,
        cluster=cluster,
        sources=sources,
        plan=plan,
        trials=plan.resolve(read_commits(folder)),
    )


def concurrent_trials(config: StudyConfig, cluster: Cluster) -> int:
    """Return how many trials run at a time once all machines have started."""
    room = cluster.room(config.cpus_per_trial, config.gpus_per_trial)
    slots = room // config.workers_per_trial
    return min(slots, config.max_concurrent or slots) or config.max_concurrent or 1


def thin_states(
    config: StudyConfig, plan: Plan, stored_plan: Plan | None, console: Console
) -> Plan:
    """Return a plan that stores fewer states, where all would be the bulk of a study of own data.

    On a table of 240 samples, a trial has 0.3 MB of importance, and 51 states of its network have
    108 MB. A stored plan decides for the trials that are added to it.

    Parameters
    ----------
    config, plan
        The options, and their plan.
    stored_plan
        The plan in the store.
    console
        Where it is said that states are left out.
    """
    is_own = all(parse_name(name)[0] not in DATASETS for name in config.datasets)
    if not is_own or config.snapshot_every:
        return plan
    every = -(-config.epochs // KEPT_STATES)
    if stored_plan is not None:
        every = stored_plan.training.parameters_every
    else:
        parts = [_record_bytes(plan, key) for key in plan.datasets]
        importance, states = (sum(part) for part in zip(*parts, strict=True))
        if states <= MOST_STATE_BYTES * importance or every == 1:
            return plan
        console.print(
            f"The parameters are stored after every {every} epochs: after each "
            f"(--parameters-every 1) they would take {states / importance:,.0f} times the bytes of "
            "the importance.",
            highlight=False,
        )
    return replace(plan, training=replace(plan.training, parameters_every=every))


def _record_bytes(plan: Plan, key: str) -> tuple[int, int]:
    """Return the bytes of a trial's importance, NLL and batches, and of its stored states."""
    info, training = plan.datasets[key], plan.training
    per_epoch = 4 * info.sample_count * (len(info.layer_names) + 2)
    states = len(training.stored_states()) * 4 * info.parameter_count
    return training.epochs * per_epoch, states


def trial_bytes(plan: Plan, trial: TrialConfig) -> int:
    """Return the most that a trial's record and checkpoints take in the store."""
    checkpoints = 3 * 4 * plan.datasets[trial.dataset].parameter_count
    return sum(_record_bytes(plan, trial.dataset)) + checkpoints


def _read_sources(
    config: StudyConfig, folder: Folder, load: LoadSource, console: Console
) -> dict[str, Source]:
    """Return the data sets by key, from the store if it has them."""
    sources: dict[str, Source] = {}
    for name in config.datasets:
        key = dataset_key(name)
        if key in sources:
            raise ConfigError(
                expected="data sets with different names",
                got=f"two called {key}",
                where="option --datasets",
                todo="rename one of the folders or files",
            )
        with console.status(f"Reading {escape(name)}"):
            source = read_source(folder / "datasets" / f"{key}.zarr")
            if source is not None and key.startswith("folder-"):
                _require_same_size(source, config.image_size, str(folder))
            sources[key] = source or load(name, config.data_dir, config.image_size)
        for note in sources[key].notes:
            console.print(f"{key}: {note}", markup=False, highlight=False)
    return sources


def _require_same_size(source: Source, image_size: int | None, where: str) -> None:
    """Raise ConfigError if the option is not that of the stored images."""
    if source.image_size != image_size:
        words = [
            f"--image-size {size}" if size else "no --image-size"
            for size in (source.image_size, image_size)
        ]
        raise ConfigError(
            expected=f"{words[0]}, with which {source.name} was stored",
            got=words[1],
            where=where,
            todo="run with the same options, or choose another --out",
        )


def make_plan(config: StudyConfig, sources: Mapping[str, Source]) -> Plan:
    """Return the plan of a configuration for its data sets, by key."""
    return Plan(
        datasets={key: _dataset_info(config, source) for key, source in sources.items()},
        training=config.training(),
        grid=config.grid(),
        order_seed=config.order_seed,
        rand_batches=config.rand_batches,
    )


def _dataset_info(config: StudyConfig, source: Source) -> DatasetInfo:
    shape = source.train_values.shape[1:]
    classes = len(source.class_names)
    network = build_model(
        config.model, shape, config.hidden, classes, seed=0, activation=config.activation
    )
    samples = torch.from_numpy(source.train_values[:4] / np.float32(source.full_scale))
    identity = identify_network(config.model, network, samples) if ":" in config.model else None
    try:
        order = forward_layers(network, torch.zeros(2, *shape))
    except UnsupportedError as error:
        if "BatchNorm" not in error.got:
            raise
        raise UnsupportedError(
            expected=error.expected,
            got=error.got,
            where=f"option --model {config.model}, {error.where}",
            todo="replace it (GroupNorm, LayerNorm), or freeze it with the statistics that it "
            "has: call its .eval() in the function that makes the model",
        ) from None
    return DatasetInfo(
        name=source.name,
        digest=source.digest,
        sample_count=len(source.train_labels),
        test_count=len(source.test_labels),
        input_shape=shape,
        class_names=source.class_names,
        layers=tuple(parameter_layers(network)),
        forward_order=order,
        chunks=digest_json(chunk_table(source)),
        network=identity,
    )


def _note_unequal_batches(plan: Plan, key: str, console: Console) -> None:
    count, size = plan.datasets[key].sample_count, plan.training.batch_size
    if count % size:
        batches = -(-count // size)
        sizes = " or ".join(map(str, sorted({count // batches, -(-count // batches)})))
        parts = f"are {batches} batches" if batches > 1 else "is one batch"
        console.print(
            f"{key}: {count:,} samples are no multiple of {size}, so there {parts} of {sizes} "
            "samples, each sample in one of them.",
            highlight=False,
        )
