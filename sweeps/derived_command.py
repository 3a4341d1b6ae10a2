"""The command line of what is computed from committed runs: `influence`, `retrain` and `subset`.

Map: `DerivedOptions` (the options that they have in common), `run_derived` (from the command line
to the exit code).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console

from sampimp.errors import UserError, require_package
from sampimp.sweeps.door import INTERRUPTED
from sampimp.sweeps.options import unset_option

if TYPE_CHECKING:
    from sampimp.store.location import Folder
    from sampimp.sweeps.derived_study import DerivedStudy

EXIT_CODES = """Exit code:
  0  all are committed            1  some are missing
  2  a mistake that you can correct      130  interrupted by Ctrl-C
                                         143  ended by SIGTERM"""
"""The end of each command's help."""


@dataclass(frozen=True, kw_only=True)
class DerivedOptions(ABC):
    """Options of every command; a subclass adds what is computed, and how it is prepared."""

    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """The study's folder or s3:// URL."""
    runs: tuple[str, ...] = ("shuffle:1",)
    """STRATEGY:SEED, DATASET:STRATEGY:SEED, or all."""
    model: Annotated[str | None, unset_option("NAME")] = None
    """The study's network, if it is package.module:function: it is imported only if named here."""
    address: Annotated[str | None, unset_option("ADDRESS")] = None
    """Ray cluster, or local. Default: $RAY_ADDRESS, else one running here, else one is started."""
    cluster: Annotated[str | None, unset_option("YAML")] = None
    """Run as a job on the cluster that `ray up YAML` started, or attach to that job."""
    max_concurrent: Annotated[int | None, unset_option("INT")] = None
    """Largest number of units at a time. Default: as many as the cluster has room for."""
    dry_run: bool = False
    """Print the time and storage, and compute nothing."""

    def files(self) -> dict[str, str]:
        """Return, by option, the files that a cluster has to see."""
        return {}

    @abstractmethod
    def prepare(self, folder: "Folder") -> "DerivedStudy":
        """Check the options against the study; return the units of work."""

    def perform(self, console: Console) -> int:
        """Perform the units that the store lacks, or print them; return the exit code."""
        from sampimp.store.location import Folder

        return self.perform_units(self.prepare(Folder.of(self.out)), console)

    def perform_units(self, study: "DerivedStudy", console: Console) -> int:
        """Perform units on the machines of the options, or print them; return the exit code."""
        from sampimp.sweeps.derived_run import perform_or_describe

        return perform_or_describe(
            study, self.address, self.max_concurrent, console, dry_run=self.dry_run
        )


def run_derived(
    command: str,
    options: type[DerivedOptions],
    description: str,
    arguments: Sequence[str],
    prog: str,
) -> int:
    """Run a command; return its exit code.

    Parameters
    ----------
    command
        Its name.
    options
        Its options.
    description
        The head of its help.
    arguments
        The command line without the name of the program.
    prog
        The name of the program.
    """
    errors = Console(stderr=True, soft_wrap=True)
    try:
        chosen = tyro.cli(
            options,
            args=arguments,
            prog=prog,
            description=description,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        console = Console(soft_wrap=True)
        if chosen.cluster is None:
            code = chosen.perform(console)
            if code == 0 and not chosen.dry_run:
                console.print(
                    f"Figures: sampimp report {chosen.out}", markup=False, highlight=False
                )
            return code
        require_package("ray", "cluster")
        from sampimp.sweeps.jobs import send_derived

        return send_derived(
            command,
            chosen.cluster,
            chosen.address,
            {"OUT": chosen.out, **chosen.files()},
            arguments,
            console,
        )
    except UserError as error:
        errors.print(str(error), style="red", markup=False, highlight=False)
        return 2
    except KeyboardInterrupt:
        errors.print(INTERRUPTED)
        return 130
