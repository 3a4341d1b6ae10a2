"""The store of a study: one folder or bucket with its plan, data sets, records and results.

    OUT/plans/0001.json                  plan: data sets, grid, configuration; the highest counts
    OUT/study.json                       a copy of the newest plan
    OUT/datasets/mnist.zarr              values before scaling, labels, digest of each chunk
    OUT/trials/mnist-nlo-seed3-1f0c9a2b/ one trial: `sampimp.store.record` lists its files
    OUT/influence/ID/                    influence of a run, or its retrainings, as a record
    OUT/snapshots.json                   which epochs have snapshot importance, with digests
    OUT/analysis/                        results, figures, report.html
    OUT/consolidated/mnist.zarr          all trials in one sharded store, if requested
    OUT/withdrawn/                       damaged plans that were set aside

Map, from the lowest level to the highest:

=================== ========================================================================
`links`             symbolic links out of a folder are refused
`s3_errors`         turns exceptions of obstore into readable errors
`aws_credentials`   credentials for S3: variables, keys, single sign-on, roles
`buckets`           opening a folder or an S3 bucket with obstore
`location`          `Folder`: a folder or bucket as bytes and JSON
`zarr_arrays`       Zarr groups and arrays; the only module that imports zarr
`attempts`          who may write a trial, and what happens to a late writer
`variables`         `StoredVariable`: reads a trial's variable and verifies each chunk
`integrity`         digests of a record, search for damage, withdrawal
`record`            `TrialRecord`: writes one attempt: record, checkpoints, commit
`influence_layouts` shapes and identity of the records of influence and retraining
`datasets`          stored data sets
`snapshots`         stored snapshot importance
`plan`              `Plan`: which trials there are, and which of them are committed
`plan_files`        numbered plans: many drivers of one study, none of whose grids is lost
`influence_records` committed influence records, matched with their runs
`lazy_arrays`       variables of many runs as one dask array
`influence_cube`    influence and the squares of probes in the cube
`fixed_point_cube`  influence at the fixed point (-H^-1 g) in the cube
`effect_cube`       effects of removals in the cube
`cube`              `open_cube`: a study as one lazy, labelled cube
`sharded`           `consolidate`: a finished study as one sharded store per data set
=================== ========================================================================
"""

from typing import TYPE_CHECKING

from sampimp._lazy import import_on_use

if TYPE_CHECKING:
    from sampimp.store.cube import open_cube
    from sampimp.store.location import Folder
    from sampimp.store.plan import Plan, read_commits
    from sampimp.store.plan_files import read_plan
    from sampimp.store.sharded import consolidate
    from sampimp.store.zarr_arrays import zarr_store

__all__ = [
    "Folder",
    "Plan",
    "consolidate",
    "open_cube",
    "read_commits",
    "read_plan",
    "zarr_store",
]

_HOMES = {
    "Folder": "sampimp.store.location",
    "Plan": "sampimp.store.plan",
    "consolidate": "sampimp.store.sharded",
    "open_cube": "sampimp.store.cube",
    "read_commits": "sampimp.store.plan",
    "read_plan": "sampimp.store.plan_files",
    "zarr_store": "sampimp.store.zarr_arrays",
}

__getattr__, __dir__ = import_on_use(__name__, _HOMES)
