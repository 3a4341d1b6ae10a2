"""Train the paper's study, or one of your own, and write its page of samples and its report.

python sweeps/full_study.py                       the paper's study
python sweeps/full_study.py --preset digits       the same on 1,797 digits, in minutes
python sweeps/full_study.py --cluster YAML ...    on the cluster that `ray up YAML` started
python sweeps/full_study.py --help                all options

`sampimp study` is the same command.
"""

import io
from importlib.util import find_spec

from rich.console import Console

from sampimp.errors import (
    MissingPackageError,
    UserError,
    printable,
    redacted,
    require_package,
)
from sampimp.schema import __version__, digest_json
from sampimp.sweeps.door import INTERRUPTED, run_door
from sampimp.sweeps.options import StudyConfig, parse
from sampimp.sweeps.quantities import format_count


def main(arguments: list[str], prog: str = "full_study.py") -> int:
    """Run the command line.

    Returns
    -------
    int
        0 if every planned trial is committed (done or diverged), 1 if one is missing, 2 for a
        mistake that the user can correct, 130 after Ctrl-C. The packages of the extra `report` are
        optional: without them the report is left out. The page of samples is optional too.
    """
    console = Console(soft_wrap=True)
    errors = Console(stderr=True, soft_wrap=True)
    try:
        config = parse(arguments, prog)
        if config.cluster:
            require_package("ray", "cluster")
            from sampimp.sweeps.jobs import send

            return send(config, arguments, console)
        code = run_or_describe(config, console)
        if not config.dry_run:
            write_study_explorer(config.out, console, errors)
            try:
                write_study_report(config.out, console)
            except MissingPackageError as error:
                errors.print("The study is stored, and its report is not written.")
                errors.print(str(error), markup=False, highlight=False)
        return code
    except UserError as error:
        errors.print(str(error), style="red", markup=False, highlight=False)
        return 2
    except KeyboardInterrupt:
        errors.print(INTERRUPTED)
        return 130


def run_or_describe(config: StudyConfig, console: Console) -> int:
    """Run a study, or print its plan if that is asked for; return the exit code."""
    # The imports are here so that a mistake in the options, and the first line, need no PyTorch.
    if config.dry_run:
        from sampimp.sweeps.estimate import describe_study

        return describe_study(config, console)
    from sampimp.store.buckets import check_url

    if "://" in config.out:
        check_url(config.out)  # before a line that repeats it
    console.print(_describe(config), markup=False, highlight=False)
    if not _is_installed("ray"):  # its import takes seconds: the data sets are read before
        require_package("ray", "study")
    from sampimp.sweeps.run import run_study

    return run_study(config, console)


def _is_installed(package: str) -> bool:
    """Return whether a package can be imported, without an import."""
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _describe(config: StudyConfig) -> str:
    """Return in words what the options ask for."""
    trials = len(config.datasets) * sum(map(len, config.grid().values()))
    epochs = format_count(config.epochs, "epochs")
    return printable(
        f"{format_count(trials, 'trials')} of {epochs} on {', '.join(config.datasets)}, "
        f"into {config.out}."
    )


def write_study_explorer(out: str, console: Console, errors: Console) -> None:
    """Write the page of samples, before the report, which refers to it; print a failure."""
    try:
        require_package("PIL.Image", "study")
        # As in `write_study_report`.
        from sampimp.analysis.explorer import write_explorer

        with console.status("Writing the samples") as status:
            explorer = write_explorer(
                out,
                keep=True,
                has_report=find_spec("matplotlib") is not None,
                progress=lambda words: status.update(printable(words)),
            )
    except Exception as error:  # whatever it is: the study is complete without this page
        errors.print("The study is stored, and its page of samples is not written.")
        words = str(error) if isinstance(error, UserError) else redacted(repr(error))
        errors.print(printable(words), markup=False, highlight=False)
    else:
        console.print(f"Samples: {explorer.page}", markup=False, highlight=False)


def write_study_report(out: str, console: Console) -> None:
    """Analyse the study unless its report is of the same records, and print the summary."""
    # The imports are here so that training waits for none of the packages of the analyses.
    require_package("matplotlib", "report")
    from sampimp.analysis.report import print_summary, write_report
    from sampimp.store.influence_layouts import INFLUENCE_FOLDER
    from sampimp.store.location import Folder
    from sampimp.store.manifests import write_manifest
    from sampimp.store.plan import read_commits
    from sampimp.store.snapshots import SNAPSHOTS

    folder = Folder.of(out)
    commits = [sorted(read_commits(folder, records)) for records in ("trials", INFLUENCE_FOLDER)]
    records = digest_json([*commits, folder.read_json(SNAPSHOTS), __version__])
    summary = folder.read_json("analysis/summary.json")
    if summary is None or summary["records"] != records:
        with console.status("Analysing") as status:
            written = write_report(out, progress=status.update)
        page = Console(file=io.StringIO(), width=80)
        print_summary(written, page)
        summary = {"records": records, "text": page.file.getvalue()}  # type: ignore[attr-defined]
        folder.write_json("analysis/summary.json", summary)
        write_manifest(folder, "analysis")
    console.print(printable(summary["text"]), markup=False, highlight=False, end="")


if __name__ == "__main__":
    run_door(main)
