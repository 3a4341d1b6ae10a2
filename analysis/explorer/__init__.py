"""The explorer of samples: a folder of static files that a browser opens without a server.

`write_explorer` reads the cube of a study and writes `OUT/analysis/explore`: a page, and data as
scripts, each of which hands one JSON object to the page. Arrays are base64 of little-endian bytes;
images are sprites. A part is named by a digest of what it is made from, so that one more trial
writes its own parts alone.

    sampimp explore OUT [--to FOLDER] [--runs shuffle-seed1 rand-seed2] [--watch]

Map: `explorer_writer` (`write_explorer`), `choice` (what is asked for), `explored_study` (the runs
of each node, and what their parts are made from), `thinning` (what is left out of a large study),
`node_parts` (the parts of one node), `run_columns` (numbers of each sample), `histories` (their
course over the epochs), `sprites` (images), `epoch_blocks` (reading, with damage named),
`explorer_folder` (the files), `growing_study` (`--watch`), `explore` (`main`, the command line);
`application/dist` (the page).
"""

from typing import TYPE_CHECKING

from sampimp._lazy import import_on_use

if TYPE_CHECKING:
    from sampimp.analysis.explorer.explorer_writer import Explorer, write_explorer

__all__ = ["Explorer", "write_explorer"]

_HOMES = {
    "Explorer": "sampimp.analysis.explorer.explorer_writer",
    "write_explorer": "sampimp.analysis.explorer.explorer_writer",
}

__getattr__, __dir__ = import_on_use(__name__, _HOMES)
