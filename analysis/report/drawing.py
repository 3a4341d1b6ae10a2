"""The figures of the report: which figure is drawn from which result, with its caption.

Map: `FIGURES` (the table; those of sections 4 and 5 are in `influence_figures` and
`subset_figures`), `draw_figures`.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import xarray as xr

from sampimp.analysis import figures
from sampimp.analysis.report.contents import Drawn
from sampimp.analysis.report.figure_plan import FigurePlan
from sampimp.analysis.report.sample_images import read_images
from sampimp.analysis.runs import short_name

FIGURES: tuple[FigurePlan, ...] = (
    FigurePlan(
        number="1",
        name="fig01_stability",
        title="Are the same samples important whatever the initialisation?",
        result="stability",
        needs=("rank_correlation",),
        draw=lambda result, cube: figures.draw_stability(result),
        caption="Rank correlation of sample importance between two initialisations, epoch by "
        "epoch, for all layers together (above) and for each layer (below). Left, all "
        "initialisations use one sequence of batches; right, each uses a different one.",
        missing="two seeds of a reference strategy (shuffle or shuffle_by_seed)",
    ),
    FigurePlan(
        number="1b",
        name="fig01b_snapshot_stability",
        title="The same, of all samples at the end of an epoch",
        result="snapshot_stability",
        needs=("rank_correlation",),
        draw=lambda result, cube: figures.draw_stability(result),
        caption="As Fig. 1, for snapshot importance: every sample at the parameters of the end of "
        "an epoch, instead of each at the step that used it.",
        missing="snapshot importance",
        optional=True,
    ),
    FigurePlan(
        number="2",
        name="fig02_decomposition",
        title="When, in which layer and for which class does the learning happen?",
        result="decomposition",
        needs=("importance_by_layer", "importance_by_class"),
        draw=lambda result, cube: figures.draw_decomposition(result, _class_names(cube)),
        caption="Importance of all samples summed, by epoch and layer (above) and by class "
        "within a layer (below). An axis is logarithmic where its values span a factor of ten.",
        missing="a complete run of shuffle",
    ),
    FigurePlan(
        number="3",
        name="fig03_groups",
        title="How unequally is importance shared out?",
        result="importance_groups",
        needs=("importance_by_group", "share", "share_by_layer"),
        draw=lambda result, cube: figures.draw_groups(result),
        caption="Samples ranked by overall importance: the top 10 %, the next 10 % and the other "
        "80 %. Above, what each group contributes by epoch and layer; below, the share of the "
        "importance that it holds in all layers together and in each.",
        missing="a complete run of shuffle, seed 1",
    ),
    FigurePlan(
        number="4",
        name="fig04_nll",
        title="Are hard samples important samples?",
        result="importance_against_nll",
        needs=("rank_correlation", "overall_importance", "final_nll"),
        draw=lambda result, cube: figures.draw_importance_against_nll(result),
        caption="Left, the rank correlation of an epoch's sample importance with the negative "
        "log-likelihood (NLL). Right, each sample's importance over the whole run against its NLL "
        "after the last epoch; both axes are logarithmic.",
        missing="a complete run of shuffle, seed 1, with its NLL",
    ),
    FigurePlan(
        number="5",
        name="fig05_clusters",
        title="Which kinds of samples are there within one class?",
        result="clusters",
        needs=("profile", "size", "nll_quantile"),
        draw=lambda result, cube: figures.draw_clusters(
            result, read_images(cube, result.get("representative"))
        ),
        caption="Samples of one class clustered by the epochs and layers in which they were "
        "important, one cluster per row: samples nearest to its centre, its importance by epoch "
        "(across) and layer (down), and the NLL of its samples after the last epoch.",
        missing="a complete run of shuffle, seed 1, and more samples in a class than clusters",
    ),
    FigurePlan(
        number="7",
        name="fig07_curves",
        title="Does the order of the batches matter?",
        result="strategy_curves",
        needs=("train_error", "test_error"),
        draw=lambda result, cube: figures.draw_curves(result),
        caption="Error on the training samples (left) and on the test samples (right), mean over "
        "the initialisations with one standard error. Red crosses mark where a run diverged.",
        missing="at least one epoch of a run",
    ),
    FigurePlan(
        number="8",
        name="fig08_paths",
        title="Do the strategies take the network to different places?",
        result="parameter_paths",
        needs=("path", "explained_variance_ratio"),
        draw=lambda result, cube: figures.draw_paths(result),
        caption="All parameters of the network after every epoch, projected on their principal "
        "components. All strategies start from one initialisation (ring); large markers are ends.",
        missing="the parameters of the runs (stored unless switched off)",
    ),
    FigurePlan(
        number="9",
        name="fig09_class_nll",
        title="What does each strategy do to each class?",
        result="strategy_curves",
        needs=("class_nll", "train_error", "test_error"),
        draw=lambda result, cube: figures.draw_class_nll(result, _class_names(cube)),
        caption="One block per strategy, all on the same scales: error curves (above) and the mean "
        "NLL of each class of training samples (below), mean over the initialisations.",
        missing="at least one epoch of a run, with its NLL",
    ),
    FigurePlan(
        number="10",
        name="fig10_histogram",
        title="How is overall importance distributed?",
        result="importance_histogram",
        needs=("count", "bin_edge"),
        draw=lambda result, cube: figures.draw_histogram(result),
        caption="Number of samples by importance over the whole run. The horizontal axis is "
        "logarithmic; lines mark the share of samples that lie below.",
        missing="a complete run of shuffle, seed 1",
    ),
)
"""Every figure of the paper. Figures 5 and 6 are of one kind: a class of MNIST, and of CIFAR-10."""

CONVENTION_NAMES = ("sign", "denominator", "smoothing", "damping", "ceiling")
"""Attributes of the results of section 4 that a caption states."""


def draw_figures(
    cube: xr.Dataset,
    results: Mapping[str, xr.Dataset],
    report_progress: Callable[[str], None] = lambda _: None,
    plans: Sequence[FigurePlan] | None = None,
    prefix: str = "figure",
) -> list[Drawn]:
    """Draw every figure for which the results have the data; for the others, state what they need.

    Parameters
    ----------
    cube
        The node that the results are of; its images and class names are used.
    results
        Results of `analyse`.
    report_progress
        Called with a few words before each figure.
    plans
        The figures to draw, such as those of section 4 (`INFLUENCE_FIGURES`). Default: `FIGURES`.
    prefix
        Start of the ids in the figures' SVG; unique in the page.

    Returns
    -------
    list of Drawn
        In the order of `plans`.
    """
    drawn = []
    cube, results = _as_text(cube), {key: _as_text(result) for key, result in results.items()}
    reasons = _reasons(results)
    for plan in FIGURES if plans is None else plans:
        result = results.get(plan.result)
        number, name = plan.number, plan.name
        if number == "5" and short_name(cube).startswith("cifar"):
            number, name = "6", "fig06_clusters"
        if result is None or not _drawable(result, plan.needs):
            if not plan.optional:
                caption = f"Not enough data for this figure. It needs {plan.missing}."
                if plan.result in reasons:
                    caption += f" Reason: {reasons[plan.result]}."
                drawn.append(Drawn(number=number, name=name, title=plan.title, caption=caption))
            continue
        report_progress(f"drawing figure {number}")
        figure = plan.draw(result, cube)
        png = figures.encode(figure, "png")
        figure.set_layout_engine("none")  # the layout is done; the PDF need not repeat it
        drawn.append(
            Drawn(
                number=number,
                name=name,
                title=plan.title,
                caption=_caption(plan, result),
                png=png,
                pdf=figures.encode(figure, "pdf"),
                svg=figures.inline_svg(figure, plan.title, f"{prefix}-{name}"),
            )
        )
    return drawn


def _reasons(results: Mapping[str, xr.Dataset]) -> dict[str, str]:
    """Return why results are missing, by key, in the words of `analyse`."""
    lines = results["claims"].attrs.get("left_out", "") if "claims" in results else ""
    pairs = (line.partition(": ") for line in str(lines).splitlines())
    return {key: reason.rstrip(".") for key, _, reason in pairs}


def _class_names(cube: xr.Dataset) -> list[str]:
    """Return the names of the cube's classes; none if it has none."""
    return [_escaped(str(name)) for name in cube.attrs.get("class_names", ())]


def _escaped(name: str) -> str:
    r"""Return a name that matplotlib shows as it is: between $ and $ it would read mathematics.

    Examples
    --------
    >>> _escaped("$100")
    '\\$100'
    """
    return name.replace("$", r"\$")


def _as_text(dataset: xr.Dataset) -> xr.Dataset:
    """Return a data set whose layers and targets are shown as they are."""
    labels = {
        name: [_escaped(str(value)) for value in dataset[name].values]
        for name in ("layer", "target")
        if name in dataset.coords and any("$" in str(value) for value in dataset[name].values)
    }
    return dataset.assign_coords(labels) if labels else dataset


def _drawable(result: xr.Dataset, needs: Sequence[str]) -> bool:
    """Return whether the result has the variables, each with a finite value."""
    return all(
        name in result and bool(np.isfinite(result[name].values.astype(float)).any())
        for name in needs
    )


def _caption(plan: FigurePlan, result: xr.Dataset) -> str:
    """Return the caption: what is shown, of which class, by which method, from which source."""
    parts = [plan.caption]
    if "class_name" in result.attrs:
        parts.append(f"Class: {result.attrs['class_name']}.")
    for key in ("method", *CONVENTION_NAMES, "source"):
        if key in result.attrs:
            parts.append(f"{key.capitalize()}: {str(result.attrs[key]).rstrip('.')}.")
    return " ".join(parts)
