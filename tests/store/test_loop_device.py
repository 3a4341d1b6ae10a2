"""A real file system loses its power: the image of a loop device is copied without a sync.

What the file system had not written to the device by then is not in the copy, as after a power cut.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from study_here import command, make_config, values_of

from sampimp.store.location import Folder
from sampimp.store.plan import read_commits

HELPERS = Path(__file__).parents[1] / "helpers"
TOOLS = ("mkfs.ext4", "mount", "umount")

STUDY = """
import sys
from study_here import command, make_config

command(make_config(sys.argv[1]), committed=lambda label: print(label, flush=True))
"""


@contextlib.contextmanager
def mounted(image, place):
    """Mount an image of a file system; unmount it at the end."""
    place.mkdir()
    mount = subprocess.run(["mount", "-o", "loop", image, place], capture_output=True)
    if mount.returncode:
        pytest.skip(f"no loop device: {mount.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, TOOLS)), reason="needs root and mkfs.ext4"
)
@pytest.mark.parametrize("commits", [1, 2])
def test_what_was_reported_as_committed_is_on_the_device(tmp_path, commits):
    image, copied = tmp_path / "image", tmp_path / "copied"
    with image.open("wb") as file:
        file.truncate(64 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    with mounted(image, tmp_path / "disk") as disk:
        path = os.pathsep.join([*sys.path, str(HELPERS)])
        study = subprocess.Popen(
            [sys.executable, "-c", STUDY, disk / "study"],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert study.stdout is not None
        try:
            reported = [study.stdout.readline().strip() for _ in range(commits)]
            study.send_signal(signal.SIGSTOP)
            shutil.copyfile(image, copied)
        finally:
            study.kill()
            study.wait()
    with mounted(copied, tmp_path / "after") as after:
        out = after / "study"
        found = {commit["strategy"] + str(commit["seed"]) for commit in commits_of(out)}
        assert {label.removeprefix("digits-").replace("-seed", "") for label in reported} <= found
        command(make_config(out))
        values = values_of(out)
    command(make_config(tmp_path / "undisturbed"))
    assert values == values_of(tmp_path / "undisturbed")


def commits_of(out):
    return read_commits(Folder.of(out)).values()
