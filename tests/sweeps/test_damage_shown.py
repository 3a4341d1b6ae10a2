"""A command names a damaged commit in one line, and the same command makes it again."""

import subprocess
import sys

from study_here import command, make_config, values_of

from sampimp.store.commits import WITHDRAWN
from sampimp.store.location import Folder


def test_a_damaged_commit_is_named_in_one_line_and_made_again(tmp_path):
    out = tmp_path / "study"
    command(make_config(out))
    expected = values_of(out)
    trial = next(path for path in (out / "trials").iterdir() if "nlo" in path.name)
    (trial / "COMMIT.json").write_bytes(b"")
    shown = subprocess.run(
        [sys.executable, "-m", "sampimp.sweeps.consolidate", out],
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 2
    (line,) = (line for line in shown.stderr.splitlines() if "COMMIT.json" in line)
    assert line == (
        f"{trial}/COMMIT.json is damaged, so that its record counts as missing: 0 bytes: "
        "Expecting value: line 1 column 1 (char 0)"
    )
    assert "Warning" not in shown.stderr
    command(make_config(out))
    assert values_of(out) == expected
    (withdrawn,) = (Folder.of(trial) / WITHDRAWN).files()
    assert withdrawn.startswith("damaged-")
