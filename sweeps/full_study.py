"""The door: train the paper's study, or one's own, and write its report.

python sweeps/full_study.py                       the paper's study
python sweeps/full_study.py --preset digits       the same on 1,797 digits, in minutes
python sweeps/full_study.py --cluster YAML ...    on the cluster that `ray up YAML` started
python sweeps/full_study.py --help                all options
"""

import io

from rich.console import Console

from sampimp.errors import UserError
from sampimp.schema import __version__, digest_json
from sampimp.store.location import Folder
from sampimp.store.plan import read_commits
from sampimp.store.snapshots import SNAPSHOTS
from sampimp.sweeps.door import INTERRUPTED, run_door
from sampimp.sweeps.jobs import send
from sampimp.sweeps.study import parse, run


def main(arguments: list[str]) -> int:
    """Run the study; return 0 only when every planned trial is committed or diverged."""
    console = Console(soft_wrap=True)
    errors = Console(stderr=True, soft_wrap=True)
    try:
        config = parse(arguments)
        if config.cluster:
            return send(config, arguments, console)
        code = run(config, console)
        if not config.dry_run:
            report(config.out, console)
        return code
    except UserError as error:
        errors.print(str(error), style="red", markup=False, highlight=False)
        return 2
    except KeyboardInterrupt:
        errors.print(INTERRUPTED)
        return 130


def report(out: str, console: Console) -> None:
    """Analyse the study unless its report is of these very records, and print what came of it."""
    # Here: the trials need not wait for the analyses' packages, nor does a mistake to be told.
    from sampimp.analysis.report import print_summary, write_report

    folder = Folder.of(out)
    records = digest_json([sorted(read_commits(folder)), folder.read_json(SNAPSHOTS), __version__])
    summary = folder.read_json("analysis/summary.json")
    if summary is None or summary["records"] != records:
        with console.status("Analysing") as status:
            written = write_report(out, progress=status.update)
        page = Console(file=io.StringIO(), width=80)
        print_summary(written, page)
        summary = {"records": records, "text": page.file.getvalue()}  # type: ignore[attr-defined]
        folder.write_json("analysis/summary.json", summary)
    console.print(summary["text"], markup=False, highlight=False, end="")


if __name__ == "__main__":
    run_door(main)
