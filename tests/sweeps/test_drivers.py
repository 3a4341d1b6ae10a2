"""Several drivers share the units of a study, and none is left or taken from a driver at work.

The drivers are searchers on one store; Tune, the workers and the time are made by hand.
"""

import random
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from searched_store import EPOCHS, SearchedStore, searched_plan

from sampimp.store.attempts import SupersededError, read_trace
from sampimp.store.plan import read_commits
from sampimp.sweeps import searcher as module
from sampimp.sweeps.inspection import QUIET_TIME
from sampimp.sweeps.searcher import POLL_EVERY, UnitSearcher

FINISHED = UnitSearcher.FINISHED
SUPERSEDED = {"epoch": 0, "superseded": True, "done": True}


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=1000.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(module, "time", clock)
    return clock


def labels(searcher, count, first=0):
    """Ask for units; return the labels of those that are suggested."""
    suggested = [searcher.suggest(f"tune-{first + number}") for number in range(count)]
    return [config["label"] for config in suggested if config not in (None, FINISHED)]


def test_two_drivers_that_look_at_once_do_not_begin_the_same_unit(tmp_path, clock):
    store = SearchedStore(tmp_path, searched_plan({"rand": (1, 2)}))
    one, two = store.searcher(), store.searcher()
    first, same = one.suggest("one-0"), two.suggest("two-0")
    assert first == same
    assert store.begin(first) == 1
    with pytest.raises(SupersededError):
        store.begin(same)
    two.on_trial_complete("two-0", SUPERSEDED)
    assert two.suggest("two-1")["label"] == "a-rand-seed2"
    assert two.suggest("two-2") is None  # it waits for the other driver, and does not end


def test_a_unit_that_was_left_before_the_start_is_begun_at_once(tmp_path, clock):
    store = SearchedStore(tmp_path, searched_plan({"rand": (1,)}))
    dead = store.searcher().suggest("dead")
    store.checkpoint(dead, store.begin(dead), 1)
    config = store.searcher().suggest("tune-0")
    assert config["seen"] == [1, "epoch-000001-attempt-0001"]
    assert store.begin(config) == 2


@pytest.mark.parametrize("change", ["checkpoint", "commit", "attempt"])
def test_a_unit_that_went_on_since_the_start_is_not_begun(tmp_path, clock, change):
    store = SearchedStore(tmp_path, searched_plan({"rand": (1,)}))
    other = store.searcher().suggest("other")
    attempt = store.begin(other)
    store.checkpoint(other, attempt, 1)
    config = store.searcher().suggest("tune-0")
    if change == "checkpoint":
        store.checkpoint(other, attempt, 2)
    elif change == "commit":
        store.commit(other)
    else:
        store.begin(config)
    with pytest.raises(SupersededError):
        store.begin(config)
    assert read_trace(store.trial(config)).attempt == 1 + (change == "attempt")


def taken(store):
    """Return a driver whose only unit is performed by another one, and the unit's configuration."""
    searcher = store.searcher()
    config = searcher.suggest("tune-0")
    attempt = store.begin(config)
    searcher.on_trial_complete("tune-0", SUPERSEDED)
    return searcher, config, attempt


def test_a_unit_is_taken_over_once_it_shows_no_life(tmp_path, clock):
    store = SearchedStore(tmp_path, searched_plan({"rand": (1,)}))
    searcher, config, attempt = taken(store)
    for epoch in (1, 2, 3):  # as slow as it may be: a second an epoch is three seconds of patience
        store.checkpoint(config, attempt, epoch)
        clock.now += POLL_EVERY + 1
        assert searcher.suggest("wait") is None
        clock.now += QUIET_TIME + 2
        assert searcher.suggest("wait") is None
    clock.now += 2
    again = searcher.suggest("tune-1")
    assert again["label"] == config["label"]
    assert again["seen"] == [1, "epoch-000003-attempt-0001"]
    assert store.begin(again) == 2


def test_each_takeover_doubles_the_patience(tmp_path, clock):
    store = SearchedStore(tmp_path, searched_plan({"rand": (1,)}))
    searcher, _, _ = taken(store)
    for times in range(4):
        clock.now += 2**times * QUIET_TIME - 1
        assert searcher.suggest("wait") is None
        clock.now += 2
        config = searcher.suggest(f"again-{times}")
        store.begin(config)  # another driver is faster each time, and as slow to show life
        searcher.on_trial_complete(f"again-{times}", SUPERSEDED)


def test_a_unit_whose_attempt_failed_is_begun_without_a_wait(tmp_path, clock):
    store = SearchedStore(tmp_path, searched_plan({"rand": (1,)}))
    searcher, config, attempt = taken(store)
    store.trial(config).write_json(f"errors/{attempt:04d}.json", {"error": "broken", "time": 0})
    clock.now += POLL_EVERY + 1
    assert store.begin(searcher.suggest("tune-1")) == attempt + 1


def test_a_unit_committed_by_another_driver_is_done_and_unblocks_others(tmp_path, clock):
    store = SearchedStore(tmp_path, searched_plan({"shuffle": (1,), "nlo": (1,)}))
    searcher, config, _ = taken(store)
    assert searcher.suggest("tune-1") is None
    store.commit(config)
    clock.now += POLL_EVERY + 1
    assert labels(searcher, 1, 2) == ["a-nlo-seed1"]
    assert searcher.committed == {"a-shuffle-seed1": "done"}
    assert searcher.failed == set()
    searcher.on_trial_complete("tune-2", {"done": True})
    assert searcher.suggest("tune-3") == FINISHED


def test_a_unit_taken_from_a_dead_worker_is_left_to_the_other_driver(tmp_path, clock):
    store = SearchedStore(tmp_path, searched_plan({"rand": (1, 2)}))
    searcher = store.searcher()
    config = searcher.suggest("tune-0")
    store.begin(config)
    store.begin(store.searcher().suggest("other"))  # a driver that starts now
    searcher.on_trial_complete("tune-0", error=True)
    assert labels(searcher, 2, 1) == ["a-rand-seed2"]


# Any number of drivers, started and killed at any time.


class MadeDriver:
    """A driver and its workers: each unit that it runs goes on by an epoch at a time."""

    def __init__(self, store, plan, slots):
        self._store, self._slots, self._count = store, slots, 0
        self.plan, self.searcher = plan, store.searcher(plan)
        self.running = {}  # Tune's trial: configuration, attempt, epoch
        self.is_over = False

    def fill(self):
        """Ask for units until all slots are in use; return those that were begun."""
        begun = []
        while len(self.running) < self._slots:
            name = f"tune-{self._count}"
            config = self.searcher.suggest(name)
            if config is None or config == FINISHED:
                self.is_over = config == FINISHED and not self.running
                break
            self._count += 1
            try:
                attempt = self._store.begin(config)
            except SupersededError:
                self.searcher.on_trial_complete(name, SUPERSEDED)
                continue
            self.running[name] = [config, attempt, 0]
            begun.append((config, attempt))
        return begun

    def advance(self, name):
        """Let a unit go on by an epoch; return its label if that committed it."""
        config, attempt, epoch = self.running[name]
        result = {"done": True}
        try:
            if epoch < EPOCHS:
                self._store.checkpoint(config, attempt, epoch + 1)
                self.running[name][2] += 1
                return None
            if not self._store.commit(config, attempt=attempt):
                result = SUPERSEDED
        except SupersededError:
            result = SUPERSEDED
        del self.running[name]
        self.searcher.on_trial_complete(name, result)
        return config["label"] if result == {"done": True} else None


def run_drivers(store, plans, chance, clock, deaths):
    """Run drivers in any order, kill some, and run them again until each has ended.

    Returns
    -------
    commits : Counter of str
        How often each unit was committed.
    """
    commits, drivers = Counter(), [MadeDriver(store, plan, chance.randint(1, 2)) for plan in plans]
    for _ in range(20_000):
        left = [number for number, driver in enumerate(drivers) if not driver.is_over]
        if not left:
            return commits
        number = chance.choice(left)
        driver = drivers[number]
        if deaths and chance.random() < 0.05:
            deaths -= 1
            drivers[number] = MadeDriver(store, plans[number], chance.randint(1, 2))
            continue
        driver.fill()
        if driver.running:
            commits.update(filter(None, [driver.advance(chance.choice(sorted(driver.running)))]))
        clock.now += chance.choice((0.1, 1, POLL_EVERY + 1))
    raise AssertionError("the drivers take the units from each other for ever")


GRIDS = (
    {"shuffle": (1, 2), "nlo": (1,)},
    {"shuffle": (1, 2), "nlo": (1, 2), "rand": (1,)},
    {"shuffle": (1,), "rand": (1, 2, 3)},
    {"shuffle": (1, 2, 3)},
)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(2, 4), deaths=st.integers(0, 6))
def test_every_grid_is_complete_after_any_deaths(tmp_path_factory, seed, count, deaths):
    chance = random.Random(seed)
    store = SearchedStore(tmp_path_factory.mktemp("store"), None)
    plans = [searched_plan(chance.choice(GRIDS)) for _ in range(count)]
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "time", clock)
        commits = run_drivers(store, plans, chance, clock, deaths)
    assert set(commits.values()) == {1}
    for plan in plans:
        assert all(trial.commit for trial in plan.resolve(read_commits(store.folder)))
    if not deaths:  # nothing was taken from a driver at work
        for commit in read_commits(store.folder).values():
            assert commit["attempt"] == 1
