"""Records of somebody else: what each file's type leaves open is a named error, or is counted out.

Every commit here is sealed, so that only these checks stand between it and a reader.
"""

import json

import numpy as np
import oracles
import pytest
from influence_made import begin, identity_of, steps_of, write_made

import sampimp
from sampimp.errors import DamageWarning, RecordError
from sampimp.schema import digest_json
from sampimp.store import file_types, lazy_arrays
from sampimp.store.influence_records import derived_commits, require_record
from sampimp.store.location import Folder
from sampimp.store.plan import read_commits
from sampimp.store.plan_files import require_plan
from sampimp.store.seals import seal

FIXED = {"curvatures": ["hessian", "gauss_newton"], "default_damping": 1.0, "krylov_steps": 3}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    sources = {"one": oracles.make_source(name="one")}
    plan = oracles.make_plan(sources, {"shuffle": (1,)})
    folder = oracles.start_study(tmp_path_factory.mktemp("study"), plan, sources)
    oracles.run_trials(folder, plan, sources)
    return folder, plan, plan.resolve(read_commits(folder))[0]


@pytest.fixture
def study(trained):
    yield trained
    (trained[0] / "influence").remove()


def change(place, **entries):
    """Change entries of a commit, and seal it again; None removes an entry."""
    commit = json.loads(place.read_bytes("COMMIT.json"))
    del commit["seal"]
    commit |= entries
    commit = {name: entry for name, entry in commit.items() if entry is not ...}
    place.write_bytes("COMMIT.json", seal(commit))


def write_subset(study, **parts):
    """Write a record of trainings on a subset."""
    folder, plan, run = study
    identity = identity_of(run, "subset", [])
    for name in ("targets", "units", "smoothing", "fingerprint"):
        del identity[name]
    identity |= {"judged_on": "test", "judges": 9, "rule": "random", "variants": ["random"]}
    identity |= {"size": 0.5, "count": 12, "budgets": ["steps"], "seeds": [1], "scores": None}
    identity |= {"search": None} | parts
    identity["fingerprint"] = digest_json(identity)
    record, layout = begin(folder, plan, run, identity)
    for step in steps_of(layout):
        record.write(step)
    record.commit(None, {"time": 1.75e9})
    return record.folder


def test_a_target_may_have_any_number(study):
    write_made(*study, "influence", ["class:" + "9" * 5000, "class:2"])
    assert len(sampimp.open_cube(study[0])["one"]["target"]) == 2


def test_probes_of_no_layer_are_no_variable(study):
    write_made(*study, "probes", ["probe:0@elsewhere"])
    assert "final_importance" not in sampimp.open_cube(study[0])["one"]


@pytest.mark.parametrize(
    "other", [{"dampings": [1.0]}, {"dampings": [1.0, 2.0], "curvatures": ["hessian"]}]
)
def test_fixed_points_of_other_dampings_or_curvatures_are_refused(study, other):
    write_made(*study, "fixed-point", ["mean"], **FIXED, dampings=[1.0, 2.0])
    write_made(*study, "fixed-point", ["class:1"], **(FIXED | other))
    with pytest.raises(RecordError, match="curvatures and dampings of"):
        sampimp.open_cube(study[0])


def test_names_that_span_a_table_that_no_study_has_are_refused(study, monkeypatch):
    monkeypatch.setattr(lazy_arrays, "LARGEST_TABLE", 10)
    write_made(*study, "influence", ["mean", "class:1", "class:2", "class:0"])
    with pytest.raises(RecordError, match="a table of at most 10 numbers"):
        sampimp.open_cube(study[0])


@pytest.mark.parametrize("names", [["mean", "a\x00"], ["mean", "A" * 50]], ids=["NUL", "long"])
def test_targets_that_are_no_coordinate_are_refused(study, monkeypatch, names):
    monkeypatch.setattr(file_types, "LARGEST_TEXTS", 90)
    write_made(*study, "influence", names)
    with pytest.raises(RecordError, match="too long ones, or with NUL"):
        sampimp.open_cube(study[0])


def test_a_target_does_not_name_a_smoothing(study):
    write_made(*study, "influence", ["mean (x"])
    with pytest.raises(RecordError, match="a name with ' \\('"):
        sampimp.open_cube(study[0])


def test_a_commit_without_a_kind_counts_as_missing(study):
    _, place = write_made(*study, "influence", ["mean"])
    change(place, kind=...)
    with pytest.warns(DamageWarning, match="counts as missing: none among"):
        assert "influence" not in sampimp.open_cube(study[0])["one"]


def test_lists_of_other_kinds_are_ignored(study):
    _, place = write_made(*study, "influence", ["mean"])
    change(place, seeds=3, removals=None, curvatures={})
    assert "influence" in sampimp.open_cube(study[0])["one"]


@pytest.mark.parametrize("size", [0, -0.5, 1.5, float("nan")])
def test_a_size_is_a_share(study, size):
    change(write_subset(study), size=size)
    with pytest.warns(DamageWarning, match="counts as missing"):
        assert "subset_error" not in sampimp.open_cube(study[0])["one"]


def test_a_subset_without_digests_is_not_all_samples(study):
    place = write_subset(study)
    change(place, digests={})
    with pytest.raises(RecordError, match="Expected digests of 1 selected"):
        sampimp.open_cube(study[0])


def test_commits_of_a_command_fit_their_shape(study):
    folder, plan, run = study
    place = write_subset(study)
    name = place.path.rpartition("/")[2]
    assert set(derived_commits(folder, plan, [run])) == {name}
    change(place, curves={})
    with pytest.raises(RecordError, match="1 values of subset_"):
        derived_commits(folder, plan, [run])


def test_a_record_that_another_one_reads_is_of_its_kind(study):
    folder, plan, _ = study
    place = write_subset(study)
    with pytest.raises(RecordError, match="a record of the kind states"):
        require_record(folder, place.path.rpartition("/")[2], "states", plan.layout("one"))


def test_a_trial_without_digests_of_importance_is_nan(trained, tmp_path):
    folder, _, run = trained
    place = folder / "trials" / run.trial_id
    content = place.read_bytes("COMMIT.json")
    digests = {name: each for name, each in run.commit["digests"].items() if name != "importance"}
    change(place, digests=digests)
    try:
        assert np.isnan(sampimp.open_cube(folder)["one"]["importance"].values).all()
    finally:
        place.write_bytes("COMMIT.json", content)


def test_a_trial_diverges_in_one_of_its_epochs(trained):
    _, plan, run = trained
    commit = {**run.commit, "diverged_epoch": 4}
    with pytest.raises(RecordError, match="a divergence in one of 3 epochs"):
        plan.resolve({run.trial_id: commit})


def plan_of(folder, tmp_path, change_plan):
    """Return a study with another plan, without trials."""
    plan = json.loads(folder.read_bytes("study.json"))
    change_plan(plan)
    other = Folder.of(tmp_path)
    other.write_json("study.json", plan)
    return other


@pytest.mark.parametrize(
    ("words", "change_plan"),
    [
        ("trials of 1,048,577 epochs", lambda plan: plan["training"].update(epochs=2**20 + 1)),
        ("names of layers", lambda plan: plan["datasets"]["one"].update(layers=[["L\x00", 5]])),
        ("names of layers", lambda plan: plan["datasets"]["one"].update(layers=[["L" * 91, 5]])),
    ],
)
def test_a_plan_that_takes_too_much_memory_is_refused(
    trained, tmp_path, monkeypatch, words, change_plan
):
    monkeypatch.setattr(file_types, "LARGEST_TEXTS", 90)
    with pytest.raises(RecordError, match=words):
        require_plan(plan_of(trained[0], tmp_path, change_plan))


def test_labels_of_parameters_are_read_lazily(trained, tmp_path):
    """Of 2^28 parameters they would take 2 GiB."""
    layers = [["L1", 2**27], ["L2", 2**27]]
    other = plan_of(
        trained[0], tmp_path, lambda plan: plan["datasets"]["one"].update(layers=layers)
    )
    names = sampimp.open_cube(other)["one"]["layer_of_parameter"]
    assert names.chunks is not None
    ends = names[[0, 2**27 - 1, 2**27, -1]].values
    assert ends.tolist() == ["L1", "L1", "L2", "L2"]


def test_labels_without_a_class_name_are_refused(trained, tmp_path):
    folder, _, _ = trained
    content = folder.read_bytes("study.json")
    plan = json.loads(content)
    plan["datasets"]["one"]["class_names"] = ["only"]
    folder.write_json("study.json", plan)
    try:
        with pytest.raises(RecordError, match=r"train labels in 0\.\.0"):
            sampimp.open_cube(folder)
    finally:
        folder.write_bytes("study.json", content)
