"""Every missing trial is suggested once, and none before the reference that it sorts by."""

import pickle
import random
import threading
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray import cloudpickle
from searched_store import SearchedStore, searched_plan

from sampimp.errors import StoreError
from sampimp.schema import SORTED_STRATEGIES
from sampimp.store.location import Folder
from sampimp.sweeps import searcher as module
from sampimp.sweeps.searcher import POLL_EVERY, RESTARTS, RETRIES, UnitSearcher
from sampimp.sweeps.work import Unit

FINISHED = UnitSearcher.FINISHED


def test_trials_that_wait_for_no_reference_come_first(tmp_path):
    store = SearchedStore(tmp_path, searched_plan({"nlo": (1, 2), "rand": (1,), "shuffle": (1, 2)}))
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
    assert searcher.suggest("tune-3") is None  # rand unblocks no trial
    store.commit(first[0])
    assert searcher.suggest("tune-3") is None  # Tune has not reported the end yet
    searcher.on_trial_complete("tune-0", {"done": True})
    later = [searcher.suggest(f"tune-{i}") for i in (3, 4)]
    assert [config["label"] for config in later] == ["a-nlo-seed1", "a-nlo-seed2"]
    assert {config["reference_id"] for config in later} == {first[0]["trial_id"]}
    assert searcher.suggest("tune-5") is None  # one that runs may fail and be handed out again
    for trial_id in ("tune-2", "tune-3", "tune-4"):
        assert searcher.suggest("tune-5") is None
        searcher.on_trial_complete(trial_id, {"done": True})
    assert searcher.suggest("tune-5") == FINISHED


def test_a_suggestion_is_the_planned_trial(tmp_path):
    plan = searched_plan({"shuffle": (1,), "rand": (3,)}, keys=("a", "b"))
    searcher = SearchedStore(tmp_path, plan).searcher()
    for number in range(4):
        config = searcher.suggest(f"tune-{number}")
        planned = plan.resolve({})[config["position"]]
        assert plan.trials()[config["position"]] == planned.config
        assert config == {
            "kind": "train",
            "folder": f"trials/{planned.trial_id}",
            "position": config["position"],
            "label": planned.label,
            "trial_id": planned.trial_id,
            "fingerprint": planned.fingerprint,
            "reference_id": None,
            "seen": [0, ""],
        }


def test_committed_trials_are_not_suggested(tmp_path):
    store = SearchedStore(tmp_path, searched_plan({"shuffle": (1,), "sim": (1,), "rand": (1,)}))
    first = [store.searcher().suggest("tune-0")]
    store.commit(first[0])
    again = store.searcher()
    labels = [again.suggest(f"tune-{i}")["label"] for i in range(2)]
    assert labels == ["a-sim-seed1", "a-rand-seed1"]  # its reference is there: the plan's order
    assert again.suggest("tune-2") is None
    for trial_id in ("tune-0", "tune-1"):
        again.on_trial_complete(trial_id, {"done": True})
    assert again.suggest("tune-2") == FINISHED


def run_down(searcher, store=None):
    """Let a trial fail until it is not suggested again; return the number of suggestions."""
    times = 0
    while (config := searcher.suggest(f"again-{times}")) not in (None, FINISHED):
        times += 1
        if store is not None:
            store.fail(config)
        searcher.on_trial_complete(f"again-{times - 1}", error=True)
    return times


@pytest.mark.parametrize(
    ("fails_itself", "times"), [(True, 1 + RETRIES), (False, 1 + RESTARTS)], ids=["fails", "dies"]
)
def test_a_trial_is_tried_again_a_stated_number_of_times(tmp_path, fails_itself, times):
    store = SearchedStore(tmp_path, searched_plan({"shuffle": (1,), "nlm": (1,)}))
    searcher = store.searcher()
    assert run_down(searcher, store if fails_itself else None) == times
    assert searcher.failed == {"a-shuffle-seed1"}
    assert searcher.suggest("last") == FINISHED  # nlm stays blocked
    # The next command tries again, whatever failures the store has kept.
    assert run_down(store.searcher(), store if fails_itself else None) == times


def test_a_death_does_not_count_as_a_failure_of_its_own(tmp_path):
    store = SearchedStore(tmp_path, searched_plan({"rand": (1,)}))
    searcher = store.searcher()
    for number in range(2 * RETRIES):
        config = searcher.suggest(f"tune-{number}")
        if number % 2:
            store.fail(config)
        searcher.on_trial_complete(f"tune-{number}", error=True)
        assert searcher.failed == set()
    assert searcher.suggest("tune-last")["label"] == "a-rand-seed1"


def test_failures_count_where_no_error_can_be_written(tmp_path, monkeypatch):
    searcher = SearchedStore(tmp_path, searched_plan({"rand": (1,)})).searcher()

    def refuse(folder):
        raise StoreError("a disk with room", "none", str(folder), "free some")

    monkeypatch.setattr(Folder, "check_writable", refuse)
    assert run_down(searcher) == 1 + RETRIES


def test_a_process_that_dies_after_its_commit_is_done(tmp_path):
    store = SearchedStore(tmp_path, searched_plan({"shuffle": (1,), "nlm": (1,)}))
    searcher = store.searcher()
    store.commit(searcher.suggest("tune-0"))
    searcher.on_trial_complete("tune-0", error=True)
    assert searcher.suggest("tune-1")["label"] == "a-nlm-seed1"  # its reference run is committed
    assert searcher.suggest("tune-2") is None
    searcher.on_trial_complete("tune-1", {"done": True})
    assert searcher.suggest("tune-2") == FINISHED


def test_a_reference_run_that_is_tried_again_unblocks_others(tmp_path):
    store = SearchedStore(tmp_path, searched_plan({"shuffle": (1,), "nlm": (1,)}))
    searcher = store.searcher()
    searcher.suggest("tune-0")
    searcher.on_trial_complete("tune-0", error=True)
    reference = searcher.suggest("tune-1")
    assert searcher.suggest("tune-2") is None
    store.commit(reference)
    searcher.on_trial_complete("tune-1", {"done": True})
    assert searcher.suggest("tune-2")["label"] == "a-nlm-seed1"


def test_a_diverged_reference_unblocks_nothing(tmp_path):
    store = SearchedStore(tmp_path, searched_plan({"shuffle": (1,), "nlm": (1,), "rand": (1,)}))
    searcher = store.searcher()
    reference, other = (searcher.suggest(f"tune-{i}") for i in range(2))
    assert searcher.suggest("tune-2") is None
    store.commit(reference, diverged_epoch=1)
    searcher.on_trial_complete("tune-0", {"done": True})
    assert other["label"] == "a-rand-seed1"
    assert searcher.suggest("tune-2") is None  # rand may fail and be handed out again
    searcher.on_trial_complete("tune-1", {"done": True})
    assert searcher.suggest("tune-2") == FINISHED


@settings(max_examples=40)
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
def test_any_schedule_suggests_every_trial_until_it_has_ended(
    tmp_path_factory, seed, slots, keys, strategies, outcomes
):
    """Simulate Tune: `slots` trials at a time, which end in any order and with any outcome."""
    chance = random.Random(seed)
    plan = searched_plan({"shuffle": (1, 2), **dict.fromkeys(sorted(strategies), (1, 2))}, keys)
    store = SearchedStore(tmp_path_factory.mktemp("store"), plan)
    searcher = store.searcher()
    running, handed, usable, number = {}, Counter(), set(), 0
    ended, given_up = set(), set()
    while True:
        while len(running) < slots:
            config = searcher.suggest(f"tune-{number}")
            if config is None:
                assert running  # else Tune would ask for ever
            if config is None or config == FINISHED:
                break
            trial = plan.trials()[config["position"]]
            assert config["position"] not in ended | given_up
            if trial.strategy in SORTED_STRATEGIES:
                assert config["reference_id"] in usable
                assert config["reference_id"].startswith(f"{trial.dataset}-shuffle-seed1-")
            handed[config["position"]] += 1
            running[f"tune-{number}"] = config
            number += 1
        if not running:
            break
        name = chance.choice(sorted(running))
        config, outcome = running.pop(name), chance.choice(outcomes)
        if outcome == "failed":
            store.fail(config)
            if handed[config["position"]] > RETRIES:
                given_up.add(config["position"])
        else:
            ended.add(config["position"])
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
    assert sorted(handed) == sorted(ended | given_up) == expected
    labels = [trial.label for trial in plan.resolve({})]
    assert searcher.failed == {labels[position] for position in given_up}


# Runs that another command trains.


def made_units(states):
    """Return units by label: "done", "ready", "blocked" by another unit, or "awaiting" a run."""
    return [
        Unit(
            label=label,
            folder=f"influence/{label}" if state in ("done", "ready") else None,
            steps=2,
            commit={"diverged_epoch": None} if state == "done" else None,
            config={"label": label},
            unblocks=label == "states",
            awaits="a-rand-seed1" if state == "awaiting" else None,
        )
        for label, state in states.items()
    ]


def test_the_store_is_asked_about_a_run_until_it_is_committed(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(module, "time", clock)
    states, asked, said = {"one": "awaiting", "two": "done"}, [], []

    def resolve():
        asked.append(clock.now)
        return made_units(states)

    searcher = UnitSearcher(Folder.of(tmp_path), resolve, lambda: said.append(clock.now))
    assert searcher.suggest("tune-0") is None
    assert asked == [0.0]
    clock.now = POLL_EVERY + 1
    assert searcher.suggest("tune-0") is None
    assert searcher.suggest("tune-0") is None
    assert asked == [0.0, clock.now]
    assert said == [clock.now]
    clock.now *= 2
    states["one"] = "ready"
    assert searcher.suggest("tune-0")["label"] == "one"
    assert searcher.suggest("tune-1") is None
    searcher.on_trial_complete("tune-0", {"done": True})
    assert searcher.suggest("tune-1") == FINISHED
    assert len(said) == 1


def test_a_run_that_diverges_while_it_is_waited_for_ends_the_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "POLL_EVERY", -1.0)
    states = {"one": "awaiting"}
    searcher = UnitSearcher(Folder.of(tmp_path), lambda: made_units(states))
    assert searcher.suggest("tune-0") is None
    states["one"] = "blocked"
    assert searcher.suggest("tune-0") == FINISHED


def test_units_wait_for_the_states_of_their_run(tmp_path):
    states = {"states": "ready", "one": "blocked", "two": "blocked"}
    searcher = UnitSearcher(Folder.of(tmp_path), lambda: made_units(states))
    assert searcher.suggest("tune-0")["label"] == "states"
    assert searcher.suggest("tune-1") is None
    states.update(states="done", one="ready", two="ready")
    searcher.on_trial_complete("tune-0", {"done": True})
    assert [searcher.suggest(f"tune-{i}")["label"] for i in (1, 2)] == ["one", "two"]


def test_tune_can_pickle_a_searcher(tmp_path):
    lock = threading.Lock()  # as a console has
    units = made_units({"one": "ready"})
    searcher = UnitSearcher(Folder.of(tmp_path), lambda: units, lambda: lock.acquire())
    assert pickle.loads(cloudpickle.dumps(searcher)).failed == set()
