"""Credentials for S3: the environment, keys of a profile, and sign-in by boto3."""

import asyncio
import pickle
import subprocess
import sys
from datetime import timedelta

import botocore.session
import pytest
from botocore.credentials import ReadOnlyCredentials
from botocore.exceptions import SSOTokenLoadError
from fake_bucket import NO_SUCH_KEY, forget_stores, signature
from zarr.core.buffer import default_buffer_prototype

from sampimp.errors import MissingPackageError, StoreError
from sampimp.store import aws_credentials
from sampimp.store.buckets import open_store
from sampimp.store.datasets import read_source
from sampimp.store.location import Folder
from sampimp.store.zarr_arrays import zarr_store


def test_missing_credentials_are_reported_before_any_connection(not_on_aws, tmp_path):
    folder = Folder.of("s3://bucket/without-credentials")
    uses = (Folder.check_writable, Folder.check_reachable, Folder.is_empty, Folder.folders)
    for use in (*uses, lambda folder: folder.read_json("study.json")):
        with pytest.raises(
            StoreError, match=rf"credentials(.|\n)*{tmp_path}(.|\n)*AWS_ACCESS_KEY_ID"
        ):
            use(folder)


def test_settings_come_from_the_profile(bucket, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    bucket.answers = [NO_SUCH_KEY]
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
    assert [signature(request) for request in bucket.requests] == [
        ("A", "eu-north-1", None),
        ("C", "sa-east-1", "E"),
        ("C", "us-west-2", "E"),
    ]
    sent = pickle.dumps(open_store("s3://bucket/default"))  # as dask sends it to other machines
    assert b"s%3cret" not in sent
    monkeypatch.setenv("AWS_PROFILE", "absent")
    with pytest.raises(StoreError, match="profile 'absent'"):
        Folder.of("s3://bucket/absent").read_bytes("x")


def test_settings_of_the_environment_take_precedence(bucket, tmp_path, monkeypatch):
    (tmp_path / ".aws" / "credentials").write_text(
        "[default]\naws_access_key_id = A\naws_secret_access_key = B\n"
    )
    (tmp_path / ".aws" / "config").write_text(
        "[default]\nregion = eu-north-1\nendpoint_url = http://127.0.0.1:9\n"
    )
    monkeypatch.setenv("AWS_SESSION_TOKEN", "T")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-1")
    bucket.answers = [NO_SUCH_KEY]
    assert Folder.of("s3://bucket/environment").read_bytes("x") is None
    assert signature(bucket.requests[0]) == ("KEY", "us-west-1", "T")


PROCESS = """
import json, os, sys
from datetime import UTC, datetime, timedelta
assert not [name for name in os.environ if name.startswith("AWS_SECRET")]
if len(sys.argv) > 2:
    sys.exit(sys.argv[2])
with open(sys.argv[1], "a") as calls:
    calls.write("called\\n")
end = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
keys = {"AccessKeyId": "PROCESS", "SecretAccessKey": "secret-of-the-process"}
keys["SessionToken"] = "token-of-the-process"
print(json.dumps({"Version": 1, "Expiration": end, **keys}))
"""
"""A program for `credential_process`: notes each call and prints credentials, or fails."""


@pytest.fixture
def process_profile(bucket, tmp_path, monkeypatch):
    """Select the profile `process`, whose credentials a program prints; return the log of calls."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_PROFILE", "process")
    (tmp_path / "process.py").write_text(PROCESS)
    command = f"{sys.executable} {tmp_path / 'process.py'} {tmp_path / 'calls'}"
    head = f"region = eu-west-3\nendpoint_url = {bucket.endpoint}\n"
    (tmp_path / ".aws" / "config").write_text(
        f"[profile process]\n{head}credential_process = {command}\n"
        f"[profile broken]\n{head}credential_process = {command} no-login\n"
        f"[profile sso]\n{head}sso_start_url = https://sso.invalid\nsso_region = eu-west-3\n"
        "sso_account_id = 1\nsso_role_name = reader\n"
    )
    bucket.answers = [NO_SUCH_KEY]
    return tmp_path / "calls"


def test_the_process_of_a_profile_signs_requests(bucket, process_profile):
    folder = Folder.of("s3://bucket/process")
    assert [folder.read_bytes("x"), folder.read_bytes("y")] == [None, None]
    assert read_source(folder) is None  # by Zarr's store
    assert {signature(request) for request in bucket.requests} == {
        ("PROCESS", "eu-west-3", "token-of-the-process")
    }
    assert process_profile.read_text() == "called\n"  # valid for an hour


READER = """
import pickle, sys
from sampimp.store.location import Folder
folder, store = pickle.load(sys.stdin.buffer)
assert folder.read_bytes("x") is None
import obstore
try:
    obstore.get(store, "process/y")
except FileNotFoundError:
    print("asked")
"""


def test_another_process_signs_in_for_itself(bucket, process_profile):
    sent = pickle.dumps((Folder.of("s3://bucket/process"), open_store("s3://bucket/process")))
    assert b"secret" not in sent
    assert b"token" not in sent
    command = [sys.executable, "-c", READER]
    reader = subprocess.run(command, input=sent, capture_output=True, check=True)
    assert reader.stdout == b"asked\n"
    assert [signature(request)[0] for request in bucket.requests] == ["PROCESS", "PROCESS"]
    assert process_profile.read_text() == "called\n" * 2  # once in each process


def test_an_unpickled_zarr_store_signs_in_again(bucket, process_profile):
    store = zarr_store(Folder.of("s3://bucket/process"))
    sent = pickle.dumps(store)
    assert b"secret" not in sent
    forget_stores()
    key = "nll/zarr.json"
    get = pickle.loads(sent).get(key, default_buffer_prototype())
    assert asyncio.run(get) is None
    assert signature(bucket.requests[-1])[0] == "PROCESS"


def test_a_process_that_fails_is_reported_before_any_request(bucket, process_profile, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "broken")
    with pytest.raises(StoreError, match=r"profile 'broken'(.|\n)*no-login") as caught:
        Folder.of("s3://bucket/broken").read_bytes("x")
    assert all(part.strip() for part in caught.value.args)
    assert bucket.requests == []


def test_without_boto3_the_extra_is_named(bucket, process_profile, monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'sampimp\[cluster\]'"):
        Folder.of("s3://bucket/process").read_bytes("x")
    assert bucket.requests == []


def test_keys_need_no_boto3(bucket, process_profile, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    (tmp_path / ".aws" / "credentials").write_text(
        "[process]\naws_access_key_id = A\naws_secret_access_key = B\n"
    )
    assert Folder.of("s3://bucket/keys").read_bytes("x") is None
    assert signature(bucket.requests[0])[0] == "A"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "C")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "D")
    assert Folder.of("s3://bucket/variables").read_bytes("x") is None
    assert signature(bucket.requests[1])[0] == "C"


def test_single_sign_on_is_renewed_while_a_study_runs(bucket, process_profile, monkeypatch):
    logins = ["first", "second", None]

    class Credentials:
        """botocore's credentials of a profile with single sign-on; the third login has expired."""

        def get_frozen_credentials(self):
            login = logins.pop(0)
            if login is None:
                raise SSOTokenLoadError(error_msg="the token has expired")
            return ReadOnlyCredentials(login, "secret", "token")

    profiles = []

    def get_credentials(session):
        profiles.append((session.profile, session.get_config_variable("config_file")))
        return Credentials()

    monkeypatch.setattr(botocore.session.Session, "get_credentials", get_credentials)
    monkeypatch.setattr(aws_credentials, "_SIGN_IN_LIFETIME", timedelta(0))
    monkeypatch.setenv("AWS_PROFILE", "sso")
    folder = Folder.of("s3://bucket/sso")
    assert folder.read_bytes("x") is None  # the first login was tried when the bucket was opened
    assert signature(bucket.requests[0])[0] == "second"
    with pytest.raises(StoreError, match=r"token has expired(.|\n)*aws sso login"):
        folder.read_bytes("x")
    assert len(bucket.requests) == 1
    assert profiles == [("sso", str(process_profile.parent / ".aws" / "config"))]


def test_a_server_that_repeats_the_token_of_a_profile_is_not_quoted(bucket, process_profile):
    message = "<Message>Of token-of-the-process.</Message>"
    bucket.answers = [(403, f"<Error><Code>AccessDenied</Code>{message}</Error>")]
    with pytest.raises(StoreError, match=r"AccessDenied: Of \(a credential\)\."):
        Folder.of("s3://bucket/process").files()
