"""Compute the influence of each training sample on the final model of runs of a study.

python sweeps/influence.py OUT --targets mean class --runs shuffle:1
python sweeps/influence.py OUT --targets probe:64 --runs all --dry-run

`sampimp influence` is the same command; `sampimp.sweeps.influence_study` prepares it.
"""

from collections.abc import Callable, Sequence
from typing import Annotated

import tyro
from rich.console import Console

from sampimp.errors import UserError, require_package
from sampimp.sweeps.door import INTERRUPTED, run_door

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

Exit code:
  0  all are committed            1  some are missing
  2  a mistake that you can correct      130  interrupted by Ctrl-C"""


def influence(
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    /,
    targets: tuple[str, ...] = ("mean",),
    runs: tuple[str, ...] = ("shuffle:1",),
    smoothing_eps: float = 0.0,
    gate_width: float = 0.0,
    fixed_point: bool = False,
    model: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None,
    memory: float = 1.0,
    address: Annotated[str | None, tyro.conf.arg(metavar="ADDRESS", help_behavior_hint="")] = None,
    cluster: Annotated[str | None, tyro.conf.arg(metavar="YAML", help_behavior_hint="")] = None,
    max_concurrent: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")] = (
        None
    ),
    dry_run: bool = False,
) -> Callable[[Sequence[str]], int]:
    """Compute influence; return a function from the command line to the exit code.

    Parameters
    ----------
    out
        The study's folder or s3:// URL.
    targets
        Functions of the final network, as above.
    runs
        STRATEGY:SEED, DATASET:STRATEGY:SEED, or all.
    smoothing_eps
        Least eps of Adam in the derivative; 0 for the exact derivative.
    gate_width
        Half-width of the bump that replaces a ReLU's second derivative; 0 for the exact one.
    fixed_point
        Also compute -H^-1 g (eq. 4 of the paper) for targets other than probes, at six dampings.
    model
        The study's network, if it is package.module:function: it is imported only if named here.
    memory
        GB for the adjoints and steps of a unit; with less, fewer targets share a pass.
    address
        Ray cluster, or local. Default: $RAY_ADDRESS, else one running here, else one is started.
    cluster
        Run as a job on the cluster that `ray up YAML` started, or attach to that job.
    max_concurrent
        Largest number of units at a time. Default: as many as the cluster has room for.
    dry_run
        Print the time and storage, and compute nothing.
    """
    console = Console(soft_wrap=True)

    def run(arguments: Sequence[str]) -> int:
        # Here, since `--help` needs neither Ray nor PyTorch.
        if cluster is not None:
            require_package("ray", "cluster")
            from sampimp.sweeps.jobs import send_derived

            return send_derived("influence", cluster, address, out, arguments, console)
        from sampimp.influence.replay import Smoothing
        from sampimp.store.location import Folder
        from sampimp.sweeps.derived_run import perform_or_describe
        from sampimp.sweeps.influence_study import InfluenceRequest, prepare_influence

        request = InfluenceRequest(
            targets=targets,
            runs=runs,
            smoothing=Smoothing(eps=smoothing_eps, gate_width=gate_width),
            model=model,
            memory=int(memory * 2**30),
            fixed_point=fixed_point,
        )
        study = prepare_influence(Folder.of(out), request)
        return perform_or_describe(study, address, max_concurrent, console, dry_run=dry_run)

    return run


def main(arguments: list[str], prog: str = "influence.py") -> int:
    """Run the command line; return its exit code, which `--help` lists."""
    errors = Console(stderr=True, soft_wrap=True)
    command = tyro.conf.configure(tyro.conf.FlagCreatePairsOff)(influence)
    try:
        run = tyro.cli(command, args=arguments, prog=prog, description=_HELP.format(prog=prog))
        return run(arguments)
    except UserError as error:
        errors.print(str(error), style="red", markup=False, highlight=False)
        return 2
    except KeyboardInterrupt:
        errors.print(INTERRUPTED)
        return 130


if __name__ == "__main__":
    run_door(main)
