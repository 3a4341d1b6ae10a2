"""A made-up cube with a known structure, for examples and tests; nothing in it was measured.

Samples have a hardness h between 0 and 1. Their importance peaks at a time and a depth that h moves
(easy: early, output; hard: late, input), their NLL falls more slowly the larger h is, and the
batches of comparable difficulty end with a higher test error.

Map: `build`.
"""

import numpy as np
import xarray as xr

from sampimp.schema import REFERENCES, STRATEGIES

TEST_ERROR = {"nlo": 0.30, "sio": 0.31, "rnlo": 0.25, "rsio": 0.26}
"""Where the test error of the strategies ends; the others at 0.20."""


def build(
    *,
    strategies: tuple[str, ...] = (*REFERENCES, *STRATEGIES),
    seeds: int = 3,
    epochs: int = 6,
    layers: int = 4,
    samples: int = 120,
    classes: int = 3,
    parameters: int = 40,
    states: tuple[int, ...] | None = None,
    missing: tuple[tuple[str, int], ...] = (("sim", 3),),
    diverged: dict[tuple[str, int], int] | None = None,
    sample_chunk: int | None = None,
    noise: float = 0.1,
    seed: int = 0,
) -> xr.Dataset:
    """Return the cube, backed by dask in the chunks of the store.

    Parameters
    ----------
    strategies, seeds, epochs, layers, samples, classes, parameters
        What there is, and how many.
    states
        The states at which parameters are stored; all of them by default, none if empty.
    missing
        Trials (strategy, seed) that read as NaN.
    diverged
        Trials (strategy, seed) and the epoch from which they read as NaN.
    sample_chunk
        Chunk size along `sample`; all samples by default.
    noise, seed
        Deviation of the logarithm of importance and NLL between runs, and the generator's seed.
    """
    diverged = {("rsio", 2): 3} if diverged is None else diverged
    generator = np.random.default_rng(seed)
    shape = (len(strategies), seeds)
    hard = generator.permutation(np.linspace(0, 1, samples))
    time = np.arange(1, epochs + 1) / epochs
    depth = np.arange(layers) / max(1, layers - 1)  # 0 at the input, 1 at the output
    when = np.exp(-np.square(time[:, None] - (0.1 + 0.9 * hard)) / 0.1)
    where = np.exp(-np.square(depth[:, None] - (1 - hard)) / 0.3)
    beta = 1e-4 * when[:, None, :] * where[None] * (0.01 + hard**6)
    blur = generator.lognormal(0, noise, (*shape, epochs, layers, samples))
    importance = (beta * blur).astype(np.float32)
    nll = (0.01 + 3 * hard * np.exp(-2 * (1 - hard) * time[:, None])) * generator.lognormal(
        0, noise, (*shape, epochs, samples)
    )
    batch = np.broadcast_to(generator.permutation(samples) // 10, (*shape, epochs, samples))
    end = np.array([TEST_ERROR.get(name, 0.20) for name in strategies])[:, None, None]
    test_error = end + 0.3 * np.exp(-3 * time) + generator.normal(0, 0.002, (*shape, epochs))
    dims = ("strategy", "seed", "epoch")
    variables = {
        "importance": ((*dims, "layer", "sample"), importance),
        "nll": ((*dims, "sample"), nll.astype(np.float32)),
        "batch": ((*dims, "sample"), batch.astype(np.float32)),
        "train_error": (dims, test_error / 2),
        "test_error": (dims, test_error),
        "train_nll": (dims, nll.mean(-1)),
        "test_nll": (dims, nll.mean(-1) * 1.1),
    }
    coords = {
        "strategy": list(strategies),
        "seed": np.arange(1, seeds + 1),
        "epoch": np.arange(1, epochs + 1),
        "layer": [f"L{k + 1}" for k in range(layers - 1)] + ["Out"],
        "sample": np.arange(samples),
        "label": ("sample", np.arange(samples) % classes),
        "order_seed": (("strategy", "seed"), np.ones(shape, int)),
    }
    stored = tuple(range(epochs + 1)) if states is None else states
    if stored:
        start = generator.normal(size=(1, seeds, 1, parameters))
        toward = generator.normal(size=(len(strategies), 1, 1, parameters))
        step = np.sqrt(np.array(stored) / epochs)[:, None]
        variables["parameters"] = (
            ("strategy", "seed", "state", "parameter"),
            (start + step * toward).astype(np.float32),
        )
        coords["state"] = np.array(stored)
        coords["layer_of_parameter"] = (
            "parameter",
            np.sort(np.arange(parameters) % layers).astype(int),
        )
    cube = xr.Dataset(variables, coords)
    if stored:
        cube = cube.assign_coords(
            layer_of_parameter=("parameter", cube["layer"].values[cube["layer_of_parameter"]])
        )
    cube["diverged_epoch"] = xr.full_like(cube["train_nll"].isel(epoch=0, drop=True), np.nan)
    for name, number, first in [
        *((*trial, 0) for trial in missing),
        *((*trial, epoch) for trial, epoch in diverged.items()),
    ]:
        if name not in strategies or number > seeds:
            continue
        at = {"strategy": strategies.index(name), "seed": number - 1}
        for key in variables:
            time_dim = "state" if key == "parameters" else "epoch"
            gone = cube[time_dim].values >= first
            cube[key][{**at, time_dim: gone}] = np.nan
        if first:
            cube["diverged_epoch"][at] = first
    cube["importance"].attrs = {
        "units": "parameter^2",
        "learning_rate": 0.1,
        "batch_size": 10,
        "loss_reduction": "mean",
        "weight_decay": 0.0,
        "optimizer": "SGD",
    }
    cube.attrs = {"dataset": "example", "class_names": ["cat", "horse", "ship"][:classes]}
    chunks: dict[str, int] = {"strategy": 1, "seed": 1, "epoch": 1}
    if sample_chunk:
        chunks["sample"] = sample_chunk
    if stored:
        chunks["state"] = 1
    return cube.chunk(chunks)
