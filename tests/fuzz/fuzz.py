"""Mutate a small study and data sets, one file at a time, and read them: only named errors.

    python tests/fuzz/fuzz.py --cases 10000         what `make fuzz` runs
    python tests/fuzz/fuzz.py --first 4711 --cases 1    one case again

Every case copies the study, changes one file by the case's number, and reads what was changed: the
cube with all its values, `status --verify`, the checkpoints as a worker does, the data sets as a
study does. Sealed files are sealed again, and digests of states are made to fit, so that the checks
behind them are reached. An error that is no `UserError`, more than `MEMORY` or more than `PATIENCE`
is a failure. A case is printed with its number.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path

import influence_made
import numpy as np
import oracles
from PIL import Image
from rich.console import Console

import sampimp
from sampimp.data import load_source
from sampimp.errors import UserError
from sampimp.store.location import Folder
from sampimp.store.plan import read_commits
from sampimp.store.plan_files import require_plan
from sampimp.store.record import TrialRecord
from sampimp.store.seals import is_sealed, seal
from sampimp.store.snapshots import write_snapshot
from sampimp.store.zarr_arrays import open_array
from sampimp.sweeps import status
from sampimp.sweeps.work import training_units
from sampimp.training.checkpoint_states import UnusableCheckpointError
from sampimp.training.loop import TrainingRun
from sampimp.training.strategies import make_schedule

MEMORY = 2**30
"""Bytes that the readers may allocate beyond those of a process that has read the study once."""

PATIENCE = 60
"""Seconds that one case may take; undisturbed it takes less than one (a loaded machine: ten)."""

MEMORY_DISK = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Folder of the copies, in memory where there is one: a case copies and deletes 400 files."""

VALUES = (
    *(None, True, -1, 0, 1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", "../../outside", "/etc/passwd", "\x00", "\x1b[31m", "\N{GRINNING FACE}" * 9),
    *("<script>alert(1)</script>", "record-2.zarr", "float64", "9" * 5000, "__import__('os')"),
    *([], {}, [[]], [None], [0] * 1000, {"": ""}, {"name": "gzip"}, [[0, "record.zarr"]] * 3),
)


def make_study(out):
    """Make a study of every kind of file, and two data sets beside it."""
    sources = {"one": oracles.make_source(shape=(1, 4, 4))}
    grid = {"shuffle": (1, 2), "rand": (1,), "sio": (1,)}
    plan = oracles.make_plan(sources, grid, epochs=3, optimizer="momentum")
    folder = oracles.start_study(out / "study", plan, sources)
    oracles.run_trials(
        folder, plan, sources, commit=lambda trial: trial.label != "one-shuffle-seed2"
    )
    trials = plan.resolve(read_commits(folder))
    run = next(trial for trial in trials if trial.label == "one-shuffle-seed1")
    influence_made.write_made(folder, plan, run, "influence", ["mean", "class:1"])
    influence_made.write_made(folder, plan, run, "states", [])
    more = {"jitter": 1e-3, "renormalised": False, "denominator": "batch size kept"}
    more |= {"removals": ["none", "random:3"], "repeats": 2}
    influence_made.write_made(folder, plan, run, "retrain", ["mean"], **more)
    layout = plan.layout("one")
    values = np.ones(layout.shape("importance")[1:], np.float32)
    digests = write_snapshot(folder / "trials" / run.trial_id, layout, 2, values)
    folder.write_json("snapshots.json", {run.trial_id: {"2": digests}})
    unfinished = next(trial for trial in trials if trial.commit is None)
    record = TrialRecord(
        folder / "trials" / unfinished.trial_id, oracles.identity_of(unfinished), layout
    )
    training, records = start_run(plan, unfinished, sources["one"])
    for _ in range(3):
        epoch = next(records)
        record.write(epoch)
        if epoch.step:
            record.checkpoint(epoch.step, training.state())
    record.fail(RuntimeError("an error of the study"))
    rng = np.random.default_rng(0)
    arrays = {"train_inputs": rng.random((8, 3)), "train_labels": np.arange(8) % 2}
    np.savez(out / "a.npz", **arrays, test_inputs=rng.random((2, 3)), test_labels=np.arange(2))
    for part in ("train", "test"):
        for name in ("a", "b"):
            (out / "images" / part / name).mkdir(parents=True)
            pixels = rng.integers(0, 255, (6, 5, 3), dtype=np.uint8)
            for suffix in ("png", "gif", "tiff"):
                Image.fromarray(pixels).save(out / "images" / part / name / f"x.{suffix}")


def start_run(plan, trial, source):
    """Return the training run of a trial, and its records."""
    data = sampimp.data.scale_inputs(source, "unit")
    size = plan.training.batch_size
    schedule = make_schedule(trial.config.strategy, len(data.train_labels), size, 0, None)
    run = TrainingRun(trial.config, data, schedule)
    return run, run.records()


# Mutations.
def places(value, path=()):
    """Return the path of every value in a JSON file."""
    found = [path]
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            found += places(item, (*path, key))
    return found


def change_json(content, draw):
    """Return a JSON file with one value replaced, removed, repeated or nested; sealed as before."""
    value = json.loads(content)
    path = draw.choice(places(value))
    new = draw.choice(VALUES)
    how = draw.choice(("replace", "replace", "replace", "remove", "repeat", "nest"))
    if how == "nest":
        depth = draw.choice((5, 40, 100_000))
        return b"[" * depth + content + b"]" * depth
    if not path:
        value = new
    else:
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        if how == "remove":
            del holder[path[-1]]
        elif how == "repeat" and isinstance(holder, list):
            holder += holder[: 10 ** draw.randint(0, 3)]
        else:
            holder[path[-1]] = new
    if is_sealed(content) and isinstance(value, dict) and draw.random() < 0.8:
        value.pop("seal", None)
        return seal(value)
    return json.dumps(value).encode()


def change_bytes(content, draw):
    """Return a file with bytes flipped, cut, added or replaced."""
    data = bytearray(content)
    how = draw.choice(("flip", "flip", "number", "cut", "empty", "zeros", "more", "noise"))
    if how == "flip":
        for _ in range(draw.choice((1, 1, 4, 32)) if data else 0):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif how == "number" and len(data) > 16:
        at = draw.randrange(len(data) - 8)
        data[at : at + 8] = draw.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1)).to_bytes(
            8, "little"
        )
    elif how == "cut":
        del data[draw.randrange(len(data) + 1) :]
    elif how == "more":
        data += draw.randbytes(draw.choice((1, 100, 10**5)))
    elif how == "noise":
        data = bytearray(draw.randbytes(len(data)))
    else:
        data = bytearray(len(data) if how == "zeros" else 0)
    return bytes(data)


def change_kind(path, draw, files):
    """Replace a file by what is none, or by another file of the study."""
    how = draw.choice(("pipe", "folder", "link out", "loop", "huge", "swap", "gone"))
    content = path.read_bytes()
    path.unlink()
    if how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how == "link out":
        path.symlink_to("/etc/passwd")
    elif how == "loop":
        path.symlink_to(path.name)
    elif how == "huge":
        path.write_bytes(content)
        os.truncate(path, 2**40)
    elif how == "swap":
        shutil.copy(draw.choice([file for file in files if file != path]), path)


def mutate(root, draw):
    """Change one file; return it."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    is_study = draw.random() < 0.8
    by_kind = {}
    for path in files:
        if ("study" in path.relative_to(root).parts) == is_study:
            kind = path.name if path.suffix in (".json", ".pt") else path.suffix
            by_kind.setdefault(kind, []).append(path)
    path = draw.choice(by_kind[draw.choice(sorted(by_kind))])
    content = path.read_bytes()
    if draw.random() < 0.1:
        change_kind(path, draw, files)
    elif path.suffix == ".json" and draw.random() < 0.8:
        path.write_bytes(change_json(content, draw))
    else:
        path.write_bytes(change_bytes(content, draw))
        if path.name == "state.pt" and draw.random() < 0.8:
            let_digest_fit(path)
    return path.relative_to(root)


def let_digest_fit(path):
    """Give the manifest of a checkpoint the digest of its state."""
    manifest = json.loads((path.parent / "MANIFEST.json").read_bytes())
    manifest.pop("seal")
    manifest["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (path.parent / "MANIFEST.json").write_bytes(seal(manifest))


# Readers.
def read_cube(root):
    tree = sampimp.open_cube(root / "study")
    str(tree), tree._repr_html_()
    for node in tree.subtree:
        node.to_dataset().compute()


def read_status(root):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        status.main([str(root / "study"), "--verify"])


def read_checkpoints(root):
    """Plan as a driver does, and continue each unfinished trial as a worker does."""
    folder = Folder.of(root / "study")
    plan = require_plan(folder)
    trials = plan.resolve(read_commits(folder))
    for unit, trial in zip(training_units(plan, trials), trials, strict=True):
        if unit.folder is None or unit.commit is not None:
            continue
        identity, layout = oracles.identity_of(trial), plan.layout(trial.config.dataset)
        record = TrialRecord(folder / unit.folder, identity, layout)
        while (checkpoint := record.newest_checkpoint()) is not None:
            run, _ = start_run(plan, trial, oracles.make_source(shape=(1, 4, 4)))
            try:
                run.restore(checkpoint[1], checkpoint[0])
                break
            except UnusableCheckpointError:
                record.discard_checkpoint()


def read_npz(root):
    load_source(f"npz:{root / 'a.npz'}")


def read_images(root):
    load_source(f"folder:{root / 'images'}")


def readers(path):
    if path.parts[0] == "study":
        return (read_cube, read_status, read_checkpoints)
    return (read_npz,) if path.suffix == ".npz" else (read_images,)


def give_up(number, frame):
    raise TimeoutError(f"longer than {PATIENCE} s")


def run_case(master, number, outcomes):
    """Perform a case; return the traceback of its failure, or None."""
    draw = random.Random(number)
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as place:
        root = Path(place) / "copy"
        shutil.copytree(master, root)
        path = mutate(root, draw)
        for read in readers(path):
            open_array.cache_clear()
            signal.alarm(PATIENCE)
            try:
                read(root)
                outcomes["read"] += 1
            except UserError as error:
                str(error).encode()
                outcomes[type(error).__name__] += 1
            except BaseException:
                signal.alarm(0)
                return f"case {number}: {read.__name__}, {path}\n{traceback.format_exc()}"
            finally:
                signal.alarm(0)
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, give_up)
    outcomes, failures = Counter(), 0
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as place:
        master = Path(place) / "master"
        master.mkdir()
        make_study(master)
        for read in (read_cube, read_status, read_npz, read_images):
            read(master)  # imports, threads and caches take memory once
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        for number in range(options.first, options.first + options.cases):
            failure = run_case(master, number, outcomes)
            if failure is not None:
                failures += 1
                print(failure, flush=True)
            if number % 1000 == 999:
                console.print(f"{number + 1 - options.first} cases, {failures} failures")
    print(f"{options.cases} cases, {failures} failures; {dict(outcomes.most_common())}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
