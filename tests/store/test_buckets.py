"""Buckets: URLs, endpoints, and a server that is away, hangs or loses answers."""

import os
import signal
import socket
import threading
import time
from datetime import timedelta

import pytest
from fake_bucket import EMPTY_LISTING, NO_SUCH_KEY

from sampimp.errors import StoreError
from sampimp.store import buckets, location
from sampimp.store.location import Folder
from sampimp.store.s3_errors import ServerAwayError


def test_urls_are_kept_without_a_trailing_slash():
    folder = Folder.of("s3://bucket/study/") / "trials"
    assert str(folder) == "s3://bucket/study/trials"
    assert not folder.is_local


@pytest.mark.parametrize("url", ["ftp://host/study", "gs://bucket/study", "http://127.0.0.1:9/x"])
def test_other_urls_are_refused(url):
    with pytest.raises(StoreError, match=f"s3:// URL\n +Got {url.split('://')[0]}://"):
        Folder.of(url).read_json("study.json")
    with pytest.raises(StoreError, match="s3:// URL"):
        Folder.of(url).check_writable()


@pytest.mark.parametrize(
    ("endpoint", "word"),
    [("http://192.0.2.1", "unencrypted"), ("https://user:hidden@192.0.2.1", "credentials in it")],
)
def test_an_endpoint_that_exposes_secrets_is_refused(bucket, monkeypatch, endpoint, word):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    with pytest.raises(StoreError, match=word) as caught:
        Folder.of("s3://bucket/x").check_reachable()
    assert "hidden" not in str(caught.value)
    assert bucket.requests == []


@pytest.mark.parametrize(
    "url",
    ["s3://KEY:hid/den@bucket/study", "s3://KEY:hidden/x", "s3://b/x?Signature=hidden", "s3://"],
)
def test_a_secret_in_the_url_is_not_repeated(url):
    with pytest.raises(StoreError, match="s3://bucket/prefix") as caught:
        Folder.of(url)
    assert "hid" not in str(caught.value)


def test_requests_are_repeated_while_a_server_is_away(bucket):
    bucket.answers = [(503, ""), (None, ""), NO_SUCH_KEY]
    assert Folder.of("s3://bucket/study").read_bytes("x") is None
    assert [method for method, _, _ in bucket.requests] == ["GET"] * 3
    cut = "HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n<ListBucketResult>"
    bucket.answers = [(None, cut), EMPTY_LISTING]
    assert Folder.of("s3://bucket/study").folders() == []


def test_a_server_that_stays_away_or_hangs_raises_server_away_error(bucket, monkeypatch):
    monkeypatch.setattr(location, "OPENING_PATIENCE", timedelta(seconds=0.2))
    monkeypatch.setattr(location, "SERVER_PATIENCE", timedelta(seconds=0.5))
    monkeypatch.setattr(location, "_RETRY_PATIENCE", timedelta(seconds=0.1))
    monkeypatch.setattr(buckets, "REQUEST_TIMEOUT", timedelta(seconds=0.3))
    bucket.answers = [(500, "")]
    folder = Folder.of("s3://bucket/study")
    for use in (Folder.check_reachable, Folder.check_writable, Folder.folders):
        with pytest.raises(ServerAwayError, match="status 500"):
            use(folder)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        for use in (Folder.check_reachable, lambda folder: folder.read_bytes("x")):
            with pytest.raises(ServerAwayError, match="no answer in time"):
                use(Folder.of("s3://bucket/silent"))


@pytest.fixture
def handles_ctrl_c():
    """Handle SIGINT as in a terminal; processes that a shell starts in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("handles_ctrl_c")
def test_ctrl_c_interrupts_waiting_for_a_server(bucket):
    bucket.answers = [(503, "")]
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        Folder.of("s3://bucket/study").read_bytes("x")
    assert time.monotonic() - start < 60  # of 180 s


def test_an_object_is_created_once_even_if_the_answer_is_lost(bucket):
    folder = Folder.of("s3://bucket/study")
    exists = (412, "<Error><Code>PreconditionFailed</Code></Error>")
    bucket.answers = [(None, ""), exists, (200, "mine")]
    assert folder.create_bytes("owner", b"mine")
    bucket.answers = [(None, ""), exists, (200, "another's")]
    assert not folder.create_bytes("owner", b"mine")
    # Two writers at the same time: S3 answers 409 to one, and may have stored neither object.
    conflict = (409, "<Error><Code>ConditionalRequestConflict</Code></Error>")
    bucket.answers = [conflict, NO_SUCH_KEY, (200, "")]
    bucket.requests.clear()
    assert folder.create_bytes("owner", b"mine")
    assert [method for method, _, _ in bucket.requests] == ["PUT", "GET", "PUT"]
    headers = {name.lower(): value for name, value in bucket.requests[0][2].items()}
    assert headers["if-none-match"] == "*"
