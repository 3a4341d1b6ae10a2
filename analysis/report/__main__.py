"""`python -m sampimp.analysis.report OUT`."""

import sys

from sampimp.analysis.report.cli import main

if __name__ == "__main__":
    sys.exit(main())
