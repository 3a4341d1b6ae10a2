"""Synthetic results with the shapes of the analysis, for tests of figures and report.

Importance falls over decades of values with the epochs, and NLL with it.

Map: `make_results` (a dictionary like that of `analyse`), `make_claims`, `make_images`.
"""

import numpy as np
import xarray as xr

from sampimp.schema import REFERENCES, STRATEGIES

LEVELS = [0.01, 0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99]
BOX_LEVELS = [0.05, 0.25, 0.5, 0.75, 0.95]

ATTRS = {
    "method": "made up for <this> test & no other",
    "figure": "0",
    "source": "Gao & Jojic (2017), section 3",
}


def make_results(
    *,
    layers=4,
    epochs=50,
    labels=10,
    strategies=(*REFERENCES, *STRATEGIES),
    seeds=5,
    samples=2_000,
    clusters=20,
    diverged=(),
    seed=0,
):
    """Return results by their key in `RESULTS`, without snapshot stability."""
    rng = np.random.default_rng(seed)
    epoch = np.arange(1, epochs + 1)
    layer = ["L1", "L2", "L3", "Out"] if layers == 4 else [f"block{i}.conv" for i in range(layers)]
    stability = _make_stability(rng, epoch, layer, strategies)
    decomposition = _make_decomposition(rng, epoch, layer, labels, samples)
    groups = _make_groups(decomposition)
    nll = 10 ** rng.normal(-3.5, 1.2, samples)
    overall = 1e-6 * nll**0.8 * 10 ** rng.normal(0, 0.3, samples)
    return {
        "stability": stability,
        "decomposition": decomposition,
        "importance_groups": groups,
        "importance_against_nll": _make_against_nll(nll, overall, groups),
        "clusters": _make_clusters(rng, epoch, layer, nll, clusters),
        "strategy_curves": _make_curves(rng, epoch, labels, strategies, seeds, diverged),
        "parameter_paths": _make_paths(epochs, strategies, diverged),
        "importance_histogram": _make_histogram(overall),
        "claims": make_claims(),
    }


def _depth(layer):
    """Return the share of each layer, falling from input to output."""
    return 10 ** np.linspace(0.4, -0.7, len(layer))


def _make_stability(rng, epoch, layer, strategies):
    reference = [name for name in REFERENCES if name in strategies]
    pair = ["1-2", "1-3", "2-3"]
    start = np.array([0.95, 0.6])[: len(reference)]
    rho = start[:, None, None] + (0.97 - start[:, None, None]) * (
        1 - np.exp(-epoch[None, :, None] / 12)
    )
    rho = rho + rng.normal(0, 0.004, (len(reference), len(epoch), 3))
    return xr.Dataset(
        {
            "rank_correlation": (("reference", "epoch", "pair"), rho),
            "rank_correlation_interval": (
                ("reference", "epoch", "pair", "bound"),
                np.stack([rho - 0.008, rho + 0.008], -1),
            ),
            "layer_rank_correlation": (
                ("reference", "epoch", "layer", "pair"),
                rho[:, :, None] - 0.03 * np.arange(len(layer))[:, None],
            ),
        },
        {
            "reference": reference,
            "epoch": epoch,
            "pair": pair,
            "layer": layer,
            "bound": ["low", "high"],
        },
        ATTRS,
    )


def _make_decomposition(rng, epoch, layer, labels, samples):
    epochs = len(epoch)
    fall = 10 ** (-4 * (1 - np.exp(-epoch / (epochs / 2.5))))
    hard = 10 ** (rng.normal(0, 0.25, labels) * np.linspace(0, 2, epochs)[:, None])
    by_class = 1e-2 * fall[:, None, None] * _depth(layer)[:, None] * hard[:, None, :] / labels
    return xr.Dataset(
        {
            "importance_by_class": (("epoch", "layer", "label"), by_class),
            "importance_by_layer": (("epoch", "layer"), by_class.sum(-1)),
            "class_size": ("label", np.full(labels, samples // labels)),
        },
        {"epoch": epoch, "layer": layer, "label": np.arange(labels)},
        ATTRS,
    )


def _make_groups(decomposition):
    by_layer = decomposition["importance_by_layer"].values
    share = np.array([0.72, 0.17, 0.11])
    by_group = share[:, None, None] * by_layer
    by_group[2] *= np.linspace(3, 0.1, len(by_layer))[:, None]
    return xr.Dataset(
        {
            "importance_by_group": (("group", "epoch", "layer"), by_group),
            "share": ("group", share),
            "share_by_layer": (("group", "layer"), share[:, None] * np.ones(by_layer.shape[1])),
        },
        {
            "group": ["top 10 %", "next 10 %", "other 80 %"],
            "epoch": decomposition["epoch"].values,
            "layer": decomposition["layer"].values,
        },
        ATTRS,
    )


def _make_against_nll(nll, overall, groups):
    epoch, layer = groups["epoch"].values, groups["layer"].values
    layers, samples = len(layer), len(nll)
    by_difficulty = groups["importance_by_group"].values / samples
    return xr.Dataset(
        {
            "rank_correlation": (
                ("epoch", "layer"),
                0.9 - 0.1 * np.arange(layers) / layers - 0.5 * np.exp(-epoch[:, None] / 5),
            ),
            "model_rank_correlation": ("epoch", 0.92 - 0.5 * np.exp(-epoch / 5)),
            "overall_importance": ("sample", overall),
            "final_nll": ("sample", nll),
            "overall_rank_correlation": ((), 0.871),
            "overall_rank_correlation_interval": ("bound", [0.868, 0.874]),
            "importance_by_difficulty": (("difficulty", "epoch", "layer"), by_difficulty),
        },
        {
            "epoch": epoch,
            "layer": layer,
            "sample": np.arange(samples),
            "bound": ["low", "high"],
            "difficulty": ["easy", "middle", "hard"],
        },
        ATTRS,
    )


def _make_clusters(rng, epoch, layer, nll, clusters):
    epochs, samples = len(epoch), len(nll)
    members = np.sort(rng.integers(1, 900, clusters))[::-1]
    peaks = rng.integers(1, epochs + 1, clusters)
    profile = (
        10 ** rng.normal(-6, 1, (clusters, 1, 1))
        * _depth(layer)
        * np.exp(-(((epoch - peaks[:, None]) / epochs * 3) ** 2))[:, :, None]
    )
    centre = 10 ** np.sort(rng.normal(-3, 1, clusters))
    spread = 10 ** np.array([-1, -0.5, 0, 0.4, 0.9])
    result = xr.Dataset(
        {
            "profile": (("cluster", "epoch", "layer"), profile),
            "cluster_of": ("sample", rng.integers(0, clusters, samples)),
            "size": ("cluster", members),
            "final_nll": ("sample", nll),
            "nll_quantile": (("cluster", "quantile"), centre[:, None] * spread),
            "representative": (
                ("cluster", "rank"),
                rng.integers(0, samples, (clusters, 8)),
            ),
        },
        {
            "cluster": np.arange(clusters),
            "epoch": epoch,
            "layer": layer,
            "sample": np.arange(samples),
            "quantile": BOX_LEVELS,
            "rank": np.arange(8),
        },
        ATTRS,
    )
    result["profile"].attrs["units"] = "parameter^2"
    return result


def _make_curves(rng, epoch, labels, strategies, seeds, diverged):
    count, epochs = len(strategies), len(epoch)
    level = 0.02 * (1 + 0.25 * np.arange(count))
    test = level[:, None] * (1 + 8 * np.exp(-epoch / 4))
    train = level[:, None] * 3 * np.exp(-epoch / 6)
    runs = np.full((count, epochs), seeds)
    for name in diverged:
        row = list(strategies).index(name)
        runs[row, epochs // 2 :] = seeds - 2
    classes = test[:, :, None] * 10 ** rng.normal(0, 0.3, labels)
    final = test[:, -1:] * (1 + rng.normal(0, 0.03, (count, seeds)))
    means = {
        "train_error": train,
        "test_error": test,
        "train_nll": train * 2,
        "test_nll": test * 4,
    }
    return xr.Dataset(
        {
            **{name: (("strategy", "epoch"), values) for name, values in means.items()},
            **{
                f"{name}_se": (("strategy", "epoch"), values * 0.04)
                for name, values in means.items()
            },
            "runs": (("strategy", "epoch"), runs),
            "diverged": ("strategy", [2 if name in diverged else 0 for name in strategies]),
            "final_test_error": (("strategy", "seed"), final),
            "class_nll": (("strategy", "epoch", "label"), classes),
        },
        {
            "strategy": list(strategies),
            "epoch": epoch,
            "seed": np.arange(1, seeds + 1),
            "label": np.arange(labels),
        },
        ATTRS,
    )


def _make_paths(epochs, strategies, diverged):
    angle = np.linspace(0.2, 2.2, len(strategies))
    time = np.arange(epochs + 1)
    path = np.stack(
        [
            time * np.cos(angle[:, None]) * 0.4,
            time * np.sin(angle[:, None]) * 0.3,
            np.sqrt(time) * (1 + 0.1 * angle[:, None]),
        ],
        -1,
    )
    return xr.Dataset(
        {
            "path": (("strategy", "state", "component"), path),
            "explained_variance_ratio": ("component", [0.63, 0.21, 0.08]),
            "fitted": ("strategy", [name not in diverged for name in strategies]),
        },
        {"strategy": list(strategies), "state": time, "component": [1, 2, 3]},
        ATTRS,
    )


def _make_histogram(overall):
    edges = np.linspace(*np.log10([overall.min(), overall.max()]), 41)
    return xr.Dataset(
        {
            "count": ("bin", np.histogram(np.log10(overall), edges)[0]),
            "bin_edge": ("edge", edges),
            "quantile": ("q", np.quantile(overall, LEVELS)),
            "gini": ((), 0.913),
            "zeros": ((), 3),
        },
        {"q": LEVELS},
        ATTRS,
    )


def make_claims():
    """Return one claim per verdict; a sentence and a rule have characters that HTML escapes."""
    return xr.Dataset(
        {
            "section": ("claim", ["3.2", "3.4", "3.6"]),
            "sentence": (
                "claim",
                [
                    "The order of the samples is stable across initialisations.",
                    "Samples with NLL < 0.1 & high importance <b>exist</b>.",
                    "Visiting the hardest batches first is worse than random order.",
                ],
            ),
            "number": (
                "claim",
                ["0.97 [0.96, 0.98] at epoch 50", "12 % [8 %, 16 %]", "1 seed of 2"],
            ),
            "value": ("claim", [0.97, 0.12, np.nan]),
            "low": ("claim", [0.96, 0.08, np.nan]),
            "high": ("claim", [0.98, 0.16, np.nan]),
            "rule": ("claim", ["lower bound > 0.9", "upper bound < 0.1 \"or\" 'so'", "2 seeds"]),
            "verdict": ("claim", ["holds", "does not hold", "not enough data"]),
        },
        {"claim": ["stable", "low-nll", "hard-first"]},
    )


def make_images(clusters=20, ranks=8, size=28, channels=1, seed=0):
    """Return uint8 images `(cluster, rank, row, column, channel)`, each a bright blob."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    centre = rng.uniform(size * 0.3, size * 0.7, (clusters, ranks, channels, 2, 1, 1))
    blob = np.exp(-((y - centre[..., 0, :, :]) ** 2 + (x - centre[..., 1, :, :]) ** 2) / size)
    return xr.DataArray(
        (255 * np.moveaxis(blob, 2, -1)).astype(np.uint8),
        dims=("cluster", "rank", "row", "column", "channel"),
    )
