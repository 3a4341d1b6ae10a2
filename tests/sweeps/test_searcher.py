"""Every missing trial is handed out once, and none before the reference that it sorts by."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sampimp.config import TrainingConfig
from sampimp.folder import Folder
from sampimp.plan import DatasetInfo, Plan, read_commits
from sampimp.schema import SORTED_STRATEGIES
from sweeps.searcher import PlanSearcher

FINISHED = PlanSearcher.FINISHED


def make_plan(grid, keys=("a",)):
    info = DatasetInfo(
        name="made",
        digest="d" * 64,
        sample_count=6,
        test_count=2,
        input_shape=(2,),
        class_names=("0", "1"),
        layers=(("Out", 4), ("Out", 2)),
    )
    return Plan(datasets=dict.fromkeys(keys, info), training=TrainingConfig(epochs=2), grid=grid)


class Store:
    """The commits of a study, as trials leave them behind."""

    def __init__(self, folder, plan):
        self.folder, self.plan = Folder.of(folder), plan

    def searcher(self):
        return PlanSearcher(self.plan, self.folder, self.plan.resolve(read_commits(self.folder)))

    def commit(self, config, diverged_epoch=None):
        (self.folder / "trials" / config["trial_id"]).write_json(
            "COMMIT.json",
            {
                "fingerprint": config["fingerprint"],
                "diverged_epoch": diverged_epoch,
                "digests": {"importance": ["1", "2"], "nll": ["3", "4"]},
            },
        )


def test_those_that_wait_for_nothing_come_first(tmp_path):
    store = Store(tmp_path, make_plan({"nlo": (1, 2), "rand": (1,), "shuffle": (1, 2)}))
    searcher = store.searcher()
    first = [searcher.suggest(f"tune-{i}") for i in range(3)]
    assert [config["label"] for config in first] == [
        "a-shuffle-seed1",  # the reference, before all
        "a-rand-seed1",
        "a-shuffle-seed2",
    ]
    assert all(config["reference_id"] is None for config in first)
    assert searcher.suggest("tune-3") is None  # nlo waits
    searcher.on_trial_complete("tune-1", {"done": True})
    assert searcher.suggest("tune-3") is None  # rand sets nobody free
    store.commit(first[0])
    assert searcher.suggest("tune-3") is None  # Tune has not said so yet
    searcher.on_trial_complete("tune-0", {"done": True})
    later = [searcher.suggest(f"tune-{i}") for i in (3, 4)]
    assert [config["label"] for config in later] == ["a-nlo-seed1", "a-nlo-seed2"]
    assert {config["reference_id"] for config in later} == {first[0]["trial_id"]}
    assert searcher.suggest("tune-5") == FINISHED


def test_what_is_handed_out_is_the_planned_trial(tmp_path):
    plan = make_plan({"shuffle": (1,), "rand": (3,)}, keys=("a", "b"))
    searcher = Store(tmp_path, plan).searcher()
    for number in range(4):
        config = searcher.suggest(f"tune-{number}")
        planned = plan.resolve({})[config["position"]]
        assert plan.trials()[config["position"]] == planned.config
        assert config == {
            "position": config["position"],
            "label": planned.label,
            "trial_id": planned.trial_id,
            "fingerprint": planned.fingerprint,
            "reference_id": None,
        }


def test_what_is_committed_is_not_handed_out(tmp_path):
    store = Store(tmp_path, make_plan({"shuffle": (1,), "sim": (1,), "rand": (1,)}))
    first = [store.searcher().suggest("tune-0")]
    store.commit(first[0])
    again = store.searcher()
    labels = [again.suggest(f"tune-{i}")["label"] for i in range(2)]
    assert labels == ["a-sim-seed1", "a-rand-seed1"]  # its reference is there: the plan's order
    assert again.suggest("tune-2") == FINISHED


@pytest.mark.parametrize("outcome", ["failed", "diverged"])
def test_no_reference_no_dependents(tmp_path, outcome):
    store = Store(tmp_path, make_plan({"shuffle": (1,), "nlm": (1,), "rand": (1,)}))
    searcher = store.searcher()
    reference, other = (searcher.suggest(f"tune-{i}") for i in range(2))
    assert searcher.suggest("tune-2") is None
    if outcome == "diverged":
        store.commit(reference, diverged_epoch=1)
    searcher.on_trial_complete("tune-0", error=outcome == "failed")
    # rand still runs, and nobody waits for it: there is nothing more to hand out.
    assert other["label"] == "a-rand-seed1"
    assert searcher.suggest("tune-2") == FINISHED


def test_a_reference_that_failed_is_tried_by_the_next_command(tmp_path):
    store = Store(tmp_path, make_plan({"shuffle": (1,), "nlm": (1,)}))
    searcher = store.searcher()
    searcher.suggest("tune-0")
    searcher.on_trial_complete("tune-0", error=True)
    assert searcher.suggest("tune-1") == FINISHED
    assert store.searcher().suggest("tune-0")["label"] == "a-shuffle-seed1"


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    slots=st.integers(1, 4),
    keys=st.sampled_from([("a",), ("a", "b")]),
    strategies=st.sets(
        st.sampled_from(["rand", "shuffle_by_seed", *SORTED_STRATEGIES[:3]]), min_size=1
    ),
    outcomes=st.sampled_from(
        [("done",), ("done", "done", "failed"), ("done", "failed", "diverged")]
    ),
)
def test_any_schedule_hands_out_every_trial_once(
    tmp_path_factory, seed, slots, keys, strategies, outcomes
):
    """Simulate Tune: `slots` trials at a time that end in any order, and in any way."""
    chance = random.Random(seed)
    plan = make_plan({"shuffle": (1, 2), **dict.fromkeys(sorted(strategies), (1, 2))}, keys)
    store = Store(tmp_path_factory.mktemp("store"), plan)
    searcher = store.searcher()
    running, handed, usable, number = {}, [], set(), 0
    while True:
        while len(running) < slots:
            config = searcher.suggest(f"tune-{number}")
            if config is None:
                assert running  # else Tune would ask for ever
            if config is None or config == FINISHED:
                break
            trial = plan.trials()[config["position"]]
            assert config["position"] not in handed
            if trial.strategy in SORTED_STRATEGIES:
                assert config["reference_id"] in usable
                assert config["reference_id"].startswith(f"{trial.dataset}-shuffle-seed1-")
            handed.append(config["position"])
            running[f"tune-{number}"] = config
            number += 1
        if not running:
            break
        name = chance.choice(sorted(running))
        config, outcome = running.pop(name), chance.choice(outcomes)
        if outcome != "failed":
            store.commit(config, diverged_epoch=2 if outcome == "diverged" else None)
        if outcome == "done" and "-shuffle-seed1-" in config["trial_id"]:
            usable.add(config["trial_id"])
        searcher.on_trial_complete(name, {"done": True}, error=outcome == "failed")
    free = {key: any(name.startswith(f"{key}-") for name in usable) for key in keys}
    expected = [
        position
        for position, trial in enumerate(plan.trials())
        if trial.strategy not in SORTED_STRATEGIES or free[trial.dataset]
    ]
    assert sorted(handed) == expected
    assert len(np.unique(handed)) == len(handed)
