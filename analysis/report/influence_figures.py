"""The figures of section 4, influence on the final model; they are no figures of the paper.

Each caption says what a reader sees; signs, units, smoothing, damping, denominator and ceiling
follow from the result's attributes.

Map: `INFLUENCE_FIGURES`.
"""

import xarray as xr
from matplotlib.figure import Figure

from sampimp.analysis import figures
from sampimp.analysis.influence_runs import INFLUENCE, RETRAIN, SINGLES
from sampimp.analysis.report.figure_plan import FigurePlan
from sampimp.analysis.report.sample_images import read_images
from sampimp.analysis.runs import class_name


def _draw_influential_samples(result: xr.Dataset, cube: xr.Dataset) -> Figure:
    names, target_images = {}, {}
    for target in figures.shown_targets([str(name) for name in result["target"].values]):
        kind, _, number = target.partition(":")
        if kind == "class":
            names[target] = f"class {class_name(cube, int(number))}"
            continue
        names[target] = f"test sample {number}"
        if "test_image" in cube:
            test_sample = cube.isel(test_sample=int(number))
            target_images[target] = test_sample["test_image"].values
            names[target] += f":\n{class_name(cube, int(test_sample['test_label']))}"
    return figures.draw_influential_samples(
        result,
        read_images(cube, result["position"]),
        names,
        [str(name) for name in cube.attrs.get("class_names", ())],
        target_images,
    )


_BOTH = f"{INFLUENCE} --targets {SINGLES}, {RETRAIN} --targets {SINGLES}"

INFLUENCE_FIGURES: tuple[FigurePlan, ...] = (
    FigurePlan(
        number="12",
        name="fig12_influence",
        title="What did each epoch and layer do to the final model?",
        result="influence_by_layer",
        needs=("mean_importance", "mean_influence"),
        draw=lambda result, cube: figures.draw_influence_by_layer(result),
        caption="Left, importance: how far a training step moves a layer's parameters because of a "
        "sample. Right, influence: the derivative of the target at the end of training by the "
        "weight of a sample's loss in that epoch, through that layer, exact up to smoothing; "
        "its absolute value. Both are means over the samples. Influence functions have one number "
        "for each sample, without epochs and layers.",
        missing=f"influence: {INFLUENCE}",
    ),
    FigurePlan(
        number="13",
        name="fig13_removals",
        title="Does training without a sample do what influence predicts?",
        result="removal_effects",
        needs=("predicted", "actual"),
        draw=lambda result, cube: figures.draw_removal_effects(result),
        caption="Each point is a removal of one sample, or of a random subset, and each panel one "
        "kind of removals. Blue, minus the influence of the removed samples against the actual "
        "effect; grey squares, the actual effect once more, by a retraining from a jittered start. "
        "Where the squares scatter, the truth does not agree with itself, and no prediction can "
        "agree with it. The line is equality.",
        missing=f"influence and retrainings of the same targets: {_BOTH}",
    ),
    FigurePlan(
        number="14",
        name="fig14_methods",
        title="Which method predicts the effects of removals, and how well could any?",
        result="method_scores",
        needs=("score",),
        draw=lambda result, cube: figures.draw_method_scores(result),
        caption="Scores of all methods on one run: unrolled influence, its last and its first "
        "epoch alone, and influence at a fixed point, -C⁻¹ g (eq. 4). The dashed line is the "
        "ceiling, the score to expect of a prediction that is as good as one retraining. Methods "
        "without a sign, such as importance, are in Fig. 16.",
        missing=f"influence and retrainings of the same targets: {_BOTH}",
    ),
    FigurePlan(
        number="15",
        name="fig15_left",
        title="How much of each epoch's importance is left at the end?",
        result="influence_by_layer",
        needs=("mean_arriving", "share_left"),
        draw=lambda result, cube: figures.draw_share_left(result),
        caption="Left, arriving importance: what a sample's importance in an epoch and layer has "
        "become in the final parameters of all layers. Right, its sum over the samples divided by "
        "that of importance: below 1 training forgot, above 1 it amplified what the epoch did.",
        missing=f"probes: {INFLUENCE} --targets probe:16",
    ),
    FigurePlan(
        number="16",
        name="fig16_sizes",
        title="Does importance predict how much a removal changes?",
        result="removal_sizes",
        needs=("rank_correlation", "actual_size"),
        draw=lambda result, cube: figures.draw_removal_sizes(result),
        caption="Above, a sample's overall importance against the mean absolute effect of its "
        "removal; the line ends at the effect by another retraining. Below, the rank correlation "
        "of importance and of other sizes with that effect, with its ceiling.",
        missing=f"retrainings without single samples: {RETRAIN} --targets {SINGLES}",
    ),
    FigurePlan(
        number="17",
        name="fig17_images",
        title="Which training images help, and which harm?",
        result="influential_samples",
        needs=("value",),
        draw=_draw_influential_samples,
        caption="For the test samples of each class, and for single ones (in black), the training "
        "images with the lowest influence on their negative log-likelihood (helpful) and with the "
        "highest (harmful). Below an image, its class, and the size of its influence as a share of "
        "the largest in the row.",
        missing=f"the influence on classes or test samples: {INFLUENCE} --targets class "
        "sample:0..31",
    ),
)
"""Drawn where influence was computed for any run of the data set."""
