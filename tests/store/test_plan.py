"""The plan: which trials there are, what identifies them, and which plans may be joined."""

import dataclasses
import json

import oracles
import pytest

from sampimp.config import NetworkIdentity, TrainingConfig, TrialConfig
from sampimp.errors import ConfigError, RecordError, StoreError
from sampimp.schema import REFERENCES, STRATEGIES
from sampimp.store.integrity import record_digest
from sampimp.store.location import Folder
from sampimp.store.plan import DatasetInfo, Plan, read_commits
from sampimp.store.plan_files import read_plan

GRID = {"nlo": (1, 2), "shuffle": (1, 2), "rand": (1,), "sim": (3,), "shuffle_by_seed": (1, 2)}


def make_plan(grid=GRID, keys=("a", "b"), **changes):
    sources = {key: oracles.make_source(name=key, seed=ord(key)) for key in keys}
    return oracles.make_plan(sources, grid, **changes)


def commit_of(planned, diverged_epoch=None, digests=("1", "2")):
    return {
        "fingerprint": planned.fingerprint,
        "attempt": 1,
        "epochs": 2,
        "diverged_epoch": diverged_epoch,
        "parts": [[0, "record.zarr"]],
        "digests": {
            "importance": [[digest] for digest in digests],
            "nll": [["3"]],
            "parameters": [["4"]],
        },
        "curves": {},
    }


def reference_of(plan, key):
    (reference,) = (t for t in plan.resolve({}) if t.label == f"{key}-shuffle-seed1")
    return reference


def test_trials_cover_the_grid_and_references_come_first():
    trials = make_plan().trials()
    names = [(t.dataset, t.strategy, t.seed) for t in trials]
    assert len(names) == len(set(names)) == 2 * 8
    assert set(names[:2]) == {("a", "shuffle", 1), ("b", "shuffle", 1)}
    assert ("a", "shuffle", 2) in names[2:]
    assert ("b", "sim", 3) in names


def test_order_seeds():
    plan = dataclasses.replace(make_plan(), order_seed=10)
    seeds = {(t.strategy, t.seed): t.order_seed for t in plan.trials()}
    assert seeds["shuffle", 1] == seeds["shuffle", 2] == seeds["rand", 1] == 10
    assert seeds["shuffle_by_seed", 1] == 11
    assert seeds["shuffle_by_seed", 2] == 12
    by_seed = dataclasses.replace(plan, rand_batches="by_seed")
    assert {t.order_seed for t in by_seed.trials() if t.strategy == "rand"} == {11}


def test_sorted_strategies_wait_for_the_reference_of_their_own_data_set():
    plan = make_plan()
    reference = reference_of(plan, "a")
    commit = commit_of(reference)
    resolved = {t.label: t for t in plan.resolve({reference.trial_id: commit})}
    assert resolved["a-shuffle-seed1"].commit == commit
    waiting = {label for label, t in resolved.items() if t.trial_id is None}
    assert waiting == {"b-nlo-seed1", "b-nlo-seed2", "b-sim-seed3"}
    assert all(resolved[label].fingerprint is None for label in waiting)
    sorted_trial = resolved["a-nlo-seed2"]
    assert sorted_trial.reference_id == reference.trial_id
    assert sorted_trial.fingerprint == sorted_trial.config.fingerprint(
        plan.code, plan.datasets["a"].digest, record_digest(commit)
    )
    assert resolved["a-rand-seed1"].reference_id is None
    assert resolved["b-rand-seed1"].trial_id is not None
    for trial in resolved.values():
        if trial.trial_id:
            assert trial.trial_id == f"{trial.label}-{trial.fingerprint[:8]}"


def test_the_results_of_the_reference_are_part_of_the_fingerprint():
    plan = make_plan()
    reference = reference_of(plan, "a")

    def fingerprints(commit):
        resolved = plan.resolve({reference.trial_id: commit})
        return {t.label: t.fingerprint for t in resolved if t.config.dataset == "a"}

    first = fingerprints(commit_of(reference))
    second = fingerprints(commit_of(reference, digests="9"))
    changed = {label for label in first if first[label] != second[label]}
    assert changed == {"a-nlo-seed1", "a-nlo-seed2", "a-sim-seed3"}


def test_a_diverged_reference_is_not_sorted_by():
    plan = make_plan()
    reference = reference_of(plan, "a")
    resolved = plan.resolve({reference.trial_id: commit_of(reference, diverged_epoch=2)})
    waiting = {t.label for t in resolved if t.trial_id is None and t.config.dataset == "a"}
    assert waiting == {"a-nlo-seed1", "a-nlo-seed2", "a-sim-seed3"}


def test_a_commit_of_another_fingerprint_is_refused():
    plan = make_plan()
    reference = reference_of(plan, "a")
    commit = commit_of(reference) | {"fingerprint": reference.fingerprint[:8] + "0" * 56}
    with pytest.raises(RecordError, match=rf"COMMIT.json of {reference.trial_id}"):
        plan.resolve({reference.trial_id: commit})


CHANGES = {
    "model": "cnn",
    "optimizer": "adamw",
    "schedule": "cosine",
    "activation": "gelu",
    "input_scaling": "standard",
    "hidden": (5, 4, 3),
    "epochs": 4,
    "batch_size": 6,
    "learning_rate": 0.31,
    "weight_decay": 1e-4,
    "parameters_every": 2,
    "threads": 2,
    "workers": 2,
    "device": "cuda",
}


def test_changes_cover_every_setting():
    assert set(CHANGES) == {field.name for field in dataclasses.fields(TrainingConfig)}


def test_the_papers_trials_keep_their_fingerprint():
    # The value before other models and optimizers existed: stored records still match.
    trial = TrialConfig(
        dataset="mnist", strategy="rand", seed=1, order_seed=0, training=TrainingConfig()
    )
    assert (
        trial.fingerprint("0.1.0", "0", None)
        == "110647e9af53e4b9d92288fc2cb31738d1975d8d5e3dba609ca49cdb62ff2a7a"
    )


@pytest.mark.parametrize("name", CHANGES)
def test_every_setting_changes_the_fingerprint(name):
    def trial(**changes):
        training = TrainingConfig(**changes)
        return TrialConfig(dataset="a", strategy="rand", seed=1, order_seed=0, training=training)

    default, changed = trial(), trial(**{name: CHANGES[name]})
    assert default.fingerprint("1", "2", None) != changed.fingerprint("1", "2", None)
    assert default.fingerprint("1", "2", None) == trial().fingerprint("1", "2", None)


@pytest.mark.parametrize(
    "change", [{"dataset": "b"}, {"strategy": "nlo"}, {"seed": 2}, {"order_seed": 1}]
)
def test_data_set_strategy_and_seeds_change_the_fingerprint(change):
    trial = oracles.trial_config()
    other = dataclasses.replace(trial, **change)
    assert trial.fingerprint("1", "2", None) != other.fingerprint("1", "2", None)


def test_code_data_and_reference_change_the_fingerprint():
    trial = oracles.trial_config()
    prints = {
        trial.fingerprint(*values)
        for values in [("1", "2", None), ("9", "2", None), ("1", "9", None), ("1", "2", "9")]
    }
    assert len(prints) == 4


NETWORK = NetworkIdentity(
    source="0" * 64,
    parameters=(("0.weight", (3, 4)), ("0.bias", (3,))),
    initial=((0.1, 1.0, 0.5, -0.5), (0.0, 0.0, 0.0, 0.0)),
    outputs=((1.0, 2.0, 3.0),),
)


def with_network(plan, network):
    """Return the plan for a user's own network."""
    training = dataclasses.replace(plan.training, model="nets:make")
    infos = {key: dataclasses.replace(info, network=network) for key, info in plan.datasets.items()}
    return dataclasses.replace(plan, training=training, datasets=infos)


def test_source_and_parameters_of_a_users_network_change_the_fingerprint():
    def fingerprints(network):
        trials = with_network(make_plan({"rand": (1, 2)}), network).resolve({})
        return [trial.fingerprint for trial in trials]

    first = fingerprints(NETWORK)
    # Initial values and outputs differ between processors, and are no part of it.
    assert first == fingerprints(dataclasses.replace(NETWORK, initial=(), outputs=()))
    assert not set(first) & set(fingerprints(dataclasses.replace(NETWORK, source="1" * 64)))
    assert not set(first) & set(fingerprints(dataclasses.replace(NETWORK, parameters=())))
    assert not set(first) & set(fingerprints(None))


def test_the_network_recorded_first_is_kept():
    nearly = dataclasses.replace(NETWORK, outputs=((1.0, 2.0, 3.0001),))
    stored, requested = (with_network(make_plan(), network) for network in (NETWORK, nearly))
    assert stored.joined(requested, "OUT") == stored
    assert Plan.from_json(json.loads(json.dumps(stored.to_json()))) == stored


def test_json_round_trip():
    plan = make_plan()
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.resolve({}) == plan.resolve({})


@pytest.mark.parametrize("model", ["my.models:", "a:../../outside", "a:b/c", "a:b.c", "a:b:c"])
def test_a_network_is_named_by_a_function(model):
    """The name of the function is that of a node of the cube, and of folders."""
    with pytest.raises(ConfigError, match=r"package\.module:function"):
        TrainingConfig(model=model)
    assert TrainingConfig(model="my-models.small:net").model == "my-models.small:net"


def test_a_study_from_before_other_activations_had_relus():
    plan = make_plan()
    content = json.loads(json.dumps(plan.to_json()))
    del content["training"]["activation"]
    older = Plan.from_json(content)
    assert older == plan
    assert older.joined(plan, "OUT") == plan
    gelu = dataclasses.replace(plan.training, activation="gelu")
    with pytest.raises(ConfigError, match=r"activation 'relu' \(requested: 'gelu'\)"):
        older.joined(dataclasses.replace(plan, training=gelu), "OUT")


def test_a_plan_may_lack_what_earlier_versions_did_not_write_and_nothing_else():
    plan = with_network(make_plan(), NETWORK)
    content = json.loads(json.dumps(plan.to_json()))
    info = content["datasets"]["a"]
    for holder in (content, content["training"], info, info["network"]):
        for name in set(holder) - {"schema_version"}:
            value = holder.pop(name)
            if name in TrainingConfig.LATER_ENTRIES | DatasetInfo.LATER_ENTRIES:
                Plan.from_json(content)
            else:
                with pytest.raises(RecordError, match=f"an entry '{name}'"):
                    Plan.from_json(content)
            holder[name] = value
    assert Plan.from_json(content) == plan


def test_joining_adds_seeds_strategies_and_data_sets():
    stored = make_plan({"shuffle": (1, 2), "rand": (1, 2)}, keys="a")
    requested = make_plan({"nlm": (1,), "rand": (5, 2)}, keys="ab")
    joined = stored.joined(requested, "OUT")
    assert joined.grid == {"shuffle": (1, 2), "rand": (1, 2, 5), "nlm": (1,)}
    assert list(joined.datasets) == ["a", "b"]
    # The trials planned before keep their fingerprints.
    before = {t.fingerprint for t in stored.resolve({})}
    assert before <= {t.fingerprint for t in joined.resolve({})}
    assert joined.joined(stored, "OUT") == joined


@pytest.mark.parametrize("name", CHANGES)
def test_joining_another_configuration_is_refused_with_what_differs(name):
    stored, requested = make_plan(), make_plan(**{name: CHANGES[name]})
    if name == "hidden":
        requested = dataclasses.replace(requested, datasets=stored.datasets)
    with pytest.raises(ConfigError) as caught:
        stored.joined(requested, "the study")
    assert caught.value.got == (
        f"{name} {getattr(stored.training, name)!r} (requested: {CHANGES[name]!r})"
    )
    assert caught.value.where == "the study"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"order_seed": 3}, "order_seed"),
        ({"rand_batches": "by_seed"}, "rand_batches"),
        ({"code": "0"}, "code"),
    ],
)
def test_joining_another_order_or_code_is_refused(change, named):
    with pytest.raises(ConfigError, match=f"Got {named} "):
        make_plan().joined(dataclasses.replace(make_plan(), **change), "OUT")


def test_joining_a_data_set_of_other_values_is_refused():
    plan = make_plan()
    other = dataclasses.replace(plan.datasets["b"], digest="f" * 64)
    requested = dataclasses.replace(plan, datasets=plan.datasets | {"b": other})
    with pytest.raises(ConfigError, match=r"Got data set b '.*' \(requested: 'f{12}'\)\n"):
        plan.joined(requested, "OUT")


def test_read_plan_and_commits(tmp_path):
    folder = Folder.of(tmp_path)
    assert read_plan(folder) is None
    assert read_commits(folder) == {}
    plan = make_plan(dict.fromkeys((*REFERENCES, *STRATEGIES), (1,)))
    folder.write_json("study.json", plan.to_json())
    assert read_plan(folder) == plan
    commit = commit_of(reference_of(plan, "a"))
    (folder / "trials" / "one").write_json("COMMIT.json", commit)
    (folder / "trials" / "two").write_json("trial.json", {})  # still running
    assert read_commits(folder) == {"one": commit}


def test_the_plan_that_a_worker_gets_is_read_without_a_file():
    plan = make_plan(dict.fromkeys((*REFERENCES, *STRATEGIES), (1,)))
    assert Plan.from_json(plan.to_json()) == plan


def test_a_study_of_another_schema_is_refused(tmp_path):
    folder = Folder.of(tmp_path)
    folder.write_json("study.json", make_plan().to_json() | {"schema_version": 99, "code": "7.1"})
    with pytest.raises(StoreError, match=r"schema version 2(.|\n)*version 99(.|\n)*7\.1"):
        read_plan(folder)
