"""Open a local folder or an S3 bucket with obstore: endpoint, region, credentials, retries.

Endpoint and region come from the AWS_* variables, or from the profile in ~/.aws that AWS_PROFILE
names; credentials: see `sampimp.store.aws_credentials`. An http:// endpoint is accepted on this
machine only, unless AWS_ALLOW_HTTP is set, because every value would travel unencrypted.

Map: `open_store` (obstore's view of a path or URL), `check_url`, `put_whole` (one object by one
request), `local_root`; `SERVER_PATIENCE`, `OPENING_PATIENCE` and `REQUEST_TIMEOUT` (timeouts of
requests).
"""

import functools
import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import obstore
from obstore.store import LocalStore, S3Store

from sampimp.errors import RecordError, StoreError
from sampimp.store.aws_credentials import AwsProfile, find_credentials, first_set
from sampimp.store.disk import make_root
from sampimp.store.s3_errors import readable_errors

if TYPE_CHECKING:
    from obstore.store import ClientConfig, S3Config

SERVER_PATIENCE = timedelta(minutes=3)
"""How long a server may be away during a study (obstore: below 5 minutes, or signatures expire)."""
OPENING_PATIENCE = timedelta(seconds=10)
"""The same when a study is opened, so that a mistyped endpoint is reported at once (arbitrary)."""
REQUEST_TIMEOUT = timedelta(seconds=60)
"""Longest duration of one request: 8 MB, the largest object of the paper's study, at 140 kB/s.
With `SERVER_PATIENCE`, a call fails after four minutes at the latest."""


@functools.lru_cache(maxsize=512)
def open_store(url: str, patience: timedelta = SERVER_PATIENCE) -> LocalStore | S3Store:
    """Return the obstore store of an absolute path, which is created, or of an s3:// URL.

    Parameters
    ----------
    url
        The path or the URL.
    patience
        How long obstore retries a request to S3 before it fails.

    Raises
    ------
    StoreError
        The path cannot be a folder, the URL is of another kind, or S3 has no credentials.
    """
    if "://" in url:
        check_url(url)
        return _open_s3(url, patience)
    try:
        make_root(url)
        return LocalStore(url)
    except Exception as error:  # of the disk, or obstore's GenericError
        raise StoreError(
            expected="a folder, or a place where one can be made",
            got=str(error).split("\n")[0],
            where=url,
            todo="choose another --out or correct its permissions",
        ) from None


def local_root(store: LocalStore | S3Store) -> str | None:
    """Return the root folder of a store on a disk; None for a bucket."""
    return str(store.prefix) if isinstance(store, LocalStore) else None


async def put_whole(store: LocalStore | S3Store, key: str, content: Any) -> None:
    """Put an object by one request.

    Above 5 MB obstore would send parts; if the last answer is lost and the request is repeated, the
    server no longer knows the parts and reports an error, though the object is stored.
    """
    await obstore.put_async(store, key, content, use_multipart=False)


async def get_whole(store: LocalStore | S3Store, key: str, largest: int) -> bytes:
    """Return an object, or raise RecordError if it has more than `largest` bytes, unread."""
    answer = await obstore.get_async(store, key)
    if answer.meta["size"] > largest:
        raise too_large(answer.meta["size"], largest, key)
    return bytes(await answer.bytes_async())


def too_large(size: int, largest: int, where: str) -> RecordError:
    """Return the error for an object that is larger than any that a study has in its place."""
    return RecordError(
        expected=f"a file of at most {largest:,} bytes",
        got=f"{size:,} bytes",
        where=where,
        todo="restore it from a copy, or delete it and run the command that wrote it again",
    )


def check_url(url: str) -> None:
    """Raise StoreError unless a URL is a plain s3://bucket/prefix; it is not quoted in the error.

    Raises
    ------
    StoreError
        The URL has another scheme, credentials, a host or a query in it.
    """
    scheme, _, rest = url.partition("://")
    bucket = rest.partition("/")[0]
    if scheme != "s3":
        got = f"{scheme}://" if scheme.isalnum() else "another URL"
    elif "@" in rest or ":" in bucket:
        got = "a URL with credentials or a host in it (not repeated here)"
    elif not bucket or set(rest) & set("?#"):
        got = "a URL without a bucket, or with a query (not repeated here)"
    else:
        return
    raise StoreError(
        expected="a folder or an s3:// URL",
        got=got,
        where="the folder or URL that was passed, as --out or in code",
        todo="write it as a path, or as s3://bucket/prefix; credentials belong in "
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or ~/.aws, a server in AWS_ENDPOINT_URL",
    )


def _open_s3(url: str, patience: timedelta) -> S3Store:
    """Return the obstore store of a bucket; a request fails after `patience` without an answer."""
    client: ClientConfig = {
        "connect_timeout": timedelta(seconds=5),
        "timeout": REQUEST_TIMEOUT,
    }
    config: S3Config = {}
    profile = AwsProfile.from_environment()
    settings = profile.read()
    endpoint = first_set("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    if not endpoint and (endpoint := settings.get("endpoint_url", "")):
        config["endpoint"] = endpoint
    if not first_set("AWS_REGION", "AWS_DEFAULT_REGION") and "region" in settings:
        config["region"] = settings["region"]
    if _is_unencrypted(endpoint):
        client["allow_http"] = True
    with readable_errors(url):
        return S3Store.from_url(
            url,
            config=config,
            client_options=client,
            retry_config={
                "max_retries": 1000,  # `patience` ends the retries
                "retry_timeout": patience,
                "backoff": {"max_backoff": timedelta(seconds=5)},
            },
            credential_provider=find_credentials(url, profile, settings),
        )


def _is_unencrypted(endpoint: str) -> bool:
    """Return whether an endpoint is http:// on this machine; refuse http:// to another machine."""
    parts = urlsplit(endpoint)
    is_here = parts.hostname in ("localhost", "::1") or (parts.hostname or "").startswith("127.")
    allowed = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes", "on")
    if "@" in endpoint:
        got, shown = "an endpoint with credentials in it", "not repeated here"
    elif parts.scheme == "http" and not is_here and not allowed:
        got, shown = "an http:// endpoint, which would get all values unencrypted", endpoint
    else:
        return parts.scheme == "http" and is_here
    raise StoreError(
        expected="an https:// endpoint without credentials",
        got=got,
        where=f"AWS_ENDPOINT_URL or the profile's endpoint_url: {shown}",
        todo="write https://HOST, or set AWS_ALLOW_HTTP=true in a network that you trust",
    )
