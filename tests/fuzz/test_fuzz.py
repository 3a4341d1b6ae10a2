"""A changed file of somebody else's study is a named error, in bounded memory and time.

`make fuzz` runs 10,000 cases; this test the first of them, half by half.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = 80


@pytest.mark.parametrize("first", [0, CASES])
def test_changed_files_raise_named_errors_only(first):
    place = Path(__file__).parent
    paths = [str(place.parent / "helpers"), str(place.parents[1])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(place / "fuzz.py"), "--first", str(first)]
    command += ["--cases", str(CASES)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert f"{CASES} cases, 0 failures" in result.stdout
    assert "RecordError" in result.stdout  # the checks are reached


def test_a_failure_is_a_failure():
    """An error that is none of the named ones, or a change beside the study, is reported."""
    code = """
import sys, fuzz
def broken(root):
    raise KeyError("x")
def unclean(root):
    (root / "beside").touch()
both = iter((broken, unclean))
fuzz.fuzz_readers.readers = lambda part, draw: (next(both),)
sys.argv = ["fuzz", "--cases", "2"]
sys.exit(fuzz.main())
"""
    place = Path(__file__).parent
    paths = [str(place), str(place.parent / "helpers"), str(place.parents[1])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "case 0: broken" in result.stdout
    assert "case 1: unclean" in result.stdout
    assert "changed beside the study" in result.stdout
    assert "2 cases, 2 failures" in result.stdout
