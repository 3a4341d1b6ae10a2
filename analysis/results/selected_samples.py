"""Who is kept: the samples that one rule selects, by class, difficulty and importance.

Map: `selected_samples`.
"""

from typing import Any

import numpy as np
import xarray as xr

from sampimp.analysis.kernels import BOOTSTRAP_SEED
from sampimp.analysis.runs import (
    codes_of_labels,
    label_result,
    lazy,
    overall_importance,
    place_of,
    require,
)
from sampimp.analysis.subset_runs import RANDOM_RULES, SUBSET, subset_run
from sampimp.errors import MissingDataError
from sampimp.schema import ALL_SAMPLES
from sampimp.store.subset_choice import CHOSEN

SIZE, BUDGET = 0.3, "steps"
"""The subset that is shown by default: the one nearest to this size, at equal steps."""

EXAMPLES = 16
"""Number of kept samples, and of those left out, that are shown (arbitrary)."""


def selected_samples(
    cube: xr.Dataset,
    *,
    rule: str | None = None,
    size: float = SIZE,
    budget: str = BUDGET,
    examples: int = EXAMPLES,
) -> xr.Dataset:
    """Return which samples a rule selects, and what distinguishes them.

    Parameters
    ----------
    cube
        One node of the cube.
    rule
        Default: the one that the validation split chose; without a choice, the first one that is
        no baseline.
    size
        Share of the samples; the nearest one at which the rule was trained is taken.
    budget
        steps or epochs: the choice and the parameters of rules can differ between them.
    examples
        Number of samples drawn at random from those that are kept, and from those left out.

    Returns
    -------
    Dataset
        kept(sample), of the lowest training seed; overall_importance(sample) and
        final_nll(sample), lazy; kept_count(label) and class_size(label); position(group, rank),
        places in the training set for `group` kept and left, -1 where there are fewer, and
        training_label(group, rank). The attributes rule, variant, size, budget and
        training_seed name the training.

    Raises
    ------
    MissingDataError
        There are no trainings on subsets, or not by this rule and budget.

    Examples
    --------
    >>> from sampimp.analysis.example_cube import example_cube, with_subsets
    >>> result = selected_samples(with_subsets(example_cube()))
    >>> result.attrs["rule"], result.attrs["variant"], int(result["kept"].sum())
    ('chosen', 'tau-high', 36)

    References
    ----------
    Gao & Jojic (2017), section 5.
    """
    run = subset_run(require(cube, "importance", "nll"))
    rule, at = _nearest(run, rule, size, budget, place_of(cube))
    kept = run["selected"].sel(at | {"rule": rule}, drop=True).compute()
    labels, codes = codes_of_labels(cube)
    position = _draw_examples(kept.values, examples)
    coords = {"label": labels, "group": ["kept", "left"], "rank": np.arange(examples)}
    result = xr.Dataset(
        {
            "kept": ("sample", kept.values),
            "overall_importance": overall_importance(lazy(run["importance"])),
            "final_nll": lazy(run["nll"]).isel(epoch=-1, drop=True),
            "kept_count": ("label", np.bincount(codes[kept.values], minlength=len(labels))),
            "class_size": ("label", np.bincount(codes, minlength=len(labels))),
            "position": (("group", "rank"), position),
            "training_label": (("group", "rank"), cube["label"].values[position]),
        },
        {name: (name, values) for name, values in coords.items()},
    )
    result = result.drop_vars(set(result.coords) - {*coords, "sample"})
    variant = str(run["subset_variant"].sel(rule=rule, size=at["size"], budget=budget).item())
    label_result(
        result,
        cube,
        method=f"scores of the run {run.attrs['run']}; images drawn at random from both groups",
        figure="19",
        section="5",
        variables=_VARIABLES,
    )
    result.attrs |= {"rule": rule, "variant": variant, **at}
    return result


_VARIABLES = {
    "kept": ("1", "whether the rule selects the sample"),
    "overall_importance": ("parameter^2", "overall importance"),
    "final_nll": ("nat", "NLL at the end of the last epoch"),
    "kept_count": ("1", "samples of the class that are kept"),
    "class_size": ("1", "samples of the class"),
    "position": ("1", "place in the training set of an example; -1 for none"),
    "training_label": ("1", "label of the example"),
}


def _nearest(
    run: xr.Dataset, rule: str | None, size: float, budget: str, place: str
) -> tuple[str, dict[str, Any]]:
    """Return the rule, and size, budget and seed of the training that is shown."""
    trained = run["subset_variant"].sel(budget=budget) != ""
    rules = [
        str(name)
        for name in run["rule"].values
        if name != ALL_SAMPLES and bool(trained.sel(rule=name).any())
    ]
    if rule is None:
        ranked = sorted(rules, key=lambda name: (name != CHOSEN, name in RANDOM_RULES))
        rule = ranked[0] if ranked else CHOSEN
    if rule not in rules:
        raise MissingDataError(
            f"trainings on subsets by the rule {rule}, budget {budget}",
            f"those by {', '.join(rules) or 'no rule'}",
            place,
            f"train on its subsets: {SUBSET} --rules {rule}",
        )
    sizes = run["size"].values[trained.sel(rule=rule).transpose("size").values]
    nearest = float(sizes[np.abs(sizes - size).argmin()])
    masks = run["selected"].sel(rule=rule, size=nearest, budget=budget)
    for seed in sorted(run["training_seed"].values.tolist()):
        if bool(masks.sel(training_seed=seed).any()):
            break
    return rule, {"size": nearest, "budget": budget, "training_seed": seed}


def _draw_examples(kept: np.ndarray, count: int) -> np.ndarray:
    """Return places of samples that are kept, and of those that are not (2, count); -1 for none."""
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    position = np.full((2, count), -1)
    for row, mask in zip(position, (kept, ~kept), strict=True):
        members = np.flatnonzero(mask)
        drawn = generator.choice(members, min(count, len(members)), replace=False)
        row[: len(drawn)] = drawn
    return position
