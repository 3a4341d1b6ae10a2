"""The door to snapshot importance: score a study that is done.

python sweeps/score_snapshots.py OUT --every 5
python sweeps/score_snapshots.py OUT --every 5 --model package.module:function
"""

import tyro
from rich.console import Console

from sampimp.errors import UserError
from sampimp.sweeps.cluster import connect
from sampimp.sweeps.door import run_door
from sampimp.sweeps.scoring import score_snapshots


def score(
    out: tyro.conf.Positional[str],
    /,
    every: int = 5,
    model: str | None = None,
    address: str | None = None,
    cpus: int = 1,
    gpus: float = 0.0,
) -> int:
    """Score every training sample at the stored parameters of every so many epochs.

    Parameters
    ----------
    out
        The study's folder or s3:// URL.
    every
        Epochs between two snapshots; the paper's section 3.2 has five.
    model
        The study's network, where it is package.module:function: it is imported only if named here.
    address
        Ray cluster; else RAY_ADDRESS, else that of `ray start` here, else one is started.
    cpus
        CPUs of one epoch's scoring.
    gpus
        GPUs of one epoch's scoring.
    """
    console = Console(soft_wrap=True)
    console.print(f"{connect(address)}.")
    count = score_snapshots(out, every, console, model=model, cpus=cpus, gpus=gpus)
    console.print(f"{count} epochs scored; the others were there already.")
    return 0


def main(arguments: list[str]) -> int:
    """Run the command line; return 2 for a mistake that can be mended."""
    try:
        return tyro.cli(score, args=arguments, prog="score_snapshots.py")
    except UserError as error:
        Console(stderr=True, soft_wrap=True).print(str(error), style="red", markup=False)
        return 2


if __name__ == "__main__":
    run_door(main)
