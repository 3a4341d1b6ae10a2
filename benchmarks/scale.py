"""Time and memory of a study of many trials: its plan, `open_cube`, and `sampimp status` on S3.

The study is all commits, of 50 epochs in one chunk each, and no records: none of the three reads
one. S3 is the server of the tests, in a process of its own, with a latency that is added to every
answer; so the time is this package's, plus that of waiting.

    python benchmarks/scale.py [--trials 10000] [--epochs 50] [--latency 0.01]

Map: `make_study`, `serve`, `measure`, `main`.
"""

import argparse
import multiprocessing
import os
import resource
import secrets
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from memory_bucket import MemoryBucket
from reading import identity, make_plan, make_source, start_study

from sampimp.schema import CURVES, REFERENCES, STRATEGIES
from sampimp.store.cube import open_cube
from sampimp.store.location import Folder
from sampimp.store.plan import Plan, read_commits
from sampimp.store.plan_files import require_plan
from sampimp.store.seals import json_bytes, seal
from sampimp.sweeps.status import show_status

SMALL = 300
"""Trials of the study that is opened as a cube, the size of the paper's."""


def make_study(out: Path, trials: int, epochs: int) -> Folder:
    """Write a study of so many trials, or a few more, all of them committed."""
    strategies = (*STRATEGIES, *REFERENCES)
    seeds = tuple(range(1, -(-trials // len(strategies)) + 1))
    source = make_source(1_000)
    plan = make_plan(source, dict.fromkeys(strategies, seeds), epochs, 100)
    folder = start_study(out, plan, source)
    counts = {"importance": epochs, "nll": epochs, "batch": epochs, "parameters": epochs + 1}
    history = {
        "attempt": 1,
        "epochs": epochs,
        "diverged_epoch": None,
        "parts": [[0, "record.zarr"]],
        "digests": {
            name: [[secrets.token_hex(32)] for _ in range(count)] for name, count in counts.items()
        },
        "curves": {name: [0.123456789 + epoch for epoch in range(epochs)] for name in CURVES},
        "seconds": [1.23456789] * epochs,
        "files": {
            f"record.zarr/{name}/c/{epoch}/0/0": secrets.token_hex(32)
            for name, count in counts.items()
            for epoch in range(count)
        },
    }
    for _ in range(2):  # the reference, then those that sort by it
        for trial in plan.resolve(read_commits(folder)):
            if trial.trial_id is None or trial.commit is not None:
                continue
            place = out / "trials" / trial.trial_id
            (place / "attempts").mkdir(parents=True)
            (place / "attempts" / "0001.json").write_bytes(
                json_bytes({"host": "here", "pid": 1, "time": 1.0, "token": "0", "seals": True})
            )
            (place / "COMMIT.json").write_bytes(seal({**identity(trial), **history}))
    return folder


def serve(out: Path, latency: float, pipe: Connection) -> None:
    """Serve a study as s3://studies/many; tell the endpoint, then the number of requests."""
    bucket = MemoryBucket()
    bucket.latency = latency
    for path in out.rglob("*"):
        if path.is_file():
            bucket.objects[f"studies/many/{path.relative_to(out)}"] = path.read_bytes()
    pipe.send(bucket.endpoint)
    while pipe.recv():
        pipe.send(len(bucket.requests))


def measure(words: str, call: Callable[[], object]) -> None:
    """Print the duration of a call, and the most memory that this process has had."""
    start, used = time.perf_counter(), time.process_time()
    call()
    wall, cpu = time.perf_counter() - start, time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{words}: {wall:.2f} s ({cpu:.2f} s of CPU), peak {peak:.2f} GB", flush=True)


def main(arguments: list[str]) -> int:
    """Make the studies in a temporary folder, measure, and print the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--latency", type=float, default=0.01)
    parser.add_argument("--scratch", help="parent of the temporary folder")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        few, many = Path(scratch, "few"), Path(scratch, "many")
        folder = make_study(many, options.trials, options.epochs)
        make_study(few, min(SMALL, options.trials), options.epochs)
        measure(f"open {SMALL} trials", lambda: open_cube(few))
        plan = require_plan(folder)
        count = len(plan.trials())
        measure(f"plan of {count} trials, none committed", lambda: _plan_again(plan))
        measure(f"status of {count} trials on a disk", lambda: show_status(str(many)))
        pipe, other = multiprocessing.Pipe()
        server = multiprocessing.get_context("spawn").Process(
            target=serve, args=(many, options.latency, other), daemon=True
        )
        server.start()
        os.environ |= {
            "AWS_ENDPOINT_URL": pipe.recv(),
            "AWS_ACCESS_KEY_ID": "KEY",
            "AWS_SECRET_ACCESS_KEY": "secret-of-the-benchmark",
            "AWS_REGION": "us-east-1",
        }
        words = f"status of {count} trials on S3, {1000 * options.latency:.0f} ms an answer"
        measure(words, lambda: show_status("s3://studies/many"))
        pipe.send(True)
        print(f"  in {pipe.recv()} requests")
        measure(
            f"plan of {count} trials, all committed", lambda: plan.resolve(read_commits(folder))
        )
        pipe.send(False)
        server.join()
    return 0


def _plan_again(plan: Plan) -> Any:
    """Do with a plan what a driver does before it trains anything."""
    return Plan.from_json(plan.to_json()).resolve({})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
