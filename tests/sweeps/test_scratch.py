"""Temporary folders of killed processes are removed at the next start, and no others."""

import os
import re
import socket
import subprocess
import sys
import tempfile

from sampimp.sweeps.scratch import scratch_folder

START = """
import os, signal
from sampimp.sweeps.scratch import scratch_folder
with scratch_folder() as folder:
    print(folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_folder_of_a_killed_process_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    env = os.environ | {"TMPDIR": str(tmp_path)}
    killed = subprocess.run([sys.executable, "-c", START], env=env, capture_output=True, text=True)
    assert os.path.isdir(killed.stdout.strip())
    host = re.sub(r"[^A-Za-z0-9]+", "_", socket.gethostname())
    dead = re.search(r"-(\d+)-\w+$", killed.stdout.strip())[1]
    others = [
        f"sampimp-tune-{host}-{os.getppid()}-running",
        f"sampimp-tune-other_host-{dead}-x",
        f"sampimp-tune-{host}-{dead}-x.y",
        "sampimp-tune-old",
    ]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / "kept").mkdir()
    (tmp_path / f"sampimp-tune-{host}-{dead}-link").symlink_to(tmp_path / "kept")
    with scratch_folder() as folder, scratch_folder() as second:
        assert os.path.isdir(folder)
        assert os.path.isdir(second)
        assert not os.path.exists(killed.stdout.strip())
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted([*others, "kept", f"sampimp-tune-{host}-{dead}-link"])
