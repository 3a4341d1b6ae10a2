"""The figures of section 5, trainings on subsets; they are no figures of the paper.

Map: `SUBSET_FIGURES`.
"""

from sampimp.analysis import figures
from sampimp.analysis.report.figure_plan import FigurePlan
from sampimp.analysis.report.sample_images import read_images
from sampimp.analysis.subset_runs import SUBSET

SUBSET_FIGURES: tuple[FigurePlan, ...] = (
    FigurePlan(
        number="18",
        name="fig18_subsets",
        title="How small a subset suffices?",
        result="subset_errors",
        needs=("error",),
        draw=lambda result, cube: figures.draw_subset_errors(result),
        caption="Test error after training on a subset alone, by the share of the samples that is "
        "kept. Left, with as many updates as all samples make in the study's epochs; right, with "
        "as many passes over the subset. Bars are one standard error over training seeds. Thick "
        "and black, the rule that a validation split chose at each size, without a test label.",
        missing=f"trainings on subsets: {SUBSET}",
    ),
    FigurePlan(
        number="19",
        name="fig19_selected",
        title="Who is kept?",
        result="selected_samples",
        needs=("kept_count",),
        draw=lambda result, cube: figures.draw_selected_samples(
            result,
            read_images(cube, result["position"]),
            [str(name) for name in cube.attrs.get("class_names", ())],
        ),
        caption="The samples that one rule keeps, and those that it leaves out, in the training "
        "with the lowest seed. Left, in the plane of NLL after the last epoch and overall "
        "importance, both logarithmic; right, the classes among them, beside those of the data.",
        missing=f"trainings on subsets: {SUBSET}",
    ),
)
"""Drawn where any run was followed by trainings on subsets."""
