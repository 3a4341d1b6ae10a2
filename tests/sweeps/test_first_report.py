"""A report is written while a study trains, once; its process ends with the study."""

import sys
import time
from io import StringIO

import pytest
from rich.console import Console
from study_here import command, make_config

from sampimp.store.location import Folder
from sampimp.sweeps import first_report
from sampimp.sweeps.first_report import FirstReport

SLOW = (sys.executable, "-c", "import time; time.sleep(600)")
FAILS = (sys.executable, "-c", "import sys; sys.exit('no room')")


class Display:
    """What `FirstReport` asks the display of a study."""

    def __init__(self, done=(), seconds=100.0):
        self.done, self.seconds = set(done), seconds

    def is_done(self, label):
        return label in self.done

    def seconds_left(self):
        return self.seconds


@pytest.fixture
def console():
    return Console(file=StringIO(), width=200)


def begin(folder, console):
    return FirstReport(Folder.of(str(folder)), ("digits-shuffle-seed1",), console)


def wait(report, display):
    end = time.monotonic() + 60
    while report._process is not None:
        report.look(display)
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_report_of_a_first_run_is_written(tmp_path, console):
    command(make_config(tmp_path / "study", strategies=("shuffle",), reference_seeds=(1,)))
    display = Display({"digits-shuffle-seed1"})
    with begin(tmp_path / "study", console) as report:
        report.look(display)
        wait(report, display)
        report.look(display)
        assert report._process is None  # once is enough
    page = tmp_path / "study" / "analysis" / "report.html"
    assert console.file.getvalue() == f"Report of the first runs: {page}\n"
    assert page.stat().st_size > 100_000
    with begin(tmp_path / "study", console) as report:
        report.look(display)
        assert report._process is None  # a later command has it already


@pytest.mark.parametrize(
    "display",
    [
        Display({"digits-rand-seed1"}),
        Display({"digits-shuffle-seed1"}, seconds=19),
        Display({"digits-shuffle-seed1"}, seconds=None),
    ],
)
def test_no_report_without_a_reference_or_near_the_end(tmp_path, console, display):
    with begin(tmp_path, console) as report:
        report.look(display)
        assert report._process is None


def test_its_process_ends_with_the_study_and_a_failure_says_nothing(tmp_path, console, monkeypatch):
    display = Display({"digits-shuffle-seed1"})
    monkeypatch.setattr(first_report, "COMMAND", SLOW)
    with begin(tmp_path, console) as report:
        report.look(display)
        process = report._process
        assert process.poll() is None
    assert process.returncode == -15
    monkeypatch.setattr(first_report, "COMMAND", FAILS)
    with begin(tmp_path, console) as report:
        report.look(display)
        wait(report, display)
    assert console.file.getvalue() == ""
