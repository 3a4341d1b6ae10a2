"""Which runs of a study influence or retraining is computed of, and whether they can be replayed.

    shuffle:1           strategy and seed, of every data set of the study
    mnist:shuffle:1     of one data set
    all                 every run of the study that has not diverged

Map: `choose_runs`; `check_replayable`, `require_code`, `require_parameters`.
"""

from collections.abc import Sequence

from sampimp.config import TrialConfig
from sampimp.data import Source
from sampimp.errors import ConfigError, RecordError
from sampimp.schema import __version__
from sampimp.store.datasets import open_source
from sampimp.store.location import Folder
from sampimp.store.plan import Plan, PlannedTrial
from sampimp.sweeps.stored_study import check_model, require_source


def choose_runs(plan: Plan, trials: Sequence[PlannedTrial], names: Sequence[str]) -> list[int]:
    """Return the positions of the named runs in the plan, each once, in the plan's order.

    Raises
    ------
    ConfigError
        A name is malformed, or names a run that the study does not have.
    RecordError
        A named run has diverged, or all of them have.
    """
    if not names:
        raise ConfigError(
            expected="one or more runs as STRATEGY:SEED or DATASET:STRATEGY:SEED, or all",
            got="none",
            where="option --runs",
            todo="name a run, or leave the option out",
        )
    positions: set[int] = set()
    for name in names:
        if name == "all":
            chosen = [i for i, trial in enumerate(trials) if not _has_diverged(trial)]
        else:
            chosen = [i for i, trial in enumerate(trials) if name in _names_of(trial.config)]
        if name != "all" and not chosen:
            known = sorted({_names_of(trial.config)[0] for trial in trials})
            raise ConfigError(
                expected=f"a run of the study as STRATEGY:SEED or DATASET:STRATEGY:SEED, such as "
                f"{', '.join(known[:6])}{', ...' if known[6:] else ''}",
                got=repr(name),
                where="option --runs",
                todo="name a run of the study, or add it to the study first",
            )
        positions |= set(chosen)
    diverged = [trials[i] for i in sorted(positions) if _has_diverged(trials[i])]
    if diverged or not positions:
        epochs = [
            f"{trial.label} diverged in epoch {trial.commit['diverged_epoch']}"
            for trial in diverged
            if trial.commit
        ]
        raise RecordError(
            expected="a run that trained to its end",
            got="; ".join(epochs) or "none",
            where="option --runs",
            todo="leave it out: a diverged run has no final model",
        )
    return sorted(positions)


def _names_of(config: TrialConfig) -> tuple[str, str]:
    name = f"{config.strategy}:{config.seed}"
    return name, f"{config.dataset}:{name}"


def _has_diverged(trial: PlannedTrial) -> bool:
    return trial.commit is not None and trial.commit["diverged_epoch"] is not None


def check_replayable(
    folder: Folder, plan: Plan, keys: Sequence[str], model: str | None
) -> dict[str, Source]:
    """Check that runs can be trained again with the same bytes, as far as that is known before.

    Parameters
    ----------
    folder, plan
        The study.
    keys
        The data sets of the runs.
    model
        The network as the user names it.

    Returns
    -------
    dict of str to Source
        These data sets.

    Raises
    ------
    ConfigError
        Another version trained the study, several workers shared its runs, or the network is a
        user's own, and the user has not named it.
    StoreError
        A data set is missing.
    RecordError
        A data set is not the one of the plan.
    """
    check_model(plan, model)
    require_code(folder, plan)
    if plan.training.workers > 1:
        raise ConfigError(
            expected="runs that one worker trained",
            got=f"{plan.training.workers} workers that shared each batch",
            where=str(folder),
            todo="train the study with --workers-per-trial 1: the order of sums over workers is "
            "not replayed",
        )
    for key in keys:
        info = plan.datasets[key]
        open_source(folder / "datasets" / f"{key}.zarr", info.digest, info.chunks)
    return {key: require_source(folder, key) for key in keys}


def require_code(folder: Folder, plan: Plan) -> None:
    """Raise ConfigError unless this version of the package trained the study."""
    if plan.code != __version__:
        raise ConfigError(
            expected=f"a study that this version trained, {__version__}",
            got=f"a study of version {plan.code}",
            where=str(folder),
            todo=f"install sampimp {plan.code}, or train the study again: another version may "
            "replay it with other bytes",
        )


def require_parameters(folder: Folder, plan: Plan) -> None:
    """Raise ConfigError if no parameters are stored, with which a replay could be compared."""
    if not plan.training.stored_states():
        raise ConfigError(
            expected="stored parameters, at least at the start and the end of each run",
            got="--parameters-every 0: none, from which a run could be replayed",
            where=str(folder),
            todo="train the study with --parameters-every 1 in another --out; any N from 1 on "
            "will do, at the price of one more replay",
        )
