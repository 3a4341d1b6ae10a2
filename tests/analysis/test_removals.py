"""Results of section 4 against naive loops over removals, targets, samples and repeats."""

from itertools import combinations

import numpy as np
import pytest
import xarray as xr
from scipy import stats

import sampimp
from sampimp.analysis.example_cube import example_cube, with_influence
from sampimp.analysis.influence_runs import (
    has_influence,
    influence_run,
    natural_damping,
    removal_kinds,
)
from sampimp.analysis.results.analyse import RESULTS, analyse
from sampimp.analysis.results.influence_by_layer import influence_by_layer
from sampimp.analysis.results.influential_samples import influential_samples
from sampimp.analysis.results.method_scores import FIXED_POINT_BEST, UNROLLED, method_scores
from sampimp.analysis.results.removal_effects import removal_effects
from sampimp.analysis.results.removal_sizes import removal_sizes
from sampimp.errors import ConfigError, MissingDataError

KINDS = ("random", "top", "subset-0.95")
SINGLES = [f"sample:{number}" for number in range(12)]


@pytest.fixture(scope="module")
def cube():
    return with_influence(
        example_cube(samples=60, strategies=("shuffle", "rand"), seeds=2), noise=0.3
    )


@pytest.fixture(scope="module")
def run(cube):
    return cube.sel(strategy="shuffle", seed=1).compute()


@pytest.fixture(scope="module")
def results(cube):
    return analyse(cube)


def correlation(first, second):
    return stats.spearmanr(first, second).statistic


def rows_of(run, kind):
    return [i for i, name in enumerate(run["removal"].values) if name.startswith(f"{kind}:")]


def predicted_loop(run, kind, target, influence):
    """Return minus the sum of influence (sample) over the samples of each removal of a kind."""
    return [
        -sum(float(influence[i]) for i in range(len(influence)) if run["removed"].values[row, i])
        for row in rows_of(run, kind)
    ]


def score_loop(run, kind, influence_of, repeat=0):
    """Return the mean over the test samples of the correlation with one retraining."""
    scores = []
    for target in SINGLES:
        predicted = predicted_loop(run, kind, target, influence_of(target))
        actual = run["effect"].sel(target=target, repeat=repeat).values[rows_of(run, kind)]
        scores.append(correlation(predicted, actual))
    return np.mean(scores)


def test_importance_and_influence_by_layer(cube, run):
    result = influence_by_layer(cube)
    assert result["share_left"].chunks
    beta, arriving = run["importance"].values, run["arriving_importance"].values
    influence = run["influence"].sel(target="mean").values
    for t in range(6):
        for d in range(4):
            here = result.isel(epoch=t, layer=d)
            assert float(here["mean_importance"]) == pytest.approx(beta[t, d].mean(), rel=1e-5)
            assert float(here["mean_influence"]) == pytest.approx(
                np.abs(influence[t, d]).mean(), rel=1e-5
            )
            assert float(here["mean_arriving"]) == pytest.approx(arriving[t, d].mean(), rel=1e-5)
            assert float(here["share_left"]) == pytest.approx(
                arriving[t, d].sum() / beta[t, d].sum(), rel=1e-5
            )
    by_epoch = arriving.astype(float).sum(1)
    mean_epoch = (by_epoch * np.arange(1, 7)[:, None]).sum(0) / by_epoch.sum(0)
    expected = correlation(run["nll"].values[-1], mean_epoch)
    assert float(result["left_when_rank_correlation"]) == pytest.approx(expected)
    low, high = result["left_when_rank_correlation_interval"].values
    assert low < expected < high
    assert result.attrs["target"] == "mean"


def test_effects_and_their_agreement_by_target(results, run):
    result = results["removal_effects"]
    assert result["kind"].values.tolist() == list(KINDS)
    for kind in KINDS:
        mine = result["kind_of"].values == KINDS.index(kind)
        for target in ("mean", "class:1", "sample:3"):
            predicted = predicted_loop(
                run, kind, target, run["influence_total"].sel(target=target).values
            )
            here = result.sel(target=target)
            np.testing.assert_allclose(here["predicted"].values[mine], predicted, rtol=1e-5)
            actual = run["effect"].sel(target=target).values[rows_of(run, kind)]
            np.testing.assert_array_equal(here["actual"].values[mine], actual)
            here = here.sel(kind=kind)
            assert float(here["agreement"]) == pytest.approx(correlation(predicted, actual[:, 0]))
            pairs = [correlation(actual[:, a], actual[:, b]) for a, b in combinations(range(3), 2)]
            assert float(here["agreement_of_repeats"]) == pytest.approx(np.mean(pairs))


def test_scores_of_all_methods(results, run):
    result = results["method_scores"]
    influence, total = run["influence"], run["influence_total"]
    for kind in KINDS:
        scores = result.sel(kind=kind)
        by_name = dict(zip(scores["predictor"].values, scores["score"].values, strict=True))
        assert by_name[UNROLLED] == pytest.approx(
            score_loop(run, kind, lambda t: total.sel(target=t).values)
        )
        for name, place in (("last epoch alone", -1), ("first epoch alone", 0)):
            expected = score_loop(
                run,
                kind,
                lambda t, place=place: influence.sel(target=t).values[place].sum(0),
            )
            assert by_name[name] == pytest.approx(expected, abs=1e-3)  # sums of float32
        pairs = [
            np.mean(
                [
                    correlation(*run["effect"].sel(target=t).values[rows_of(run, kind)][:, pair].T)
                    for t in SINGLES
                ]
            )
            for pair in ([0, 1], [0, 2], [1, 2])
        ]
        assert float(scores["ceiling"]) == pytest.approx(np.mean(pairs))
        for value, interval in (("score", "score_interval"), ("ceiling", "ceiling_interval")):
            values = scores[value].values
            assert (scores[interval].sel(bound="low").values <= values + 1e-9).all()
            assert (scores[interval].sel(bound="high").values >= values - 1e-9).all()
        assert int(scores["target_count"]) == 12
        mean_actual = run["effect"].mean("repeat")
        against_mean = np.mean(
            [
                correlation(
                    predicted_loop(run, kind, t, total.sel(target=t).values),
                    mean_actual.sel(target=t).values[rows_of(run, kind)],
                )
                for t in SINGLES
            ]
        )
        assert float(scores["score_against_mean"].sel(predictor=UNROLLED)) == pytest.approx(
            against_mean
        )


def test_a_damping_is_judged_on_the_half_that_did_not_choose_it(results, run):
    result = results["method_scores"]
    fixed = run["fixed_point_influence"].isel(curvature=0)
    for kind in KINDS:
        halves = np.empty((2, 3))
        whole = []
        for number, damping in enumerate(fixed["damping"].values):
            by_target = []
            for target in SINGLES:
                values = fixed.sel(target=target, damping=damping).values
                predicted = np.array(predicted_loop(run, kind, target, values))
                actual = run["effect"].sel(target=target, repeat=0).values[rows_of(run, kind)]
                by_target.append(
                    [correlation(predicted[h::2], actual[h::2]) for h in range(2)]
                    + [correlation(predicted, actual)]
                )
            *halves[:, number], score = np.mean(by_target, axis=0)
            whole.append(score)
        expected = (halves[0, halves[1].argmax()] + halves[1, halves[0].argmax()]) / 2
        scores = result.sel(kind=kind)
        by_name = dict(zip(scores["predictor"].values, scores["score"].values, strict=True))
        assert by_name["-GGN^-1 g, best damping"] == pytest.approx(expected)
        assert by_name[FIXED_POINT_BEST] == pytest.approx(expected)
        np.testing.assert_allclose(scores["score_by_damping"].values.ravel(), whole)
        difference = by_name[UNROLLED] - expected
        assert float(scores["unrolled_minus_fixed_point"]) == pytest.approx(difference)
        low, high = scores["unrolled_minus_fixed_point_interval"].values
        assert low < difference < high
    # 1 / (0.1 * 6 epochs * 6 batches) = 0.278; of 0.001, 0.1 and 1 the nearest in logarithm is 0.1
    assert natural_damping(run) == pytest.approx(1 / 3.6)
    assert "-GGN^-1 g, damping 0.1" in by_name


def test_curvature_and_smoothing_are_methods_of_their_own(cube, run):
    smoothed = [f"{name} (eps=0.0001)" for name in run["target"].values]
    wider = cube.drop_vars("target_units").reindex(target=[*run["target"].values, *smoothed])
    wider = wider.assign_coords(target_units=("target", ["nat"] * wider.sizes["target"])).compute()
    for name in ("influence", "influence_total", "adjoint_norm"):
        values = -cube[name].values if name != "adjoint_norm" else cube[name].values
        wider[name].loc[{"target": smoothed}] = values
    solution = cube["fixed_point_influence"].isel(curvature=0, drop=True)
    both = xr.concat([solution, -solution], "curvature")
    wider = wider.drop_dims("curvature")
    wider["fixed_point_influence"] = both.assign_coords(
        curvature=["gauss-newton", "hessian"]
    ).reindex(target=wider["target"])
    scores = method_scores(wider, resamples=20)["score"].sel(kind="random").to_series()
    assert scores[f"{UNROLLED} (eps=0.0001)"] == pytest.approx(-scores[UNROLLED])
    assert scores["-Hessian^-1 g, damping 0.1"] == pytest.approx(-scores["-GGN^-1 g, damping 0.1"])
    assert scores[FIXED_POINT_BEST] == pytest.approx(scores["-GGN^-1 g, best damping"])


def test_sizes_against_the_mean_absolute_effect(results, run):
    result = results["removal_sizes"]
    assert result["kind"].values.tolist() == ["random", "top"]
    tau = run["importance"].values.astype(float).sum((0, 1))
    total = run["influence_total"].sel(target=SINGLES).values.astype(float)
    known = {
        "overall importance": tau,
        "final NLL": run["nll"].values[-1],
        "final importance": run["final_importance_total"].values,
        "mean |influence|": np.abs(total).mean(0),
    }
    assert result["score"].values.tolist() == list(known)
    for kind in ("random", "top"):
        rows = rows_of(run, kind)
        removed = [int(run["removed"].values[row].argmax()) for row in rows]
        actual = np.abs(run["effect"].sel(target=SINGLES).values[rows]).mean(1)
        here = result.sel(kind=kind)
        ceiling = np.mean(
            [correlation(actual[:, a], actual[:, b]) for a, b in combinations(range(3), 2)]
        )
        assert float(here["ceiling"]) == pytest.approx(ceiling)
        for name, values in known.items():
            expected = correlation([values[i] for i in removed], actual[:, 0])
            assert float(here["rank_correlation"].sel(score=name)) == pytest.approx(expected)
            assert float(here["above_ceiling_share"].sel(score=name)) == pytest.approx(
                expected - 0.9 * ceiling
            )
        mine = result["kind_of"].values == result["kind"].values.tolist().index(kind)
        np.testing.assert_allclose(result["actual_size"].values[mine], actual)
        np.testing.assert_allclose(result["size"].values[0, mine], tau[removed])


def test_the_most_helpful_sample_has_the_lowest_influence(cube, run):
    result = influential_samples(cube, 3)
    assert result["target"].values.tolist() == ["class:0", "class:1", "class:2", *SINGLES]
    for target in ("class:2", "sample:7"):
        values = run["influence_total"].sel(target=target).values
        order = sorted(range(60), key=lambda i: values[i])
        here = result.sel(target=target)
        assert here["position"].sel(end="helpful").values.tolist() == order[:3]
        assert here["position"].sel(end="harmful").values.tolist() == order[:-4:-1]
        np.testing.assert_array_equal(
            here["value"].sel(end="harmful"), [values[i] for i in order[:-4:-1]]
        )


def test_a_sample_that_helps_is_not_listed_as_harmful(cube):
    changed = cube.copy()
    changed["influence_total"] = -abs(cube["influence_total"])
    result = influential_samples(changed, 2)
    assert (result["position"].sel(end="harmful") == -1).all()
    assert np.isnan(result["value"].sel(end="harmful")).all()


def test_diverged_retrainings_are_left_out_and_counted(cube, run):
    changed = cube.copy()
    effect = cube["effect"].copy(deep=True)
    effect.loc[{"strategy": "shuffle", "seed": 1, "removal": "random:4", "repeat": 2}] = np.nan
    changed["effect"] = effect
    scores = method_scores(changed, resamples=20)
    assert scores["left_out"].values.tolist() == [1, 0, 0]
    assert scores["count"].values.tolist() == [19, 20, 20]
    rows = rows_of(run, "random")
    del rows[4]
    expected = []
    for target in SINGLES:
        influence = run["influence_total"].sel(target=target).values
        predicted = [-influence[run["removed"].values[row]].sum() for row in rows]
        actual = run["effect"].sel(target=target, repeat=0).values[rows]
        expected.append(correlation(predicted, actual))
    value = scores["score"].sel(kind="random", predictor=UNROLLED)
    assert float(value) == pytest.approx(np.mean(expected))
    assert "random:4" not in removal_effects(changed)["removal"].values


def test_one_retraining_has_no_ceiling(cube):
    single = cube.isel(repeat=[0])
    scores = method_scores(single, resamples=20)
    assert np.isfinite(scores["score"].sel(predictor=UNROLLED)).all()
    for name in ("ceiling", "ceiling_against_mean", "score_against_mean"):
        assert np.isnan(scores[name]).all(), name
    assert np.isnan(removal_sizes(single, resamples=20)["ceiling"]).all()


def test_kinds_are_judged_on_the_targets_that_they_have(cube):
    changed = cube.copy()
    effect = cube["effect"].copy(deep=True)
    tops = [name for name in cube["removal"].values if name.startswith("top")]
    effect.loc[{"removal": tops, "target": SINGLES}] = np.nan
    changed["effect"] = effect
    kinds = {kind.name: kind for kind in removal_kinds(influence_run(changed, "effect"))}
    assert kinds["top"].targets == ["mean", "class:0", "class:1", "class:2"]
    assert kinds["top"].left_out == 0
    scores = method_scores(changed, resamples=20)
    assert scores["target_count"].values.tolist() == [12, 4, 12]


def test_the_reference_run_is_preferred_and_another_is_taken(cube):
    assert influence_run(cube, "effect").attrs["run"] == "shuffle, seed 1"
    other = cube.copy()
    for name in ("adjoint_norm", "effect"):
        other[name] = cube[name].copy(data=cube[name].values[::-1])
    assert influence_run(other, "influence", "effect").attrs["run"] == "rand, seed 1"
    other["effect"] = xr.full_like(cube["effect"], np.nan)
    with pytest.raises(MissingDataError, match="none that has all of them"):
        influence_run(other, "influence", "effect")


def test_analyse_adds_the_results_for_which_there_is_influence(cube, results):
    assert [key for key in results if RESULTS[key].section == "4"] == [
        "influence_by_layer",
        "removal_effects",
        "method_scores",
        "removal_sizes",
        "influential_samples",
    ]
    without = example_cube(samples=60, strategies=("shuffle", "rand"), seeds=2)
    assert not has_influence(without)
    plain = analyse(without)
    assert not [key for key in plain if RESULTS[key].section == "4"]
    for key, result in plain.items():
        if key != "claims":
            xr.testing.assert_identical(result, results[key])
    assert not [
        key
        for key in RESULTS
        if key in plain["claims"].attrs["left_out"] and RESULTS[key].section == "4"
    ]
    only_probes = cube[[*without.data_vars, "arriving_importance"]]
    part = analyse(only_probes)
    assert "mean_influence" not in part["influence_by_layer"]
    assert "share_left" in part["influence_by_layer"]
    assert "method_scores: expected" in part["claims"].attrs["left_out"]


@pytest.mark.filterwarnings("ignore:The data type")  # Zarr on fixed-length strings
def test_results_of_section_4_can_be_stored(results, tmp_path):
    for name in (key for key in results if RESULTS[key].section == "4"):
        results[name].to_zarr(tmp_path / name, consolidated=False)
        again = xr.open_zarr(tmp_path / name, consolidated=False).compute()
        xr.testing.assert_equal(again, results[name])


# predicted_removal


def test_predicted_removal_is_minus_the_sum_over_epochs_layers_and_samples(cube, run):
    effect = sampimp.predicted_removal(cube["influence"], cube["removed"])
    assert effect.chunks
    assert set(effect.dims) == {"strategy", "seed", "target", "removal"}
    mine = effect.sel(strategy="shuffle", seed=1).compute()
    for removal in ("random:2", "subset-0.95:7"):
        expected = 0.0
        for i in np.flatnonzero(run["removed"].sel(removal=removal)):
            expected -= float(run["influence"].sel(target="class:1").values[..., i].sum())
        actual = float(mine.sel(target="class:1", removal=removal))
        assert actual == pytest.approx(expected, rel=1e-4)
    assert np.isnan(effect.sel(strategy="rand", removal="random:2")).all()
    total = sampimp.predicted_removal(run["influence_total"], run["removed"])
    np.testing.assert_allclose(
        total.transpose("target", "removal"),
        mine.transpose("target", "removal"),
        rtol=1e-3,
        atol=1e-6,
    )


def test_the_renormalised_removal_subtracts_each_batchs_mean(run):
    effect = sampimp.predicted_removal(run["influence"], run["removed"], run["batch"])
    influence, batch = run["influence"].sel(target="sample:2").values, run["batch"].values
    for removal in ("top:0", "subset-0.95:3"):
        expected = 0.0
        for i in np.flatnonzero(run["removed"].sel(removal=removal)):
            for t in range(6):
                mates = [j for j in range(60) if batch[t, j] == batch[t, i]]
                for d in range(4):
                    mean = sum(float(influence[t, d, j]) for j in mates) / len(mates)
                    expected -= float(influence[t, d, i]) - mean
        actual = float(effect.sel(target="sample:2", removal=removal))
        assert actual == pytest.approx(expected, rel=1e-6)


def test_an_epoch_that_did_not_use_a_sample_counts_as_zero(run):
    influence = run["influence"].copy(deep=True)
    influence[:, 2, :, 5] = np.nan
    removed = xr.DataArray(np.arange(60) == 5, dims="sample", coords={"sample": run["sample"]})
    effect = sampimp.predicted_removal(influence, removed)
    expected = -np.delete(influence.values.astype(float)[..., 5], 2, 1).sum((1, 2))
    np.testing.assert_allclose(effect, expected)
    influence[:, :, :, 5] = np.nan
    assert np.isnan(sampimp.predicted_removal(influence, removed)).all()
    assert np.isfinite(sampimp.predicted_removal(influence, ~removed & (run["sample"] < 4))).all()


def test_predicted_removal_refuses_other_samples_and_types(run):
    with pytest.raises(ConfigError, match="type bool"):
        sampimp.predicted_removal(run["influence"], run["removed"].astype(float))
    with pytest.raises(ConfigError, match="by epoch"):
        sampimp.predicted_removal(run["influence_total"], run["removed"], run["batch"])
    with pytest.raises(ConfigError, match="same samples"):
        sampimp.predicted_removal(run["influence"], run["removed"].isel(sample=slice(50)))


def test_renormalised_effects_are_predicted_in_their_convention(cube, run):
    changed = cube.copy()
    words = "number of samples that remain in the batch"
    changed["effect"] = cube["effect"].assign_attrs(denominator=words)
    results = {
        "effects": removal_effects(changed),
        "scores": method_scores(changed, resamples=20),
        "sizes": removal_sizes(changed, resamples=20),
    }
    for name, result in results.items():
        assert "samples that remain" in result.attrs["denominator"], name
    expected = sampimp.predicted_removal(run["influence"], run["removed"], run["batch"])
    effects = results["effects"]
    np.testing.assert_allclose(
        effects["predicted"].transpose("removal", "target"),
        expected.sel(removal=effects["removal"].values, target=effects["target"].values).transpose(
            "removal", "target"
        ),
        rtol=1e-6,
    )
    last = sampimp.predicted_removal(
        run["influence"].isel(epoch=[-1]), run["removed"], run["batch"].isel(epoch=[-1])
    )
    rows = rows_of(run, "random")
    by_target = [
        correlation(
            last.sel(target=t).values[rows], run["effect"].sel(target=t, repeat=0).values[rows]
        )
        for t in SINGLES
    ]
    score = results["scores"]["score"].sel(kind="random", predictor="last epoch alone")
    assert float(score) == pytest.approx(np.mean(by_target))
    both = f"batch size, {words}"
    changed["effect"] = cube["effect"].assign_attrs(denominator=both)
    with pytest.raises(MissingDataError, match="one convention"):
        removal_effects(changed)


def test_the_damping_of_the_record_is_the_natural_one(cube):
    changed = cube.copy()
    stored = cube["fixed_point_influence"].assign_attrs(default_damping=0.9)
    changed["fixed_point_influence"] = stored
    scores = method_scores(changed, resamples=20)
    assert "-GGN^-1 g, damping 1" in scores["predictor"].values
    assert "= 0.9" in scores.attrs["damping"]
