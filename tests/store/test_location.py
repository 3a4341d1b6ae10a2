"""A folder holds bytes and JSON, on a disk or in a bucket, and says what is in the way."""

import http.server
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from sampimp.data import Source
from sampimp.errors import RecordError, StoreError
from sampimp.store import buckets, location
from sampimp.store.buckets import open_store
from sampimp.store.datasets import read_source, write_source
from sampimp.store.location import Folder
from sampimp.store.s3_errors import ServerAwayError
from sampimp.store.zarr_arrays import zarr_store


def made_source():
    """Return the smallest data set."""
    values = np.ones((2, 3), np.uint8)
    return Source(
        name="x",
        train_values=values,
        train_labels=np.zeros(2, np.int64),
        test_values=values,
        test_labels=np.zeros(2, np.int64),
        full_scale=1.0,
        class_names=("a",),
    )


def test_a_folder_holds_bytes_and_json(tmp_path):
    folder = Folder.of(tmp_path) / "a" / "b"
    assert str(folder) == f"{tmp_path}/a/b"
    assert folder.is_local
    assert folder.read_bytes("x") is None
    assert folder.read_json("x") is None
    assert folder.is_empty()
    folder.write_bytes("x", b"one")
    folder.write_bytes("x", b"two")
    folder.write_json("deep/y.json", {"k": [1, 2.5, None]})
    assert folder.read_bytes("x") == b"two"
    assert (tmp_path / "a/b/x").read_bytes() == b"two"
    assert folder.read_json("deep/y.json") == {"k": [1, 2.5, None]}
    assert not folder.is_empty()
    assert folder.folders() == ["deep"]
    assert Folder.of(tmp_path).folders() == ["a"]


def test_what_is_there_is_not_created_again(tmp_path):
    folder = Folder.of(tmp_path / "new") / "trial"
    assert folder.create_json("owner.json", {"attempt": "a"})
    assert not folder.create_json("owner.json", {"attempt": "b"})
    assert folder.create_json("owner.json", {"attempt": "a"})  # asked again by the same caller
    assert folder.read_json("owner.json") == {"attempt": "a"}
    folder.write_json("owner.json", {"attempt": "c"})
    assert not folder.create_json("owner.json", {"attempt": "a"})
    assert folder.read_json("owner.json") == {"attempt": "c"}
    assert [path.name for path in (tmp_path / "new" / "trial").iterdir()] == ["owner.json"]


def test_of_several_threads_that_create_an_object_one_does(tmp_path):
    folder, start = Folder.of(tmp_path), threading.Barrier(8)

    def race(number):
        start.wait()
        return [folder.create_bytes(f"round-{r}", b"%d" % number) for r in range(100)]

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(race, range(8)))
    for r in range(100):
        (winner,) = (number for number in range(8) if won[number][r])
        assert folder.read_bytes(f"round-{r}") == b"%d" % winner


RACE = """
import sys
from sampimp.store.location import Folder
folder, me = Folder.of(sys.argv[1]), sys.argv[2].encode()
print("ready", flush=True)
sys.stdin.readline()
print(*(r for r in range(200) if folder.create_bytes(f"round-{r}", me)))
"""


def test_of_several_processes_that_create_an_object_one_does(tmp_path):
    folder = Folder.of(tmp_path / "new")
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(folder), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 3
    for racer in racers:
        racer.stdin.write("\n")
        racer.stdin.flush()
    won = [{int(r) for r in racer.communicate()[0].split()} for racer in racers]
    for r in range(200):
        (winner,) = (number for number in range(3) if r in won[number])
        assert folder.read_bytes(f"round-{r}") == b"%d" % winner


def test_paths_are_made_absolute_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Folder.of("study/")
    assert folder == Folder.of(tmp_path / "study") == Folder.of(folder)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    folder.write_bytes("x", b"1")
    assert (tmp_path / "study" / "x").read_bytes() == b"1"


def test_urls_stay_as_they_are():
    folder = Folder.of("s3://bucket/study/") / "trials"
    assert str(folder) == "s3://bucket/study/trials"
    assert not folder.is_local


def test_removing_a_folder_leaves_its_neighbours(tmp_path):
    folder = Folder.of(tmp_path)
    for name in ("epoch-1", "epoch-10", "epoch-1/deep"):
        (folder / name).write_bytes("x", b"1")
    (folder / "epoch-1").remove()
    assert not (tmp_path / "epoch-1").exists()
    assert (tmp_path / "epoch-10" / "x").read_bytes() == b"1"
    (folder / "never").remove()
    assert folder.folders() == ["epoch-10"]


@pytest.fixture
def linked(tmp_path):
    """A root that is reached by a link, a folder beside it, and a trial in it."""
    (tmp_path / "disk" / "study" / "trial" / "deep").mkdir(parents=True)
    (tmp_path / "disk" / "study" / "other").mkdir()
    (tmp_path / "outside").mkdir()
    for file in ("outside/precious", "disk/study/other/kept", "disk/study/trial/deep/x"):
        (tmp_path / file).write_bytes(b"1")
    (tmp_path / "study").symlink_to(tmp_path / "disk" / "study")
    return Folder.of(tmp_path / "study")


OUTSIDE = ("../../../outside", "../../../outside/precious", "../../../outside/new")
"""From a trial: a folder, a file, and nothing yet."""


@pytest.mark.parametrize("target", OUTSIDE)
def test_a_link_that_leads_out_is_refused_with_its_path(linked, tmp_path, target):
    link = tmp_path / "study" / "trial" / "link"
    link.symlink_to(target)
    trial = linked / "trial"
    for use in (
        lambda: trial.read_bytes("link"),
        lambda: trial.read_json("link/precious"),
        lambda: trial.write_bytes("link", b"2"),
        lambda: trial.write_json("link/precious", 2),
        lambda: trial.create_bytes("link/deeper/new", b"2"),
        lambda: trial.delete("link"),
        lambda: trial.delete("link/precious"),
        lambda: (trial / "link").folders(),
        lambda: (trial / "link").files(),
        lambda: (trial / "link").size(),
        lambda: (trial / "link").remove(),
        lambda: (trial / "link" / "deeper").remove(),
        lambda: trial.remove(),
        lambda: zarr_store(trial / "link"),
        lambda: write_source(trial / "link" / "made.zarr", made_source()),
    ):
        with pytest.raises(StoreError, match=f"Where {link}\n"):
            use()
    assert link.is_symlink()
    assert os.listdir(tmp_path / "outside") == ["precious"]
    assert (tmp_path / "outside" / "precious").read_bytes() == b"1"
    assert trial.read_bytes("deep/x") == b"1"  # nothing was deleted
    assert linked.size() == 2


def test_zarr_follows_no_link_that_leads_out(linked, tmp_path):
    write_source(linked / "made.zarr", made_source())
    for name in ("train_labels", "train_values/c/0"):
        place = tmp_path / "study" / "made.zarr" / name
        shutil.move(place, tmp_path / "moved")
        place.symlink_to(tmp_path / "moved")
        before = {path: path.read_bytes() for path in (tmp_path / "moved").rglob("*.json")}
        with pytest.raises(StoreError, match=f"Where .*{name}"):
            read_source(linked / "made.zarr")
        with pytest.raises(StoreError, match=f"Where .*{name}"):
            write_source(linked / "made.zarr", made_source())
        assert {path: path.read_bytes() for path in before} == before
        place.unlink()
        shutil.move(tmp_path / "moved", place)
    assert read_source(linked / "made.zarr") is not None


def test_a_link_that_stays_inside_is_deleted_and_not_followed(linked, tmp_path):
    study = tmp_path / "study"
    trial = linked / "trial"
    for name, target in (("folder", "../other"), ("file", "../other/kept"), ("loop", "..")):
        (study / "trial" / name).symlink_to(target)
    assert trial.read_bytes("file") == b"1"
    assert (trial / "folder").files() == ["kept"]
    with pytest.raises(StoreError, match="on the way to what is deleted"):
        trial.delete("folder/kept")
    trial.write_bytes("file", b"2")
    assert not (study / "trial" / "file").is_symlink()  # the link was replaced
    assert linked.read_bytes("other/kept") == b"1"
    trial.delete("folder")
    (study / "trial" / "folder").symlink_to("../other")
    (trial / "folder").remove()
    assert not (study / "trial" / "folder").is_symlink()
    trial.remove()
    assert sorted(os.listdir(study)) == ["other"]
    assert linked.read_bytes("other/kept") == b"1"
    linked.remove()
    assert os.listdir(tmp_path / "disk" / "study") == []


@pytest.mark.parametrize("name", ["../outside", "trial/../../outside"])
def test_a_name_that_leads_out_is_refused(linked, name):
    for use in (lambda: linked.read_bytes(f"{name}/precious"), lambda: (linked / name).remove()):
        with pytest.raises(StoreError, match="leads out"):
            use()


def test_damaged_json_is_refused(tmp_path):
    (tmp_path / "study.json").write_text('{"seed": ')
    with pytest.raises(RecordError, match=rf"9 bytes(.|\n)*{tmp_path}/study.json"):
        Folder.of(tmp_path).read_json("study.json")


def test_what_can_be_written_is_left_clean(tmp_path):
    Folder.of(tmp_path / "new").check_writable()
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("below", ["", "study"])
def test_a_file_in_the_way_is_refused_and_left(tmp_path, below):
    file = tmp_path / "results"
    file.write_text("precious")
    for use in (Folder.check_writable, lambda folder: folder.write_bytes("x", b"1")):
        with pytest.raises(StoreError, match=f"Where {file}"):
            use(Folder.of(file / below))
    assert file.read_text() == "precious"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(StoreError, match=f"Where {tmp_path}/study"):
            Folder.of(tmp_path / "study").check_writable()
    finally:
        tmp_path.chmod(0o755)


@pytest.mark.parametrize("url", ["ftp://host/study", "gs://bucket/study", "http://127.0.0.1:9/x"])
def test_other_urls_are_refused(url):
    with pytest.raises(StoreError, match=f"s3:// URL\n +Got {url.split('://')[0]}://"):
        Folder.of(url).read_json("study.json")
    with pytest.raises(StoreError, match="s3:// URL"):
        Folder.of(url).check_writable()


# -------------------------------------------------- a bucket; on a real server in test_s3.py


class Bucket:
    """An HTTP server on loopback that says what it is told to, and notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.answers: list[tuple[int | None, str]] = []
        """Status and body, in turn, the last for all that follow; None breaks the connection."""
        bucket = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                bucket.asked.append((self.command, self.path, dict(self.headers)))
                status, body = bucket.answers[0]
                del bucket.answers[: len(bucket.answers) > 1]
                if status is None:
                    self.wfile.write(body.encode())
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("ETag", '"1"')
                self.send_header("Last-Modified", "Sun, 06 Nov 1994 08:49:37 GMT")
                self.end_headers()
                self.wfile.write(body.encode())

            do_GET = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def not_on_aws(monkeypatch, tmp_path):
    """No credentials in the environment or the home, and no AWS below."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".aws").mkdir()
    is_file = Path.is_file
    monkeypatch.setattr(
        Path, "is_file", lambda path: "sys_vendor" not in str(path) and is_file(path)
    )
    buckets.open_store.cache_clear()
    yield
    buckets.open_store.cache_clear()


@pytest.fixture
def bucket(not_on_aws, monkeypatch):
    """A server that every bucket is on, and credentials for it."""
    bucket = Bucket()
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-tests")
    yield bucket
    bucket.close()


NONE_THERE = (404, "<Error><Code>NoSuchKey</Code></Error>")
EMPTY = (200, "<ListBucketResult></ListBucketResult>")


def signed(request) -> tuple[str, str, str | None]:
    """Return whose key a request is signed with, for which region, and its session token."""
    headers = {name.lower(): value for name, value in request[2].items()}
    key, _, region, *_ = headers["authorization"].partition("Credential=")[2].split("/")
    return key, region, headers.get("x-amz-security-token")


def test_s3_without_credentials_is_refused_before_any_connection(not_on_aws, tmp_path):
    folder = Folder.of("s3://bucket/without-credentials")
    uses = (Folder.check_writable, Folder.check_reachable, Folder.is_empty, Folder.folders)
    for use in (*uses, lambda folder: folder.read_json("study.json")):
        with pytest.raises(
            StoreError, match=rf"credentials(.|\n)*{tmp_path}(.|\n)*AWS_ACCESS_KEY_ID"
        ):
            use(folder)


def test_s3_settings_come_from_the_profile(bucket, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    bucket.answers = [NONE_THERE]
    credentials = tmp_path / ".aws" / "credentials"
    credentials.write_text(
        "[default]\naws_access_key_id = A\naws_secret_access_key = s%3cret\n"
        "[other]\naws_access_key_id = C\naws_secret_access_key = D\naws_session_token = E\n"
    )
    (tmp_path / ".aws" / "config").write_text(
        f"[default]\nregion = eu-north-1\nendpoint_url = {bucket.endpoint}\n"
        f"[profile other]\nregion = sa-east-1\nendpoint_url = {bucket.endpoint}\n"
    )
    assert Folder.of("s3://bucket/default").read_bytes("x") is None
    monkeypatch.setenv("AWS_PROFILE", "other")
    assert Folder.of("s3://bucket/other").read_bytes("x") is None
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    assert Folder.of("s3://bucket/region").read_bytes("x") is None
    assert [signed(request) for request in bucket.asked] == [
        ("A", "eu-north-1", None),
        ("C", "sa-east-1", "E"),
        ("C", "us-west-2", "E"),
    ]
    sent = pickle.dumps(open_store("s3://bucket/default"))  # as dask sends it to other machines
    assert b"s%3cret" not in sent
    monkeypatch.setenv("AWS_PROFILE", "absent")
    with pytest.raises(StoreError, match="profile 'absent'"):
        Folder.of("s3://bucket/absent").read_bytes("x")


def test_s3_settings_of_the_environment_go_first(bucket, tmp_path, monkeypatch):
    (tmp_path / ".aws" / "credentials").write_text(
        "[default]\naws_access_key_id = A\naws_secret_access_key = B\n"
    )
    (tmp_path / ".aws" / "config").write_text(
        "[default]\nregion = eu-north-1\nendpoint_url = http://127.0.0.1:9\n"
    )
    monkeypatch.setenv("AWS_SESSION_TOKEN", "T")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-1")
    bucket.answers = [NONE_THERE]
    assert Folder.of("s3://bucket/environment").read_bytes("x") is None
    assert signed(bucket.asked[0]) == ("KEY", "us-west-1", "T")


@pytest.mark.parametrize(
    ("endpoint", "word"),
    [("http://192.0.2.1", "in clear"), ("https://user:hidden@192.0.2.1", "credentials in it")],
)
def test_an_endpoint_that_gives_secrets_away_is_refused(bucket, monkeypatch, endpoint, word):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    with pytest.raises(StoreError, match=word) as caught:
        Folder.of("s3://bucket/x").check_reachable()
    assert "hidden" not in str(caught.value)
    assert bucket.asked == []


@pytest.mark.parametrize(
    "url",
    ["s3://KEY:hid/den@bucket/study", "s3://KEY:hidden/x", "s3://b/x?Signature=hidden", "s3://"],
)
def test_a_secret_in_the_url_is_not_repeated(url):
    with pytest.raises(StoreError, match="s3://bucket/prefix") as caught:
        Folder.of(url)
    assert "hid" not in str(caught.value)


# What AWS answers to a wrong secret key holds the request, its session token included.
REFUSAL = (
    "<Error><Code>SignatureDoesNotMatch</Code><Message>They differ.</Message>"
    "<CanonicalRequest>x-amz-security-token:token-of-the-tests</CanonicalRequest></Error>"
)


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (403, REFUSAL, ("credentials that may", "SignatureDoesNotMatch: They differ.")),
        (400, "<Error><Code>ExpiredToken</Code></Error>", ("credentials that may", "Expired")),
        (404, "<Error><Code>NoSuchBucket</Code></Error>", ("a bucket that is there", "create")),
        (301, "", ("the region of the bucket", "AWS_REGION")),
        (405, "token-of-the-tests", ("a request that the server accepts", "status 405")),
    ],
)
def test_an_answer_is_told_without_its_secrets(bucket, monkeypatch, status, body, words):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token-of-the-tests")
    bucket.answers = [(status, body)]
    folder = Folder.of("s3://bucket/study")
    source = made_source()
    uses = (Folder.check_reachable, Folder.check_writable, Folder.is_empty, Folder.remove)
    for use in (
        *uses,
        lambda folder: folder.create_bytes("x", b"1"),
        lambda folder: folder.read_json("x"),
        lambda folder: write_source(folder, source),  # by Zarr
    ):
        with pytest.raises(StoreError) as caught:
            use(folder)
        text = "".join(traceback.format_exception(caught.value))
        assert all(word in text for word in words), text
        assert "bucket" in caught.value.where
        for secret in ("token-of-the-tests", "secret-of-the-tests"):
            assert secret not in text


def test_a_server_that_is_away_for_a_while_is_waited_for(bucket):
    bucket.answers = [(503, ""), (None, ""), NONE_THERE]
    assert Folder.of("s3://bucket/study").read_bytes("x") is None
    assert [method for method, _, _ in bucket.asked] == ["GET"] * 3
    cut = "HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n<ListBucketResult>"
    bucket.answers = [(None, cut), EMPTY]
    assert Folder.of("s3://bucket/study").folders() == []


def test_a_server_that_stays_away_or_hangs_is_given_up(bucket, monkeypatch):
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
def hears_ctrl_c():
    """Hear it as in a terminal: what a shell starts in the background does not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("hears_ctrl_c")
def test_ctrl_c_is_heard_while_a_server_is_waited_for(bucket):
    bucket.answers = [(503, "")]
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        Folder.of("s3://bucket/study").read_bytes("x")
    assert time.monotonic() - start < 60  # of 180 s


def test_an_object_is_created_once_though_the_answer_is_lost(bucket):
    folder = Folder.of("s3://bucket/study")
    there = (412, "<Error><Code>PreconditionFailed</Code></Error>")
    bucket.answers = [(None, ""), there, (200, "mine")]
    assert folder.create_bytes("owner", b"mine")
    bucket.answers = [(None, ""), there, (200, "another's")]
    assert not folder.create_bytes("owner", b"mine")
    # Two at the same time: S3 says 409 to one, and may have put neither.
    conflict = (409, "<Error><Code>ConditionalRequestConflict</Code></Error>")
    bucket.answers = [conflict, NONE_THERE, (200, "")]
    bucket.asked.clear()
    assert folder.create_bytes("owner", b"mine")
    assert [method for method, _, _ in bucket.asked] == ["PUT", "GET", "PUT"]
    headers = {name.lower(): value for name, value in bucket.asked[0][2].items()}
    assert headers["if-none-match"] == "*"
