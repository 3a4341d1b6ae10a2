"""The command `sampimp`: help without imports, the scripts' options and exit codes, and extras."""

import re
import subprocess
import sys
import time

import pytest

from sampimp.sweeps import (
    command,
    consolidate,
    full_study,
    influence,
    retrain,
    score_snapshots,
    status,
)
from sampimp.sweeps.command import SUBCOMMANDS, run_command

COMMAND = "from sampimp.sweeps.command import main; main()"
HEAVY = ("ray", "torch", "xarray", "tyro", "rich", "matplotlib", "sklearn")


def run_python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )


def help_of(main, capsys):
    """Return the help of a program whose name is left out, and its exit code."""
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    return re.sub(r"sampimp \w+|\w+\.py", "PROGRAM", capsys.readouterr().out), exit_.value.code


def test_help_names_every_subcommand_and_imports_nothing_heavy():
    code = f"import sys, atexit; atexit.register(lambda: print({HEAVY} & sys.modules.keys()))"
    code = code.replace(str(HEAVY), str(set(HEAVY)))
    start = time.monotonic()
    result = run_python(f"{code}\n{COMMAND}", "--help")
    assert time.monotonic() - start < 5  # a quarter of a second, on an idle machine
    assert (result.returncode, result.stderr) == (0, "")
    *text, loaded = result.stdout.splitlines()
    assert loaded == "set()"
    assert max(map(len, text)) <= 100
    named = {line.split()[0] for line in text if re.match(r"  [a-z]+ {2,}", line)}
    assert named == set(SUBCOMMANDS)
    assert sum(line.startswith("  sampimp ") for line in text) >= 3  # examples


def test_no_arguments_and_the_version(capsys):
    assert run_command([]) == 0
    assert capsys.readouterr().out == f"{command.HELP}\n"
    assert run_command(["--version"]) == 0
    assert re.fullmatch(r"sampimp \d+\.\d+\S*\n", capsys.readouterr().out)


def test_an_unknown_subcommand_is_refused(capsys):
    assert run_command(["stats"]) == 2
    error = capsys.readouterr().err
    assert "'stats'; did you mean status?" in error
    assert [line[:9] for line in error.splitlines()] == [
        "Expected ",
        "     Got ",
        "   Where ",
        "   To do ",
    ]


@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("study", full_study),
        ("status", status),
        ("score", score_snapshots),
        ("influence", influence),
        ("retrain", retrain),
        ("consolidate", consolidate),
    ],
)
def test_a_subcommand_has_the_options_of_its_script(name, script, capsys):
    expected = help_of(script.main, capsys)
    assert expected[1] == 0
    assert help_of(lambda arguments: run_command([name, *arguments]), capsys) == expected


def test_help_of_study_is_grouped_and_fits(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    text, _ = help_of(lambda arguments: run_command(["study", *arguments]), capsys)
    titles = re.findall(r"^\W*(\w+) options\W*$", text, re.MULTILINE)
    assert titles == ["run", "training", "storage", "machine"]
    assert "Examples:" in text
    assert max(map(len, text.splitlines()[1:])) <= 80


def test_a_subcommand_has_the_exit_code_of_its_script(tmp_path, capsys):
    for name in ("status", "consolidate"):
        assert run_command([name, str(tmp_path / "nowhere")]) == 2
        assert "Expected a study" in capsys.readouterr().err


WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
from sampimp.sweeps.command import main
main()
"""


@pytest.mark.parametrize(
    ("package", "arguments", "extra"),
    [
        ("tyro", ["study", "--help"], "study"),
        ("rich", ["status", "OUT"], "study"),
        ("ray", ["score", "OUT"], "study"),
        ("ray", ["study", "--preset", "digits", "--out", "OUT"], "study"),
        ("tyro", ["report", "OUT"], "report"),
        ("matplotlib", ["report", "OUT"], "report"),
        ("sklearn", ["report", "OUT"], "report"),
        ("jinja2", ["report", "OUT"], "report"),
    ],
)
def test_a_missing_package_names_its_extra(package, arguments, extra, tmp_path):
    result = run_python(
        WITHOUT.format(package=package),
        *(word.replace("OUT", str(tmp_path / "out")) for word in arguments),
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    assert lines[0] == f"Expected the Python package {package}"
    assert lines[-1].strip() == f"To do pip install 'sampimp[{extra}]'"
    assert len(lines) == 4


@pytest.mark.parametrize("package", ["tyro", "rich", "ray", "xarray"])
def test_help_needs_no_package_of_an_extra(package):
    result = run_python(WITHOUT.format(package=package), "--help")
    assert (result.returncode, result.stderr) == (0, "")
