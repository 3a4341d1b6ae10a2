"""How fast a study opens and reads: 300 trials, and the trials' records against one sharded store.

`open`: a study of 300 trials as their COMMIT.json files are after 50 epochs of MNIST (digests of
importance, NLL, batch and 51 states of the parameters, four curves), opened again and again. The
records themselves are not there: to open, none is read.

`read`: a study of about 200 MB of random values, written as trials write it and consolidated; then
four ways to read it, from the records and from the consolidated store in turn, each in a cube that
was opened afresh. Files are in the page cache: on a disk or a bucket, the number of objects (here
1,700 against 67) weighs more.

    python benchmarks/reading.py [--rounds 7] [--trials 8] [--samples 20000] [--epochs 50]

Measured (2 shared cores at load 10, zarr 3.1.6, dask 2026.8; medians of 7): 300 trials open in 0.44
s (0.62 the first time). 215 MB are consolidated and compared in 20 s. From the records and from the
consolidated store: to open 8 trials 0.03 and 0.07 s; one sample of all 2.3 and 0.05 s, 55 times as
fast; one epoch of one trial 0.014 and 0.073 s, 7 times as slow; the sum of all 2.6 and 0.84 s, 2.8
times as fast.
"""

import argparse
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xarray as xr

from sampimp.config import TrainingConfig
from sampimp.data import Source
from sampimp.schema import CURVES, REFERENCES, STRATEGIES, EpochRecord
from sampimp.store.cube import open_cube
from sampimp.store.location import Folder
from sampimp.store.plan import DatasetInfo, Plan, PlannedTrial, read_commits
from sampimp.store.record import TrialRecord, write_source
from sampimp.store.sharded import consolidate

LAYERS = ("L1", "L2", "L3", "Out")


def make_plan(source: Source, grid: dict[str, tuple[int, ...]], epochs: int, size: int) -> Plan:
    """Return a plan over one data set, with `size` parameters in each layer."""
    info = DatasetInfo(
        name=source.name,
        digest=source.digest,
        sample_count=len(source.train_labels),
        test_count=len(source.test_labels),
        input_shape=source.train_values.shape[1:],
        class_names=source.class_names,
        layers=tuple((name, size) for name in LAYERS),
    )
    return Plan(datasets={"made": info}, training=TrainingConfig(epochs=epochs), grid=grid)


def start_study(out: Path, plan: Plan, source: Source) -> Folder:
    """Write the plan and its data set."""
    folder = Folder.of(out)
    folder.write_json("study.json", plan.to_json())
    write_source(folder / "datasets" / "made.zarr", source)
    return folder


def make_source(samples: int) -> Source:
    """Return random images of 28 x 28."""
    generator = np.random.default_rng(0)

    def part(count: int) -> tuple[np.ndarray, np.ndarray]:
        values = generator.integers(0, 256, (count, 1, 28, 28), dtype=np.uint8)
        return values, np.arange(count, dtype=np.int64) % 10

    (train_values, train_labels), (test_values, test_labels) = part(samples), part(100)
    return Source(
        name="made",
        train_values=train_values,
        train_labels=train_labels,
        test_values=test_values,
        test_labels=test_labels,
        full_scale=255.0,
        class_names=tuple(map(str, range(10))),
    )


def identity(trial: PlannedTrial) -> dict[str, object]:
    """Return what a record says of itself."""
    config = trial.config
    return {
        "dataset": config.dataset,
        "strategy": config.strategy,
        "seed": config.seed,
        "fingerprint": trial.fingerprint,
    }


def commit_300(out: Path) -> None:
    """Write a study of 300 trials without their records: 7 x 40 strategies, 2 x 10 references."""
    seeds, epochs, generator = tuple(range(1, 41)), 50, np.random.default_rng(0)
    grid = dict.fromkeys(STRATEGIES, seeds) | dict.fromkeys(REFERENCES, seeds[:10])
    source = make_source(50_000)
    plan = make_plan(source, grid, epochs, 670_000 // 4)
    folder = start_study(out, plan, source)
    counts = {"importance": epochs, "nll": epochs, "batch": epochs, "parameters": epochs + 1}
    for _ in range(2):  # the reference, then those that sort by it
        for trial in plan.resolve(read_commits(folder)):
            if trial.trial_id is None or trial.commit is not None:
                continue
            commit = {
                **identity(trial),
                "attempt": 1,
                "epochs": epochs,
                "diverged_epoch": None,
                "parts": [[0, "record.zarr"]],
                "digests": {
                    name: [[secrets.token_hex(32)] for _ in range(count)]
                    for name, count in counts.items()
                },
                "curves": {name: generator.random(epochs).tolist() for name in CURVES},
                "seconds": generator.random(epochs).tolist(),
            }
            (folder / "trials" / trial.trial_id).write_json("COMMIT.json", commit)


def train_random(out: Path, trials: int, samples: int, epochs: int) -> None:
    """Write a study of random values: `trials` seeds, half of them of `shuffle`, half of `rand`."""
    seeds = tuple(range(1, trials // 2 + 1))
    source = make_source(samples)
    plan = make_plan(source, {"shuffle": seeds, "rand": seeds}, epochs, 1_000)
    folder = start_study(out, plan, source)
    layout = plan.layout("made")
    for number, trial in enumerate(plan.resolve({})):
        generator = np.random.default_rng(number)
        # Importance spans decades and its low bits are noise, as they are in a real study.
        spread = generator.lognormal(0, 3, samples).astype(np.float32)
        record = TrialRecord(folder / f"trials/{trial.trial_id}", identity(trial), layout)

        def draw(*shape: int, generator: np.random.Generator = generator) -> np.ndarray:
            return generator.random(shape, dtype=np.float32)

        record.write(EpochRecord(epoch=0, arrays={"parameters": draw(layout.parameter)}))
        for epoch in range(1, epochs + 1):
            arrays = {
                "importance": draw(len(LAYERS), samples) * spread,
                "nll": draw(samples) * spread,
                "batch": np.floor(draw(samples) * samples / 100),
                "parameters": draw(layout.parameter),
                **{name: np.asarray(generator.random()) for name in CURVES},
            }
            record.write(EpochRecord(epoch=epoch, arrays=arrays))
        record.commit(None)


READS: dict[str, Callable[[xr.Dataset], object]] = {
    "open": lambda cube: cube,
    "one sample: importance of all strategies, seeds, epochs, layers": lambda cube: (
        cube["importance"].isel(sample=1234).values
    ),
    "one epoch of one trial: importance of all layers, samples": lambda cube: (
        cube["importance"].isel(strategy=1, seed=1, epoch=20).values
    ),
    "all: importance summed over all epochs, layers": lambda cube: (
        cube["importance"].sum(["epoch", "layer"]).values
    ),
}


def seconds(call: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(times: list[float]) -> str:
    """Return the median and the middle half, in seconds.

    Examples
    --------
    >>> spread([3.0, 1.0, 2.0])
    '2.000 (1.500 to 2.500)'
    """
    low, middle, high = np.quantile(times, [0.25, 0.5, 0.75])
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main(arguments: list[str]) -> int:
    """Make the studies in a temporary folder, measure, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--scratch", help="where the temporary folder is made")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=asked.scratch) as scratch:
        many, few = Path(scratch, "300"), Path(scratch, "few")
        commit_300(many)
        times = [seconds(lambda: open_cube(many)) for _ in range(asked.rounds + 1)]
        print(f"open 300 trials: first {times[0]:.3f} s, then {spread(times[1:])} s", flush=True)
        made = seconds(lambda: train_random(few, asked.trials, asked.samples, asked.epochs))
        written = seconds(lambda: consolidate(few))
        whole = open_cube(few)["made"].to_dataset()
        print(
            f"{whole.nbytes / 1e6:.0f} MB in {asked.trials} trials: written in {made:.1f} s, "
            f"consolidated and compared in {written:.1f} s",
            flush=True,
        )
        sources: dict[str, Callable[[], xr.Dataset]] = {
            "records": lambda: open_cube(few)["made"].to_dataset(),
            "consolidated": lambda: xr.open_zarr(few / "consolidated" / "made.zarr"),
        }
        for words, read in READS.items():
            found: dict[str, list[float]] = {name: [] for name in sources}
            for _ in range(asked.rounds):
                for name, opened in sources.items():
                    cube = None if words == "open" else opened()
                    call = opened if cube is None else lambda read=read, cube=cube: read(cube)
                    found[name].append(seconds(call))
            ratio = statistics.median(
                a / b for a, b in zip(found["records"], found["consolidated"], strict=True)
            )
            print(f"{words}: " + ", ".join(f"{name} {spread(t)} s" for name, t in found.items()))
            print(f"    records / consolidated: {ratio:.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
