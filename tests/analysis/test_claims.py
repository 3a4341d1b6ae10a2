"""Verdicts on the claims follow from the numbers alone, in both directions."""

import numpy as np
import pytest
import xarray as xr

from sampimp.analysis.claims.evidence import Evidence
from sampimp.analysis.claims.judge import VERDICTS, judge, judge_claims
from sampimp.analysis.claims.table import CLAIMS
from sampimp.analysis.example_cube import FINAL_TEST_ERROR, example_cube, with_influence
from sampimp.analysis.results.analyse import analyse
from sampimp.analysis.results.curves import strategy_curves


@pytest.fixture(scope="module")
def results():
    return analyse(example_cube(missing=(), diverged={}, noise=0.02))


def verdicts(cube, results):
    table = judge_claims(cube, results)
    return dict(
        zip(table["sentence"].values.tolist(), table["verdict"].values.tolist(), strict=True)
    )


def verdict_of(cube, results, words):
    (verdict,) = [v for sentence, v in verdicts(cube, results).items() if words in sentence]
    return verdict


@pytest.mark.parametrize(
    ("estimate", "side", "threshold", "expected"),
    [
        ((2, 1, 3), "above", 0, "holds"),
        ((-2, -3, -1), "above", 0, "does not hold"),
        ((2, -1, 3), "above", 0, "not enough data"),
        ((2, 1, 3), "below", 0, "does not hold"),
        ((-2, -3, -1), "below", 0, "holds"),
        ((0, -1, 1), "below", 0, "not enough data"),
        ((0, -0.05, 0.05), "within", 0.1, "holds"),
        ((0.1, 0.05, 0.15), "within", 0.1, "not enough data"),
        ((-0.3, -0.4, -0.2), "within", 0.1, "does not hold"),
        ((2, np.nan, np.nan), "above", 0, "not enough data"),
        ((np.nan, np.nan, np.nan), "above", 0, "not enough data"),
    ],
)
def test_the_interval_decides(estimate, side, threshold, expected):
    assert judge(estimate, side, threshold) == expected


def test_a_number_without_interval_decides_only_if_the_claim_allows_it():
    assert judge((2, np.nan, np.nan), "above", 0, point=True) == "holds"
    assert judge((np.inf, np.nan, np.nan), "above", 0, point=True) == "holds"
    assert judge((np.nan, np.nan, np.nan), "above", 0, point=True) == "not enough data"


def test_claims_hold_for_data_that_has_their_structure(results):
    cube = example_cube(missing=(), diverged={})
    for words in [
        "stable under initialisation",
        "Easy samples act early",
        "Easy samples shape the parameters near the output",
        "Hard samples shape the parameters near the input",
        "becomes larger",
        "Most samples have small",
        "are worse than mixed",
        "lowest test error of all",
        "easy samples first",
        "NLO and RNLO are drastically",
    ]:
        assert verdict_of(cube, results, words) == "holds", words


def test_claims_do_not_hold_for_data_with_the_opposite_structure(results):
    cube = example_cube(missing=(), diverged={})
    reversed_results = dict(results)
    curves = results["strategy_curves"].copy()
    mixed = [name for name in curves["strategy"].values if name not in FINAL_TEST_ERROR]
    better = curves["final_test_error"] + 0.4 * curves["strategy"].isin(mixed)
    reversed_results["strategy_curves"] = curves.assign(final_test_error=better)
    assert verdict_of(cube, reversed_results, "are worse than mixed") == "does not hold"
    assert verdict_of(cube, reversed_results, "lowest test error of all") == "does not hold"
    against = results["importance_against_nll"].copy()
    for name in ("when_rank_correlation", "when_rank_correlation_interval"):
        against[name] = -against[name]
    reversed_results["importance_against_nll"] = against
    assert verdict_of(cube, reversed_results, "Easy samples act early") == "does not hold"
    stable = results["stability"].copy()
    at = {"reference": 0, "epoch": 2, "pair": 1}
    stable["rank_correlation_interval"][at] = [0.1, 0.2]
    stable["rank_correlation"][at] = 0.15
    reversed_results["stability"] = stable
    assert verdict_of(cube, reversed_results, "stable under initialisation") == "does not hold"


def test_a_diverged_run_counts_as_guessing_and_a_missing_run_is_left_out():
    cube = example_cube(missing=(("nlo", 3),), diverged={("rnlo", 2): 3})
    evidence = Evidence({"strategy_curves": strategy_curves(cube).compute()}, classes=3)
    error = cube["test_error"].isel(epoch=-1).compute()
    rnlo, nlo = evidence.final_error("rnlo").values, evidence.final_error("nlo").values
    assert rnlo[1] == pytest.approx(2 / 3)
    np.testing.assert_allclose(rnlo[[0, 2]], error.sel(strategy="rnlo", seed=[1, 3]))
    assert np.isnan(nlo[2])
    value, low, high = evidence.error_difference(["rnlo"], ["nlo"])
    assert value == pytest.approx((rnlo - nlo)[:2].mean())
    assert low < value < high


def test_without_results_there_is_not_enough_data():
    cube = example_cube()
    table = judge_claims(cube, {})
    assert set(table["verdict"].values) == {"not enough data"}
    assert set(table["number"].values) == {"none"}
    one_seed = analyse(example_cube(seeds=1))
    assert verdict_of(example_cube(seeds=1), one_seed, "are worse than mixed") == "not enough data"


@pytest.mark.parametrize(
    ("dataset", "included", "excluded"),
    [
        ("mnist", "almost all", "1st layer provides"),
        ("cifar10", "1st layer provides", "almost all"),
        ("CIFAR-10", "1st layer provides", "very similar for all"),
        ("digits", "lowest test error", "(CIFAR-10)"),
    ],
)
def test_a_sentence_about_one_data_set_is_judged_on_that_one(dataset, included, excluded):
    cube = example_cube()
    cube.attrs["dataset"] = dataset
    sentences = " ".join(judge_claims(cube, {})["sentence"].values.tolist())
    assert included in sentences
    assert excluded not in sentences


def test_a_diverged_path_is_infinitely_far(results):
    cube = example_cube(missing=(), diverged={})
    paths = results["parameter_paths"].copy(deep=True)
    diverged = paths["strategy"] == "rnlo"
    paths["distance"] = (
        paths["distance"].where(~diverged).where(~diverged.rename(strategy="other_strategy"))
    )
    evidence = Evidence({"parameter_paths": paths}, 3)
    assert evidence.distance("nlo", "rnlo") == np.inf
    assert evidence.smallest_distance([("nlo", "rnlo"), ("sio", "rsio")]) == evidence.distance(
        "sio", "rsio"
    )
    assert verdict_of(cube, {"parameter_paths": paths}, "reversed order") in VERDICTS


def test_each_claim_has_its_rule_interval_and_threshold(results):
    table = judge_claims(example_cube(), results)
    assert isinstance(table, xr.Dataset)
    assert {claim.section for claim in CLAIMS} == {"3.2", "3.3", "3.4", "3.5", "3.6", "4", "5"}
    assert len({claim.sentence for claim in CLAIMS}) == len(CLAIMS)
    for rule in table["rule"].values:
        assert "Interval" in rule or "no interval" in rule
        assert "Holds" in rule
    finite = np.isfinite(table["low"])
    assert (table["low"] <= table["value"])[finite].all()
    assert (table["value"] <= table["high"])[finite].all()


SMALL = {"samples": 60, "strategies": ("shuffle",), "seeds": 1, "states": ()}


@pytest.fixture(scope="module")
def influence():
    cube = with_influence(example_cube(**SMALL), removals=40)
    return cube, analyse(cube)


def section_4(cube, results):
    table = judge_claims(cube, results)
    rows = table.isel(claim=table["section"].values == "4")
    return {
        sentence: (number, verdict)
        for sentence, number, verdict in zip(
            rows["sentence"].values.tolist(),
            rows["number"].values.tolist(),
            rows["verdict"].values.tolist(),
            strict=True,
        )
    }


def with_activation(cube, activation):
    cube = cube.copy()
    cube["importance"] = cube["importance"].assign_attrs(activation=activation)
    return cube


def test_section_4_is_judged_where_influence_was_computed(influence):
    cube, results = influence
    assert section_4(example_cube(**SMALL), results) == {}
    for activation, words in (("gelu", "smooth"), ("relu", "(ReLU)")):
        claims = section_4(with_activation(cube, activation), results)
        assert next(words in sentence for sentence in claims)
        assert len(claims) == (3 if activation == "gelu" else 2)
        assert {verdict for _, verdict in claims.values()} <= set(VERDICTS)
    claims = section_4(cube, results)
    late = next(v for sentence, v in claims.items() if "left of it at the end" in sentence)
    assert late[1] == "holds"


@pytest.mark.parametrize(
    ("interval", "expected"),
    [((0.92, 0.97), "holds"), ((0.88, 0.97), "not enough data"), ((0.2, 0.6), "does not hold")],
)
def test_the_correlation_of_tau_with_the_size_of_effects_decides(influence, interval, expected):
    cube, results = influence
    sizes = results["removal_sizes"].copy(deep=True)
    at = {"score": "overall importance", "kind": "random"}
    sizes["rank_correlation_interval"].loc[at] = list(interval)
    sizes["rank_correlation"].loc[at] = sum(interval) / 2
    claims = section_4(cube, {**results, "removal_sizes": sizes})
    (verdict,) = [v for sentence, (_, v) in claims.items() if "Importance predicts" in sentence]
    assert verdict == expected


def test_the_fixed_point_is_judged_by_the_paired_difference(influence):
    cube, results = influence
    scores = results["method_scores"].copy(deep=True)
    scores["unrolled_minus_fixed_point"].loc[{"kind": "random"}] = 0.7
    scores["unrolled_minus_fixed_point_interval"].loc[{"kind": "random"}] = [0.6, 0.8]
    claims = section_4(cube, {**results, "method_scores": scores})
    (found,) = [found for sentence, found in claims.items() if "fixed point" in sentence]
    assert found == ("TSLOO, unrolled minus fixed point: 0.700 (0.600 to 0.800)", "holds")


def test_a_claim_that_was_not_computed_names_its_command(influence):
    cube, results = influence
    part = cube.drop_vars(["effect", "removed", "arriving_importance", "fixed_point_influence"])
    claims = section_4(part, analyse(part))
    assert len(claims) == 3
    for number, verdict in claims.values():
        assert verdict == "not enough data"
        assert number.startswith("not computed: sampimp ")
    few = results["removal_sizes"].drop_sel(kind="random")
    claims = section_4(cube, {**results, "removal_sizes": few})
    command = "not computed: sampimp retrain OUT --targets sample:0..11"
    assert (command, "not enough data") in claims.values()
