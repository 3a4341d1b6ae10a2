"""-H^-1 g in a study, without Ray: its values in the cube, and resumption with the same bytes."""

import numpy as np
import pytest
from influence_study import make_study, reverse_pass

import sampimp
from sampimp.influence.fixed_point import fixed_point_influence
from sampimp.influence.targets import make_targets
from sampimp.store.plan import read_commits
from sampimp.sweeps.fixed_point_work import FixedPointWork, fixed_point_parts

TARGETS = ("mean", "sample:1")


@pytest.fixture
def study(tmp_path):
    return make_study(tmp_path)


def test_stored_solutions_are_those_in_memory(study):
    folder, plan, data = study
    result = sampimp.compute_influence(folder, (*TARGETS, "probe:1"), fixed_point=True)
    stored = result["fixed_point_influence"]
    assert stored.dims == ("target", "curvature", "damping", "sample")
    run = reverse_pass(plan, data, ["mean"]).run
    run.load_start(run.epochs + 1)
    parts = fixed_point_parts(plan.training, len(data.train_labels))
    np.testing.assert_array_equal(stored["damping"], parts["dampings"])
    steps = plan.training.epochs * -(-len(data.train_labels) // plan.training.batch_size)
    rates = plan.training.learning_rate * steps
    assert parts["default_damping"] == pytest.approx(1 / rates, rel=1e-5)
    for target in make_targets(TARGETS, data, run.layers):
        for curvature in ("hessian", "gauss-newton"):
            expected = fixed_point_influence(
                run.loss_parts,
                target.gradient(run.model),
                parts["dampings"],
                curvature=curvature,
                weight_decay=plan.training.weight_decay,
            )
            actual = stored.sel(target=target.name, curvature=curvature)
            np.testing.assert_array_equal(actual, expected.astype(np.float32))


def test_a_killed_unit_continues_with_the_same_bytes(study, tmp_path, monkeypatch):
    folder, *_ = study
    whole = sampimp.compute_influence(folder, TARGETS, fixed_point=True).load()
    digests = [
        commit["digests"]
        for commit in read_commits(folder, "influence").values()
        if commit["kind"] == "fixed-point"
    ]
    other, *_ = make_study(tmp_path / "other")
    advance, calls = FixedPointWork.advance, []

    def dies(work):
        calls.append(work)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return advance(work)

    monkeypatch.setattr(FixedPointWork, "advance", dies)
    with pytest.raises(KeyboardInterrupt):
        sampimp.compute_influence(other, TARGETS, fixed_point=True)
    resumed = sampimp.compute_influence(other, TARGETS, fixed_point=True).load()
    assert len(calls) == 3 + 2  # two solutions were stored, and two are left
    assert digests == [
        commit["digests"]
        for commit in read_commits(other, "influence").values()
        if commit["kind"] == "fixed-point"
    ]
    np.testing.assert_array_equal(whole["fixed_point_influence"], resumed["fixed_point_influence"])


def test_without_the_option_there_are_none(study):
    folder, *_ = study
    result = sampimp.compute_influence(folder, TARGETS)
    assert "fixed_point_influence" not in result
