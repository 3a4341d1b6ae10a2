"""The report of a study: all results, all figures, and one self-contained HTML page.

`write_report` opens the cube of a study, computes the results of each data set, and writes under
`OUT/analysis/NODE/` the results (Zarr, one group per result) and the figures (PNG and PDF), and
last `OUT/analysis/report.html`. Where a result cannot be computed (parameters not stored, too few
seeds, a study that still runs), the page gives the reason in its place. `OUT` is a folder or an
`s3://` URL.

    python -m sampimp.analysis.report OUT [--scheduler threads|distributed|ray]

Map: `write` (`write_report`, `find_cubes`), `contents` (`Report`, `Section` and their tables). The
first screen: `findings` (one sentence), `sample_strip` and `sample_rows` (the most and the least
important samples), `strategy_dots`. Figures: `drawing` (`FIGURES`, `draw_figures`: which figure
from which result), `influence_figures` and `subset_figures` (those of sections 4 and 5),
`sample_images`. Text: `method_table` and `subset_table` (scores of section 4 and errors of section
5), `trial_facts` (machine, versions and fingerprints of the trials), `page_text` (no path of the
machine). `page` (`render_page`, with the Jinja templates and `page.css` in `templates/`),
`terminal` (`print_summary`), `cli` (`main`, the command line).
"""

from typing import TYPE_CHECKING

from sampimp._lazy import import_on_use

if TYPE_CHECKING:
    from sampimp.analysis.report.cli import main
    from sampimp.analysis.report.contents import Report, Section
    from sampimp.analysis.report.page import render_page
    from sampimp.analysis.report.terminal import print_summary
    from sampimp.analysis.report.write import write_report

__all__ = ["Report", "Section", "main", "print_summary", "render_page", "write_report"]

_HOMES = {
    "Report": "sampimp.analysis.report.contents",
    "Section": "sampimp.analysis.report.contents",
    "main": "sampimp.analysis.report.cli",
    "print_summary": "sampimp.analysis.report.terminal",
    "render_page": "sampimp.analysis.report.page",
    "write_report": "sampimp.analysis.report.write",
}

# So that `main --help` needs neither matplotlib nor scikit-learn.
__getattr__, __dir__ = import_on_use(__name__, _HOMES)
