"""Peak memory of all analyses of a cube larger than the memory allowed: 5 GB within 2 GiB.

The cube consists of random chunks of the store's shape (one epoch, or one state, of one trial).
They are generated when they are computed and never all in memory; the analyses run on threads.

    python benchmarks/analysis_memory.py [--gigabytes 5] [--threads 2]

Measured (2 shared cores under load, numpy 2.4, dask 2026.8): 5.00 GB of cube, all 9 results, 142 s
on 2 threads, peak 0.90 GiB resident (0.22 before the analysis began).
"""

import argparse
import resource
import sys
import time

import dask
import dask.array as da
import numpy as np
import xarray as xr

from sampimp.analysis.results.analyse import analyse
from sampimp.schema import REFERENCES, STRATEGIES, chunk_shape


def build_cube(gigabytes: float, *, samples: int = 50_000, epochs: int = 50) -> xr.Dataset:
    """Return a lazy cube of about this size: 9 strategies x 5 seeds, 4 layers.

    Importance, NLL and batch have the sizes of the paper's study; parameters, of every fifth state,
    fill the rest.
    """
    strategies = (*REFERENCES, *STRATEGIES)
    trials = (len(strategies), 5)
    layers = ("L1", "L2", "L3", "Out")
    states = np.arange(0, epochs + 1, 5)
    sizes = {"epoch": epochs, "layer": len(layers), "sample": samples}
    per_trial = 4 * epochs * samples * (len(layers) + 2)
    rest = gigabytes * 1e9 - per_trial * np.prod(trials)
    parameters = max(10_000, int(rest / (4 * np.prod(trials) * len(states))))
    hard = np.random.default_rng(0).permutation(np.linspace(0, 1, samples)).astype(np.float32)

    def noise(name: str, shape: tuple[int, ...], chunked: dict[str, int]) -> da.Array:
        generator = da.random.default_rng(len(name))
        chunks = (1, 1, *chunk_shape(name, chunked))
        return generator.random((*trials, *shape), chunks=chunks, dtype=np.float32)

    time_axis = np.arange(1, epochs + 1, dtype=np.float32)
    importance = noise("importance", (epochs, len(layers), samples), sizes)
    importance = (importance + 0.1) * hard**4 * 1e-4
    nll = noise("nll", (epochs, samples), sizes) + 3 * hard
    curve = 1 / time_axis + 0.01 * np.random.default_rng(1).random((*trials, epochs))
    dims = ("strategy", "seed", "epoch")
    cube = xr.Dataset(
        {
            "importance": ((*dims, "layer", "sample"), importance),
            "nll": ((*dims, "sample"), nll),
            "batch": ((*dims, "sample"), noise("batch", (epochs, samples), sizes)),
            **{
                name: (dims, da.from_array(curve, chunks=(1, 1, epochs)))
                for name in ("train_error", "test_error", "train_nll", "test_nll")
            },
            "parameters": (
                ("strategy", "seed", "state", "parameter"),
                noise(
                    "parameters",
                    (len(states), parameters),
                    {"state": len(states), "parameter": parameters},
                ),
            ),
            "diverged_epoch": (("strategy", "seed"), np.full(trials, np.nan)),
        },
        coords={
            "strategy": list(strategies),
            "seed": np.arange(1, 6),
            "epoch": np.arange(1, epochs + 1),
            "layer": list(layers),
            "sample": np.arange(samples),
            "label": ("sample", np.arange(samples) % 10),
            "state": states,
        },
        attrs={"dataset": "synthetic", "class_names": [str(k) for k in range(10)]},
    )
    return cube


def main() -> int:
    """Run every analysis and print the time and the peak."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--epochs", type=int, default=50)
    options = parser.parse_args()
    cube = build_cube(options.gigabytes, samples=options.samples, epochs=options.epochs)
    start = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with dask.config.set(scheduler="threads", num_workers=options.threads):
        results = analyse(cube)
    # ru_maxrss is in KiB on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{cube.nbytes / 1e9:.2f} GB of cube, {len(results)} results, "
        f"{time.perf_counter() - start:.0f} s on {options.threads} threads, "
        f"peak {peak:.2f} GiB resident ({before:.2f} before)"
    )
    return int(peak > 2)


if __name__ == "__main__":
    sys.exit(main())
