"""Reading the study: lazy, labelled results over the cube that `sampimp.open_cube` returns.

Two layers. `sampimp.analysis.kernels` is NumPy on last axes and knows no names; the modules over
it take
one node of the cube (an `xarray.Dataset`) and return a labelled, uncomputed `xarray.Dataset` that
says in its `attrs` how it was made, which figure it is, and from which section of the paper:
"Sample Importance in Training Deep Neural Networks" (Gao & Jojic, 2017),
https://openreview.net/forum?id=r1IRctqxg

Map: `study` (every result in one pass, and the table of them), `stability` (Fig. 1),
`decomposition` (Figs. 2, 3, 10), `difficulty` (Fig. 4), `clusters` (Figs. 5, 6), `curves` (Figs. 7,
9), `paths` (Fig. 8), `claims` (what of the paper holds), `runs` (which trials are there),
`kernels`. Drawing is in `figures` and computes nothing; `report` puts it all on one page.
"""

if (
    __name__ == "analysis"
):  # imported from a checkout's folder: `python -m analysis.` and old imports
    from sampimp._renamed import alias_package

    alias_package("analysis", "sampimp.analysis")
