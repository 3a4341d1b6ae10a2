"""Tests of data sets use neither the developer's files nor the network beyond loopback."""

import pytest

from sampimp.data import official

UNUSED_PORT = "http://127.0.0.1:9/"
"""The discard port, where no server listens."""


@pytest.fixture(autouse=True)
def no_data_and_no_cache(monkeypatch, tmp_path_factory):
    """Hide the developer's data folder and cache; the mirrors refuse connections."""
    monkeypatch.delenv("SAMPIMP_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(official, "MNIST_MIRRORS", (UNUSED_PORT,))
    monkeypatch.setattr(official, "CIFAR10_MIRRORS", (UNUSED_PORT,))
