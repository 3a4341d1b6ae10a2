"""The ten figures of the paper, drawn from result datasets; drawing computes nothing.

Each function takes the Dataset that the function of the same subject in `sampimp.analysis.results`
returns, and returns a `matplotlib.figure.Figure`. `pyplot`, which holds global state, is not used.
Any number of layers, classes, epochs, strategies and seeds can be drawn. Importance is in
parameter².

Source: Gao & Jojic, "Sample Importance in Training Deep Neural Networks" (2017).

Map: `draw_stability` (Fig. 1), `draw_decomposition` (2), `draw_groups` (3),
`draw_importance_against_nll` (4) and `draw_histogram` (10), of the reference runs, are in
`reference_runs`; `draw_clusters` (5 and 6) is in `class_clusters`; `draw_curves` (7), `draw_paths`
(8) and `draw_class_nll` (9) are in `strategy_runs`. `style` has colours, line styles and `encode`
(PNG, PDF), `axes` the parts that figures share.
"""

from sampimp._renamed import moved
from sampimp.errors import require_package

require_package("matplotlib", "report")

from sampimp.analysis.figures.class_clusters import draw_clusters  # noqa: E402
from sampimp.analysis.figures.reference_runs import (  # noqa: E402
    draw_decomposition,
    draw_groups,
    draw_histogram,
    draw_importance_against_nll,
    draw_stability,
)
from sampimp.analysis.figures.strategy_runs import (  # noqa: E402
    draw_class_nll,
    draw_curves,
    draw_paths,
)
from sampimp.analysis.figures.style import encode, strategy_name, strategy_style  # noqa: E402

__all__ = [
    "draw_class_nll",
    "draw_clusters",
    "draw_curves",
    "draw_decomposition",
    "draw_groups",
    "draw_histogram",
    "draw_importance_against_nll",
    "draw_paths",
    "draw_stability",
    "encode",
    "strategy_name",
    "strategy_style",
]

__getattr__ = moved(__name__)
