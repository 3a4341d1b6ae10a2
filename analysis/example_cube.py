"""A synthetic cube with a known structure, for examples and tests; none of it was measured.

Each sample has a hardness h between 0 and 1. The epoch and the layer of its largest importance
depend on h (easy: early, output; hard: late, input), its NLL falls more slowly the larger h is, and
the strategies with batches of comparable difficulty end with a higher test error.

`with_influence` adds influence on the final model, and retrainings whose effects follow from it but
for noise: the larger a sample's importance, the larger the effect of its removal.

`with_subsets` adds trainings on subsets: the most important samples suffice from 30 % on, and are
worse than random ones at 10 %.

Map: `example_cube`, `with_influence`, `with_subsets`.
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


def with_influence(
    cube: xr.Dataset,
    *,
    test_samples: int = 12,
    removals: int = 20,
    repeats: int = 3,
    noise: float = 0.02,
    seed: int = 0,
) -> xr.Dataset:
    """Return the cube with influence, probes and retrainings of the run `shuffle`, seed 1.

    Parameters
    ----------
    cube
        A cube of `example_cube`.
    test_samples
        Number of single test samples among the targets; the others are `mean` and the classes.
    removals, repeats
        Removals of each kind (`random`, `top`, `subset-0.95`), and retrainings of each.
    noise
        Standard deviation of the effects of a retraining, relative to that of all effects.
    seed
        Seed of the generator.

    Examples
    --------
    >>> cube = with_influence(example_cube())
    >>> dict(cube["influence"].sel(strategy="shuffle", seed=1).sizes)
    {'target': 16, 'epoch': 6, 'layer': 4, 'sample': 120}
    """
    generator = np.random.default_rng(seed)
    beta = cube["importance"].sel(strategy="shuffle", seed=1).values.astype(np.float64)
    epochs, _, samples = beta.shape
    left = np.linspace(0.3, 1, epochs)[:, None, None]
    classes = [f"class:{label}" for label in np.unique(cube["label"].values)]
    singles = [f"sample:{number}" for number in range(test_samples)]
    targets = ["mean", *classes, *singles]
    direction = generator.normal(size=(len(targets), samples))
    direction[0] = direction[1:].mean(0)
    influence = left * np.sqrt(beta) * direction[:, None, None, :]
    total = influence.sum((1, 2))
    removed = _example_removals(beta.sum((0, 1)), removals, generator)
    effect = -(removed @ total.T)[..., None] * np.ones(repeats)
    effect += noise * effect.std((0, 2), keepdims=True) * generator.normal(size=effect.shape)
    damped = total[:, None] + total.std() * np.array([3.0, 1.0, 4.0])[:, None] * generator.normal(
        size=(len(targets), 3, samples)
    )
    arriving = left**2 * beta
    variables = {
        "influence": (("target", "epoch", "layer", "sample"), influence.astype(np.float32)),
        "influence_total": (("target", "sample"), total.astype(np.float32)),
        "adjoint_norm": (("target", "epoch"), np.ones((len(targets), epochs))),
        "arriving_importance": (("epoch", "layer", "sample"), arriving.astype(np.float32)),
        "final_importance": (("layer", "sample"), arriving.sum(0).astype(np.float32)),
        "final_importance_total": (("sample",), arriving.sum((0, 1)).astype(np.float32)),
        "fixed_point_influence": (
            ("target", "curvature", "damping", "sample"),
            damped[:, None].astype(np.float32),
        ),
        "effect": (("removal", "target", "repeat"), effect),
        "removed": (("removal", "sample"), removed),
    }
    names = [f"{kind}:{i}" for kind in ("random", "subset-0.95", "top") for i in range(removals)]
    result = cube.assign_coords(
        target=targets,
        target_units=("target", ["nat"] * len(targets)),
        removal=names,
        repeat=np.arange(repeats),
        curvature=["gauss-newton"],
        damping=[1e-3, 0.1, 1.0],
    )
    result = _place_variables(result, variables)
    for name in ("influence", "influence_total", "arriving_importance", "removed"):
        sizes = {dim: 1 for dim in ("strategy", "seed", "epoch") if dim in result[name].dims}
        result[name] = result[name].chunk(sizes)
    return result


SUBSET_ERROR = {
    "full": (np.nan, np.nan, np.nan, 0.20),
    "chosen": (0.30, 0.202, 0.20, np.nan),
    "random": (0.32, 0.25, 0.225, np.nan),
    "balanced": (0.30, 0.24, 0.22, np.nan),
    "tau-high": (0.45, 0.202, 0.20, np.nan),
}
"""Test error of each rule with 10, 30, 50 and 100 % of the samples, at equal steps."""


def with_subsets(
    cube: xr.Dataset, *, seeds: int = 5, noise: float = 0.001, seed: int = 0
) -> xr.Dataset:
    """Return the cube with trainings on subsets of the run `shuffle`, seed 1.

    At equal epochs, errors are 0.05 higher; all samples at convergence have 0.198.

    Parameters
    ----------
    cube
        A cube of `example_cube`.
    seeds
        Number of training seeds.
    noise, seed
        Standard deviation of the errors, and the seed of the generator.

    Examples
    --------
    >>> dict(with_subsets(example_cube())["subset_error"].sel(strategy="shuffle", seed=1).sizes)
    {'rule': 5, 'size': 4, 'budget': 3, 'training_seed': 5}
    """
    generator = np.random.default_rng(seed)
    rules, sizes = list(SUBSET_ERROR), (0.1, 0.3, 0.5, 1.0)
    tau = cube["importance"].sel(strategy="shuffle", seed=1).sum(("epoch", "layer")).values
    labels, samples = cube["label"].values, cube.sizes["sample"]
    error = np.full((len(rules), len(sizes), 3, seeds), np.nan)
    variant = np.full(error.shape[:3], "", dtype="<U8")
    selected = np.zeros((*error.shape, samples), bool)
    random = generator.permuted(np.tile(np.arange(samples), (seeds, 1)), axis=1)
    order = {
        "random": random,
        "balanced": np.stack([_alternate_classes(row, labels) for row in random]),
        "tau-high": np.tile(np.argsort(-tau), (seeds, 1)),
    }
    for r, (rule, by_size) in enumerate(SUBSET_ERROR.items()):
        for s, mean in enumerate(by_size):
            if np.isnan(mean):
                continue
            own = rule
            if rule == "chosen":
                own = "balanced" if sizes[s] < 0.3 else "tau-high"
            means = (0.20, 0.20, 0.198) if rule == "full" else (mean, mean + 0.05)
            for b, value in enumerate(means):
                error[r, s, b] = value + noise * generator.normal(size=seeds)
                variant[r, s, b] = own
                for t in range(seeds):
                    kept = order.get(own, random)[t][: round(sizes[s] * samples)]
                    selected[r, s, b, t, kept] = True
    for s, own in enumerate(("balanced", "tau-high", "tau-high")):
        error[1, s] = error[rules.index(own), s]
    dims = ("rule", "size", "budget", "training_seed")
    result = cube.assign_coords(
        rule=rules,
        size=list(sizes),
        budget=["steps", "epochs", "convergence"],
        training_seed=np.arange(1, seeds + 1),
    )
    return _place_variables(
        result,
        {
            "subset_error": (dims, error),
            "subset_nll": (dims, 3 * error),
            "subset_variant": (dims[:3], variant),
            "selected": ((*dims, "sample"), selected),
        },
    )


def _alternate_classes(samples: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the samples with the first of every class first, then the second ones."""
    places = np.zeros(len(samples), int)
    for label in np.unique(labels):
        mine = labels[samples] == label
        places[mine] = np.arange(mine.sum())
    return samples[np.argsort(places, kind="stable")]


def _place_variables(
    cube: xr.Dataset, variables: dict[str, tuple[tuple[str, ...], np.ndarray]]
) -> xr.Dataset:
    """Return the cube with variables of the run `shuffle`, seed 1; others lack them."""
    shape = (cube.sizes["strategy"], cube.sizes["seed"])
    place = cube["strategy"].values.tolist().index("shuffle"), 0
    for name, (dims, values) in variables.items():
        whole = np.zeros((*shape, *values.shape), values.dtype)
        if values.dtype.kind == "f":
            whole[:] = np.nan
        whole[place] = values
        cube[name] = (("strategy", "seed", *dims), whole)
    return cube


def _example_removals(tau: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Return single removals drawn at random, subsets of 95 %, and the most important samples."""
    samples = len(tau)
    removed = np.zeros((3, count, samples), bool)
    removed[0, np.arange(count), generator.permutation(samples)[:count]] = True
    for row in removed[1]:
        row[generator.choice(samples, max(1, samples // 20), replace=False)] = True
    removed[2, np.arange(count), np.argsort(-tau)[:count]] = True
    return removed.reshape(-1, samples)


def _mask_trials(cube: xr.Dataset, first_epochs: dict[tuple[str, int], int]) -> None:
    """Set trials to NaN from an epoch on (0: missing, else diverged), and add `diverged_epoch`.

    As in training, errors are finite in the epoch in which a run diverges.
    """
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
            for key in ("train_error", "test_error"):
                cube[key][{**trial, "epoch": cube["epoch"].values == first}] = 0.9
