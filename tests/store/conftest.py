"""Fixtures of the store's tests: a bucket with prepared answers, and no AWS below."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_bucket import FakeBucket, forget_stores


@pytest.fixture
def not_on_aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No credentials in the environment or the home directory, and no EC2 machine."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    # botocore would ask the service of an EC2 machine for credentials if a profile had none.
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    (tmp_path / ".aws").mkdir()
    is_file = Path.is_file
    monkeypatch.setattr(
        Path, "is_file", lambda path: "sys_vendor" not in str(path) and is_file(path)
    )
    forget_stores()
    yield
    forget_stores()


@pytest.fixture
def bucket(not_on_aws: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBucket]:
    """A server that serves every bucket, and credentials for it in the environment."""
    bucket = FakeBucket()
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-tests")
    yield bucket
    bucket.close()
