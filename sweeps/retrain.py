"""Retrain runs of a study without some of their samples: the truth that influence predicts.

python sweeps/retrain.py OUT --removals random:30 top:30 --targets mean sample:0..11
python sweeps/retrain.py OUT --removals subset-0.95:100 --runs shuffle:1 --dry-run

`sampimp retrain` is the same command; `sampimp.sweeps.retrain_study` prepares it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sampimp.sweeps.derived_command import EXIT_CODES, DerivedOptions, run_derived
from sampimp.sweeps.door import run_door

if TYPE_CHECKING:
    from sampimp.store.location import Folder
    from sampimp.sweeps.derived_study import DerivedStudy

_HELP = """Train runs again without some of their samples, and store what that does to targets.

Each removal is trained from several starts: the run's own, then jittered ones, each with and
without the samples. How well repeats agree is the highest score that a prediction can reach.

Removals:
  random:30, top:30      single samples, at random, or the most important ones
  subset-0.95:100        random subsets that keep 95 % of the samples
  sample:17, sample:0..3 single samples
  class:3                all samples of a class

Examples:
  {prog} results/digits --removals random:30 top:30 --targets mean sample:0..11
  {prog} results/digits --removals subset-0.95:100 --dry-run

"""


@dataclass(frozen=True, kw_only=True)
class _RetrainedRemovals:
    removals: tuple[str, ...] = ("random:30", "top:30")
    """Which samples to leave out, as above."""
    targets: tuple[str, ...] = ("mean",)
    """Functions of the final network, as of `sampimp influence`, without probes."""
    repeats: int = 2
    """Starts of each retraining; the first is the run's own."""
    jitter: float = 1e-3
    """Standard deviation of what is added to the parameters of the other starts."""
    renormalised: bool = False
    """Divide a batch's loss by the number of samples that remain, instead of the batch size."""


@dataclass(frozen=True, kw_only=True)
class RetrainOptions(DerivedOptions, _RetrainedRemovals):
    """Options of `sampimp retrain`."""

    def prepare(self, folder: "Folder") -> "DerivedStudy":
        """See `DerivedOptions`."""
        # Here, since `--help` needs neither Ray nor PyTorch.
        from sampimp.sweeps.retrain_study import RetrainRequest, prepare_retrain

        request = RetrainRequest(
            removals=self.removals,
            targets=self.targets,
            runs=self.runs,
            repeats=self.repeats,
            jitter=self.jitter,
            renormalised=self.renormalised,
            model=self.model,
        )
        return prepare_retrain(folder, request)


def main(arguments: list[str], prog: str = "retrain.py") -> int:
    """Run the command line; return its exit code, which `--help` lists."""
    description = _HELP.format(prog=prog) + EXIT_CODES
    return run_derived("retrain", RetrainOptions, description, arguments, prog)


if __name__ == "__main__":
    run_door(main)
