"""The command line of the report.

Map: `main`.
"""

import sys
from collections.abc import Sequence
from typing import Annotated

from sampimp.analysis.schedulers import Scheduler, use_scheduler
from sampimp.errors import UserError, require_package


def main(
    arguments: Sequence[str] | None = None, prog: str = "python -m sampimp.analysis.report"
) -> int:
    """Run the command line and return its exit code: 0, or 2 for a `UserError`.

    Parameters
    ----------
    arguments
        Arguments of the command line. Default: `sys.argv`.
    prog
        Name of the program in `--help`.
    """
    try:
        out, scheduler, address = _parse(arguments, prog)
        require_package("rich.console", "report")
        from rich.console import Console

        from sampimp.analysis.report.terminal import print_summary
        from sampimp.analysis.report.write import write_report

        with use_scheduler(scheduler, address), Console(stderr=True).status("") as status:
            report = write_report(out, progress=status.update)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print_summary(report)
    return 0


def _parse(arguments: Sequence[str] | None, prog: str) -> tuple[str, Scheduler, str | None]:
    """Return the study's location, the scheduler and its address."""
    require_package("tyro", "report")
    import tyro

    def report(
        out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
        /,
        scheduler: Scheduler = "threads",
        scheduler_address: str | None = None,
    ) -> tuple[str, Scheduler, str | None]:
        """Analyse a study and write its results, figures and report.html.

        Parameters
        ----------
        out
            The study's folder or s3:// URL; everything is written into its folder `analysis`.
        scheduler
            Where dask computes; the results are the same.
        scheduler_address
            Address of a running cluster. Default: DASK_SCHEDULER_ADDRESS or RAY_ADDRESS, else a
            cluster is started.
        """
        return out, scheduler, scheduler_address

    return tyro.cli(report, prog=prog, args=arguments)
