"""The ten figures of the paper, six of section 4 and two of section 5; drawing computes nothing.

Each function takes the Dataset that the function of the same subject in `sampimp.analysis.results`
returns, and returns a `matplotlib.figure.Figure`. `pyplot`, which holds global state, is not used.
Any number of layers, classes, epochs, strategies and seeds can be drawn. Importance is in
parameter².

Source: Gao & Jojic, "Sample Importance in Training Deep Neural Networks" (2017).

Map: `draw_stability` (Fig. 1), `draw_decomposition` (2), `draw_groups` (3),
`draw_importance_against_nll` (4) and `draw_histogram` (10), of the reference runs, are in
`reference_runs`; `draw_clusters` (5 and 6) is in `class_clusters`; `draw_curves` (7), `draw_paths`
(8) and `draw_class_nll` (9) are in `strategy_runs`. Of section 4, `draw_influence_by_layer` (12)
and `draw_share_left` (15) are in `influence_by_epoch`, `draw_removal_effects` (13),
`draw_method_scores` (14) and `draw_removal_sizes` (16) in `removals`, and
`draw_influential_samples` (17) in `influential_images`; of section 5, `draw_subset_errors` (18) and
`draw_selected_samples` (19) in `subsets`. `style` has colours, line styles and
`encode` (PNG, PDF), `axes` the parts that figures share, `pictures` images of samples in one PNG,
`inline_svg` figures as SVG for a page.
"""

from sampimp._renamed import moved
from sampimp.errors import require_package

require_package("matplotlib", "report")

from sampimp.analysis.figures.axes import ticks_between  # noqa: E402
from sampimp.analysis.figures.class_clusters import draw_clusters  # noqa: E402
from sampimp.analysis.figures.influence_by_epoch import (  # noqa: E402
    draw_influence_by_layer,
    draw_share_left,
)
from sampimp.analysis.figures.influential_images import (  # noqa: E402
    draw_influential_samples,
    shown_targets,
)
from sampimp.analysis.figures.inline_svg import dark_colors, inline_svg  # noqa: E402
from sampimp.analysis.figures.pictures import encode_pictures  # noqa: E402
from sampimp.analysis.figures.reference_runs import (  # noqa: E402
    draw_decomposition,
    draw_groups,
    draw_histogram,
    draw_importance_against_nll,
    draw_stability,
)
from sampimp.analysis.figures.removals import (  # noqa: E402
    draw_method_scores,
    draw_removal_effects,
    draw_removal_sizes,
    name_kind,
)
from sampimp.analysis.figures.strategy_runs import (  # noqa: E402
    draw_class_nll,
    draw_curves,
    draw_paths,
)
from sampimp.analysis.figures.style import encode, strategy_name, strategy_style  # noqa: E402
from sampimp.analysis.figures.subsets import (  # noqa: E402
    BUDGET_NAMES,
    draw_selected_samples,
    draw_subset_errors,
)

__all__ = [
    "BUDGET_NAMES",
    "dark_colors",
    "draw_class_nll",
    "draw_clusters",
    "draw_curves",
    "draw_decomposition",
    "draw_groups",
    "draw_histogram",
    "draw_importance_against_nll",
    "draw_influence_by_layer",
    "draw_influential_samples",
    "draw_method_scores",
    "draw_paths",
    "draw_removal_effects",
    "draw_removal_sizes",
    "draw_selected_samples",
    "draw_share_left",
    "draw_stability",
    "draw_subset_errors",
    "encode",
    "encode_pictures",
    "inline_svg",
    "name_kind",
    "shown_targets",
    "strategy_name",
    "strategy_style",
    "ticks_between",
]

__getattr__ = moved(__name__)
