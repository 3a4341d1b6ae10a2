"""The door to one store per data set: write a finished study for publishing and reading by sample.

python sweeps/consolidate.py OUT                        into OUT/consolidated
python sweeps/consolidate.py OUT --to s3://bucket/mnist-study
"""

import tyro
from rich.console import Console

from sampimp.errors import UserError
from sampimp.store.sharded import consolidate
from sampimp.sweeps.door import run_door


def run(out: tyro.conf.Positional[str], /, to: str | None = None) -> int:
    """Write each data set of a finished study as one sharded Zarr store, compared with the trials.

    Parameters
    ----------
    out
        The study's folder or s3:// URL.
    to
        Where the stores go, a folder or s3:// URL; OUT/consolidated by default.
    """
    console = Console(soft_wrap=True)
    with console.status("") as status:
        done = consolidate(out, to, progress=status.update)
    for store in done:
        how = "written and compared" if store.written else "there already, of the same records"
        console.print(f"{store.path}: {store.bytes / 1e9:.2f} GB, {how}.", highlight=False)
    return 0


def main(arguments: list[str]) -> int:
    """Run the command line; return 2 for a mistake that can be mended."""
    errors = Console(stderr=True, soft_wrap=True)
    try:
        return tyro.cli(run, args=arguments, prog="consolidate.py")
    except UserError as error:
        errors.print(str(error), style="red", markup=False, highlight=False)
        return 2
    except KeyboardInterrupt:
        errors.print("Interrupted. The same command begins the store that it was at anew.")
        return 130


if __name__ == "__main__":
    run_door(main)
