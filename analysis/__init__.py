"""Results of a study: labelled datasets, claims, figures and the report.

Two layers. `sampimp.analysis.kernels` is NumPy on last axes, without names. The functions of
`sampimp.analysis.results` take one node of the cube that `sampimp.open_cube` returns (an
`xarray.Dataset`) and return a labelled, lazy `xarray.Dataset`, whose attributes state the method,
the figure and the section of the paper: "Sample Importance in Training Deep Neural Networks"
(Gao & Jojic, 2017), https://openreview.net/forum?id=r1IRctqxg

Map: `results` (a module for each subject; `results.analyse` computes all of them), `claims` (the
paper's sentences, and the verdict on each), `figures` (drawing; it computes nothing), `report`
(results, figures and one HTML page); `runs` (trials and sums of a cube), `influence_runs` (runs
with influence, and removals), `removal_prediction` (`predicted_removal`), `sample_frame`
(`to_frame`), `kernels`, `pca` and `prediction` (array arithmetic), `schedulers` (where dask
computes), `example_cube` (a synthetic cube).
"""

if __name__ == "analysis":
    # Imported from a checkout's folder: `python -m analysis.report`, or an old import path.
    from sampimp._renamed import alias_package

    alias_package("analysis", "sampimp.analysis")
