"""`python -m sampimp.analysis.report OUT`."""

import sys

from sampimp.analysis.report.cli import main

sys.exit(main())
