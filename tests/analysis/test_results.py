"""Results against NumPy on the whole cube in memory."""

import importlib

import dask
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sampimp.analysis import runs
from sampimp.analysis.example_cube import example_cube
from sampimp.analysis.results.analyse import RESULTS, analyse
from sampimp.analysis.results.clusters import cluster_count, clusters, default_class
from sampimp.analysis.results.curves import strategy_curves
from sampimp.analysis.results.decomposition import (
    decomposition,
    importance_groups,
    importance_histogram,
)
from sampimp.analysis.results.difficulty import importance_against_nll
from sampimp.analysis.results.paths import parameter_paths
from sampimp.analysis.results.stability import stability
from sampimp.errors import ConfigError, RecordError

LAZY = {
    "stability": stability,
    "decomposition": decomposition,
    "importance_groups": importance_groups,
    "importance_against_nll": importance_against_nll,
    "strategy_curves": strategy_curves,
    "importance_histogram": importance_histogram,
}


WITHOUT_INFLUENCE = [key for key, result in RESULTS.items() if result.section not in ("4", "5")]


@pytest.fixture(scope="module")
def cube():
    return example_cube()


@pytest.fixture(scope="module")
def memory(cube):
    return cube.compute()


@pytest.fixture(scope="module")
def results(cube):
    return analyse(cube)


@pytest.mark.parametrize("name", LAZY)
def test_a_call_computes_nothing_but_the_curves(cube, name):
    heavy = ["importance", "nll", "batch", "parameters"]

    def refuse(block):
        raise AssertionError("computed on the call")

    trap = cube.copy()
    for key in heavy:
        data = cube[key].data.map_blocks(refuse, dtype=np.float32, meta=np.empty((0,), np.float32))
        trap[key] = cube[key].copy(data=data)
    result = LAZY[name](trap)
    assert any(dask.is_dask_collection(v.data) for v in result.values())
    with pytest.raises(AssertionError, match="computed on the call"):
        result.compute()


@pytest.mark.parametrize("name", LAZY)
@settings(max_examples=3)
@given(sample=st.integers(7, 40), layer=st.integers(1, 4), epoch=st.integers(1, 3))
def test_no_result_depends_on_the_chunks(name, sample, layer, epoch):
    small = example_cube(
        strategies=("shuffle", "shuffle_by_seed", "nlo"),
        seeds=2,
        samples=40,
        epochs=3,
        states=(),
        missing=(),
        diverged={("nlo", 2): 2},
    )
    other = small.chunk(sample=sample, layer=layer, epoch=epoch)
    ours, expected = LAZY[name](other).compute(), LAZY[name](small.compute()).compute()
    xr.testing.assert_allclose(ours, expected, rtol=1e-9)


@pytest.mark.parametrize("name", LAZY)
def test_a_result_has_its_method_source_units_and_names(cube, name):
    result = LAZY[name](cube)
    assert {"method", "figure", "source"} <= set(result.attrs)
    assert "Gao & Jojic" in result.attrs["source"]
    for variable in result.values():
        assert variable.attrs["units"]
        assert variable.attrs["long_name"]
    assert "order_seed" not in result.coords


def test_stability_is_spearman_between_seeds(results, memory):
    result = results["stability"]
    assert result["reference"].values.tolist() == ["shuffle", "shuffle_by_seed"]
    for reference in ("shuffle", "shuffle_by_seed"):
        beta = memory["importance"].sel(strategy=reference).values.astype(np.float64)
        for t in range(beta.shape[1]):
            at_epoch = result.sel(reference=reference).isel(epoch=t)
            for pair, (a, b) in {"1-2": (0, 1), "1-3": (0, 2), "2-3": (1, 2)}.items():
                expected = stats.spearmanr(beta[a, t].sum(0), beta[b, t].sum(0)).statistic
                value = at_epoch["rank_correlation"].sel(pair=pair)
                np.testing.assert_allclose(value, expected)
                low, high = at_epoch["rank_correlation_interval"].sel(pair=pair)
                assert low < value < high
                for d in range(beta.shape[2]):
                    np.testing.assert_allclose(
                        at_epoch["layer_rank_correlation"].isel(layer=d).sel(pair=pair),
                        stats.spearmanr(beta[a, t, d], beta[b, t, d]).statistic,
                    )


def test_stability_keeps_the_epochs_before_a_divergence_and_leaves_missing_seeds_out():
    cube = example_cube(seeds=4, missing=(("shuffle", 4),), diverged={("shuffle", 2): 3})
    result = stability(cube, resamples=10).sel(reference="shuffle").compute()
    by_epoch = result["rank_correlation"].sel(pair="1-2")
    assert np.isfinite(by_epoch.values).tolist() == [True, True, False, False, False, False]
    assert np.isfinite(result["rank_correlation"].sel(pair="1-3")).all()
    # Seed 4 was run for shuffle_by_seed only.
    assert np.isnan(result["rank_correlation"].sel(pair="3-4")).all()
    alone = example_cube(strategies=("shuffle",), seeds=4, missing=(("shuffle", 4),), diverged={})
    assert stability(alone)["pair"].values.tolist() == ["1-2", "1-3", "2-3"]


def test_snapshot_importance_is_correlated_where_it_was_measured(cube):
    scored = cube.assign(
        snapshot_importance=cube["importance"].where(cube["epoch"] % 2 == 0).chunk(epoch=1)
    )
    result = stability(scored, "snapshot_importance", resamples=10).compute()
    measured = np.isfinite(result["rank_correlation"].sel(reference="shuffle", pair="1-2").values)
    assert measured.tolist() == [False, True] * 3
    assert "snapshot" in result.attrs["method"]
    results = analyse(scored.drop_vars("parameters").sel(strategy=["shuffle"]))
    assert "snapshot_stability" in results


def test_decomposition_adds_up(results, memory):
    result = results["decomposition"]
    beta = memory["importance"].sel(strategy="shuffle").values.astype(np.float64).mean(0)
    label = memory["label"].values
    for c in range(3):
        np.testing.assert_allclose(
            result["importance_by_class"].sel(label=c), beta[..., label == c].sum(-1)
        )
    np.testing.assert_allclose(result["importance_by_layer"], beta.sum(-1))
    np.testing.assert_allclose(result["importance_by_fold"].sum("fold"), beta.sum(-1))
    assert result["class_size"].values.tolist() == [40, 40, 40]
    assert result["parameter_count"].values.tolist() == [10, 10, 10, 10]


def test_decomposition_takes_complete_seeds_alone():
    cube = example_cube(diverged={("shuffle", 2): 3})
    beta = cube["importance"].sel(strategy="shuffle", seed=[1, 3]).values.astype(np.float64)
    result = decomposition(cube)
    np.testing.assert_allclose(result["importance_by_layer"], beta.mean(0).sum(-1))
    assert "2 initialisations" in result.attrs["method"]


def test_the_groups_are_the_samples_by_rank(cube, memory):
    beta = memory["importance"].sel(strategy="shuffle", seed=1).values.astype(np.float64)
    order = np.argsort(-beta.sum((0, 1)))
    parts = np.split(order, [12, 24])  # 120 samples
    result = importance_groups(cube).compute()
    for name, part in zip(["top 10 %", "next 10 %", "other 80 %"], parts, strict=True):
        total = beta[..., part].sum(-1)
        np.testing.assert_allclose(result["importance_by_group"].sel(group=name), total)
        np.testing.assert_allclose(result["share"].sel(group=name), total.sum() / beta.sum())
        np.testing.assert_allclose(
            result["share_by_layer"].sel(group=name), total.sum(0) / beta.sum((0, 2))
        )
    tau = importance_against_nll(cube)["overall_importance"].compute()
    xr.testing.assert_allclose(importance_groups(cube, tau).compute(), result)


def test_importance_against_nll(results, memory):
    run = memory.sel(strategy="shuffle", seed=1)
    beta, nll = run["importance"].values.astype(np.float64), run["nll"].values
    alpha, tau, final = beta.sum(1), beta.sum((0, 1)), nll[-1]
    mean_epoch = (alpha * np.arange(1, 7)[:, None]).sum(0) / tau
    result = results["importance_against_nll"]
    np.testing.assert_allclose(result["overall_importance"], tau)
    np.testing.assert_allclose(result["mean_epoch"], mean_epoch)
    np.testing.assert_allclose(result["layer_share"], beta.sum(0) / tau)
    for t in range(6):
        np.testing.assert_allclose(
            result["rank_correlation"].isel(epoch=t),
            [stats.spearmanr(beta[t, d], nll[t]).statistic for d in range(4)],
        )
        np.testing.assert_allclose(
            result["model_rank_correlation"].isel(epoch=t),
            stats.spearmanr(alpha[t], nll[t]).statistic,
        )
    for name, expected in {
        "overall": stats.spearmanr(tau, final).statistic,
        "when": stats.spearmanr(final, mean_epoch).statistic,
    }.items():
        np.testing.assert_allclose(result[f"{name}_rank_correlation"], expected)
        low, high = result[f"{name}_rank_correlation_interval"].values
        assert low < expected < high
    order = np.argsort(final, kind="stable")
    for name, part in zip(["easy", "medium", "hard"], np.split(order, [60, 108]), strict=True):
        np.testing.assert_allclose(
            result["importance_by_difficulty"].sel(difficulty=name), beta[..., part].mean(-1)
        )


def test_equal_nll_is_split_by_the_order_of_the_samples():
    cube = example_cube(samples=20)
    cube["nll"] = xr.zeros_like(cube["nll"])
    result = importance_against_nll(cube).compute()
    beta = cube["importance"].sel(strategy="shuffle", seed=1).values.astype(np.float64)
    assert result["difficulty_size"].values.tolist() == [10, 8, 2]
    np.testing.assert_allclose(
        result["importance_by_difficulty"].sel(difficulty="easy"), beta[..., :10].mean(-1)
    )
    assert np.isnan(result["overall_rank_correlation"])


def test_the_histogram_counts_every_sample_with_importance(cube):
    cube = cube.copy()
    cube["importance"] = cube["importance"].where(cube["sample"] >= 5, 0).chunk(epoch=1)
    tau = cube["importance"].sel(strategy="shuffle", seed=1).values.astype(np.float64).sum((0, 1))
    result = importance_histogram(cube, bins=7).compute()
    count, edges = np.histogram(np.log10(tau[5:]), bins=7)
    np.testing.assert_array_equal(result["count"], count)
    np.testing.assert_allclose(result["bin_edge"], edges)
    assert int(result["zeros"]) == 5
    np.testing.assert_allclose(result["quantile"].sel(q=0.5), np.median(tau))
    np.testing.assert_allclose(result["gini"], np.abs(tau[:, None] - tau).mean() / (2 * tau.mean()))


def test_clusters_recover_known_groups_and_are_ordered_by_importance():
    cube = example_cube(samples=120, classes=2, diverged={}, missing=())
    beta = np.full((6, 4, 120), 1e-9, np.float32)
    kind = np.arange(120) // 2 % 3  # in both classes
    for k, (t, d, size) in enumerate([(0, 3, 1e-3), (2, 1, 1e-2), (5, 0, 1e-1)]):
        beta[t, d, kind == k] = size
    noise = np.random.default_rng(0).lognormal(0, 0.05, (120,)).astype(np.float32)
    cube["importance"] = cube["importance"].copy(
        data=np.broadcast_to(beta * noise, cube["importance"].shape).copy()
    )
    result = clusters(cube.chunk(epoch=1), label=1, count=3)
    members = np.arange(1, 120, 2)
    np.testing.assert_array_equal(result["sample"], members)
    np.testing.assert_array_equal(result["cluster_of"], kind[members])
    assert result["size"].values.tolist() == [20, 20, 20]
    assert result["mean_epoch"].round().values.tolist() == [1, 3, 6]
    nll = cube["nll"].sel(strategy="shuffle", seed=1).values
    for k in range(3):
        group = members[kind[members] == k]
        np.testing.assert_allclose(
            result["profile"].isel(cluster=k), beta_mean(beta * noise, group)
        )
        np.testing.assert_allclose(
            result["nll_quantile"].isel(cluster=k),
            np.quantile(nll[-1, group].astype(float), [0.05, 0.25, 0.5, 0.75, 0.95]),
        )
        assert set(result["representative"].isel(cluster=k).values) <= set(group.tolist())
    again = clusters(cube.chunk(epoch=1), label=1, count=3)
    xr.testing.assert_identical(result, again)


def beta_mean(beta, samples):
    return beta[..., samples].astype(np.float64).mean(-1)


def test_a_small_cluster_lists_minus_one_and_equal_profiles_give_fewer_clusters():
    cube = example_cube(samples=30, classes=1, diverged={}, missing=())
    cube["importance"] = xr.ones_like(cube["importance"]).compute()
    cube["importance"][..., 0] = 9.0
    with pytest.warns(match="distinct clusters"):
        result = clusters(cube.chunk(epoch=1), label=0, count=4)
    assert result["size"].values.tolist() == [29, 1]
    assert result["representative"].isel(cluster=1).values.tolist() == [0] + [-1] * 11


def test_the_number_of_clusters_is_the_papers_for_large_classes():
    cube = xr.Dataset(coords={"label": ("sample", np.repeat([0, 1, 2], [5000, 600, 30]))})
    cube.attrs = {"class_names": ["horse", "5", "cat"]}
    assert [cluster_count(cube, label) for label in range(3)] == [30, 20, 2]
    assert default_class(cube) == 0
    with pytest.raises(ConfigError, match="a label out of"):
        clusters(example_cube(), label=77)
    with pytest.raises(ConfigError, match="between 1 and 40 clusters"):
        clusters(example_cube(), label=1, count=41)


def test_curves_are_means_over_the_seeds_that_have_the_epoch(results, memory):
    result = results["strategy_curves"]
    error = memory["test_error"]
    rsio = error.sel(strategy="rsio").values  # seed 2 diverged in epoch 3
    for epoch in (2, 3):
        curve, spread = (result[f"test_error{end}"].sel(strategy="rsio") for end in ("", "_se"))
        np.testing.assert_allclose(curve[epoch], rsio[[0, 2], epoch].mean())
        np.testing.assert_allclose(spread[epoch], stats.sem(rsio[[0, 2], epoch]))
    assert result["runs"].sel(strategy="sim").values.tolist() == [2] * 6  # seed 3 is missing
    assert result["diverged"].sel(strategy=["rsio", "sim"]).values.tolist() == [1, 0]
    nll = memory["nll"].sel(strategy="rsio").values.astype(np.float64)
    class_nll = nll[..., memory["label"].values == 2].mean(-1)
    np.testing.assert_allclose(
        result["class_nll"].sel(strategy="rsio", label=2), np.nanmean(class_nll, axis=0)
    )
    np.testing.assert_array_equal(
        result["final_test_error"], error.transpose("strategy", "seed", "epoch")[..., -1]
    )


def test_a_run_that_diverges_in_the_last_epoch_has_no_final_error():
    result = strategy_curves(example_cube(diverged={("rsio", 2): 6})).compute()
    final = result["final_test_error"].sel(strategy="rsio").values
    np.testing.assert_array_equal(np.isnan(final), [False, True, False])
    np.testing.assert_allclose(result["test_error"].sel(strategy="rsio")[-1], np.nanmean(final))


def test_one_seed_has_no_standard_error():
    result = strategy_curves(example_cube(strategies=("shuffle", "nlo"), seeds=1)).compute()
    assert np.isnan(result["test_error_se"]).all()
    assert np.isfinite(result["test_error"]).all()


@pytest.mark.parametrize("block_bytes", [1, 700, 2**20])
def test_paths_are_an_exact_pca_of_all_states(block_bytes):
    missing = [("sim", seed) for seed in (1, 2, 3)]
    cube = example_cube(states=(0, 2, 6), missing=missing, diverged={("rsio", 1): 3})
    result = parameter_paths(cube, 2, block_bytes=block_bytes)
    assert "sim" not in result["strategy"].values
    assert result["state"].values.tolist() == [0, 2, 6]
    names = result["strategy"].values.tolist()
    states = cube["parameters"].sel(seed=1, strategy=names).values.astype(np.float64)
    fit = states[[name != "rsio" for name in names]].reshape(-1, 40)
    axes = np.linalg.svd(fit - fit.mean(0), full_matrices=False)
    expected = (states - fit.mean(0)) @ axes[2][:2].T
    np.testing.assert_allclose(np.abs(result["path"]), np.abs(expected), atol=1e-9)
    np.testing.assert_allclose(
        result["explained_variance_ratio"], (axes[1] ** 2 / (axes[1] ** 2).sum())[:2]
    )
    assert result["fitted"].values.tolist() == [name != "rsio" for name in names]
    apart = np.linalg.norm(states[:, None, -1] - states[None, :, -1], axis=-1)
    np.testing.assert_allclose(result["distance"], apart, atol=1e-6)
    np.testing.assert_allclose(
        result["travelled"], np.linalg.norm(states[:, -1] - states[:, 0], axis=-1)
    )


def test_paths_are_those_of_the_seed_with_the_most_strategies():
    cube = example_cube(missing=[("sim", 1), ("rand", 3)])
    result = parameter_paths(cube)
    assert "states of seed 2 " in result.attrs["method"]
    states = cube["parameters"].sel(seed=2, strategy=result["strategy"].values)
    travelled = np.linalg.norm(states.values[:, -1] - states.values[:, 0], axis=-1)
    np.testing.assert_allclose(result["travelled"], travelled, rtol=1e-6)


def test_missing_data_is_an_error():
    no_parameters = example_cube(states=())
    with pytest.raises(RecordError, match="none named parameters"):
        parameter_paths(no_parameters)
    with pytest.raises(RecordError, match="at least two seeds"):
        stability(example_cube(strategies=("shuffle", "rand"), seeds=1))
    diverged = example_cube(diverged={("shuffle", 1): 4})
    for function in (importance_groups, importance_against_nll, importance_histogram, clusters):
        with pytest.raises(RecordError, match="diverged before its last epoch"):
            function(diverged)
    with pytest.raises(RecordError, match="a complete run of shuffle"):
        decomposition(example_cube(strategies=("rand",)))
    with pytest.raises(ConfigError, match="positive number of components"):
        parameter_paths(example_cube(), 0)


def test_analyse_returns_the_results_for_which_there_is_data(cube, results):
    assert list(results) == [key for key in WITHOUT_INFLUENCE if key != "snapshot_stability"]
    assert not any(dask.is_dask_collection(result) for result in results.values())
    xr.testing.assert_allclose(results["stability"], stability(cube).compute())
    few = analyse(example_cube(strategies=("rand", "nlo"), states=()))
    assert list(few) == ["strategy_curves", "claims"]
    assert "parameter_paths: expected" in few["claims"].attrs["left_out"]


def test_a_cube_without_chunks_is_analysed(memory):
    assert set(analyse(memory)) == set(WITHOUT_INFLUENCE) - {"snapshot_stability"}


@pytest.mark.parametrize("layers", [1, 2, 6])
def test_any_number_of_layers_classes_and_epochs(layers):
    results = analyse(example_cube(layers=layers, classes=2, epochs=2, samples=24, states=()))
    assert results["decomposition"].sizes["layer"] == layers
    assert set(results["claims"]["verdict"].values) <= {
        "holds",
        "does not hold",
        "not enough data",
    }


@pytest.mark.filterwarnings("ignore:The data type")  # Zarr on fixed-length strings
def test_every_result_can_be_stored_and_read_again(results, tmp_path):
    for name, result in results.items():
        result.to_zarr(tmp_path / name, consolidated=False)
        again = xr.open_zarr(tmp_path / name, consolidated=False).compute()
        xr.testing.assert_equal(again, result)
        assert again.attrs == result.attrs


def test_trials_are_recognised_by_their_curves(cube):
    assert runs.seeds_of(cube, "sim") == [1, 2]
    assert runs.seeds_of(cube, "rsio") == [1, 3]
    assert runs.seeds_of(cube, "rsio", whole=False) == [1, 2, 3]
    assert runs.seeds_of(cube, "absent") == []


@pytest.mark.parametrize("key", RESULTS)
def test_the_table_of_results_names_existing_functions(key):
    module, _, name = RESULTS[key].function.rpartition(".")
    assert callable(getattr(importlib.import_module(module), name))


def test_a_damaged_chunk_is_an_error_and_not_a_missing_result():
    """Parameters are read by one result only, after all others are computed."""

    def damaged(block):
        raise RecordError(expected="a", got="b", where="c", todo="d")

    cube = example_cube()
    parameters = cube["parameters"].chunk().data.map_blocks(damaged, dtype=np.float32)
    cube["parameters"] = (cube["parameters"].dims, parameters)
    with pytest.raises(RecordError, match="Expected a"):
        analyse(cube)
