"""Cut the power of a recorded study after one of its operations, and continue what is left.

Map: `Recording`, `record_study`, `is_cut`, `check_cut`.
"""

import random
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from simulated_disk import Operation, SimulatedDisk, recorded
from study_here import command, make_config, values_of

import sampimp
from sampimp.errors import DamageWarning
from sampimp.store import record
from sampimp.store.location import Folder
from sampimp.store.plan import read_commits
from sampimp.store.plan_files import read_plan
from sampimp.sweeps.inspection import inspect


class Recording(NamedTuple):
    """An undisturbed study."""

    disk: Path
    """Its disk; the study is in the folder `study`."""
    operations: list[Operation]
    values: dict[str, Any]
    is_durable: bool
    """Whether every epoch was made durable; else only the commits were."""


def record_study(disk: Path, is_durable: bool) -> Recording:
    """Run a study, and record its operations, and after which of them something was reported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "SYNC_EVERY", 0.0 if is_durable else 1e9)
        with recorded(patch) as log:
            command(
                make_config(disk / "study", epochs=2),
                lambda label, step: log.mark(("epoch", label, step)),
                lambda label: log.mark(("commit", label)),
            )
    return Recording(disk, log.operations, values_of(disk / "study"), is_durable)


def is_cut(operations: list[Operation], number: int) -> bool:
    """Return whether an operation publishes a file, is the last sync of one, or a report."""
    before, kind, after = (operations[number + step].kind for step in (-1, 0, 1))
    if kind == "fsync":
        return after != "fsync"
    is_published = before == "fsync" and kind in ("replace", "link")
    return is_published or kind in ("syncfs", "mark")


def check_cut(recording: Recording, cut: int, place: Path, seed: int) -> None:
    """Cut the power after an operation, continue the study, and compare it with the undisturbed.

    Parameters
    ----------
    recording
        The undisturbed study.
    cut
        Index of the operation.
    place
        Folder for what the disk may have left.
    seed
        Seed of what is left.
    """
    simulated, done, committed = SimulatedDisk(recording.disk), {}, set()
    for operation in recording.operations[: cut + 1]:
        if operation.kind == "mark":
            kind, label, *step = operation.other
            done[label] = max(done.get(label, 0), *step, 0)
            committed |= {label} if kind == "commit" else set()
        else:
            simulated.apply(operation)
    simulated.survivors(place, random.Random(seed))
    folder = Folder.of(place / "study")
    begun: dict[str, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamageWarning)
        plan = read_plan(folder)
        if plan is not None:
            statuses = {status.trial.label: status for status in inspect(folder, plan)}
            assert {label for label, s in statuses.items() if s.state == "done"} >= committed
            sampimp.open_cube(folder)
        command(make_config(place / "study", epochs=2), lambda *step: begun.setdefault(*step))
    assert not committed & set(begun)
    if recording.is_durable:  # at most the epoch that was not done is trained again
        for label, first in begun.items():
            assert first > done.get(label, 0)
    assert values_of(place / "study") == recording.values
    with warnings.catch_warnings():
        warnings.simplefilter("error", DamageWarning)
        assert len(read_commits(folder)) == len(recording.values)
