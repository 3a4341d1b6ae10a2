"""What all tests share: Ray's environment, and how they run on two cores."""

import os
import tempfile
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Read by Ray when it is imported: without clusters of many machines it takes 127.0.0.1, whatever
# the machine's own address is.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

# Ray's workers have the environment that Ray was started with. So the tests of a bucket tell them
# its server and credentials by these files, which are there while `test_s3.py` runs.
os.environ["AWS_CONFIG_FILE"] = f"{tempfile.gettempdir()}/sampimp-tests-{os.getpid()}/config"
os.environ["AWS_SHARED_CREDENTIALS_FILE"] = f"{os.environ['AWS_CONFIG_FILE']}-credentials"

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a folder that starts Ray in one process, beside all others in a second."""
    for item in items:
        if item.path.is_relative_to(HERE / "sweeps") or item.path == HERE / "test_replay.py":
            item.add_marker(pytest.mark.xdist_group("ray"))
