"""Train on subsets of a study's samples: which of them suffice, by which rule.

python sweeps/subset.py OUT --rules tau-high strata power --sizes 0.05 0.1 0.3 --seeds 1 2 3 4 5
python sweeps/subset.py OUT --within 0.3 --dry-run

`sampimp subset` is the same command; `sampimp.sweeps.subset_study` prepares it.
"""

from collections.abc import Callable, Sequence
from typing import Annotated

import tyro
from rich.console import Console

from sampimp.errors import ConfigError, UserError, require_package
from sampimp.sweeps.door import INTERRUPTED, run_door

_HELP = """Select subsets of the training samples by several rules, and train on them alone.

Every subset is trained with as many updates as all samples make in the study's epochs (steps), and
with as many passes (epochs). All samples are trained as well, also to convergence. No rule sees a
test label. The parameters of strata and power, and `chosen`, the best rule at a size and budget,
come from a tenth of the training samples (validation).

Rules:
  random, balanced       always compared: drawn at random, from all or equally from each class
  tau-high, tau-low      the most, or least, important samples
  nll-high, nll-low      those of the highest, or lowest, NLL at the end of training
  strata, strata:0.1     equally many from each bin of importance, without the hardest 10 %
  power, power:0.25      drawn with p proportional to importance^0.25
  final-importance       those that moved the final parameters most (sampimp influence first)
  metagradient           found by exchange, from the derivative of training: 20 reverse passes
  scores:FILE            the highest of your own numbers, one a sample (.npy or text)
  variable:NAME          the highest of a variable of the cube

Examples:
  {prog} results/mnist
  {prog} results/mnist --rules tau-high metagradient --sizes 0.05 0.3 --seeds 1 2 3
  {prog} results/mnist --within 0.3

Exit code:
  0  all are committed            1  some are missing
  2  a mistake that you can correct      130  interrupted by Ctrl-C"""

BISECTION_ROUNDS = 12
"""Most rounds of a bisection: each halves the distance in log size."""


def train_subsets(
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    /,
    rules: tuple[str, ...] = ("tau-high", "nll-high", "strata", "power"),
    sizes: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5),
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5),
    within: Annotated[float | None, tyro.conf.arg(metavar="POINTS", help_behavior_hint="")] = None,
    runs: tuple[str, ...] = ("shuffle:1",),
    model: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None,
    address: Annotated[str | None, tyro.conf.arg(metavar="ADDRESS", help_behavior_hint="")] = None,
    cluster: Annotated[str | None, tyro.conf.arg(metavar="YAML", help_behavior_hint="")] = None,
    max_concurrent: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")] = (
        None
    ),
    dry_run: bool = False,
) -> Callable[[Sequence[str]], int]:
    """Train on subsets; return a function from the command line to the exit code.

    Parameters
    ----------
    out
        The study's folder or s3:// URL.
    rules
        Who is kept, as above.
    sizes
        Shares of the samples, between 0 and 1.
    seeds
        Of initialisation, order and random draws.
    within
        Also search, for each rule and budget, the smallest size whose test error is within so many
        percentage points of that of all samples, by bisection.
    runs
        STRATEGY:SEED, DATASET:STRATEGY:SEED, or all: the runs whose importance and NLL select.
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

            return send_derived("subset", cluster, address, out, arguments, console)
        from sampimp.store.location import Folder
        from sampimp.sweeps.derived_run import perform_or_describe
        from sampimp.sweeps.subset_study import (
            SubsetRequest,
            export_subsets,
            next_sizes,
            prepare_subsets,
        )

        if within is not None and not 0 <= within < 100:
            raise ConfigError(
                expected="percentage points of the test error, 0 or above and below 100",
                got=f"{within:g}",
                where="option --within",
                todo="change the value, such as 0.3",
            )
        folder = Folder.of(out)
        request = SubsetRequest(rules=rules, sizes=sizes, seeds=seeds, runs=runs, model=model)
        study = prepare_subsets(folder, request)
        code = perform_or_describe(study, address, max_concurrent, console, dry_run=dry_run)
        if code or dry_run:
            return code
        for _ in range(BISECTION_ROUNDS if within is not None else 0):
            sizes_left = next_sizes(folder, request, float(within or 0) / 100)
            if not sizes_left:
                break
            study = prepare_subsets(folder, request, sizes_left)
            code = perform_or_describe(study, address, max_concurrent, console, dry_run=False)
            if code:
                return code
        paths = export_subsets(folder, request)
        console.print(
            f"The selected samples are in {len(paths)} files {out}/influence/selected/*.npy and "
            ".csv:",
            markup=False,
            highlight=False,
        )
        console.print(
            f'  torch.utils.data.Subset(train_set, numpy.load("{paths[0]}"))',
            markup=False,
            highlight=False,
        )
        return 0

    return run


def main(arguments: list[str], prog: str = "subset.py") -> int:
    """Run the command line; return its exit code, which `--help` lists."""
    errors = Console(stderr=True, soft_wrap=True)
    command = tyro.conf.configure(tyro.conf.FlagCreatePairsOff)(train_subsets)
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
