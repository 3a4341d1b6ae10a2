"""The door: train the paper's study, or one's own, and write its report.

python sweeps/full_study.py                       the paper's study
python sweeps/full_study.py --preset digits       the same on 1,797 digits, in minutes
python sweeps/full_study.py --help                all options
"""

import sys

from rich.console import Console

from analysis.report import print_summary, write_report
from sampimp.errors import UserError
from sweeps.study import parse, run


def main(arguments: list[str]) -> int:
    """Run the study; return 0 only when every planned trial is committed or diverged."""
    console = Console(soft_wrap=True)
    errors = Console(stderr=True, soft_wrap=True)
    try:
        config = parse(arguments)
        code = run(config, console)
        if not config.dry_run:
            with console.status("Analysing") as status:
                report = write_report(config.out, progress=status.update)
            print_summary(report)
        return code
    except UserError as error:
        errors.print(str(error), style="red", markup=False, highlight=False)
        return 2
    except KeyboardInterrupt:
        errors.print("Interrupted. What is committed is kept; the same command continues.")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
