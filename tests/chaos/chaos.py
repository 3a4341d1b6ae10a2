"""Kill a study again and again, and compare its arrays with those of an undisturbed study.

python tests/chaos/chaos.py --deaths 20 --seed 1

A schedule drawn from the seed states after how many epochs a process dies, and which: the driver, a
trial's worker, the raylet or the whole head (`kill -9`, by process id), or that Ctrl-C is pressed.
If the driver is dead, the store is damaged as well: a torn checkpoint, a truncated manifest, a
deleted or changed chunk. The same command is then run again until the study is done. Two scenes
follow: a disk that is full and then enlarged, and a store that is read-only for a while (both need
root, for a tmpfs).

Required: every array of every trial is bit-identical with the undisturbed study, and at most one
epoch is trained again for each death and running trial.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import sampimp
from sampimp.store.location import Folder
from sampimp.store.plan import read_commits
from sampimp.store.plan_files import require_plan
from sampimp.sweeps.verification import verify_study, withdraw_damaged

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from processes import TRAIN, Driver, command_of, kill

TRIALS, EPOCHS = 10, 24
STUDY = (
    *("--preset", "digits", "--hidden", "64", "64", "--epochs", str(EPOCHS), "--batch-size", "25"),
    *("--influence", "--subsets"),  # none
    *("--strategies", "shuffle", "rand", "nlo", "sim", "--reference-seeds", "1"),
    *("--seeds", "1", "2", "3"),
)
"""The reference run, three trials that wait for no other, and six that sort by it."""

KINDS = ("driver", "worker", "raylet", "head", "Ctrl-C")
HURTS = ("torn checkpoint", "truncated manifest", "deleted chunk", "changed chunk")
QUIET = Console(quiet=True)


@dataclass
class Tally:
    """What happened to a study."""

    commands: int = 0
    deaths: Counter[str] = field(default_factory=Counter)
    hurts: Counter[str] = field(default_factory=Counter)
    lost: list[int] = field(default_factory=list)
    """Epochs to be trained again, of each trial that ran at a death."""
    waits: dict[str, list[float]] = field(default_factory=dict)
    """Seconds from a death to the next checkpoint, by kind."""
    text: str = ""
    """What the last command printed."""


# The state of the store.


def trials_of(out: Path) -> list[Path]:
    """Return the folders of the trials that have begun."""
    return sorted((out / "trials").glob("*-seed*"))


def is_committed(trial: Path) -> bool:
    """Return whether a trial is committed."""
    return (trial / "COMMIT.json").exists()


def checkpoints_of(trial: Path) -> list[tuple[int, Path]]:
    """Return epoch and folder of a trial's checkpoints that have a manifest, oldest first."""
    folders = sorted(manifest.parent for manifest in trial.glob("checkpoints/*/MANIFEST.json"))
    return [(int(folder.name.split("-")[1]), folder) for folder in folders]


def progress(out: Path) -> int:
    """Return how many epochs of the study are checkpointed or committed."""
    return sum(
        EPOCHS if is_committed(trial) else max([0, *(epoch for epoch, _ in checkpoints_of(trial))])
        for trial in trials_of(out)
    )


def lost_epochs(out: Path) -> list[int]:
    """Return the number of epochs that each running trial has written and not checkpointed."""
    lost = []
    for trial in trials_of(out):
        attempts = len(list(trial.glob("attempts/*.json")))
        record = trial / ("record.zarr" if attempts == 1 else f"record-{attempts}.zarr")
        if not is_committed(trial) and record.exists():
            newest = max([0, *(epoch for epoch, _ in checkpoints_of(trial))])
            chunks = [*record.glob("importance/c/*"), *record.glob("batch/c/*")]
            epochs = {1 + int(chunk.name) for chunk in chunks}
            lost.append(sum(epoch > newest for epoch in epochs))
    return lost


# Deaths and damage.


def victims(driver: Driver, kind: str) -> list[int]:
    """Return the processes to kill; none if no process of the kind runs now."""
    if kind in ("driver", "Ctrl-C"):
        return [driver.process.pid]
    commands = {pid: command_of(pid) for pid in driver.family.alive()}
    workers = [pid for pid, command in commands.items() if command.startswith("ray::Trial")]
    raylets = [pid for pid, command in commands.items() if "/raylet/raylet " in command]
    servers = [pid for pid, command in commands.items() if "/gcs/gcs_server " in command]
    if not workers:
        return []
    return {"worker": workers[:1], "raylet": raylets, "head": raylets + servers}[kind]


def interrupt(driver: Driver) -> None:
    """Press Ctrl-C, and assert that the command ends at once, without a traceback."""
    driver.interrupt()
    code, text = driver.communicate()
    assert code in (0, 130), text  # it may be done by then
    assert "Traceback" not in text, text
    assert code == 0 or text.splitlines()[-1] == (
        "Interrupted. Committed trials are kept; the same command continues."
    ), text


def hurt(out: Path, kind: str, chance: random.Random) -> bool:
    """Damage the store as a dying machine does; return whether there was a file to damage."""
    under_way = [trial for trial in trials_of(out) if not is_committed(trial)]
    if kind in ("torn checkpoint", "truncated manifest"):
        newest = [checkpoints_of(trial)[-1][1] for trial in under_way if checkpoints_of(trial)]
        name = "state.pt" if kind == "torn checkpoint" else "MANIFEST.json"
        files = [folder / name for folder in newest]
    else:
        trials = under_way if kind == "deleted chunk" else filter(is_committed, trials_of(out))
        files = [
            file
            for trial in trials
            for name in ("importance", "nll", "batch", "parameters")
            for file in sorted(trial.glob(f"record*.zarr/{name}/c/**/*"))
            if file.is_file()
        ]
    if not files:
        return False
    file = chance.choice(files)
    content = bytearray(file.read_bytes())
    if kind == "deleted chunk":
        file.unlink()
    elif kind == "changed chunk":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
    else:
        file.write_bytes(content[: len(content) // 2])
    return True


def recovers(driver: Driver, out: Path, begun: int, before: int) -> bool:
    """Wait until a new attempt has written an epoch; return False if the driver ends first."""
    while driver.process.poll() is None:
        if sum(attempts(out).values()) > begun and progress(out) > before:
            return True
        time.sleep(0.01)
    return False


def run_with_faults(out: Path, deaths: int, seed: int, say: Console) -> Tally:
    """Run a study with deaths and damage at random times until it is done."""
    chance, tally = random.Random(seed), Tally()
    moments = sorted(chance.uniform(0.01, 0.97) * TRIALS * EPOCHS for _ in range(deaths))
    kinds = [KINDS[number % len(KINDS)] for number in range(deaths)]
    hurts = [HURTS[number % len(HURTS)] for number in range(deaths)]
    chance.shuffle(kinds)
    chance.shuffle(hurts)
    driver = start(out, tally)
    try:
        for moment, kind in zip(moments, kinds, strict=True):
            while progress(out) < moment or not (dying := victims(driver, kind)):
                if driver.process.poll() is not None:  # given up, or done before its time
                    driver.close(0)
                    if take_out_damage(out) == 0 and progress(out) == TRIALS * EPOCHS:
                        finish(out, tally)
                        return tally
                    driver = start(out, tally)
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.2))  # at any time of an epoch
            if driver.process.poll() is not None:  # the study is done
                continue
            if kind == "Ctrl-C":
                interrupt(driver)
            else:
                for pid in dying:
                    kill(pid)
            died, before, begun = time.monotonic(), progress(out), sum(attempts(out).values())
            tally.deaths[kind] += 1
            what = "Ctrl-C pressed" if kind == "Ctrl-C" else f"{kind} killed"
            say.print(f"{before:>4} of {TRIALS * EPOCHS} epochs: {what}", highlight=False)
            if kind != "worker":  # the driver of a head or a raylet that is gone goes as well
                driver.family.alive()
                driver.close(0)
            tally.lost += lost_epochs(out)
            if kind != "worker":
                if hurts and hurt(out, hurts[-1], chance):
                    say.print(f"     and a {hurts[-1]}")
                    tally.hurts[hurts.pop()] += 1
                before = progress(out)
                driver = start(out, tally)
            if recovers(driver, out, begun, before):
                tally.waits.setdefault(kind, []).append(time.monotonic() - died)
        tally.text = driver.communicate()[1]
    finally:
        driver.close()
    finish(out, tally)
    return tally


def leave_alone(out: Path) -> None:
    """Run an undisturbed study."""
    tally = Tally()
    driver = start(out, tally)
    try:
        code, tally.text = driver.communicate()
    finally:
        driver.close()
    assert code == 0, tally.text


def start(out: Path, tally: Tally) -> Driver:
    """Run the command again."""
    tally.commands += 1
    return Driver(out, STUDY, door=TRAIN)


def finish(out: Path, tally: Tally) -> None:
    """Withdraw damaged trials and run the command, until all trials are committed and intact."""
    for _ in range(4):  # arbitrary: once is enough, unless a damaged chunk is found while it runs
        if take_out_damage(out) == 0 and len(read_commits(Folder.of(out))) == TRIALS:
            return
        driver = start(out, tally)
        try:
            tally.text = driver.communicate()[1]
        finally:
            driver.close()
    raise AssertionError(f"the study does not come to an end:\n{tally.text}")


def take_out_damage(out: Path) -> int:
    """Withdraw the trials that are damaged, as `status.py OUT --withdraw` does; return how many."""
    folder = Folder.of(out)
    plan = require_plan(folder)
    findings = verify_study(folder, plan, QUIET)
    withdraw_damaged(folder, findings, QUIET)
    return len(findings.of("trial"))


# Comparison.


def differing_bytes(out: Path, expected: Path) -> int:
    """Return how many bytes of the two studies' arrays differ; raise where a trial is missing."""
    assert set(read_commits(Folder.of(out))) == set(read_commits(Folder.of(expected)))
    cube, wanted = (sampimp.open_cube(folder)["digits"].to_dataset() for folder in (out, expected))
    differing = 0
    for name in ("importance", "nll", "batch", "parameters", "train_nll", "test_error"):
        got, want = cube[name].values, wanted[name].values
        assert not np.isnan(want).all()
        assert got.shape == want.shape
        differing += int((got.view(np.uint8) != want.view(np.uint8)).sum())
    return differing


# The scenes.


@contextlib.contextmanager
def small_disk(where: Path) -> Iterator[None]:
    """Mount a disk of 100 MB."""
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(where)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


def remount(disk: Path, option: str) -> None:
    """Remount with an option; a file that is open for writing delays it for a moment."""
    for _ in range(2000):
        command = ["mount", "-o", f"remount,{option}", str(disk)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        time.sleep(0.005)
    raise AssertionError(done.stderr)


def meet_a_disk(folder: Path, expected: Path, spoil: Callable, mend: Callable, word: str) -> str:
    """Spoil the disk of a running study, repair it once the command has ended, and finish."""
    disk, tally = folder / "disk", Tally()
    with small_disk(disk):
        out = disk / "study"
        driver = start(out, tally)
        try:
            driver.wait_until(lambda: progress(out) >= 20)
            spoil(disk)
            code, text = driver.communicate()
        finally:
            driver.close()
            mend(disk)
        assert code != 0, text
        assert word in text, text
        assert "Traceback" not in text, text
        finish(out, tally)
        differing = differing_bytes(out, expected)
        assert differing == 0
    disk.rmdir()
    return f"exit code {code} and a message, then done: {differing} differing bytes"


def fill(disk: Path) -> None:
    """Write until nothing more fits."""
    with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def a_full_disk(folder: Path, expected: Path) -> str:
    """Fill the disk, and enlarge it later."""
    enlarge = "size=200m"
    return meet_a_disk(
        folder, expected, fill, lambda disk: remount(disk, enlarge), "No space left on device"
    )


def a_read_only_store(folder: Path, expected: Path) -> str:
    """Make the disk read-only for a while."""
    return meet_a_disk(
        folder,
        expected,
        lambda disk: remount(disk, "ro"),
        lambda disk: remount(disk, "rw"),
        "Read-only file system",
    )


def attempts(out: Path) -> dict[str, int]:
    """Return the number of attempts at each trial."""
    return {trial.name: len(list(trial.glob("attempts/*.json"))) for trial in trials_of(out)}


SCENES: dict[str, tuple[Callable[[Path, Path], str], bool]] = {
    "disk full, then enlarged": (a_full_disk, True),
    "store read-only for a while": (a_read_only_store, True),
}
"""Each scene, and whether it requires root."""


def main(deaths: int = 20, seed: int = 1, scenes: bool = True) -> int:
    """Disturb a study, and compare it with an undisturbed one.

    Parameters
    ----------
    deaths
        Number of processes killed or interrupted.
    seed
        Seed of the schedule.
    scenes
        Also meet a full disk and a read-only store.
    """
    console = Console()
    # Drivers inherit it: a process started in the background of a shell ignores Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="sampimp-chaos-") as name:
        folder = Path(name)
        begun = time.monotonic()
        leave_alone(folder / "alone")
        alone = time.monotonic() - begun
        tally = run_with_faults(folder / "study", deaths, seed, console)
        differing = differing_bytes(folder / "study", folder / "alone")
        table = Table("fault", "times", "median s until it went on")
        for kind in KINDS:
            waits = sorted(tally.waits.get(kind, [0.0]))
            table.add_row(
                kind if kind == "Ctrl-C" else f"kill -9: {kind}",
                str(tally.deaths[kind]),
                f"{waits[len(waits) // 2]:.1f}",
            )
        for kind in HURTS:
            table.add_row(kind, str(tally.hurts[kind]), "")
        console.print(table)
        console.print(
            f"{sum(tally.deaths.values())} deaths, {tally.commands} commands; "
            f"{differing} differing bytes; of {len(tally.lost)} running trials, "
            f"{sum(tally.lost)} lost an epoch and {sum(n > 1 for n in tally.lost)} more than one; "
            f"{time.monotonic() - begun - alone:.0f} s, {alone:.0f} s undisturbed",
            highlight=False,
        )
        ok = differing == 0 and max(tally.lost, default=0) <= 1
        for words, (scene, needs_root) in SCENES.items() if scenes else ():
            if needs_root and os.geteuid() != 0:
                console.print(f"[bold]{words}: SKIPPED, a tmpfs can be mounted by root only[/]")
                continue
            console.print(f"{words}: {scene(folder, folder / 'alone')}", highlight=False)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
