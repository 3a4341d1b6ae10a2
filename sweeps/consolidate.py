"""Write a finished study as one store per data set, for publishing and for reading by sample.

python sweeps/consolidate.py OUT                        into OUT/consolidated
python sweeps/consolidate.py OUT --to s3://bucket/mnist-study

`sampimp consolidate` is the same command; `sampimp.store.sharded` does the work.
"""

from typing import Annotated

import tyro
from rich.console import Console

from sampimp.errors import UserError
from sampimp.sweeps.door import run_door
from sampimp.sweeps.quantities import format_bytes

_HELP = """Write each data set of a finished study as one sharded Zarr store.

Every value is compared with the records of the trials. Influence and retrainings are left out:
read them with sampimp.open_cube.

Examples:
  {prog} results/digits                               into results/digits/consolidated
  {prog} results/digits --to s3://bucket/digits       into a bucket

Exit code:
  0  all stores are written      2  a mistake that you can correct
  130  interrupted by Ctrl-C, 143 by SIGTERM"""


def write_stores(
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    /,
    to: Annotated[str | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None,
) -> int:
    """Write each data set of a finished study as one sharded Zarr store; return the exit code.

    Parameters
    ----------
    out
        The study's folder or s3:// URL.
    to
        Folder or s3:// URL of the stores. Default: OUT/consolidated.
    """
    from sampimp.store.sharded import consolidate  # here, since `--help` needs no dask

    console = Console(soft_wrap=True)
    with console.status("") as status:
        stores = consolidate(out, to, progress=status.update)
    for store in stores:
        how = "written and compared" if store.written else "there already, of the same records"
        console.print(f"{store.path}: {format_bytes(store.bytes)}, {how}.", highlight=False)
        if store.left_out:
            console.print(f"  left out: {', '.join(store.left_out)}", highlight=False)
    return 0


def main(arguments: list[str], prog: str = "consolidate.py") -> int:
    """Run the command line; return its exit code, which `--help` lists."""
    errors = Console(stderr=True, soft_wrap=True)
    try:
        return tyro.cli(
            write_stores, args=arguments, prog=prog, description=_HELP.format(prog=prog)
        )
    except UserError as error:
        errors.print(str(error), style="red", markup=False, highlight=False)
        return 2
    except KeyboardInterrupt:
        errors.print("Interrupted. The same command begins the unfinished store anew.")
        return 130


if __name__ == "__main__":
    run_door(main)
