"""Studies: which runs, on which machines. Ray is imported here, and in `analysis.schedulers`.

Commands (`python sweeps/NAME.py`, or `sampimp`)

===================== ====================================================================
`command`             `sampimp study`, `status`, `report`, `score`, `influence`, `retrain`,
                      `subset`, `consolidate`
`full_study`          train the paper's study, the digits, or one of your own
`status`              how far a study is; damage found and withdrawn
`score_snapshots`     snapshot importance of a study that is done
`influence`           what each sample did to the final model of a run
`retrain`             what happens to the final model without samples
`subset`              which samples suffice
`consolidate`         a finished study as one sharded store per data set
===================== ====================================================================

A study, from its options to its exit code

===================== ====================================================================
`options`             `StudyConfig`, presets, command line
`study`               `Study`: options, data sets, plan, and what the store lacks
`preflight`           checks of the folder, the machines and the disk
`estimate`            time and storage; `--dry-run`
`run`                 train what is missing
`first_report`        the report of the first run, while others train
`work`                units of work: training runs, and what is computed from them
`tuning`              perform units of work, through Ray Tune
`trial`               a unit of work as Tune sees it
`searcher`            which unit is next
`trial_inputs`        data set and batches of a training run
`team`                the workers of a trial that has several
`scoring`             snapshot importance, through Ray Data
`ingest`              folders of images, through Ray Data
`inspection`          the state of each trial, from the store alone
`verification`        damage in the store, found and withdrawn
===================== ====================================================================

What is computed from committed runs

===================== ====================================================================
`stored_study`        checks of the study
`run_choice`          which runs, and whether they can be replayed
`influence_study`     from a request to units of work; `compute_influence`
`influence_units`     blocks of targets as units of work
`influence_work`      the reverse pass and the forward replay, step by step
`fixed_point_work`    -H^-1 g, one target and curvature after another
`retrain_study`       from a request to units of work
`retrain_work`        retrainings, one by one
`subset_study`        from a request to units of work
`subset_scores`       scores that rules read besides importance and NLL
`subset_results`      the next sizes of the bisection; indices as files
`error_tables`        test errors by rule and size, for the terminal
`subset_units`        rules and sizes as units of work
`subset_work`         trainings on subsets, and searches for subsets
`derived_command`     the options that these commands have in common
`derived_units`       what units on runs have in common
`derived_study`       perform units in this process
`derived_run`         perform units on a cluster, or describe them
===================== ====================================================================

Machines and terminals

===================== ====================================================================
`machines`            machines and their room for trials, without Ray
`cluster`             the Ray cluster
`jobs`                a study sent to a cluster from a laptop
`progress`            the display while a study runs
`provenance`          versions and hardware behind a trial
`door`                exit codes, and Ctrl-C
===================== ====================================================================
"""

import os
import sys
from pathlib import Path

# Ray reads the variable when it is imported. `ray start` requires a secret wherever ~/.ray has one,
# and a driver sends it only in this mode. A cluster that requires none ignores it.
if "ray" not in sys.modules and (Path.home() / ".ray" / "auth_token").exists():
    os.environ.setdefault("RAY_AUTH_MODE", "token")

if __name__ == "sweeps":  # imported from a checkout's folder: `python -m sweeps.` and old imports
    from sampimp._renamed import alias_package

    alias_package("sweeps", "sampimp.sweeps")
