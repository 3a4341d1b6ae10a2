"""Compute the influence of each training sample on the final model of runs of a study.

python sweeps/influence.py OUT --targets mean class --runs shuffle:1
python sweeps/influence.py OUT --targets probe:64 --runs all --dry-run

`sampimp influence` is the same command; `sampimp.sweeps.influence_study` prepares it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sampimp.sweeps.derived_command import EXIT_CODES, DerivedOptions, run_derived
from sampimp.sweeps.door import run_door

if TYPE_CHECKING:
    from sampimp.store.location import Folder
    from sampimp.sweeps.derived_study import DerivedStudy

_HELP = """Compute what each training sample did to the final model, by epoch and layer.

A run is gone through backward from its stored parameters, once for up to 16 targets. The effect of
removing a sample is minus its influence, to first order. What is stored is not computed again; a
run that is still training is waited for.

Targets:
  mean, mean-error           mean NLL of the test samples; mean of 1 - p(class)
  class, class:3             mean NLL of each class, or of one
  sample:17, sample:0..31    NLL of test samples
  margin:17, train:5         logit margin of a test sample; NLL of a training sample
  probe:64, probe:64@LAYER   squares of random directions: how far samples moved the parameters
  package.module:function    your own, called with the network: it returns a scalar tensor

Examples:
  {prog} results/digits --targets mean class --runs shuffle:1
  {prog} results/digits --targets probe:64 --runs all
  {prog} results/digits --targets sample:0..31 --dry-run

"""


@dataclass(frozen=True, kw_only=True)
class _Targets:
    targets: tuple[str, ...] = ("mean",)
    """Functions of the final network, as above."""
    smoothing_eps: float = 0.0
    """Least eps of Adam in the derivative; 0 for the exact derivative."""
    gate_width: float = 0.0
    """Half-width of the bump that replaces a ReLU's second derivative; 0 for the exact one."""
    fixed_point: bool = False
    """Also compute -H^-1 g (eq. 4 of the paper) for targets other than probes, at six dampings."""
    memory: float = 1.0
    """GB for the adjoints and steps of a unit; with less, fewer targets share a pass."""


@dataclass(frozen=True, kw_only=True)
class InfluenceOptions(DerivedOptions, _Targets):
    """Options of `sampimp influence`."""

    def prepare(self, folder: "Folder") -> "DerivedStudy":
        """See `DerivedOptions`."""
        # Here, since `--help` needs neither Ray nor PyTorch.
        from sampimp.influence.replay import Smoothing
        from sampimp.sweeps.influence_study import InfluenceRequest, prepare_influence

        request = InfluenceRequest(
            targets=self.targets,
            runs=self.runs,
            smoothing=Smoothing(eps=self.smoothing_eps, gate_width=self.gate_width),
            model=self.model,
            memory=int(self.memory * 2**30),
            fixed_point=self.fixed_point,
        )
        return prepare_influence(folder, request)


def main(arguments: list[str], prog: str = "influence.py") -> int:
    """Run the command line; return its exit code, which `--help` lists."""
    description = _HELP.format(prog=prog) + EXIT_CODES
    return run_derived("influence", InfluenceOptions, description, arguments, prog)


if __name__ == "__main__":
    run_door(main)
