"""All results of one data set of the cube.

Lazy results read the same chunks, so `analyse` computes them together: 50 epochs of a reference run
are then read once instead of five times. `importance_groups` needs overall importance and reads the
run again. k-means and the exact principal components need small inputs in memory and follow. The
claims come last, from the numbers of all other results.

Map: `RESULTS` (the table of all results), `analyse`, `compute_together`. The variables of each
result are listed in `sampimp.analysis.results`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import dask
import xarray as xr

from sampimp.analysis.claims.judge import judge_claims
from sampimp.analysis.influence_runs import has_influence
from sampimp.analysis.results.clusters import clusters
from sampimp.analysis.results.curves import strategy_curves
from sampimp.analysis.results.decomposition import (
    decomposition,
    importance_groups,
    importance_histogram,
)
from sampimp.analysis.results.difficulty import importance_against_nll
from sampimp.analysis.results.influence_by_layer import influence_by_layer
from sampimp.analysis.results.influential_samples import influential_samples
from sampimp.analysis.results.method_scores import method_scores
from sampimp.analysis.results.paths import parameter_paths
from sampimp.analysis.results.removal_effects import removal_effects
from sampimp.analysis.results.removal_sizes import removal_sizes
from sampimp.analysis.results.selected_samples import selected_samples
from sampimp.analysis.results.stability import stability
from sampimp.analysis.results.subset_errors import subset_errors
from sampimp.analysis.subset_runs import has_subsets
from sampimp.errors import ConfigError, MissingDataError


@dataclass(frozen=True)
class Result:
    """A result's title, the paper's figure and section, and the function that computes it."""

    title: str
    figure: str
    section: str
    function: str


RESULTS: Mapping[str, Result] = {
    "stability": Result(
        "Stability under initialisation", "1", "3.2", "sampimp.analysis.results.stability.stability"
    ),
    "snapshot_stability": Result(
        "Stability of snapshot importance",
        "1",
        "3.2",
        "sampimp.analysis.results.stability.stability",
    ),
    "decomposition": Result(
        "Importance by epoch, layer and class",
        "2",
        "3.3",
        "sampimp.analysis.results.decomposition.decomposition",
    ),
    "importance_groups": Result(
        "Importance of the most important samples",
        "3",
        "3.3",
        "sampimp.analysis.results.decomposition.importance_groups",
    ),
    "importance_against_nll": Result(
        "Importance against negative log-likelihood",
        "4",
        "3.4 and 3.5",
        "sampimp.analysis.results.difficulty.importance_against_nll",
    ),
    "clusters": Result(
        "Clusters of one class", "5 and 6", "3.5", "sampimp.analysis.results.clusters.clusters"
    ),
    "strategy_curves": Result(
        "Training under the strategies",
        "7 and 9",
        "3.6",
        "sampimp.analysis.results.curves.strategy_curves",
    ),
    "parameter_paths": Result(
        "Paths of the parameters", "8", "3.6", "sampimp.analysis.results.paths.parameter_paths"
    ),
    "importance_histogram": Result(
        "Spread of overall importance",
        "10",
        "3.3 and appendix",
        "sampimp.analysis.results.decomposition.importance_histogram",
    ),
    "influence_by_layer": Result(
        "Influence by epoch and layer",
        "12 and 15",
        "4",
        "sampimp.analysis.results.influence_by_layer.influence_by_layer",
    ),
    "removal_effects": Result(
        "Predicted and actual effects of removals",
        "13",
        "4",
        "sampimp.analysis.results.removal_effects.removal_effects",
    ),
    "method_scores": Result(
        "All methods on one run",
        "14",
        "4",
        "sampimp.analysis.results.method_scores.method_scores",
    ),
    "removal_sizes": Result(
        "Importance against the size of the effect of a removal",
        "16",
        "4",
        "sampimp.analysis.results.removal_sizes.removal_sizes",
    ),
    "influential_samples": Result(
        "Most helpful and most harmful samples",
        "17",
        "4",
        "sampimp.analysis.results.influential_samples.influential_samples",
    ),
    "subset_errors": Result(
        "Errors after training on subsets",
        "18",
        "5",
        "sampimp.analysis.results.subset_errors.subset_errors",
    ),
    "selected_samples": Result(
        "Samples that a rule selects",
        "19",
        "5",
        "sampimp.analysis.results.selected_samples.selected_samples",
    ),
    "claims": Result(
        "The paper's claims", "none", "3.2 to 5", "sampimp.analysis.claims.judge.judge_claims"
    ),
}
"""Every result that `analyse` can return, in the order of the report."""


def analyse(cube: xr.Dataset) -> dict[str, xr.Dataset]:
    """Compute every result for which the cube has the data.

    Parameters
    ----------
    cube
        One node of the cube.

    Returns
    -------
    dict of Dataset, in memory
        Keys of `RESULTS`, in that order. A result whose input is missing is left out, and the
        attribute `left_out` of `claims` gives the reason, one line per result (none for snapshot
        importance, for section 4 in a cube without influence, and for section 5 in one without
        subsets: these are optional).

    Raises
    ------
    RecordError
        A stored chunk is damaged.

    Examples
    --------
    >>> from sampimp.analysis.example_cube import example_cube
    >>> results = analyse(example_cube().drop_vars("parameters"))
    >>> sorted(name for name in set(RESULTS) - set(results) if RESULTS[name].section not in "45")
    ['parameter_paths', 'snapshot_stability']
    """
    # Results name samples by their position; every stored result would have all names.
    cube = cube.drop_vars(["file", "test_file"], errors="ignore")
    results: dict[str, xr.Dataset] = {}
    reasons: dict[str, str] = {}

    def attempt(key: str, make: Callable[[], xr.Dataset]) -> None:
        try:
            results[key] = make()
        except (MissingDataError, ConfigError) as error:
            reasons[key] = f"{key}: expected {error.expected}; got {error.got}"

    attempt("stability", lambda: stability(cube))
    if "snapshot_importance" in cube:
        attempt("snapshot_stability", lambda: stability(cube, "snapshot_importance"))
    attempt("decomposition", lambda: decomposition(cube))
    attempt("importance_against_nll", lambda: importance_against_nll(cube))
    attempt("strategy_curves", lambda: strategy_curves(cube))
    attempt("importance_histogram", lambda: importance_histogram(cube))
    if has_influence(cube):
        attempt("influence_by_layer", lambda: influence_by_layer(cube))
    if has_subsets(cube):
        attempt("selected_samples", lambda: selected_samples(cube))
    results = compute_together(results)
    against = results.get("importance_against_nll")
    tau = None if against is None else against["overall_importance"]
    attempt("importance_groups", lambda: importance_groups(cube, tau).compute())
    attempt("clusters", lambda: clusters(cube))
    attempt("parameter_paths", lambda: parameter_paths(cube))
    if has_influence(cube):
        attempt("removal_effects", lambda: removal_effects(cube))
        attempt("method_scores", lambda: method_scores(cube))
        attempt("removal_sizes", lambda: removal_sizes(cube))
        attempt("influential_samples", lambda: influential_samples(cube))
    if has_subsets(cube):
        attempt("subset_errors", lambda: subset_errors(cube))
    results["claims"] = judge_claims(cube, results)
    results["claims"].attrs["left_out"] = "\n".join(reasons.values())
    return {key: results[key] for key in RESULTS if key in results}


def compute_together(results: Mapping[str, xr.Dataset]) -> dict[str, xr.Dataset]:
    """Return the results in memory, after one pass over the chunks that they share.

    Examples
    --------
    >>> from sampimp.analysis.example_cube import example_cube
    >>> results = {"curves": strategy_curves(example_cube())}
    >>> compute_together(results)["curves"].chunks
    Frozen({})
    """
    lazy = [
        (key, name)
        for key, result in results.items()
        for name in result.variables
        if dask.is_dask_collection(result.variables[name].data)
    ]
    # Not dask.compute(*datasets): dask 2026.8 loses keys when it fuses the tasks of several
    # datasets ("Missing dependency ... finalize-hlgfinalizecompute").
    arrays = dask.compute(*(results[key].variables[name].data for key, name in lazy))
    computed = {key: result.copy() for key, result in results.items()}
    for (key, name), array in zip(lazy, arrays, strict=True):
        computed[key][name] = computed[key][name].copy(data=array)
    return computed
