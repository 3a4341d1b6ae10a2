"""Plans of several drivers: none is lost, a conflict is refused, a damaged one is set aside."""

import json
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import oracles
import pytest

from sampimp.errors import ConfigError, DamageWarning, RecordError, StoreError
from sampimp.store.location import Folder
from sampimp.store.plan import Plan
from sampimp.store.plan_files import (
    find_plan,
    read_plan,
    require_plan,
    store_plan,
)
from sampimp.store.seals import unseal

SOURCES = {"a": oracles.make_source(name="a", seed=1)}

DAMAGE = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "another byte": lambda content: content.replace(b'"rand"', b'"sand"'),
    "another shape": lambda content: b"[1, 2]",
}


def plan_of(*seeds, learning_rate=0.1):
    plan = oracles.make_plan(SOURCES, {"rand": seeds})
    return replace(plan, training=replace(plan.training, learning_rate=learning_rate))


def files_of(out):
    """Return every file below a folder, by its path."""
    return {str(p.relative_to(out)): p.read_bytes() for p in Path(out).rglob("*") if p.is_file()}


def damage(out, file, how):
    path = out / file
    path.write_bytes(DAMAGE[how](path.read_bytes()))


# Several drivers.


def test_a_driver_with_nothing_new_writes_nothing(tmp_path):
    folder = Folder.of(tmp_path)
    first, _ = store_plan(folder, plan_of(1, 2))
    before = files_of(tmp_path)
    assert sorted(before) == ["plans/0001.json", "study.json"]
    assert store_plan(folder, plan_of(2)) == (first, [])
    assert files_of(tmp_path) == before
    joined, _ = store_plan(folder, plan_of(3))
    assert joined.grid == {"rand": (1, 2, 3)}
    assert read_plan(folder) == require_plan(folder) == joined
    after = files_of(tmp_path)
    assert sorted(after) == ["plans/0001.json", "plans/0002.json", "study.json"]
    assert after["plans/0001.json"] == before["plans/0001.json"]
    assert after["study.json"] == after["plans/0002.json"]


def test_the_writer_of_a_plan_is_stated_in_it(tmp_path):
    store_plan(Folder.of(tmp_path), plan_of(1))
    content = (tmp_path / "plans" / "0001.json").read_bytes()
    value = unseal(content, "plans/0001.json")
    assert {"host", "pid", "time", "token"} < value.keys()
    assert read_plan(Folder.of(tmp_path)) == plan_of(1)


def test_no_grid_is_lost_when_many_drivers_begin_at_once(tmp_path):
    folder, start = Folder.of(tmp_path), threading.Barrier(8)

    def begin(number):
        start.wait()
        return store_plan(folder, plan_of(number))[0]

    with ThreadPoolExecutor(8) as pool:
        plans = list(pool.map(begin, range(8)))
    assert read_plan(folder).grid == {"rand": tuple(range(8))}
    for number, plan in enumerate(plans):
        assert number in plan.grid["rand"]
    names = sorted(path.name for path in (tmp_path / "plans").iterdir())
    assert names == [f"{number:04d}.json" for number in range(1, 9)]
    grids = [set(json.loads((tmp_path / "plans" / n).read_bytes())["grid"]["rand"]) for n in names]
    assert all(before < after for before, after in pairwise(grids))
    assert (tmp_path / "study.json").read_bytes() == (tmp_path / "plans/0008.json").read_bytes()


RACE = """
import json, sys
from sampimp.store.location import Folder
from sampimp.store.plan import Plan
from sampimp.store.plan_files import store_plan
plan = Plan.from_json(json.loads(sys.stdin.readline()))
print("ready", flush=True)
sys.stdin.readline()
store_plan(Folder.of(sys.argv[1]), plan)
"""


def test_no_grid_is_lost_between_processes(tmp_path):
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for number, racer in enumerate(racers):
        racer.stdin.write(json.dumps(plan_of(number).to_json()) + "\n")
        racer.stdin.flush()
    assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 3
    for racer in racers:
        racer.stdin.write("\n")
        racer.stdin.flush()
    assert [racer.communicate() and racer.returncode for racer in racers] == [0, 0, 0]
    assert read_plan(Folder.of(tmp_path)).grid == {"rand": (0, 1, 2)}


@pytest.mark.parametrize("times", range(5))
def test_of_conflicting_settings_one_is_stored_and_the_others_are_refused(tmp_path, times):
    folder, start = Folder.of(tmp_path), threading.Barrier(8)

    def begin(number):
        start.wait()
        rate = 0.1 if number % 2 else 0.2
        try:
            return rate, store_plan(folder, plan_of(number, learning_rate=rate))[0]
        except ConfigError as error:
            return rate, error

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(begin, range(8)))
    stored = read_plan(folder)
    refusals = [error.got for _, error in results if isinstance(error, ConfigError)]
    assert len(refusals) == 4
    assert all("learning_rate" in got for got in refusals)
    accepted = {rate for rate, result in results if isinstance(result, Plan)}
    assert accepted == {stored.training.learning_rate}
    parity = stored.training.learning_rate == 0.1
    assert stored.grid == {"rand": tuple(range(int(parity), 8, 2))}
    for path in (tmp_path / "plans").iterdir():
        training = json.loads(path.read_bytes())["training"]
        assert training["learning_rate"] == stored.training.learning_rate


def test_a_copy_that_is_written_late_is_replaced(tmp_path, monkeypatch):
    """Another driver adds a plan, and copies it, while this one copies its own."""
    folder, write = Folder.of(tmp_path), Folder.write_bytes
    others = [plan_of(2)]

    def write_late(self, name, content):
        if name == "study.json" and others:
            store_plan(folder, others.pop())
        write(self, name, content)

    monkeypatch.setattr(Folder, "write_bytes", write_late)
    store_plan(folder, plan_of(1))
    assert (tmp_path / "study.json").read_bytes() == (tmp_path / "plans/0002.json").read_bytes()


# Damage.


@pytest.mark.parametrize("how", DAMAGE)
def test_a_reader_falls_back_to_the_plan_before_and_writes_nothing(tmp_path, how):
    folder = Folder.of(tmp_path)
    for seed in (1, 2):
        store_plan(folder, plan_of(seed))
    damage(tmp_path, "plans/0002.json", how)
    before = files_of(tmp_path)
    with pytest.warns(DamageWarning, match=r"plans/0002.json of .*plans/0001.json is used"):
        assert read_plan(folder) == plan_of(1)
    with pytest.warns(DamageWarning):
        assert require_plan(folder) == plan_of(1)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("how", DAMAGE)
def test_a_driver_sets_a_damaged_plan_aside_and_adds_its_own(tmp_path, how):
    folder = Folder.of(tmp_path)
    for seed in (1, 2):
        store_plan(folder, plan_of(seed))
    damage(tmp_path, "plans/0002.json", how)
    bytes_of_damage = (tmp_path / "plans/0002.json").read_bytes()
    plan, set_aside = store_plan(folder, plan_of(2))
    assert plan.grid == {"rand": (1, 2)}
    assert set_aside == ["plans/0002.json"]
    files = files_of(tmp_path)
    assert files.pop("withdrawn/plans-0002.json") == bytes_of_damage
    # The number is not used again: another driver may be about to set the same file aside.
    assert sorted(files) == ["plans/0001.json", "plans/0003.json", "study.json"]
    assert files["study.json"] == files["plans/0003.json"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_plan(folder) == plan


def test_a_damaged_plan_is_replaced_although_nothing_is_new(tmp_path):
    folder = Folder.of(tmp_path)
    store_plan(folder, plan_of(1))
    (tmp_path / "plans" / "0002.json").write_bytes(b"")
    assert store_plan(folder, plan_of(1)) == (plan_of(1), ["plans/0002.json"])
    assert sorted(files_of(tmp_path)) == [
        *("plans/0001.json", "plans/0003.json", "study.json", "withdrawn/plans-0002.json")
    ]


def test_the_copy_counts_where_all_numbered_plans_are_damaged(tmp_path):
    folder = Folder.of(tmp_path)
    for seed in (1, 2):
        store_plan(folder, plan_of(seed))
    for file in ("plans/0001.json", "plans/0002.json"):
        damage(tmp_path, file, "half")
    with pytest.warns(DamageWarning, match=r"study.json is used"):
        assert read_plan(folder).grid == {"rand": (1, 2)}
    plan, set_aside = store_plan(folder, plan_of(3))
    assert plan.grid == {"rand": (1, 2, 3)}
    assert set_aside == ["plans/0002.json", "plans/0001.json"]
    assert find_plan(folder).file == "plans/0003.json"


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_copy_is_written_again_and_warned_of_by_nobody(tmp_path, how):
    folder = Folder.of(tmp_path)
    store_plan(folder, plan_of(1))
    damage(tmp_path, "study.json", how)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_plan(folder) == plan_of(1)
    assert store_plan(folder, plan_of(1)) == (plan_of(1), [])
    files = files_of(tmp_path)
    assert files["study.json"] == files["plans/0001.json"]


@pytest.mark.parametrize("how", DAMAGE)
def test_a_study_without_a_sound_plan_is_refused_by_readers_and_continued_by_a_driver(
    tmp_path, how
):
    folder = Folder.of(tmp_path)
    store_plan(folder, plan_of(1))
    for file in ("plans/0001.json", "study.json"):
        damage(tmp_path, file, how)
    assert read_plan(folder) is None
    with pytest.raises(StoreError, match=r"plans/0001.json and study.json, damaged") as caught:
        require_plan(folder)
    assert "run the command of the study again" in caught.value.todo
    assert store_plan(folder, plan_of(2)) == (plan_of(2), ["plans/0001.json", "study.json"])
    assert read_plan(folder) == plan_of(2)


def test_damaged_files_of_one_name_are_all_kept(tmp_path):
    folder = Folder.of(tmp_path)
    for content in (b"one", b"two", b"two"):
        (tmp_path / "study.json").write_bytes(content)
        for path in (tmp_path / "plans").glob("*.json"):
            path.unlink()
        store_plan(folder, plan_of(1))
    kept = {name: content for name, content in files_of(tmp_path).items() if "withdrawn" in name}
    assert kept == {"withdrawn/study.json": b"one", "withdrawn/study-2.json": b"two"}


# Other versions.


def test_a_study_of_an_earlier_version_is_read_and_continued(tmp_path):
    folder = Folder.of(tmp_path)
    folder.write_json("study.json", plan_of(1).to_json())
    before = files_of(tmp_path)
    assert require_plan(folder) == plan_of(1)
    assert files_of(tmp_path) == before
    plan, set_aside = store_plan(folder, plan_of(2))
    assert (plan.grid, set_aside) == ({"rand": (1, 2)}, [])
    assert find_plan(folder).file == "plans/0001.json"
    assert folder.read_json("study.json")["grid"] == {"rand": [1, 2]}


def test_the_first_driver_of_this_version_adds_a_plan_even_if_nothing_is_new(tmp_path):
    folder = Folder.of(tmp_path)
    folder.write_json("study.json", plan_of(1).to_json())
    store_plan(folder, plan_of(1))
    assert find_plan(folder).file == "plans/0001.json"


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"schema_version": 1}, StoreError, ("schema version 2", "version 1", "release that")),
        ({"colour": "red"}, RecordError, ("colour", "study.json")),
        ({"grid": 3}, RecordError, ("an object at .grid", "study.json")),
    ],
)
def test_a_plan_of_another_version_is_refused(tmp_path, change, kind, words):
    folder = Folder.of(tmp_path)
    folder.write_json("study.json", plan_of(1).to_json() | change)
    for use in (require_plan, lambda where: store_plan(where, plan_of(1))):
        with pytest.raises(kind) as caught:
            use(folder)
        assert all(word in str(caught.value) for word in words), str(caught.value)


def test_no_study_is_named_as_such(tmp_path):
    assert read_plan(Folder.of(tmp_path)) is None
    with pytest.raises(StoreError, match=r"a study, with a study.json"):
        require_plan(Folder.of(tmp_path))
