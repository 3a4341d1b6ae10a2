"""The scores of the samples that a rule reads besides importance and NLL of its run.

Map: `read_score_file`, `own_scores` (of a rule and a run), `selectable_count`.
"""

import warnings
from collections.abc import Mapping

import numpy as np

from sampimp.errors import ConfigError, DataError, MissingDataError
from sampimp.store.cube import open_cube
from sampimp.store.location import Folder
from sampimp.store.plan import Plan, PlannedTrial
from sampimp.subsets.rules import SelectionRule, parse_rule


def read_score_file(path: str) -> np.ndarray:
    """Return the scores of a file, float64.

    Raises
    ------
    DataError
        It is missing, or has other content than numbers.
    """
    try:
        values = _read_array(path)
    except Exception as error:  # of whichever decoder reads the file
        raise _no_scores(path, str(error).partition("\n")[0] or type(error).__name__) from None
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiub":
        kind = values.dtype if isinstance(values, np.ndarray) else "several arrays"
        raise _no_scores(path, f"{kind}, which are not real numbers")
    if not values.size:
        raise _no_scores(path, "no number")
    if values.dtype.kind in "iu" and max(map(abs, (int(values.min()), int(values.max())))) > 2**53:
        raise _no_scores(path, "whole numbers above 2^53, which float64 does not tell apart")
    with np.errstate(over="ignore"):  # of a longer format
        scores = values.astype(np.float64)
    return scores.ravel() if scores.size in scores.shape else scores


def _read_array(path: str) -> object:
    if path.endswith(".npy"):
        try:
            return np.load(path, allow_pickle=False)
        except ValueError:  # NumPy's advice is to load it unsafely
            raise ValueError("other content than an array of numbers") from None
    if path.endswith(".npz"):
        raise ValueError("an .npz file, which may have several arrays")
    with warnings.catch_warnings(action="ignore"):  # of an empty file
        return np.loadtxt(path, delimiter=",", ndmin=1, encoding="utf-8-sig")


def _no_scores(path: str, got: str) -> DataError:
    return DataError(
        expected="an .npy file, or a text file with a number in each line",
        got=got,
        where=path,
        todo="write it with np.save(PATH, scores) or np.savetxt(PATH, scores), without a heading",
    )


def own_scores(
    folder: Folder,
    plan: Plan,
    run: PlannedTrial,
    rule: SelectionRule,
    files: Mapping[str, np.ndarray],
) -> np.ndarray:
    """Return a rule's scores for the samples of a run, (N,) float64.

    Parameters
    ----------
    folder, plan, run
        The study, and one of its runs.
    rule
        One that reads a file, a variable of the cube, or final importance.
    files
        The values of each file of scores, by its rule.

    Raises
    ------
    MissingDataError
        The cube has no such variable, or has it of other runs alone.
    ConfigError
        It has other dimensions than the sample.
    DataError
        A file does not have one number for each sample.
    """
    count = plan.datasets[run.config.dataset].sample_count
    if rule.spec in files:
        if files[rule.spec].shape != (count,):
            raise DataError(
                expected=f"{count:,} scores, one for each training sample, in their order",
                got=f"shape {files[rule.spec].shape}",
                where=f"option --rules, {rule.spec} (file and digest)",
                todo="write one number for each sample, NaN where there is none",
            )
        return files[rule.spec]
    name = "final_importance_total" if rule.name == "final-importance" else rule.argument
    node = open_cube(folder)[plan.node(run.config.dataset)].to_dataset()
    if name not in node:
        usable = [
            str(other)
            for other, values in node.variables.items()
            if other != "sample"
            and {"sample"} <= set(values.dims) <= {"strategy", "seed", "sample"}
            and values.dtype.kind in "fiub"
        ]
        raise _missing(folder, run, rule, name, f"none in the cube, which has {', '.join(usable)}")
    values = node[name].sel(
        {dim: getattr(run.config, dim) for dim in ("strategy", "seed") if dim in node[name].dims}
    )
    if values.dims != ("sample",) or values.dtype.kind not in "fiub":
        raise ConfigError(
            expected="a variable with one number for each sample of a run",
            got=f"dimensions {', '.join(map(str, values.dims))} of {values.dtype}",
            where=f"rule {rule.spec}",
            todo="reduce it yourself, and pass it as scores:FILE.npy",
        )
    numbers = np.asarray(values, np.float64)
    if not np.isfinite(numbers).any():
        raise _missing(folder, run, rule, name, "NaN for every sample of this run")
    return numbers


def _missing(
    folder: Folder, run: PlannedTrial, rule: SelectionRule, name: str, got: str
) -> MissingDataError:
    config = run.config
    todo = "name one of the cube's variables that this run has"
    if rule.name == "final-importance":
        todo = (
            f"run `sampimp influence {folder} --targets probe:64 --runs "
            f"{config.dataset}:{config.strategy}:{config.seed}` first"
        )
    return MissingDataError(
        expected=f"the variable {name} of {run.label}",
        got=got,
        where=f"rule {rule.spec}",
        todo=todo,
    )


def selectable_count(rule: SelectionRule, pool: np.ndarray, scores: np.ndarray | None) -> int:
    """Return how many samples of a pool, given by position, a rule can select at most.

    Parameters
    ----------
    rule
        The rule; without a parameter, its most permissive variant counts.
    pool
        Positions of the samples.
    scores
        The scores that it reads, (N,); None if all samples have one.
    """
    usable = len(pool) if scores is None else int(np.isfinite(scores[pool]).sum())
    return max(parse_rule(variant).capacity(usable) for variant in rule.variants)
