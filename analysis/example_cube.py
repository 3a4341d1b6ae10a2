"""A synthetic cube with a known structure, for examples and tests; none of it was measured.

Each sample has a hardness h between 0 and 1. The epoch and the layer of its largest importance
depend on h (easy: early, output; hard: late, input), its NLL falls more slowly the larger h is, and
the strategies with batches of comparable difficulty end with a higher test error.

Map: `example_cube`.
"""

import numpy as np
import xarray as xr

from sampimp.schema import REFERENCES, STRATEGIES

FINAL_TEST_ERROR = {"nlo": 0.30, "sio": 0.31, "rnlo": 0.25, "rsio": 0.26}
"""Test error at the end of these strategies; 0.20 of the others."""


def example_cube(
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
        The strategies, and the number of each of the others.
    states
        The states at which parameters are stored; all of them by default, none if empty.
    missing
        Trials (strategy, seed) whose values are NaN. By default `sim`, seed 3.
    diverged
        Trials (strategy, seed) and the epoch from which their values are NaN. By default `rsio`,
        seed 2, from epoch 3.
    sample_chunk
        Chunk size along `sample`; all samples by default.
    noise, seed
        Standard deviation of the logarithm of importance and NLL between runs, and the seed of
        the generator.

    Examples
    --------
    >>> dict(example_cube()["importance"].sizes)
    {'strategy': 9, 'seed': 3, 'epoch': 6, 'layer': 4, 'sample': 120}
    """
    diverged = {("rsio", 2): 3} if diverged is None else diverged
    generator = np.random.default_rng(seed)
    shape = (len(strategies), seeds)
    hard = generator.permutation(np.linspace(0, 1, samples))
    time = np.arange(1, epochs + 1) / epochs
    depth = np.arange(layers) / max(1, layers - 1)  # 0 at the input, 1 at the output
    in_time = np.exp(-np.square(time[:, None] - (0.1 + 0.9 * hard)) / 0.1)
    in_depth = np.exp(-np.square(depth[:, None] - (1 - hard)) / 0.3)
    beta = 1e-4 * in_time[:, None, :] * in_depth[None] * (0.01 + hard**6)
    variation = generator.lognormal(0, noise, (*shape, epochs, layers, samples))
    importance = (beta * variation).astype(np.float32)
    nll = (0.01 + 3 * hard * np.exp(-2 * (1 - hard) * time[:, None])) * generator.lognormal(
        0, noise, (*shape, epochs, samples)
    )
    batch = np.broadcast_to(generator.permutation(samples) // 10, (*shape, epochs, samples))
    final_error = np.array([FINAL_TEST_ERROR.get(name, 0.20) for name in strategies])[:, None, None]
    test_error = (
        final_error + 0.3 * np.exp(-3 * time) + generator.normal(0, 0.002, (*shape, epochs))
    )
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
    kept_states = tuple(range(epochs + 1)) if states is None else states
    if kept_states:
        start = generator.normal(size=(1, seeds, 1, parameters))
        direction = generator.normal(size=(len(strategies), 1, 1, parameters))
        step = np.sqrt(np.array(kept_states) / epochs)[:, None]
        variables["parameters"] = (
            ("strategy", "seed", "state", "parameter"),
            (start + step * direction).astype(np.float32),
        )
        coords["state"] = np.array(kept_states)
        coords["layer_of_parameter"] = (
            "parameter",
            np.sort(np.arange(parameters) % layers).astype(int),
        )
    cube = xr.Dataset(variables, coords)
    if kept_states:
        cube = cube.assign_coords(
            layer_of_parameter=("parameter", cube["layer"].values[cube["layer_of_parameter"]])
        )
    _mask_trials(cube, dict.fromkeys(missing, 0) | diverged)
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
    if kept_states:
        chunks["state"] = 1
    return cube.chunk(chunks)


def _mask_trials(cube: xr.Dataset, first_epochs: dict[tuple[str, int], int]) -> None:
    """Set trials to NaN from an epoch on (0: missing, else diverged), and add `diverged_epoch`."""
    variables = list(cube.data_vars)
    strategies = cube["strategy"].values.tolist()
    cube["diverged_epoch"] = xr.full_like(cube["train_nll"].isel(epoch=0, drop=True), np.nan)
    for (name, number), first in first_epochs.items():
        if name not in strategies or number > cube.sizes["seed"]:
            continue
        trial = {"strategy": strategies.index(name), "seed": number - 1}
        for key in variables:
            time = "state" if key == "parameters" else "epoch"
            cube[key][{**trial, time: cube[time].values >= first}] = np.nan
        if first:
            cube["diverged_epoch"][trial] = first
