"""One run of a study as a table with one row a sample, for pandas and the tools that read it.

Importance, its course over layers and epochs, and what the NLL of each epoch says about the
training of the sample: p(label) = exp(-NLL), so that *confidence* and *variability* of a data map
are exact, for any number of classes. Whether the sample was classified correctly is not stored: of
K > 2 classes the label has the largest probability for certain only where p(label) > 1/2, which is
a lower bound.

Map: `to_frame`.
"""

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from sampimp.analysis.runs import class_name, overall_importance, place_of, started
from sampimp.errors import ConfigError, MissingDataError
from sampimp.schema import ALL_SAMPLES, REFERENCE_SEED, REFERENCE_STRATEGY

if TYPE_CHECKING:
    import pandas as pd

_Column = tuple[np.ndarray, str]
"""Values of each sample, and their unit."""


def to_frame(
    cube: xr.Dataset | xr.DataTree,
    *,
    strategy: str = REFERENCE_STRATEGY,
    seed: int = REFERENCE_SEED,
) -> "pd.DataFrame":
    """Return a run of a study as a pandas frame with one row a sample.

    Parameters
    ----------
    cube
        One node of `sampimp.open_cube`, or the tree of a study with a single one.
    strategy, seed
        The run. By default the reference run, `shuffle`, seed 1.

    Returns
    -------
    pandas.DataFrame
        With the index `sample` and these columns, where the cube has what they are made of:

        label, class_name, file
            Class, its name, and the sample's file.
        importance
            Overall importance tau, the sum over layers and epochs, parameter².
        importance_LAYER, share_LAYER
            The sum over epochs, and its share of tau.
        mean_epoch
            Mean of the epochs, each weighted by the sample's importance in it.
        final_nll
            Negative log-likelihood at the end of the last epoch, nat.
        confidence, variability
            Mean and standard deviation of p(label) = exp(-NLL) over the ends of the epochs.
        correctness_bound
            Share of the epochs at whose end p(label) > 1/2: the label then has the largest
            probability. With two classes this is the share of correct epochs, with more a lower
            bound of it.
        influence_TARGET
            Influence on a target, summed over epochs and layers; removing the sample changes the
            target by minus this, to first order.
        selected_RULE
            Share of a rule's trainings on subsets (over sizes, budgets and seeds) that used the
            sample.

        `attrs` holds the units of the columns (`units`), the run (`strategy`, `seed`), the data set
        and its digest, the folder of the trial with its fingerprint (`trial`), the number of epochs
        and the attributes of importance. All are plain values, so that `to_parquet` keeps them. Of
        a run that diverged, the epochs before count; `diverged_epoch` is in the attrs.

    Raises
    ------
    ConfigError
        The tree has several nodes, or the study no such strategy or seed.
    MissingDataError
        The run is not committed, or the cube has no importance or no NLL.

    Examples
    --------
    >>> from sampimp.analysis.example_cube import example_cube
    >>> frame = to_frame(example_cube())
    >>> frame.nlargest(2, "importance")[["class_name", "mean_epoch"]].round(1)
           class_name  mean_epoch
    sample
    91          horse         5.2
    87            cat         5.2
    >>> frame.attrs["units"]["importance"]
    'parameter^2'

    References
    ----------
    Gao & Jojic (2017), section 2; Swayamdipta et al. (2020), Dataset Cartography, section 2, for
    confidence and variability.
    """
    import pandas as pd  # a dependency of xarray; here, so that an analysis does not import it

    node = _single_node(cube)
    missing = [name for name in ("importance", "nll") if name not in node]
    if missing:
        raise MissingDataError(
            expected="a cube with importance and nll",
            got=f"none with {', '.join(missing)}; it has {', '.join(map(str, node.data_vars))}",
            where=place_of(node),
            todo="pass a node of sampimp.open_cube, with these variables; a recording of a loop of "
            "yours has no NLL, and its own to_dataframe()",
        )
    run = _select_run(node, strategy, seed)
    columns = {**_identity(run), **_importance(run), **_likelihood(run), **_further(run)}
    frame = pd.DataFrame(
        {name: values for name, (values, _) in columns.items()},
        index=pd.Index(run["sample"].values, name="sample"),
    )
    diverged = float(run.get("diverged_epoch", np.nan))
    scale = {key: value for key, value in run["importance"].attrs.items() if key != "units"}
    frame.attrs = {
        "units": {name: unit for name, (_, unit) in columns.items()},
        "dataset": str(node.attrs.get("dataset", "")),
        "digest": str(node.attrs.get("digest", "")),
        "strategy": strategy,
        "seed": int(seed),
        "trial": str(run["trial"].values) if "trial" in run else "",
        **({} if np.isnan(diverged) else {"diverged_epoch": int(diverged)}),
        **{key: value for key, value in scale.items() if key != "long_name"},
        "epochs": run.sizes["epoch"],
    }
    return frame


def _single_node(cube: xr.Dataset | xr.DataTree) -> xr.Dataset:
    """Return the data set of a node, or of the only node of a tree."""
    if isinstance(cube, xr.Dataset):
        return cube
    if cube.has_data:
        return cube.to_dataset()
    nodes = [node for node in cube.descendants if node.has_data]
    if len(nodes) == 1:
        return nodes[0].to_dataset()
    names = [node.relative_to(cube) for node in nodes]
    raise ConfigError(
        expected="one node of the cube, the runs of one data set",
        got=f"a tree with {len(nodes)} nodes: {', '.join(names) or 'none'}",
        where="to_frame",
        todo=f"choose one: to_frame(tree[{names[0]!r}])" if names else "run the study first",
    )


def _select_run(cube: xr.Dataset, strategy: str, seed: int) -> xr.Dataset:
    """Return a committed run, its started epochs alone."""
    for name, value in (("strategy", strategy), ("seed", seed)):
        values = np.atleast_1d(cube[name].values).tolist() if name in cube.coords else []
        if name not in cube.dims or value not in values:
            raise ConfigError(
                expected=f"a {name} of the cube: {', '.join(map(str, values)) or 'it has none'}",
                got=f"{value}" if name in cube.dims else f"a cube without the dimension {name}",
                where=place_of(cube),
                todo=f"pass one of them as {name}"
                if name in cube.dims
                else "pass a node of sampimp.open_cube, and choose the run by strategy and seed",
            )
    if not started(cube).sel(strategy=strategy, seed=seed):
        raise MissingDataError(
            expected=f"a committed run of {strategy}, seed {seed}",
            got="one that is missing or not finished",
            where=place_of(cube),
            todo="run the study's own command again, and open the cube again; `sampimp status OUT` "
            "shows which runs are there",
        )
    run = cube.sel(strategy=strategy, seed=seed)
    diverged = run.get("diverged_epoch", np.nan)
    run = run if np.isnan(diverged) else run.sel(epoch=run["epoch"] < diverged)
    if not run.sizes["epoch"]:
        raise MissingDataError(
            expected="a run with an epoch before it diverged",
            got=f"{strategy}, seed {seed}, which diverged in its first epoch",
            where=place_of(cube),
            todo="choose another run, or train with a smaller learning rate",
        )
    return run


def _identity(run: xr.Dataset) -> dict[str, _Column]:
    """Return what names the sample and its class."""
    columns: dict[str, _Column] = {}
    if "label" in run:
        labels = run["label"].values
        names = {label: class_name(run, int(label)) for label in np.unique(labels)}
        columns["label"] = labels, "1"
        columns["class_name"] = np.array([names[label] for label in labels], dtype=object), ""
    if "file" in run.coords:
        columns["file"] = run["file"].values.astype(object), ""
    return columns


def _importance(run: xr.Dataset) -> dict[str, _Column]:
    """Return importance, by layer too, and its mean epoch; NaN where an epoch lacks the sample."""
    beta = run["importance"].transpose("epoch", "layer", "sample")
    by_layer = beta.sum("epoch", skipna=False, dtype=np.float64)
    by_epoch = beta.sum("layer", skipna=False, dtype=np.float64)
    by_layer, by_epoch = (
        xr.Dataset({"layer_sum": by_layer, "epoch_sum": by_epoch}).compute().values()
    )
    tau = overall_importance(beta).values
    whole = np.where(tau > 0, tau, np.nan)
    layers = run["layer"].values.tolist()
    mean_epoch = run["epoch"].values @ by_epoch.values / whole
    return {
        "importance": (tau, "parameter^2"),
        **{
            f"importance_{layer}": (values, "parameter^2")
            for layer, values in zip(layers, by_layer.values, strict=True)
        },
        **{
            f"share_{layer}": (values / whole, "1")
            for layer, values in zip(layers, by_layer.values, strict=True)
        },
        "mean_epoch": (mean_epoch, "epoch"),
    }


def _likelihood(run: xr.Dataset) -> dict[str, _Column]:
    """Return what the NLL at the ends of the epochs says about the training of each sample."""
    nll = run["nll"].transpose("epoch", "sample").values.astype(np.float64)
    likelihood = np.exp(-nll)
    return {
        "final_nll": (nll[-1], "nat"),
        "confidence": (likelihood.mean(0), "1"),
        "variability": (likelihood.std(0), "1"),
        "correctness_bound": ((nll < np.log(2)).mean(0), "1"),
    }


def _further(run: xr.Dataset) -> dict[str, _Column]:
    """Return influence by target and selection by rule, where the study has them for the run."""
    columns: dict[str, _Column] = {}
    if "influence_total" in run:
        totals = run["influence_total"].transpose("target", "sample").values
        for target, unit, values in zip(
            run["target"].values.tolist(), run["target_units"].values, totals, strict=True
        ):
            if not np.isnan(values).all():
                columns[f"influence_{target}"] = values, f"{unit} per unit of sample weight"
    if "selected" in run:
        selected = run["selected"].compute()
        trained = selected.any("sample")
        trainings = ("size", "budget", "training_seed")
        share = selected.sum(trainings) / trained.sum(trainings)
        for rule in run["rule"].values.tolist():
            if rule != ALL_SAMPLES and bool(trained.sel(rule=rule).any()):
                columns[f"selected_{rule}"] = share.sel(rule=rule).values, "1"
    return columns
