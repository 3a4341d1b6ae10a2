"""The command line of the report.

Map: `main`.
"""

import sys
from collections.abc import Sequence
from typing import Annotated, Literal

from sampimp.errors import UserError, require_package

_HELP = """Analyse a study and write its results, figures and report.html.

Everything is written into the folder `analysis` of the study.

Examples:
  {prog} results/digits
  {prog} s3://bucket/mnist --scheduler distributed --scheduler-address tcp://head:8786

Exit code:
  0  the report is written      2  a mistake that you can correct
  130  interrupted by Ctrl-C"""

_Scheduler = Literal["threads", "distributed", "ray"]


def main(arguments: Sequence[str] | None = None, prog: str = "python -m analysis.report") -> int:
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
        from sampimp.analysis.schedulers import use_scheduler

        with use_scheduler(scheduler, address), Console(stderr=True).status("") as status:
            report = write_report(out, progress=status.update)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print_summary(report)
    return 0


def _parse(arguments: Sequence[str] | None, prog: str) -> tuple[str, _Scheduler, str | None]:
    """Return the study's location, the scheduler and its address."""
    require_package("tyro", "report")
    import tyro

    def report(
        out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
        /,
        scheduler: _Scheduler = "threads",
        scheduler_address: Annotated[
            str | None, tyro.conf.arg(metavar="ADDRESS", help_behavior_hint="")
        ] = None,
    ) -> tuple[str, _Scheduler, str | None]:
        """Return the arguments.

        Parameters
        ----------
        out
            The study's folder or s3:// URL.
        scheduler
            Where dask computes; the results are the same.
        scheduler_address
            Running cluster. Default: $DASK_SCHEDULER_ADDRESS or $RAY_ADDRESS, else one is started.
        """
        return out, scheduler, scheduler_address

    return tyro.cli(report, prog=prog, args=arguments, description=_HELP.format(prog=prog))
