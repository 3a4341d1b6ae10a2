"""Start, kill and restart four drivers of one study, and check what each of them published.

python tests/chaos/drivers.py --seeds 10

The grids of the drivers overlap. A seed states when each driver starts, after how many epochs one
is killed, whether its Ray processes are killed with it or go on for a while, and when it is
restarted. Then the history is checked: plans, attempts and commits, as the store states them and as
they were seen to appear.

Required: each driver ends with exit code 0, and its grid is committed by then; no plan is lost;
each trial is committed once, by one of its attempts; every array is bit-identical with the arrays
of a plain loop over the joined grid.
"""

import functools
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import tyro
from chaos import checkpoints_of, differing_bytes, is_committed, trials_of
from rich.console import Console

from sampimp.data import Source, load_source
from sampimp.store.location import Folder
from sampimp.store.plan import Plan, read_commits
from sampimp.store.plan_files import read_plan
from sampimp.store.seals import unseal
from sampimp.sweeps.options import parse
from sampimp.sweeps.study import make_plan

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
import oracles
from processes import TRAIN, Driver, kill

EPOCHS = 5
STUDY = (
    *("--preset", "digits", "--hidden", "16", "--epochs", str(EPOCHS), "--batch-size", "10"),
    *("--influence", "--subsets"),  # none
    *("--reference-seeds", "1", "--max-concurrent", "1"),
)
GRIDS = (
    ("--strategies", "shuffle", "rand", "--seeds", "1", "2"),
    ("--strategies", "rand", "nlo", "--seeds", "1", "2"),
    ("--strategies", "nlo", "sim", "--seeds", "1"),
    ("--strategies", "rand", "--seeds", "2", "3"),
)
"""The strategies and seeds of each driver."""

QUIET_TIME = 5.0
"""Patience of the drivers in seconds: a minute would be most of the time of the test."""


@dataclass
class Run:
    """What happened to a study."""

    starts: int = 0
    deaths: list[str] = field(default_factory=list)
    pids: set[int] = field(default_factory=set)
    """Processes of all drivers."""
    commits: dict[str, bytes] = field(default_factory=dict)
    """The commit of each trial, as it was when it appeared."""
    seconds: float = 0.0


@functools.cache
def digits() -> dict[str, Source]:
    """Return the data sets of the study."""
    return {"digits": load_source("digits")}


@functools.cache
def plan_of(grid: tuple[str, ...]) -> Plan:
    """Return the plan of a driver."""
    return make_plan(parse([*STUDY, *grid]), digits())


def train_alone(out: Path) -> None:
    """Train the joined grid in a plain loop, without Ray."""
    plan, *others = map(plan_of, GRIDS)
    for other in others:
        plan = plan.joined(other, str(out))
    oracles.run_trials(oracles.start_study(out, plan, digits()), plan, digits())


def progress(out: Path) -> int:
    """Return how many epochs are checkpointed or committed."""
    return sum(
        EPOCHS if is_committed(trial) else max([0, *(epoch for epoch, _ in checkpoints_of(trial))])
        for trial in trials_of(out)
    )


class Scene:
    """Four drivers of one study.

    Parameters
    ----------
    out
        The store.
    seed, deaths
        Seed of the schedule, and how many drivers are killed.
    say
        Called with a line for each event.
    """

    def __init__(self, out: Path, seed: int, deaths: int, say: Callable[[str], None]) -> None:
        self._out, self._say = out, say
        self._chance = random.Random(seed)
        self._begun = time.monotonic()
        self._starts = {number: self._chance.uniform(0, 3) for number in range(len(GRIDS))}
        epochs = EPOCHS * self._trial_count()
        self._moments = sorted(self._chance.uniform(0.02, 0.8) * epochs for _ in range(deaths))
        self._drivers: dict[int, Driver] = {}
        self._ended: list[Driver] = []
        self.run = Run()

    @staticmethod
    def _trial_count() -> int:
        return len({(t.strategy, t.seed) for grid in GRIDS for t in plan_of(grid).trials()})

    def play(self) -> None:
        """Run until every driver has ended, and none is to be started again."""
        try:
            while self._drivers or self._starts:
                self._start_those_due()
                self._note_commits()
                if self._moments and self._drivers and progress(self._out) >= self._moments[0]:
                    self._moments.pop(0)
                    self._kill_one()
                for number in [n for n, d in self._drivers.items() if d.process.poll() is not None]:
                    self._end(number)
                time.sleep(0.05)
        finally:
            for driver in (*self._drivers.values(), *self._ended):
                driver.close(0)
        self._note_commits()
        self.run.seconds = time.monotonic() - self._begun

    def _start_those_due(self) -> None:
        now = time.monotonic() - self._begun
        for number in [n for n, due in self._starts.items() if due <= now]:
            del self._starts[number]
            env = os.environ | {"TESTS_QUIET_TIME": str(QUIET_TIME)}
            driver = Driver(self._out, (*STUDY, *GRIDS[number]), env=env, door=TRAIN)
            self._drivers[number] = driver
            self.run.starts += 1
            self.run.pids.add(driver.process.pid)
            self._tell(f"driver {number} starts")

    def _kill_one(self) -> None:
        number = self._chance.choice(sorted(self._drivers))
        driver, kind = self._drivers.pop(number), self._chance.choice(("driver", "head"))
        members = driver.family.alive()
        driver.kill()
        for pid in members if kind == "head" else ():
            kill(pid)
        self._ended.append(driver)
        self.run.deaths.append(kind)
        self._starts[number] = time.monotonic() - self._begun + self._chance.uniform(0, 4)
        self._tell(f"driver {number} is killed" + (" with its Ray" if kind == "head" else ""))

    def _end(self, number: int) -> None:
        driver = self._drivers.pop(number)
        code, text = driver.communicate()
        driver.close(0)
        self._tell(f"driver {number} ends with {code}")
        assert code == 0, text
        assert "Traceback" not in text, text
        trials = plan_of(GRIDS[number]).resolve(read_commits(Folder.of(self._out)))
        assert all(trial.commit for trial in trials), text

    def _note_commits(self) -> None:
        """Note each commit when it appears; it must stay as it is."""
        for trial in trials_of(self._out):
            if is_committed(trial):
                content = (trial / "COMMIT.json").read_bytes()
                assert self.run.commits.setdefault(trial.name, content) == content
            else:
                assert trial.name not in self.run.commits

    def _tell(self, words: str) -> None:
        now = time.monotonic() - self._begun
        self._say(f"{now:6.1f} s, {progress(self._out):>3} epochs: {words}")


def check_history(out: Path, run: Run) -> None:
    """Assert that the store's own history is that of drivers which lost nothing of each other's."""
    folder = Folder.of(out)
    plans = sorted((out / "plans").iterdir())
    assert [path.name for path in plans] == [f"{i + 1:04d}.json" for i in range(len(plans))]
    contents = [unseal(path.read_bytes(), str(path)) for path in plans]
    assert {content["pid"] for content in contents} <= run.pids
    assert len({content["token"] for content in contents}) == len(contents)
    cells = [{(s, seed) for s, seeds in c["grid"].items() for seed in seeds} for c in contents]
    assert all(before < after for before, after in pairwise(cells))
    assert (out / "study.json").read_bytes() == plans[-1].read_bytes()
    for grid in GRIDS:
        trials = plan_of(grid).trials()
        assert {(trial.strategy, trial.seed) for trial in trials} <= cells[-1]
    plan = read_plan(folder)
    assert plan is not None
    trials = plan.resolve(read_commits(folder))
    assert {trial.trial_id for trial in trials} == set(run.commits)
    assert {path.name for path in trials_of(out)} == set(run.commits)
    for trial in trials:
        check_attempts(out / "trials" / str(trial.trial_id), trial.commit or {})
    assert not (out / "withdrawn").exists()


def check_attempts(trial: Path, commit: dict) -> None:
    """Assert that one attempt committed a trial, and each attempt was claimed once."""
    files = sorted((trial / "attempts").iterdir())
    assert [path.name for path in files] == [f"{i + 1:04d}.json" for i in range(len(files))]
    assert 1 <= commit["attempt"] <= len(files)
    starts = [first for first, _ in commit["parts"]]
    assert starts == sorted(set(starts))
    assert starts[0] == 0
    assert commit["epochs"] == EPOCHS
    assert not (trial / "withdrawn").exists()


def play(folder: Path, seed: int, deaths: int, say: Callable[[str], None]) -> Run:
    """Play a scene, and check it against the plain loop in folder/alone; return what happened."""
    out = folder / f"study-{seed}"
    scene = Scene(out, seed, deaths, say)
    scene.play()
    check_history(out, scene.run)
    assert differing_bytes(out, folder / "alone") == 0
    attempts = sum(len(list((trial / "attempts").iterdir())) for trial in trials_of(out))
    say(
        f"seed {seed}: {scene.run.starts} starts, killed {scene.run.deaths}, "
        f"{len(scene.run.commits)} trials by {attempts} attempts, "
        f"{len(list((out / 'plans').iterdir()))} plans, 0 differing bytes, "
        f"{scene.run.seconds:.0f} s"
    )
    shutil.rmtree(out)
    return scene.run


def main(seeds: int = 10, first: int = 1, deaths: int = 5) -> int:
    """Play scenes, and check the history of each.

    Parameters
    ----------
    seeds
        Number of scenes, each with a seed of its own.
    first
        Seed of the first.
    deaths
        How many drivers are killed in each.
    """
    console = Console()
    with tempfile.TemporaryDirectory(prefix="sampimp-drivers-") as name:
        train_alone(Path(name) / "alone")
        for seed in range(first, first + seeds):
            play(Path(name), seed, deaths, lambda line: console.print(line, highlight=False))
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
