"""Clusters of one class: when and in which layers its samples act (section 3.5, Figs. 5 and 6).

k-means on epoch x layer profiles of in-step importance, into 20 clusters of digit 5 and 30 of
horse. The paper does not say how profiles are scaled. Here a profile is log(1 + beta / m_d), with
m_d the mean of layer d over the class and all epochs. The logarithm is taken because importance is
heavy-tailed: plain k-means would spend its clusters on a handful of extreme samples. The 1 makes
all values far below the mean nearly 0 instead of spreading them over twenty decades. A mean for
each layer makes a layer count by its pattern and not by its number of parameters.

Map: `default_class`, `cluster_count` (which class, how many clusters), `normalise_profiles`,
`clusters`.
"""

import numpy as np
import xarray as xr

from sampimp.analysis.runs import class_name, codes_of_labels, label_result, place_of, reference_run
from sampimp.errors import ConfigError, require_package

PAPER_CLASSES = {"5": 20, "five": 20, "horse": 30}
"""The classes that the paper clusters, with their number of clusters (section 3.5)."""

SAMPLES_PER_CLUSTER = 25
"""Smallest mean number of samples per cluster; a small class gets fewer clusters than the paper's
(arbitrary)."""

BOX_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Quantiles that a box plot shows."""

REPRESENTATIVES = 12
"""Number of samples listed for each cluster, those nearest to its centre (arbitrary)."""


def default_class(cube: xr.Dataset) -> int:
    """Return the label of the class that the paper clusters, else the smallest label.

    Examples
    --------
    >>> from sampimp.analysis.example_cube import example_cube
    >>> default_class(example_cube())
    1
    """
    labels, _ = codes_of_labels(cube)
    for label in labels.tolist():
        if class_name(cube, label) in PAPER_CLASSES:
            return int(label)
    return int(labels[0])


def cluster_count(cube: xr.Dataset, label: int) -> int:
    """Return the number of clusters of a class: the paper's, or fewer for a small class.

    Twenty (thirty for `horse`), at most one per 25 samples, and at least two.

    Examples
    --------
    >>> from sampimp.analysis.example_cube import example_cube
    >>> cluster_count(example_cube(), 1)  # 40 samples
    2
    """
    size = int(np.count_nonzero(cube["label"].values == label))
    wanted = PAPER_CLASSES.get(class_name(cube, label), 20)
    return max(2, min(wanted, size // SAMPLES_PER_CLUSTER))


def clusters(
    cube: xr.Dataset, label: int | None = None, count: int | None = None, seed: int = 0
) -> xr.Dataset:
    """Return clusters of the samples of one class by the epochs and layers of their importance.

    The profiles of the class, [samples of the class x epochs x layers], are read into memory.

    Parameters
    ----------
    cube
        One node of the cube.
    label
        Label of the class. Default: `default_class`.
    count
        Number of clusters. Default: `cluster_count`. The result has fewer if there are fewer
        distinct profiles.
    seed
        Seed of k-means (10 starts).

    Returns
    -------
    Dataset, in memory
        profile(cluster, epoch, layer), cluster_of(sample), size(cluster), final_nll(sample),
        nll_quantile(cluster, quantile), nll_quantile_by_epoch(cluster, epoch, quantile),
        representative(cluster, rank), overall_importance(sample), mean_epoch(cluster),
        layer_share(cluster, layer). `sample` is the permanent index of the class's samples;
        clusters are ordered by mean overall importance, low first. `representative` is -1 at the
        ranks that a small cluster lacks.

    Raises
    ------
    MissingDataError
        The reference run is not complete.
    ConfigError
        The class does not exist, or `count` is not between 1 and its number of samples.

    Examples
    --------
    >>> from sampimp.analysis.example_cube import example_cube
    >>> result = clusters(example_cube(), label=1, count=3)
    >>> result["size"].values.tolist(), result.attrs["class_name"]
    ([26, 9, 5], 'horse')

    References
    ----------
    Gao & Jojic (2017), section 3.5, Figs. 5 and 6.
    """
    run = reference_run(cube, "importance", "nll")
    label = default_class(cube) if label is None else label
    members, count = _choose_samples(cube, label, count)
    samples = run.isel(sample=members).compute()
    beta = samples["importance"].transpose("sample", "epoch", "layer").astype(np.float64)
    features = normalise_profiles(beta.values)
    tau = beta.sum(("epoch", "layer")).values
    codes = _assign_clusters(features, tau, count, seed)
    result = _describe_clusters(samples, beta.values, features, tau, codes)
    label_result(
        result,
        cube,
        method=(
            f"k-means (scikit-learn, 10 starts, seed {seed}) into {count} clusters of the profiles "
            "log(1 + beta / m_d) over epoch and layer, m_d the mean of layer d over the class "
            "and the epochs; reference run (shuffle, seed 1)"
        ),
        figure="6" if class_name(cube, label) == "horse" else "5",
        section="3.5",
        variables={
            "profile": ("parameter^2", "mean importance of a sample of the cluster"),
            "cluster_of": ("1", "cluster of the sample"),
            "size": ("1", "samples of the cluster"),
            "final_nll": ("nat", "NLL at the end of the last epoch"),
            "overall_importance": ("parameter^2", "overall importance"),
            "nll_quantile": ("nat", "quantile of final NLL"),
            "nll_quantile_by_epoch": ("nat", "quantile of NLL at the end of the epoch"),
            "representative": ("1", "index of the sample next closest to the centre"),
            "mean_epoch": ("epoch", "importance-weighted mean epoch of the cluster"),
            "layer_share": ("1", "share of the cluster's importance in the layer"),
        },
    )
    result.attrs["label"] = int(label)
    result.attrs["class_name"] = class_name(cube, label)
    return result


def _choose_samples(cube: xr.Dataset, label: int, count: int | None) -> tuple[np.ndarray, int]:
    """Return the positions of the class's samples and the number of clusters, both checked."""
    members = np.flatnonzero(cube["label"].values == label)
    if not len(members):
        raise ConfigError(
            f"a label out of {codes_of_labels(cube)[0].tolist()}",
            f"{label}",
            place_of(cube),
            "choose one of these",
        )
    count = cluster_count(cube, label) if count is None else count
    if not 1 <= count <= len(members):
        raise ConfigError(
            f"between 1 and {len(members)} clusters of class {class_name(cube, label)}",
            f"{count}",
            place_of(cube),
            "choose another number",
        )
    return members, count


def _describe_clusters(
    samples: xr.Dataset,
    beta: np.ndarray,
    features: np.ndarray,
    tau: np.ndarray,
    codes: np.ndarray,
) -> xr.Dataset:
    """Return the variables of the result that follow from each sample's cluster.

    Parameters
    ----------
    samples
        Importance and NLL of the class's samples, in memory.
    beta, features : array [sample, epoch, layer]
        Importance, and the profiles that were clustered.
    tau : array [sample]
        Overall importance.
    codes : array [sample] of int
        Each sample's cluster.
    """
    groups = [np.flatnonzero(codes == c) for c in range(codes.max() + 1)]
    ranks = min(REPRESENTATIVES, len(codes))
    nearest = _nearest_to_centres(features, groups, ranks)
    nll = samples["nll"].transpose("epoch", "sample").values.astype(np.float64)
    profile = np.stack([beta[group].mean(0) for group in groups])
    total = profile.sum((1, 2))
    with np.errstate(invalid="ignore"):
        mean_epoch = profile.sum(2) @ samples["epoch"].values / total
        share = profile.sum(1) / total[:, None]
    quantile_by_epoch = np.stack(
        [np.quantile(nll[:, group], BOX_QUANTILES, axis=1).T for group in groups]
    )
    return xr.Dataset(
        {
            "profile": (("cluster", "epoch", "layer"), profile),
            "cluster_of": ("sample", codes),
            "size": ("cluster", np.array([len(group) for group in groups])),
            "final_nll": ("sample", nll[-1]),
            "overall_importance": ("sample", tau),
            "nll_quantile": (("cluster", "quantile"), quantile_by_epoch[:, -1]),
            "nll_quantile_by_epoch": (("cluster", "epoch", "quantile"), quantile_by_epoch),
            "representative": (
                ("cluster", "rank"),
                np.where(nearest >= 0, samples["sample"].values[nearest], -1),
            ),
            "mean_epoch": ("cluster", mean_epoch),
            "layer_share": (("cluster", "layer"), share),
        },
        coords={
            "cluster": np.arange(len(groups)),
            "epoch": samples["epoch"].values,
            "layer": samples["layer"].values,
            "sample": samples["sample"].values,
            "quantile": list(BOX_QUANTILES),
            "rank": np.arange(1, ranks + 1),
        },
    )


def normalise_profiles(beta: np.ndarray) -> np.ndarray:
    """Return log(1 + beta / m_d), with m_d the mean of layer d over samples and epochs.

    Parameters
    ----------
    beta : array [sample, epoch, layer]

    Examples
    --------
    >>> normalise_profiles(np.array([[[0.0, 5.0]], [[2.0, 5.0]]])).round(2).tolist()
    [[[0.0, 0.69]], [[1.1, 0.69]]]
    """
    mean = beta.mean((0, 1), keepdims=True)
    return np.log1p(np.divide(beta, mean, out=np.zeros_like(beta), where=mean > 0))


def _assign_clusters(features: np.ndarray, tau: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return each sample's cluster by k-means, numbered by mean overall importance, low first."""
    require_package("sklearn.cluster", "report")
    from sklearn.cluster import KMeans

    fitted = KMeans(n_clusters=count, n_init=10, random_state=seed).fit(
        features.reshape(len(features), -1)
    )
    labels = np.unique(fitted.labels_)
    means = [tau[fitted.labels_ == label].mean() for label in labels]
    codes = np.empty(len(features), np.int64)
    for new, old in enumerate(labels[np.argsort(means, kind="stable")]):
        codes[fitted.labels_ == old] = new
    return codes


def _nearest_to_centres(features: np.ndarray, groups: list[np.ndarray], ranks: int) -> np.ndarray:
    """Return the positions of the samples nearest to each centre [cluster, rank]; -1 if too few."""
    nearest = np.full((len(groups), ranks), -1, np.int64)
    for c, group in enumerate(groups):
        distance = np.square(features[group] - features[group].mean(0)).sum((1, 2))
        chosen = group[np.argsort(distance, kind="stable")[:ranks]]
        nearest[c, : len(chosen)] = chosen
    return nearest
