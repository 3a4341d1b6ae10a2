"""How the tests share two cores: those that start Ray run one after the other."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a folder that starts Ray in one process, beside all others in a second."""
    for item in items:
        if item.path.is_relative_to(HERE / "sweeps") or item.path == HERE / "test_replay.py":
            item.add_marker(pytest.mark.xdist_group("ray"))
