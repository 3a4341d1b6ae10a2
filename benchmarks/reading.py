"""Time to open and read a study: 300 trials; records of trials against one sharded store.

`open`: a study of 300 trials, opened repeatedly. Its COMMIT.json files are those of 50 epochs of
MNIST (digests of importance, NLL, batch and 51 states of the parameters, four curves). There are no
records, since opening a cube reads none.

`read`: a study of about 200 MB of random values, written as trials write it, and consolidated; then
four reads, alternately from the records and from the consolidated store, each from a newly opened
cube. Files are in the page cache: on a disk or in a bucket, the number of objects (here 1,700
against 67) has more weight.

    python benchmarks/reading.py [--rounds 7] [--trials 8] [--samples 20000] [--epochs 50]

Measured (2 shared cores at load 10, zarr 3.1.6, dask 2026.8; medians of 7): 300 trials open in 0.44
s (0.62 s the first time); consolidating and comparing 215 MB takes 20 s. From the records and from
the consolidated store: opening 8 trials 0.03 and 0.07 s; one sample of all trials 2.3 and 0.05 s
(55 times as fast); one epoch of one trial 0.014 and 0.073 s (7 times as slow); the sum of all
values 2.6 and 0.84 s (2.8 times as fast).
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
from sampimp.store.datasets import write_source
from sampimp.store.location import Folder
from sampimp.store.plan import DatasetInfo, Plan, PlannedTrial, read_commits
from sampimp.store.record import TrialRecord
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
    """Return the attributes that identify a trial in its record."""
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
        # As in a real study, importance spans decades and its low bits are noise.
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
    """Return the duration of a call in seconds."""
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
    """Make the studies in a temporary folder, measure, and print the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--scratch", help="parent of the temporary folder")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        many, few = Path(scratch, "300"), Path(scratch, "few")
        commit_300(many)
        times = [seconds(lambda: open_cube(many)) for _ in range(options.rounds + 1)]
        print(f"open 300 trials: first {times[0]:.3f} s, then {spread(times[1:])} s", flush=True)
        made = seconds(lambda: train_random(few, options.trials, options.samples, options.epochs))
        written = seconds(lambda: consolidate(few))
        whole = open_cube(few)["made"].to_dataset()
        print(
            f"{whole.nbytes / 1e6:.0f} MB in {options.trials} trials: written in {made:.1f} s, "
            f"consolidated and compared in {written:.1f} s",
            flush=True,
        )
        sources: dict[str, Callable[[], xr.Dataset]] = {
            "records": lambda: open_cube(few)["made"].to_dataset(),
            "consolidated": lambda: xr.open_zarr(few / "consolidated" / "made.zarr"),
        }
        for words, read in READS.items():
            durations: dict[str, list[float]] = {name: [] for name in sources}
            for _ in range(options.rounds):
                for name, opened in sources.items():
                    cube = None if words == "open" else opened()
                    call = opened if cube is None else lambda read=read, cube=cube: read(cube)
                    durations[name].append(seconds(call))
            ratio = statistics.median(
                records / consolidated
                for records, consolidated in zip(
                    durations["records"], durations["consolidated"], strict=True
                )
            )
            medians = [f"{name} {spread(times)} s" for name, times in durations.items()]
            print(f"{words}: {', '.join(medians)}")
            print(f"    records / consolidated: {ratio:.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
