"""`full_study.py` without the report."""

import sys

from sweeps import full_study

if __name__ == "__main__":
    full_study.report = lambda out, console: None
    sys.exit(full_study.main(sys.argv[1:]))
