"""Influence, probes and effects in the cube, from made records of a study with two runs."""

import math
import pickle

import numpy as np
import oracles
import pytest
from influence_made import write_made

import sampimp
from sampimp.errors import RecordError
from sampimp.schema import INFLUENCE_VARIABLES
from sampimp.store.plan import read_commits
from sampimp.store.sharded import consolidate

SMOOTHED = {"eps": 1e-4, "gate_width": 0.0}
LAYERS = ["L1", "L2", "Out"]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two reference runs without influence."""
    sources = {"one": oracles.make_source(name="one")}
    plan = oracles.make_plan(sources, {"shuffle": (1, 2), "rand": (1,)})
    folder = oracles.start_study(tmp_path_factory.mktemp("study"), plan, sources)
    oracles.run_trials(folder, plan, sources)
    runs = {t.label: t for t in plan.resolve(read_commits(folder))}
    return folder, plan, runs


@pytest.fixture
def write(study, monkeypatch):
    """Write records, and remove them after the test."""
    folder, plan, runs = study

    def write(label, kind, targets, **more):
        return write_made(folder, plan, runs[f"one-{label}"], kind, targets, **more)

    yield write
    (folder / "influence").remove()


def node_of(study):
    return sampimp.open_cube(study[0])["one"]


def test_a_study_without_influence_has_no_such_variable(study):
    node = node_of(study)
    assert set(INFLUENCE_VARIABLES).isdisjoint(node.data_vars)
    assert {"target", "removal", "repeat"}.isdisjoint(node.dims)


def test_epochs_that_were_written_backward_are_in_their_place(study, write):
    steps, _ = write("shuffle-seed1", "influence", ["class:10", "class:9", "mean"])
    other, _ = write("shuffle-seed2", "influence", ["mean"], seed=1)
    node = node_of(study)
    influence = node["influence"]
    assert influence.dims == ("strategy", "seed", "target", "epoch", "layer", "sample")
    assert influence.dtype == np.float32
    assert node["target"].values.tolist() == ["mean", "class:9", "class:10"]
    assert node["target_units"].values.tolist() == ["nat"] * 3
    one = node.to_dataset().sel(strategy="shuffle", seed=1)
    for place, target in enumerate(["class:10", "class:9", "mean"]):
        here = one.sel(target=target)
        for step, epoch in ((1, 3), (2, 2), (3, 1)):
            arrays = steps[step - 1].arrays
            np.testing.assert_array_equal(
                here["influence"].sel(epoch=epoch), arrays["influence"][place]
            )
            assert here["adjoint_norm"].sel(epoch=epoch) == arrays["adjoint_norm"][place]
        total = steps[-1].arrays["influence_total"][place]
        np.testing.assert_array_equal(here["influence_total"], total)
    two = node.to_dataset().sel(strategy="shuffle", seed=2)
    np.testing.assert_array_equal(
        two["influence"].sel(target="mean", epoch=3), other[0].arrays["influence"][0]
    )
    for name in ("influence", "influence_total", "adjoint_norm"):
        assert np.isnan(two[name].sel(target="class:9")).all()
        assert np.isnan(node[name].sel(strategy="rand")).all()


def test_test_samples_are_shown_where_they_can_be_targets(study, write):
    source = oracles.make_source(name="one")
    assert "test_image" not in node_of(study)
    write("shuffle-seed1", "influence", ["sample:1"])
    node = node_of(study)
    assert node["test_image"].dims == ("test_sample", "row", "column", "channel")
    np.testing.assert_array_equal(node["test_image"], np.moveaxis(source.test_values, 1, 3))
    assert tuple(node["test_file"].values) == source.test_files
    np.testing.assert_array_equal(node["image"], np.moveaxis(source.train_values, 1, 3))
    np.testing.assert_array_equal(node["test_label"], source.test_labels)


def test_any_selection_equals_the_whole_there(study, write):
    write("shuffle-seed1", "influence", ["mean", "class:0", "sample:7"])
    write("rand-seed1", "influence", ["sample:7", "mean"], seed=1)
    write("rand-seed1", "influence", ["class:0"], seed=2)
    influence = pickle.loads(pickle.dumps(node_of(study)["influence"]))
    whole = influence.compute()
    chosen = {"strategy": ["rand"], "target": ["sample:7", "mean"], "sample": [20, 3], "epoch": 2}
    np.testing.assert_array_equal(influence.sel(chosen), whole.sel(chosen))
    part = {"sample": slice(2, 19, 4), "layer": slice(1, None), "target": slice(None, None, -1)}
    np.testing.assert_array_equal(influence.isel(part), whole.isel(part))
    assert np.isfinite(whole.sel(strategy="rand", seed=1)).all()


def test_smoothed_targets_stand_beside_exact_ones(study, write):
    exact, _ = write("shuffle-seed1", "influence", ["mean"])
    smoothed, _ = write("shuffle-seed1", "influence", ["mean"], seed=1, smoothing=SMOOTHED)
    node = node_of(study)
    assert node["target"].values.tolist() == ["mean", "mean (eps=0.0001)"]
    run = node["influence_total"].sel(strategy="shuffle", seed=1)
    for target, steps in zip(node["target"].values, (exact, smoothed), strict=True):
        np.testing.assert_array_equal(
            run.sel(target=target), steps[-1].arrays["influence_total"][0]
        )


def test_growth_is_named(study, write):
    write("shuffle-seed1", "influence", ["mean"], growth={"mean": 2})
    attrs = node_of(study)["influence"].attrs
    assert attrs["growth"] == ["shuffle, seed 1, mean: epoch 2"]
    assert "-influence" in attrs["sign"]
    assert attrs["units"] == "unit of the target per unit of sample weight"
    assert "batch size kept" in attrs["denominator"]


def test_probes_are_means_over_blocks(study, write):
    names = [f"probe:{k}" for k in range(3)]
    first, _ = write("shuffle-seed1", "probes", names[:2])
    second, _ = write("shuffle-seed1", "probes", names[2:], seed=1)
    node = node_of(study)
    assert "final_importance" not in node
    assert "target" not in node.dims
    run = node.to_dataset().sel(strategy="shuffle", seed=1)
    for epoch in (1, 2, 3):
        a, b = (steps[3 - epoch].arrays["arriving_importance"] for steps in (first, second))
        expected = (2 * a.astype(np.float64) + b) / 3
        np.testing.assert_array_equal(
            run["arriving_importance"].sel(epoch=epoch), expected.astype(np.float32)
        )
    a, b = (steps[-1].arrays["final_importance_total"] for steps in (first, second))
    expected = ((2 * a.astype(np.float64) + b) / 3).astype(np.float32)
    np.testing.assert_array_equal(run["final_importance_total"], expected)
    attrs = node["final_importance_total"].attrs
    assert (attrs["probes"], attrs["relative_error"]) == (3, math.sqrt(2 / 3))


def test_probes_of_layers_have_a_mean_each(study, write):
    """Two probes on L1 and one on Out; L2 has none."""
    steps, _ = write("rand-seed1", "probes", ["probe:0@L1", "probe:0@Out", "probe:1@L1"])
    more, _ = write("rand-seed1", "probes", ["probe:2@L1"], seed=1)
    # A block that repeats a probe of a larger one does not count twice.
    write("rand-seed1", "probes", ["probe:0@Out"], seed=2)
    node = node_of(study)
    assert {"arriving_importance", "final_importance_total"}.isdisjoint(node.data_vars)
    run = node["final_importance"].sel(strategy="rand", seed=1)
    assert run.dims == ("layer", "sample")
    a, b = (s[-1].arrays["final_importance"] for s in (steps, more))
    expected = ((2 * a[0].astype(np.float64) + b[0]) / 3).astype(np.float32)
    np.testing.assert_array_equal(run.sel(layer="L1"), expected)
    np.testing.assert_array_equal(run.sel(layer="Out"), a[2])
    assert np.isnan(run.sel(layer="L2")).all()
    assert node["final_importance"].attrs["probes"] == 1  # of the layer that has the fewest


def test_exact_probes_are_preferred(study, write):
    write("shuffle-seed1", "probes", ["probe:0"], smoothing=SMOOTHED)
    assert node_of(study)["final_importance_total"].attrs["smoothing"] == "eps=0.0001"
    exact, _ = write("shuffle-seed1", "probes", ["probe:0"], seed=1)
    total = node_of(study)["final_importance_total"]
    assert "smoothing" not in total.attrs
    np.testing.assert_array_equal(
        total.sel(strategy="shuffle", seed=1), exact[-1].arrays["final_importance_total"]
    )


def test_effects_are_differences_to_the_same_repeat(study, write):
    more = {"repeats": 2, "jitter": 1e-3, "renormalised": False}
    more["denominator"] = "batch size kept"
    first, _ = write(
        "shuffle-seed1", "retrain", ["mean", "class:0"], removals=["none", "random:4"], **more
    )
    second, _ = write(
        "shuffle-seed1", "retrain", ["mean", "class:0"], seed=1, removals=["keep:0.5:0"], **more
    )
    write("rand-seed1", "retrain", ["mean"], removals=["top:3"], **more)  # without its baseline
    node = node_of(study)
    assert node["effect"].dims == ("strategy", "seed", "removal", "target", "repeat")
    assert node["removal"].values.tolist() == ["keep:0.5:0", "random:4", "top:3"]
    assert node["repeat"].values.tolist() == [0, 1]
    run = node.to_dataset().sel(strategy="shuffle", seed=1)
    final = np.array([step.arrays["final_value"] for step in first])  # none 0, 1, random 0, 1
    subset = np.array([step.arrays["final_value"] for step in second])
    for place, target in enumerate(["mean", "class:0"]):
        here = run.sel(target=target)
        np.testing.assert_array_equal(here["baseline"], final[:2, place])
        effect = here["effect"].sel(removal="random:4")
        np.testing.assert_array_equal(effect, final[2:, place] - final[:2, place])
        effect = here["effect"].sel(removal="keep:0.5:0")
        np.testing.assert_array_equal(effect, subset[:, place] - final[:2, place])
    assert np.isnan(run["effect"].sel(removal="top:3")).all()
    assert np.isnan(node["effect"].sel(strategy="rand", seed=1)).all()
    removed = run["removed"].compute()
    assert removed.dtype == bool
    np.testing.assert_array_equal(removed.sel(removal="random:4"), first[-1].arrays["removed"][1])
    np.testing.assert_array_equal(
        removed.sel(removal="keep:0.5:0"), second[-1].arrays["removed"][0]
    )
    assert not removed.sel(removal="top:3").any()
    assert node["effect"].attrs["jitter"] == "0.001"


def test_records_of_a_run_that_was_trained_again_are_left_out(study, write):
    write("shuffle-seed1", "influence", ["mean"], record="f" * 64)
    assert "influence" not in node_of(study)


def test_a_damaged_chunk_is_an_error(study, write):
    _, folder = write("shuffle-seed1", "influence", ["mean"])
    name = "record.zarr/influence/c/0/0/0/0"
    content = bytearray(folder.read_bytes(name))
    content[-1] ^= 1
    folder.write_bytes(name, bytes(content))
    influence = node_of(study)["influence"].sel(strategy="shuffle", seed=1)
    influence.sel(epoch=3).compute()
    with pytest.raises(RecordError, match="influence, epoch 1"):
        influence.sel(epoch=1).compute()


def test_consolidation_says_what_it_leaves_out(study, write, tmp_path):
    write("shuffle-seed1", "influence", ["mean"])
    write("shuffle-seed1", "probes", ["probe:0"])
    (done,) = consolidate(study[0], tmp_path / "to")
    assert set(done.left_out) == {
        *("influence", "influence_total", "adjoint_norm"),
        *("arriving_importance", "final_importance_total", "test_image"),
    }
    assert done.written
