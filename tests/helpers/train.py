"""`full_study.py` without pages, and with the patience of $TESTS_QUIET_TIME, if it is set."""

import os

from sampimp.sweeps import full_study
from sampimp.sweeps.door import run_door

if __name__ == "__main__":
    full_study.write_study_explorer = lambda out, console, errors: None
    full_study.write_study_report = lambda out, console: None
    if "TESTS_QUIET_TIME" in os.environ:
        from sampimp.sweeps import searcher  # imports Ray, which other tests time

        searcher.QUIET_TIME = float(os.environ["TESTS_QUIET_TIME"])
        searcher.POLL_EVERY = 1.0
    run_door(full_study.main)
