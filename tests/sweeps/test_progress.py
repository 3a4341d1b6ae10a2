"""The display of a running study: counts, time left, and lines that fit."""

import pickle
import re
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray import cloudpickle
from ray.exceptions import ActorDiedError, RayTaskError
from rich.console import Console

from sampimp.config import TrainingConfig, TrialConfig
from sampimp.errors import StoreError
from sampimp.store.plan import Plan, PlannedTrial
from sampimp.sweeps import progress as module
from sampimp.sweeps.progress import LINE_EVERY, Progress
from sampimp.sweeps.quantities import format_clock
from sampimp.sweeps.work import training_units

DONE, DIVERGED = {"diverged_epoch": None}, {"diverged_epoch": 2}


ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Clock:
    """A clock that the test sets."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def planned(strategy, seed, commit=None, blocked=False, dataset="digits"):
    trial = TrialConfig(
        dataset=dataset,
        strategy=strategy,
        seed=seed,
        order_seed=0,
        training=TrainingConfig(epochs=10),
    )
    return PlannedTrial(trial, None if blocked else f"{strategy}{seed}", None, None, commit)


def make(trials, terminal=False, given_up=(), committed=None, seconds=None):
    console = Console(file=StringIO(), force_terminal=terminal, width=80, soft_wrap=True)
    plan = Plan(datasets={}, training=TrainingConfig(epochs=10), grid={})
    progress = Progress(
        training_units(plan, trials),
        given_up,
        {} if committed is None else committed,
        console,
        seconds=seconds,
    )
    return progress, console.file


def tune_trial(label, error_file=None):
    return SimpleNamespace(config={"label": label}, pickled_error_file=error_file)


def report(progress, label, epoch, done=False, diverged=False):
    result = {"epoch": epoch, "done": done, "diverged": diverged}
    progress.on_trial_result(0, [], tune_trial(label), result)


def test_counts_and_time_left(clock):
    trials = [
        planned("shuffle", 1),
        planned("shuffle", 2, DONE),
        planned("rand", 1, DIVERGED),
        planned("rand", 2),
        planned("nlo", 1, blocked=True),
    ]
    progress, file = make(trials, given_up={"digits-nlo-seed1"})
    with progress:
        for label in ("digits-shuffle-seed1", "digits-rand-seed2"):
            progress.on_trial_start(0, [], tune_trial(label))
        clock.now += 31
        report(progress, "digits-shuffle-seed1", 4)
        # 20 epochs were there; 4 of the 30 others took 31 s, so that 26 take 201.5 s.
        first, line = file.getvalue().splitlines(keepends=True)
        assert first.startswith("0:00  5 trials: ")
        assert line == (
            "0:31  5 trials: 1 done, 2 running, 1 blocked, 1 diverged; 24 of 50 epochs; "
            "about 3:22 left\n"
        )
        report(progress, "digits-shuffle-seed1", 10, done=True)
        report(progress, "digits-rand-seed2", 3, done=True, diverged=True)
        progress.on_trial_error(0, [], tune_trial("digits-nlo-seed1"))
        assert file.getvalue().splitlines()[2:] == [
            "digits-nlo-seed1 failed: its process did not start"
        ]
    assert (
        file.getvalue()
        .splitlines()[-1]
        .startswith("0:31  5 trials: 2 done, 2 diverged, 1 failed; 40 of 50 epochs; ")
    )


def test_no_time_left_before_the_first_epoch(clock):
    progress, file = make([planned("rand", 1), planned("sim", 1, blocked=True)])
    with progress:
        pass
    line = "0:00  2 trials: 0 done, 1 waiting, 1 blocked; 0 of 20 epochs; time left: measuring\n"
    assert file.getvalue() == 2 * line  # at the start and at the end


def test_a_time_that_was_measured_before_is_shown_until_the_rate_is_known(clock):
    progress, file = make([planned("rand", 1)], seconds=100)
    with progress:
        assert "; about 1:40 left\n" in file.getvalue()
        clock.now += 4
        report(progress, "digits-rand-seed1", 1)
        assert progress._line().endswith("; about 1:36 left")
        clock.now += 8
        report(progress, "digits-rand-seed1", 3)
        # 3 of 10 epochs took 12 s, so that 7 take 28 s.
        assert progress._line().endswith("; about 0:28 left")


def test_a_log_gets_a_line_now_and_then(clock):
    progress, file = make([planned("rand", 1)])
    with progress:
        for epoch in range(1, 10):
            clock.now += LINE_EVERY / 3
            report(progress, "digits-rand-seed1", epoch)
    # At the start, after 40 s and 80 s, and at the end.
    lines = file.getvalue().splitlines()
    assert [line[:4] for line in lines] == ["0:00", "0:40", "1:20", "1:30"]


def test_a_retry_counts_from_its_checkpoint(clock):
    progress, _ = make([planned("rand", 1)])
    report(progress, "digits-rand-seed1", 4)
    report(progress, "digits-rand-seed1", 5)
    assert "5 of 10 epochs" in progress._line()
    assert "1 running" in progress._line()


def test_a_terminal_of_80_columns(clock):
    strategies = ("shuffle_by_seed", "rand", "nlo", "rnlo", "nlm", "sio", "rsio", "sim")
    trials = [
        planned(strategy, seed, dataset="cifar10") for strategy in strategies for seed in range(50)
    ]
    progress, file = make(trials, terminal=True)
    with progress:
        for trial in trials[:100]:
            progress.on_trial_start(0, [], tune_trial(trial.label))
            report(progress, trial.label, 3)
        clock.now += 3600
        file.truncate(file.seek(0))
        progress._live.refresh()
        frame = ANSI.sub("", file.getvalue())
    lines = frame.splitlines()
    assert len(lines) <= 5
    assert max(map(len, lines)) <= 80
    text = " ".join(frame.split())
    assert "300 of 4,000 epochs 1 h 00 about 12 h 20 left" in text  # 3,700 epochs at 300 an hour
    assert "400 trials: 0 done, 100 running, 300 waiting" in text
    assert "running: cifar10-shuffle_by_seed-seed0 3/10, " in text
    assert text.endswith("and 96 more")


def raised(error):
    """Return the error as Ray raises it from a worker."""
    return RayTaskError("step", "Traceback ...\n" + str(error), error)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            raised(OSError(28, "no space [left] on [/dev/vda]")),
            "OSError: [Errno 28] no space [left] on [/dev/vda]",
        ),
        (raised(ValueError("much\nto say\n")), "ValueError: to say"),
        (raised(KeyError()), "KeyError: no message"),
        (
            raised(StoreError("a bucket", "none", "s3://b", "make it")),
            "expected a bucket, got none",
        ),
        (ActorDiedError(), "its process or its machine died"),
        (None, "its process did not start"),
    ],
)
@pytest.mark.parametrize("given_up", [True, False])
def test_a_failure_is_one_line_with_its_reason_and_outcome(
    clock, tmp_path, error, reason, given_up
):
    progress, file = make([planned("rand", 1)], given_up={"digits-rand-seed1"} if given_up else ())
    error_file = None
    if error is not None:
        error_file = str(tmp_path / "error.pkl")
        Path(error_file).write_bytes(cloudpickle.dumps(error))
    progress.on_trial_error(0, [], tune_trial("digits-rand-seed1", error_file))
    fate = "failed" if given_up else "is tried again"
    assert file.getvalue() == f"digits-rand-seed1 {fate}: {reason}\n"
    assert ("1 failed" if given_up else "1 waiting") in progress._line()


def test_a_superseded_trial_counts_as_waiting(clock):
    progress, _ = make([planned("rand", 1)])
    result = {"epoch": 4, "done": True, "superseded": True}
    progress.on_trial_result(0, [], tune_trial("digits-rand-seed1"), result)
    assert "0 done, 1 waiting; 4 of 10 epochs" in progress._line()


def test_that_another_driver_is_at_work_is_said_once(clock):
    progress, file = make([planned("rand", seed) for seed in (1, 2)])
    for seed in (1, 2):
        result = {"epoch": 0, "done": True, "superseded": True}
        progress.on_trial_result(0, [], tune_trial(f"digits-rand-seed{seed}"), result)
    assert file.getvalue() == (
        "Another run of this study performs digits-rand-seed1. This one goes on with others, and "
        "waits for what is left.\n"
    )


def test_a_trial_that_another_driver_commits_is_done(clock):
    committed = {}
    progress, file = make([planned("rand", seed) for seed in (1, 2, 3)], committed=committed)
    progress.on_step_end(0, [])
    assert "0 done, 3 waiting; 0 of 30 epochs" in progress._line()
    committed.update({"digits-rand-seed1": "done", "digits-rand-seed2": "diverged"})
    progress.on_step_end(1, [])
    assert "1 done, 1 waiting, 1 diverged; 20 of 30 epochs" in progress._line()
    assert file.getvalue() == ""
    clock.now += LINE_EVERY + 1
    progress.on_step_end(2, [])  # also while this driver only waits
    assert "1 done, 1 waiting, 1 diverged" in file.getvalue()


def test_tune_may_pickle_it(clock):
    progress, _ = make([planned("rand", 1)])
    again = pickle.loads(pickle.dumps(progress))
    assert again._counts() == progress._counts()


def test_format_clock_rounds_to_the_next_unit():
    assert format_clock(59.6) == "1:00"
    assert format_clock(3599) == "59:59"
    assert format_clock(86_400 + 60) == "24 h 01"
