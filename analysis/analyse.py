"""Every analysis of one node of the cube, in one pass over its chunks.

The lazy results share the chunks they read, so `analyse` computes them together: 50 epochs of a
reference run are then read once instead of five times. k-means and the exact PCA need small inputs
in memory and follow, and the claims come last, from the numbers of all the others.

Map: `RESULTS` (what there is), `analyse` (all of it).

What the results hold, by key (dimensions in brackets):

`stability` (of `sampimp.analysis.stability`), `snapshot_stability` (the same of snapshot
importance)
    rank_correlation(reference, epoch, pair), rank_correlation_interval(reference, epoch, pair,
    bound), layer_rank_correlation(reference, epoch, layer, pair)
`decomposition` (of `sampimp.analysis.decomposition`)
    importance_by_class(epoch, layer, label), importance_by_layer(epoch, layer), class_size(label),
    importance_by_fold(fold, epoch, layer), parameter_count(layer) where parameters are stored
`importance_groups` (of `sampimp.analysis.decomposition`)
    importance_by_group(group, epoch, layer), share(group), share_by_layer(group, layer),
    group_size(group)
`importance_against_nll` (of `sampimp.analysis.difficulty`)
    rank_correlation(epoch, layer), model_rank_correlation(epoch), overall_rank_correlation(),
    when_rank_correlation(), where_rank_correlation(layer), each but the first with
    `*_interval`(bound); overall_importance(sample), final_nll(sample), mean_epoch(sample),
    layer_share(layer, sample), importance_by_difficulty(difficulty, epoch, layer),
    importance_by_difficulty_and_fold(difficulty, fold, epoch, layer), difficulty_size(difficulty)
`clusters` (of `sampimp.analysis.clusters`; `sample` holds the permanent indices of the class's
samples)
    profile(cluster, epoch, layer), cluster_of(sample), size(cluster), final_nll(sample),
    overall_importance(sample), nll_quantile(cluster, quantile), nll_quantile_by_epoch(cluster,
    epoch, quantile), representative(cluster, rank), mean_epoch(cluster), layer_share(cluster,
    layer); attributes label, class_name
`strategy_curves` (of `sampimp.analysis.curves`)
    train_error, test_error, train_nll, test_nll (strategy, epoch), each with `*_se`;
    runs(strategy, epoch), diverged(strategy), diverged_epoch(strategy, seed),
    final_test_error(strategy, seed), train_error_by_seed(strategy, seed, epoch),
    class_nll(strategy, epoch, label)
`parameter_paths` (of `sampimp.analysis.paths`)
    path(strategy, state, component), explained_variance_ratio(component), distance(strategy,
    other_strategy), travelled(strategy), fitted(strategy)
`importance_histogram` (of `sampimp.analysis.decomposition`)
    count(bin), bin_edge(edge) in log10, zeros(), quantile(q), gini(), mean()
`claims` (of `sampimp.analysis.claims`)
    section, sentence, scope, number, value, low, high, side, threshold, rule, verdict (claim)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import dask
import xarray as xr

from sampimp.analysis.claims import claims
from sampimp.analysis.clusters import clusters
from sampimp.analysis.curves import strategy_curves
from sampimp.analysis.decomposition import decomposition, importance_groups, importance_histogram
from sampimp.analysis.difficulty import importance_against_nll
from sampimp.analysis.paths import parameter_paths
from sampimp.analysis.stability import stability
from sampimp.errors import ConfigError, RecordError


@dataclass(frozen=True)
class Result:
    """What one result is: its title, the paper's figure and section, and the function behind it."""

    title: str
    figure: str
    section: str
    function: str


RESULTS: Mapping[str, Result] = {
    "stability": Result(
        "Stability under initialisation", "1", "3.2", "sampimp.analysis.stability.stability"
    ),
    "snapshot_stability": Result(
        "Stability of snapshot importance", "1", "3.2", "sampimp.analysis.stability.stability"
    ),
    "decomposition": Result(
        "Importance by epoch, layer and class",
        "2",
        "3.3",
        "sampimp.analysis.decomposition.decomposition",
    ),
    "importance_groups": Result(
        "Importance of the most important samples",
        "3",
        "3.3",
        "sampimp.analysis.decomposition.importance_groups",
    ),
    "importance_against_nll": Result(
        "Importance against negative log-likelihood",
        "4",
        "3.4 and 3.5",
        "sampimp.analysis.difficulty.importance_against_nll",
    ),
    "clusters": Result(
        "Clusters of one class", "5 and 6", "3.5", "sampimp.analysis.clusters.clusters"
    ),
    "strategy_curves": Result(
        "Training under the strategies", "7 and 9", "3.6", "sampimp.analysis.curves.strategy_curves"
    ),
    "parameter_paths": Result(
        "Paths of the parameters", "8", "3.6", "sampimp.analysis.paths.parameter_paths"
    ),
    "importance_histogram": Result(
        "Spread of overall importance",
        "10",
        "3.3 and appendix",
        "sampimp.analysis.decomposition.importance_histogram",
    ),
    "claims": Result("The paper's claims", "none", "3.2 to 3.6", "sampimp.analysis.claims.claims"),
}
"""Every result that `analyse` can return, in the order of the report."""


def analyse(cube: xr.Dataset) -> dict[str, xr.Dataset]:
    """Return every result that the cube allows, computed.

    Parameters
    ----------
    cube
        One node of the cube.

    Returns
    -------
    dict of Dataset, in memory
        Keys of `RESULTS`, in that order. A result whose input is not there is left out, and the
        attribute `left_out` of `claims` says why, one line each.

    Examples
    --------
    >>> from sampimp.analysis.runs import small_cube
    >>> results = analyse(small_cube().drop_vars("parameters"))
    >>> sorted(set(RESULTS) - set(results))
    ['parameter_paths', 'snapshot_stability']
    """
    found: dict[str, xr.Dataset] = {}
    why: dict[str, str] = {}

    def attempt(key: str, make: Callable[[], xr.Dataset]) -> None:
        try:
            found[key] = make()
        except (RecordError, ConfigError) as error:
            why[key] = f"{key}: expected {error.expected}; got {error.got}"

    attempt("stability", lambda: stability(cube))
    if "snapshot_importance" in cube:
        attempt("snapshot_stability", lambda: stability(cube, "snapshot_importance"))
    attempt("decomposition", lambda: decomposition(cube))
    attempt("importance_against_nll", lambda: importance_against_nll(cube))
    attempt("strategy_curves", lambda: strategy_curves(cube))
    attempt("importance_histogram", lambda: importance_histogram(cube))
    found = compute_together(found)
    against = found.get("importance_against_nll")
    tau = None if against is None else against["overall_importance"]
    attempt("importance_groups", lambda: importance_groups(cube, tau).compute())
    attempt("clusters", lambda: clusters(cube))
    attempt("parameter_paths", lambda: parameter_paths(cube))
    found["claims"] = claims(cube, found)
    found["claims"].attrs["left_out"] = "\n".join(why.values())
    return {key: found[key] for key in RESULTS if key in found}


def compute_together(results: Mapping[str, xr.Dataset]) -> dict[str, xr.Dataset]:
    """Return the results in memory, after one pass over the chunks they share.

    Examples
    --------
    >>> from sampimp.analysis.runs import small_cube
    >>> lazy = {"curves": strategy_curves(small_cube())}
    >>> compute_together(lazy)["curves"].chunks
    Frozen({})
    """
    places = [
        (key, name)
        for key, result in results.items()
        for name in result.variables
        if dask.is_dask_collection(result.variables[name].data)
    ]
    # dask.compute(*datasets) would be the plain way; dask 2026.8 loses keys when it fuses the tasks
    # of some datasets with each other ("Missing dependency ... finalize-hlgfinalizecompute").
    arrays = dask.compute(*(results[key].variables[name].data for key, name in places))
    computed = {key: result.copy() for key, result in results.items()}
    for (key, name), array in zip(places, arrays, strict=True):
        computed[key][name] = computed[key][name].copy(data=array)
    return computed
