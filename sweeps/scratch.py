"""A temporary folder of this process, removed at its end, as are those of killed processes.

Ray Tune needs a folder for its own state, which a study does not use.

Map: `scratch_folder`.
"""

import contextlib
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "sampimp-tune-"


@contextlib.contextmanager
def scratch_folder() -> Iterator[str]:
    """Yield a new temporary folder; first remove those whose process on this host is gone."""
    host = re.sub(r"[^A-Za-z0-9]+", "_", socket.gethostname())  # containers may share the folder
    _remove_stale(host)
    with tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{host}-{os.getpid()}-") as folder:
        yield folder


def _remove_stale(host: str) -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}{host}-*"):
        match = re.fullmatch(rf"{_PREFIX}{host}-(\d+)-\w+", folder.name)
        if match is None or folder.is_symlink() or _is_running(int(match[1])):
            continue
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == os.getuid():
                shutil.rmtree(folder)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # a process of another user
        return True
    return True
