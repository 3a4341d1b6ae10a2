"""The command line of the explorer: `sampimp explore`.

Map: `main`, `print_explorer`.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from sampimp.errors import UserError, printable, require_package

if TYPE_CHECKING:
    from rich.console import Console

    from sampimp.analysis.explorer.explorer_writer import Explorer

_HELP = """Write a page that shows every sample of a study, with its importance.

It is a folder of files, which a browser opens without a server. Parts that are there already are
kept.

Examples:
  {prog} results/digits                        into results/digits/analysis/explore
  {prog} s3://bucket/mnist --to mnist-samples  from a bucket into a folder
  {prog} results/mnist --runs all              with importance by epoch of every run
  {prog} results/mnist --watch                 while the study runs

Exit code:
  0  the page is written      2  a mistake that you can correct
  130  interrupted by Ctrl-C"""


class _Options(NamedTuple):
    """What `sampimp explore` is asked for."""

    out: str
    to: str | None
    runs: tuple[str, ...]
    node: tuple[str, ...]
    megabytes: float
    watch: bool
    port: int


def main(arguments: Sequence[str] | None = None, prog: str = "sampimp explore") -> int:
    """Run the command line; return its exit code, which `--help` lists.

    Parameters
    ----------
    arguments
        Arguments of the command line. Default: `sys.argv`.
    prog
        Name of the program in `--help`.
    """
    try:
        options = _parse(arguments, prog)
        require_package("rich.console", "report")
        from rich.console import Console

        return _explore(options, Console(soft_wrap=True))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. What is written is kept; the same command continues.", file=sys.stderr)
        return 130


def _parse(arguments: Sequence[str] | None, prog: str) -> _Options:
    require_package("tyro", "report")
    import tyro

    def named(metavar: str) -> Any:
        return tyro.conf.arg(metavar=metavar, help_behavior_hint="")

    def explore(
        out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
        /,
        to: Annotated[str | None, named("FOLDER")] = None,
        runs: Annotated[tuple[str, ...], named("RUN [RUN ...]")] = (),
        node: Annotated[tuple[str, ...], named("NODE [NODE ...]")] = (),
        megabytes: Annotated[float, tyro.conf.arg(metavar="MB")] = 200.0,
        watch: bool = False,
        port: Annotated[int, named("N")] = 0,
    ) -> _Options:
        """Return the options.

        Parameters
        ----------
        out
            The study's folder or s3:// URL.
        to
            Folder of the page. Default: OUT/analysis/explore.
        runs
            Runs whose importance and NLL are shown by epoch, such as shuffle-seed1, or all.
            Default: the first run.
        node
            Data sets, such as mnist. Default: all.
        megabytes
            Size that the folder stays below: epochs are left out first, then samples.
        watch
            Serve the page on this machine, and write it again when runs are committed.
        port
            Port of that server. Default: a free one.
        """
        return _Options(out, to, runs, node, megabytes, watch, port)

    return tyro.cli(
        explore,
        prog=prog,
        args=arguments,
        description=_HELP.format(prog=prog),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _explore(options: _Options, console: "Console") -> int:
    """Write the page, and with --watch again and again."""
    from sampimp.analysis.explorer.explorer_writer import write_explorer
    from sampimp.analysis.explorer.growing_study import serve_folder, watch_study

    def write() -> "Explorer":
        with console.status("") as status:
            return write_explorer(
                options.out,
                to=options.to,
                runs=options.runs,
                nodes=options.node,
                megabytes=options.megabytes,
                progress=lambda words: status.update(printable(words)),
            )

    def say(words: str) -> None:
        console.print(printable(words), markup=False, highlight=False)

    def write_again() -> None:
        say(_shown(write()))

    written = write()
    print_explorer(written, say)
    if not options.watch:
        return 0
    with serve_folder(written.folder, options.port) as address:
        say(f"Open {address}; Ctrl-C ends.")
        watch_study(options.out, write_again, warn=say)
    return 0


def print_explorer(written: "Explorer", say: Any) -> None:
    """Print what was written, its size, and the path of the page.

    Parameters
    ----------
    written
        The explorer.
    say
        Prints one line.
    """
    for words in (*written.notes, *(f"Damaged: {each}" for each in written.damaged)):
        say(words)
    say(_shown(written))
    say(f"Samples: {written.page}")
    if not written.folder.is_local:
        say("It opens only from a folder: download it, or write it into one with --to FOLDER.")


def _shown(written: "Explorer") -> str:
    """Return the number of runs and files, and the size, in a line."""
    changes = f"{written.changes} files written" if written.changes else "nothing changed"
    return (
        f"{written.runs} of {written.planned} runs, {written.histories} by epoch; "
        f"{written.bytes / 1e6:.1f} MB, {changes}."
    )
