"""Provenance of a trial: library versions, git commit and hardware.

Map: `describe_machine`, `git_commit`.
"""

import os
import platform
import subprocess
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


@cache
def describe_machine() -> dict[str, Any]:
    """Return library versions, git commit and hardware of this process."""
    libraries = ("sampimp", "torch", "ray", "zarr", "xarray", "numpy")
    versions = {"python": platform.python_version()}
    for library in libraries:
        with suppress(PackageNotFoundError):  # of an extra that is not installed, such as Ray
            versions[library] = version(library)
    return {
        "versions": versions,
        "commit": git_commit(),
        "hardware": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "platform": platform.platform(terse=True),
        },
    }


def git_commit() -> str | None:
    """Return the commit of the checkout that this package runs from; None if it is installed."""
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
