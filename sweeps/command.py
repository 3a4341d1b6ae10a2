"""The command `sampimp`: one subcommand for each script of the studies and their analysis.

A subcommand takes the options of its script, and has its exit codes, since both call the same
function. Their modules are imported once the subcommand is known: `sampimp --help` needs no
package but this one, and takes a tenth of a second. Where a package of an extra is missing, the
error names the extra.

Map: `main`; `SUBCOMMANDS`.
"""

import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from typing import NamedTuple, NoReturn

from sampimp.errors import ConfigError, UserError, require_package
from sampimp.schema import __version__
from sampimp.sweeps.door import run_door


class Subcommand(NamedTuple):
    """Module that a subcommand runs, and packages that it needs."""

    module: str
    """Module whose `main` takes the arguments and returns the exit code."""
    extra: str
    """Extra that installs what the module imports."""
    packages: tuple[str, ...]
    """Packages of that extra which the module imports as soon as it is imported."""


SUBCOMMANDS: Mapping[str, Subcommand] = {
    "study": Subcommand("sampimp.sweeps.full_study", "study", ("rich", "tyro")),
    "status": Subcommand("sampimp.sweeps.status", "study", ("rich", "tyro")),
    "score": Subcommand(
        "sampimp.sweeps.score_snapshots", "study", ("rich", "tyro", "ray", "pyarrow")
    ),
    "influence": Subcommand("sampimp.sweeps.influence", "study", ("rich", "tyro")),
    "retrain": Subcommand("sampimp.sweeps.retrain", "study", ("rich", "tyro")),
    "subset": Subcommand("sampimp.sweeps.subset", "study", ("rich", "tyro")),
    "consolidate": Subcommand("sampimp.sweeps.consolidate", "study", ("rich", "tyro")),
    "report": Subcommand(
        "sampimp.analysis.report.cli",
        "report",
        ("rich", "tyro", "jinja2", "matplotlib", "scipy", "sklearn"),
    ),
    "explore": Subcommand(
        "sampimp.analysis.explorer.explore", "report", ("rich", "tyro", "PIL", "scipy")
    ),
}

HELP = """usage: sampimp COMMAND [OPTIONS]

Which training samples shaped a network, in which layer, and when.

Run a study:
  study         train the paper's study, or one of your own, and write its report
  score         add the importance of every sample at the parameters of stored epochs
  influence     add what every sample did to the final model, by epoch and layer
  retrain       add what happens without samples, by training runs again
  subset        add trainings on subsets alone: which samples suffice

Look at a study:
  status        the state of each run; damage in the store
  report        results, figures and report.html
  explore       a page that shows every sample, with its importance

Publish a study:
  consolidate   one sharded Zarr store per data set

Options:
  -h, --help    this text; `sampimp COMMAND --help` has the options of a command
  --version     the version of sampimp

Examples:
  sampimp study --preset digits --out results/digits
  sampimp status results/digits
  sampimp report results/digits
  sampimp study --datasets mnist --dry-run

Exit code: 0 for success, 2 for a mistake that you can correct; the help of a command has others."""


def main() -> NoReturn:
    """Run the command line of this process, and end the process with its exit code."""
    run_door(run_command)


def run_command(arguments: list[str]) -> int:
    """Run a subcommand; return its exit code.

    Parameters
    ----------
    arguments
        The command line without `sampimp`.
    """
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if name == "--version":
        print(f"sampimp {__version__}")
        return 0
    try:
        return _load(name, helps="--help" in rest or "-h" in rest)(rest)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def _load(name: str, *, helps: bool) -> Callable[[list[str]], int]:
    """Import the function of a subcommand; with `helps`, require only what its help needs."""
    if name not in SUBCOMMANDS:
        close = get_close_matches(name, SUBCOMMANDS, 1)
        raise ConfigError(
            expected=f"one of the commands {', '.join(SUBCOMMANDS)}",
            got=f"{name!r}" + (f"; did you mean {close[0]}?" if close else ""),
            where="the command line",
            todo="see sampimp --help",
        )
    subcommand = SUBCOMMANDS[name]
    for package in ("rich", "tyro") if helps else subcommand.packages:
        require_package(package, subcommand.extra)
    return partial(import_module(subcommand.module).main, prog=f"sampimp {name}")
