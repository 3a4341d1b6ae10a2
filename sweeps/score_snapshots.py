"""Compute the snapshot importance of a study that is done.

python sweeps/score_snapshots.py OUT --every 5
python sweeps/score_snapshots.py OUT --every 5 --model package.module:function

`sampimp score` is the same command; `sampimp.sweeps.scoring` does the work.
"""

from typing import Annotated

import tyro
from rich.console import Console

from sampimp.errors import UserError
from sampimp.sweeps.door import INTERRUPTED, run_door

_HELP = """Compute the importance of every training sample at the stored parameters of epochs.

Epochs that have it already are left as they are.

Examples:
  {prog} results/digits --every 5
  {prog} results/mine --every 5 --model package.module:function

Exit code:
  0  all epochs have it       2  a mistake that you can correct
  130  interrupted by Ctrl-C, 143 by SIGTERM"""


def score(
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    /,
    every: int = 5,
    model: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None,
    address: Annotated[str | None, tyro.conf.arg(metavar="ADDRESS", help_behavior_hint="")] = None,
    cpus: int = 1,
    gpus: float = 0.0,
) -> int:
    """Compute snapshot importance; return the exit code.

    Parameters
    ----------
    out
        The study's folder or s3:// URL.
    every
        Epochs between two snapshots; the paper has five (section 3.2).
    model
        The study's network, if it is package.module:function: it is imported only if named here.
    address
        Ray cluster, or local. Default: $RAY_ADDRESS, else one running here, else one is started.
    cpus
        CPUs for the samples of one epoch.
    gpus
        GPUs for the samples of one epoch.
    """
    # Here, since `--help` needs neither Ray nor PyTorch.
    from sampimp.sweeps.cluster import connect
    from sampimp.sweeps.scoring import score_snapshots

    console = Console(soft_wrap=True)
    console.print(f"{connect(address)}.", markup=False, highlight=False)
    count = score_snapshots(out, every, console, model=model, cpus=cpus, gpus=gpus)
    console.print(f"{count} epochs scored; the others were there already.", highlight=False)
    return 0


def main(arguments: list[str], prog: str = "score_snapshots.py") -> int:
    """Run the command line; return its exit code, which `--help` lists."""
    errors = Console(stderr=True, soft_wrap=True)
    try:
        return tyro.cli(score, args=arguments, prog=prog, description=_HELP.format(prog=prog))
    except UserError as error:
        errors.print(str(error), style="red", markup=False)
        return 2
    except KeyboardInterrupt:
        errors.print(INTERRUPTED)
        return 130


if __name__ == "__main__":
    run_door(main)
