"""`full_study.py` without the report."""

from sampimp.sweeps import full_study
from sampimp.sweeps.door import run_door

if __name__ == "__main__":
    full_study.write_study_report = lambda out, console: None
    run_door(full_study.main)
