"""Only `sampimp.store.disk` changes files of a study: an interposed library sees every call."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

SCRIPT = """
import json, sys
import pytest
import simulated_disk, study_here
from sampimp.store.location import Folder
from sampimp.store.sharded import consolidate
from sampimp.sweeps.influence_study import compute_influence

out, report = sys.argv[1:]
with pytest.MonkeyPatch.context() as patch, simulated_disk.recorded(patch) as log:
    study_here.command(study_here.make_config(out))
    compute_influence(out, ["mean"], strategy="shuffle", seed=1)
    consolidate(out)
    Folder.of(out).remove()
paths = {path for operation in log.operations for path in (operation.path, operation.other)}
paths |= log.missed
open(report, "w").write(json.dumps([path for path in paths if isinstance(path, str)]))
open(out + "-beside", "w").close()  # what the library would see of others
"""


@pytest.mark.skipif(
    shutil.which("cc") is None or sys.platform != "linux", reason="no C compiler, or no LD_PRELOAD"
)
def test_only_one_module_changes_files(tmp_path):
    library, out = tmp_path / "watch.so", tmp_path / "study"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-o", library, HERE / "watch_writes.c", "-ldl"],
        check=True,
    )
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "WATCH_ROOT": str(out),
        "WATCH_LOG": str(tmp_path / "log"),
        "PYTHONPATH": os.pathsep.join([*sys.path, str(HERE.parent / "helpers")]),
    }
    command = [sys.executable, "-c", SCRIPT, str(out), str(tmp_path / "report")]
    subprocess.run(command, check=True, env=environment, timeout=300)
    seen = {line.partition(" ")[2] for line in (tmp_path / "log").read_text().splitlines()}
    recorded = set(json.loads((tmp_path / "report").read_text()))
    assert len(seen) > 100
    assert {os.path.normpath(path) for path in seen} - recorded == {f"{out}-beside"}
