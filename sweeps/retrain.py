"""Retrain runs of a study without some of their samples: the truth that influence predicts.

python sweeps/retrain.py OUT --removals random:30 top:30 --targets mean sample:0..11
python sweeps/retrain.py OUT --removals subset-0.95:100 --runs shuffle:1 --dry-run

`sampimp retrain` is the same command; `sampimp.sweeps.retrain_study` prepares it.
"""

from collections.abc import Callable, Sequence
from typing import Annotated

import tyro
from rich.console import Console

from sampimp.errors import UserError, require_package
from sampimp.sweeps.door import INTERRUPTED, run_door

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

Exit code:
  0  all are committed            1  some are missing
  2  a mistake that you can correct      130  interrupted by Ctrl-C"""


def retrain_runs(
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    /,
    removals: tuple[str, ...] = ("random:30", "top:30"),
    targets: tuple[str, ...] = ("mean",),
    runs: tuple[str, ...] = ("shuffle:1",),
    repeats: int = 2,
    jitter: float = 1e-3,
    renormalised: bool = False,
    model: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None,
    address: Annotated[str | None, tyro.conf.arg(metavar="ADDRESS", help_behavior_hint="")] = None,
    cluster: Annotated[str | None, tyro.conf.arg(metavar="YAML", help_behavior_hint="")] = None,
    max_concurrent: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")] = (
        None
    ),
    dry_run: bool = False,
) -> Callable[[Sequence[str]], int]:
    """Retrain runs; return a function from the command line to the exit code.

    Parameters
    ----------
    out
        The study's folder or s3:// URL.
    removals
        Which samples to leave out, as above.
    targets
        Functions of the final network, as of `sampimp influence`, without probes.
    runs
        STRATEGY:SEED, DATASET:STRATEGY:SEED, or all.
    repeats
        Starts of each retraining; the first is the run's own.
    jitter
        Standard deviation of what is added to the parameters of the other starts.
    renormalised
        Divide a batch's loss by the number of samples that remain, instead of the batch size.
    model
        The study's network, if it is package.module:function: it is imported only if named here.
    address
        Ray cluster, or local. Default: $RAY_ADDRESS, else one running here, else one is started.
    cluster
        Run as a job on the cluster that `ray up YAML` started, or attach to that job.
    max_concurrent
        Largest number of units at a time. Default: as many as the cluster has room for.
    dry_run
        Print the time and storage, and train nothing.
    """
    console = Console(soft_wrap=True)

    def run(arguments: Sequence[str]) -> int:
        # Here, since `--help` needs neither Ray nor PyTorch.
        if cluster is not None:
            require_package("ray", "cluster")
            from sampimp.sweeps.jobs import send_derived

            return send_derived("retrain", cluster, address, out, arguments, console)
        from sampimp.store.location import Folder
        from sampimp.sweeps.derived_run import perform_or_describe
        from sampimp.sweeps.retrain_study import RetrainRequest, prepare_retrain

        request = RetrainRequest(
            removals=removals,
            targets=targets,
            runs=runs,
            repeats=repeats,
            jitter=jitter,
            renormalised=renormalised,
            model=model,
        )
        study = prepare_retrain(Folder.of(out), request)
        return perform_or_describe(study, address, max_concurrent, console, dry_run=dry_run)

    return run


def main(arguments: list[str], prog: str = "retrain.py") -> int:
    """Run the command line; return its exit code, which `--help` lists."""
    errors = Console(stderr=True, soft_wrap=True)
    command = tyro.conf.configure(tyro.conf.FlagCreatePairsOff)(retrain_runs)
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
