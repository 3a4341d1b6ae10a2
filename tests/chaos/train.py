"""`full_study.py` without the report."""

from sweeps import full_study
from sweeps.door import run_door

if __name__ == "__main__":
    full_study.report = lambda out, console: None
    run_door(full_study.main)
