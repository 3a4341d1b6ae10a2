"""A folder of a local disk or of an object store, as bytes and JSON, behind one set of calls.

Every object is put whole or not at all: obstore renames a finished file, and a PUT of S3 is whole
by itself. What is read as missing is None; what cannot be reached at all is a `StoreError`, whose
message is made here: the text of S3's own errors can hold a session token.

A symbolic link that leads out of a local root is refused with its path, whatever is to be done. Of
a link that stays inside, the link is deleted and never what it leads to. The root itself may be a
link or lie below some: a person chose it.

A bucket is asked again for `PATIENCE` while its server does not answer. A request that hangs is
ended after `TIMEOUT` and asked again, so that nobody waits for more than four minutes. Credentials,
region and endpoint come from the AWS_* variables or from a profile in ~/.aws, and stay in obstore.

Map: `Folder`; `open_store`, `put_whole`, `check_links`, `local_root` and `reaching` for who reads
and writes the same place in another format (`sampimp.store.record`).
"""

import configparser
import contextlib
import functools
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, S3Store

from sampimp.errors import RecordError, StoreError, UserError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, S3Config, S3Credential

PATIENCE = timedelta(minutes=3)
"""How long a server may be away in mid-study (obstore: below 5 minutes, or signatures expire)."""
FIRST_PATIENCE = timedelta(seconds=10)
"""The same when a study is opened, so that a mistyped endpoint is reported at once (arbitrary)."""
TIMEOUT = timedelta(seconds=60)
"""Longest that one request may take: 8 MB, the largest object of the paper's study, at 140 kB/s."""

_ATTEMPT = timedelta(seconds=2)
"""How long obstore asks again by itself for a `Folder`: Ctrl-C is not heard meanwhile."""
_WRITE_TEST = ".sampimp-write-test"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Folder:
    """A folder of a local disk or of an object store.

    Parameters
    ----------
    root
        An absolute path, or an URL such as s3://bucket/study.
    path
        Relative to the root, with slashes.

    Examples
    --------
    >>> import tempfile
    >>> folder = Folder(tempfile.mkdtemp()) / "trials"
    >>> folder.write_json("trial.json", {"seed": 3})
    >>> folder.read_json("trial.json"), folder.read_json("absent.json")
    ({'seed': 3}, None)
    """

    root: str
    path: str = ""

    @classmethod
    def of(cls, out: "str | os.PathLike[str] | Folder") -> "Folder":
        """Return the folder of a path, made absolute, or of an URL.

        Raises
        ------
        StoreError
            The URL is not a plain s3://bucket/prefix.
        """
        if isinstance(out, Folder):
            return out
        text = os.fspath(out)
        if "://" not in text:
            return cls(os.path.abspath(text))
        _check_url(text)
        return cls(text.rstrip("/"))

    def __truediv__(self, name: str) -> "Folder":
        return Folder(self.root, str(PurePosixPath(self.path, name)))

    def __str__(self) -> str:
        return f"{self.root}/{self.path}".rstrip("/")

    @property
    def is_local(self) -> bool:
        """Whether it lies on a disk of this machine."""
        return "://" not in self.root

    def read_bytes(self, name: str) -> bytes | None:
        """Return an object's content, or None if there is none."""
        if self._is_absent:
            return None
        try:
            return self._ask(lambda store: bytes(obstore.get(store, self._key(name)).bytes()))
        except FileNotFoundError:
            return None

    def write_bytes(self, name: str, content: bytes) -> None:
        """Put an object whole; a reader sees the old one or the new one."""
        self._ask(lambda store: obstore.put(store, self._key(name), content, use_multipart=False))

    def create_bytes(self, name: str, content: bytes) -> bool:
        """Put an object whole if there is none, and return whether it is there by this call.

        A server may store an object and die before it answers; asked again, it says that there is
        one already. So what is there is compared: the same bytes count as put by this call.
        `content` has to be the caller's alone (with a random token in it, say), otherwise two
        callers with the same bytes are both told that it is theirs.
        """
        while True:
            try:
                self._ask(lambda store: obstore.put(store, self._key(name), content, mode="create"))
                return True
            except AlreadyExistsError:
                there = self.read_bytes(name)
            # None: deleted since; or S3 said 409, which means that nobody's was put, try again.
            if there is not None:
                return there == content

    def create_json(self, name: str, value: Any) -> bool:
        """Put a value that JSON can hold, as `create_bytes` does."""
        return self.create_bytes(name, _json_bytes(value))

    def read_json(self, name: str) -> Any:
        """Return what a JSON object holds, or None if there is none.

        Raises
        ------
        RecordError
            It is there and is not JSON.
        """
        content = self.read_bytes(name)
        if content is None:
            return None
        try:
            return json.loads(content)
        except ValueError as error:
            raise RecordError(
                expected="a JSON file",
                got=f"{len(content)} bytes: {error}",
                where=f"{self}/{name}",
                todo="delete this file if you know what damaged it, then run the command again",
            ) from None

    def write_json(self, name: str, value: Any) -> None:
        """Put a value that JSON can hold."""
        self.write_bytes(name, _json_bytes(value))

    def folders(self) -> list[str]:
        """Return the names of the folders in it, sorted."""
        return self._list()[0]

    def files(self) -> list[str]:
        """Return the names of the objects in it, sorted."""
        return self._list()[1]

    def size(self) -> int:
        """Return the bytes of all that is in it, without what links lead to."""
        if not self.is_local:
            pages = self._ask(lambda store: list(obstore.list(store, self._prefix)))
            return sum(item["size"] for page in pages for item in page)
        check_links(self.root, self.path)
        total = 0
        for parent, _, names in os.walk(str(self)):
            for path in (os.path.join(parent, name) for name in names):
                with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                    total += 0 if os.path.islink(path) else os.stat(path).st_size
        return total

    def delete(self, name: str) -> None:
        """Delete one object, or a link; nothing happens where there is none."""
        self._check_parents(self._key(name))
        with contextlib.suppress(FileNotFoundError):
            self._ask(lambda store: obstore.delete(store, self._key(name)))

    def is_empty(self) -> bool:
        """Return whether nothing is in it."""
        folders, objects = self._list()
        # That of a start that was killed, or that is starting now, is nothing.
        return not folders and not set(objects) - {_WRITE_TEST}

    def remove(self) -> None:
        """Delete everything in it; links are deleted, and what they lead to is not.

        Raises
        ------
        StoreError
            It is, or holds, a link that leads out of the root: nothing is deleted then.
        """
        if self.is_local:
            self._remove_tree()
            return
        pages = self._ask(lambda store: list(obstore.list(store, self._prefix)))
        paths = [item["path"] for page in pages for item in page]
        with contextlib.suppress(FileNotFoundError):  # somebody else deletes it at the same time
            self._ask(lambda store: obstore.delete(store, paths))

    def _remove_tree(self) -> None:
        check_links(self.root, self.path)
        self._check_parents(self.path)
        is_link = bool(self.path) and os.path.islink(str(self))
        tree = [] if is_link else list(os.walk(str(self), topdown=False))
        paths = [os.path.join(parent, n) for parent, inner, outer in tree for n in inner + outer]
        for path in paths:
            check_links(self.root, os.path.relpath(path, self.root))
        for path in [str(self)] if is_link else paths:
            if os.path.islink(path) or not os.path.isdir(path):
                with contextlib.suppress(FileNotFoundError), reaching(self):
                    os.unlink(path)
        for folder, _, _ in tree:
            with contextlib.suppress(OSError):  # somebody else deletes it, or writes into it
                os.rmdir(folder)

    def _check_parents(self, key: str) -> None:
        """Raise StoreError if a link is on the way to what is to be deleted."""
        if self.is_local:
            check_links(self.root, str(PurePosixPath(key).parent), passable=False)

    def check_reachable(self) -> None:
        """Raise StoreError unless the bucket is there, answers and lets us in; a disk always is.

        Everything else waits for a server that is away; this is for the start, where it is more
        likely that the endpoint is wrong.
        """
        if not self.is_local:
            self._ask(lambda store: obstore.list_with_delimiter(store, self._prefix), first=True)

    def check_writable(self) -> None:
        """Raise StoreError unless an object can be put here, and delete it again."""
        self.write_bytes(_WRITE_TEST, bytes(2**16))  # an empty one finds room on a full disk
        self.delete(_WRITE_TEST)

    def _list(self) -> tuple[list[str], list[str]]:
        """Return the names of the folders and of the objects in it, each sorted."""
        if self._is_absent:
            return [], []
        if self.is_local:
            check_links(self.root, self.path)
        found = self._ask(lambda store: obstore.list_with_delimiter(store, self._prefix))
        folders = (PurePosixPath(path).name for path in found["common_prefixes"])
        objects = (PurePosixPath(item["path"]).name for item in found["objects"])
        return sorted(folders), sorted(objects)

    def _ask(self, call: Callable[[LocalStore | S3Store], _T], first: bool = False) -> _T:
        """Call with the store, and again while its server is away; the call may run twice.

        obstore asks again by itself, but not where a connection breaks in the middle of a list, a
        delete or a conditional put.
        """
        store, start = open_store(self.root, _ATTEMPT), time.monotonic()
        patience = FIRST_PATIENCE if first else PATIENCE
        while True:
            try:
                with reaching(self):
                    return call(store)
            except ServerAwayError:
                if time.monotonic() - start > patience.total_seconds():
                    raise
                time.sleep(0.5)

    @property
    def _is_absent(self) -> bool:
        """Whether its root is a local folder that is not there; to read does not make it."""
        return self.is_local and not Path(self.root).is_dir()

    @property
    def _prefix(self) -> str:
        return f"{self.path}/" if self.path else ""

    def _key(self, name: str) -> str:
        key = str(PurePosixPath(self.path, name))
        if self.is_local:
            check_links(self.root, key)
        return key


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


@functools.lru_cache(maxsize=512)
def open_store(url: str, patience: timedelta = PATIENCE) -> LocalStore | S3Store:
    """Return obstore's view of an absolute path, which is made, or of an s3:// URL.

    Parameters
    ----------
    url
        The path or the URL.
    patience
        How long what is asked of S3 is asked again before it fails.

    Raises
    ------
    StoreError
        The path cannot be a folder, the URL is of another kind, or S3 has no credentials.
    """
    if "://" in url:
        _check_url(url)
        return _open_s3(url, patience)
    try:
        return LocalStore(url, mkdir=True)
    except Exception as error:  # obstore raises its GenericError for a file in the way
        raise StoreError(
            expected="a folder, or a place where one can be made",
            got=str(error).split("\n")[0],
            where=url,
            todo="choose another --out or mend its permissions",
        ) from None


def check_links(root: str, path: str, *, passable: bool = True) -> None:
    """Raise StoreError if the way from a local root to a path, relative to it, leads out of it.

    Parameters
    ----------
    root
        An absolute path, which may be a link itself.
    path
        With slashes; the last part may be a link as well.
    passable
        Whether a link that stays below the root may be on the way.
    """
    home, place = os.path.realpath(root), root
    for part in path.strip("/").split("/"):
        place = os.path.join(place, part)
        if part != ".." and not os.path.islink(place):
            continue
        target = os.path.realpath(place)
        if not passable or os.path.commonpath([home, target]) != home:
            raise StoreError(
                expected="no symbolic link that leads out of the folder"
                if passable
                else "folders and no symbolic link on the way to what is deleted",
                got=f"one to {target}",
                where=place,
                todo="remove the link, or put what it leads to in its place; nothing was touched",
            )


def local_root(store: LocalStore | S3Store) -> str | None:
    """Return the root of a store on a disk; None for a bucket."""
    return str(store.prefix) if isinstance(store, LocalStore) else None


async def put_whole(store: LocalStore | S3Store, key: str, content: Any) -> None:
    """Put an object by one request.

    Above 5 MB obstore would put it in parts, and where the last answer is lost and it asks again,
    the server knows nothing of the parts any more: an error, though the object is there.
    """
    await obstore.put_async(store, key, content, use_multipart=False)


# ------------------------------------------------------------------------------ what goes wrong


class ServerAwayError(StoreError):
    """A bucket's server does not answer, or only with errors of its own."""


@contextlib.contextmanager
def reaching(where: object) -> Iterator[None]:
    """Turn what obstore raises into a StoreError; that an object is or is not there passes.

    Parameters
    ----------
    where
        The folder or object, for the message.

    Raises
    ------
    ServerAwayError
        The bucket's server does not answer.
    StoreError
        The bucket is missing, refuses the credentials or the request; a disk does.
    """
    try:
        yield
    except UserError:
        raise
    except (BaseError, OSError) as error:
        is_answer = isinstance(error, FileNotFoundError | AlreadyExistsError)
        if is_answer and "<Code>NoSuchBucket" not in str(error):
            raise
        # Not from `error`: the answer in its text may repeat the request's session token.
        raise _store_error(str(error), str(where)) from None


_REASONS = (
    # in the answer's status, code and kind; expected; to do
    (
        "NoSuchBucket",
        "a bucket that is there",
        "create the bucket, or mend its name; AWS_ENDPOINT_URL says which server is asked",
    ),
    (
        "LOCATION|PermanentRedirect|AuthorizationHeaderMalformed",
        "the region of the bucket",
        "set AWS_REGION to the bucket's region",
    ),
    (
        "401|403|Token",
        "credentials that may list, read, write and delete in the bucket",
        "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or the profile in "
        "~/.aws, and what they may do",
    ),
    (
        "[34]\\d\\d",
        "a request that the server accepts",
        "check that AWS_ENDPOINT_URL is a server that speaks S3",
    ),
    (
        "",
        "a server that answers",
        "check the network, and AWS_ENDPOINT_URL if the bucket is not on AWS; then the same "
        "command again",
    ),
)


def _store_error(text: str, where: str) -> StoreError:
    """Return the error for obstore's, of whose text only what is known to be harmless is kept."""
    line = text.split("\n")[0]
    if not re.search("Error performing|HTTP error", line):  # a disk, or obstore does not ask
        return StoreError(
            expected="a folder or bucket that can be read and written",
            got=line or "an error without a text",
            where=where,
            todo="check the path, its permissions and the free space, or the AWS_* variables",
        )
    status, code, message, server, redirect = (
        found[0] if (found := re.search(pattern, text)) else ""
        for pattern in (
            r"(?<=status code: )\d{3}",
            r"(?<=<Code>)\w+",
            r"(?<=<Message>)[^<]+",
            r"https?://[^/\s?]+",
            r"redirect without LOCATION",
        )
    )
    if code:
        got = f"{code}: {message}"
    elif status or redirect:
        got = f"status {status}" if status else redirect
    elif "kind: Timeout" in text:
        got = "no answer in time"
    else:  # without an answer, the text holds only what this side knows
        got = (re.findall(r'(?:message|error): "([^"]+)"', text) or [line.rpartition(" - ")[2]])[-1]
    expected, todo = next(
        (expected, todo)
        for pattern, expected, todo in _REASONS
        if re.search(pattern, f"{status} {code} {redirect}")
    )
    kind = ServerAwayError if expected == _REASONS[-1][1] else StoreError
    return kind(expected, f"{got} (from {server or 'the server'})", where, todo)


def _check_url(url: str) -> None:
    """Raise StoreError unless an URL is a plain s3://bucket/prefix; it may hold a secret."""
    scheme, _, rest = url.partition("://")
    bucket = rest.partition("/")[0]
    if scheme != "s3":
        got = f"{scheme}://" if scheme.isalnum() else "another URL"
    elif "@" in rest or ":" in bucket:
        got = "one with credentials in it, or with a host (not repeated here)"
    elif not bucket or set(rest) & set("?#"):
        got = "one without a bucket, or with a query (not repeated here)"
    else:
        return
    raise StoreError(
        expected="a folder or an s3:// URL",
        got=got,
        where="the place that was given, as --out or in code",
        todo="write it as a path, or as s3://bucket/prefix; credentials belong into "
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or ~/.aws, a server into AWS_ENDPOINT_URL",
    )


# ------------------------------------------------------------------------------ S3's settings


def _open_s3(url: str, patience: timedelta) -> S3Store:
    """Return obstore's view of a bucket, which gives up once a server was away for `patience`."""
    client: ClientConfig = {
        "connect_timeout": timedelta(seconds=5),
        "timeout": TIMEOUT,
    }
    config: S3Config = {}
    profile = _Profile.of_environment()
    settings = profile.read()
    endpoint = _first_set("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    if not endpoint and (endpoint := settings.get("endpoint_url", "")):
        config["endpoint"] = endpoint
    if not _first_set("AWS_REGION", "AWS_DEFAULT_REGION") and "region" in settings:
        config["region"] = settings["region"]
    if _check_endpoint(endpoint):
        client["allow_http"] = True
    with reaching(url):
        return S3Store.from_url(
            url,
            config=config,
            client_options=client,
            retry_config={
                "max_retries": 1000,  # more than there is time for
                "retry_timeout": patience,
                "backoff": {"max_backoff": timedelta(seconds=5)},
            },
            credential_provider=_find_credentials(url, profile),
        )


def _first_set(*names: str) -> str:
    return next((value for name in names if (value := os.environ.get(name))), "")


def _check_endpoint(endpoint: str) -> bool:
    """Return whether an endpoint is http:// on this machine, which needs no encryption."""
    parts = urlsplit(endpoint)
    is_here = parts.hostname in ("localhost", "::1") or (parts.hostname or "").startswith("127.")
    allowed = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes", "on")
    if "@" in endpoint:
        got, shown = "one with credentials in it", "not repeated here"
    elif parts.scheme == "http" and not is_here and not allowed:
        got, shown = "an http:// one, to which every value would travel in clear", endpoint
    else:
        return parts.scheme == "http" and is_here
    raise StoreError(
        expected="an https:// endpoint without credentials",
        got=got,
        where=f"AWS_ENDPOINT_URL or the profile's endpoint_url: {shown}",
        todo="write https://HOST, or set AWS_ALLOW_HTTP=true in a network that you trust",
    )


@dataclass(frozen=True)
class _Profile:
    """A profile of the AWS files: where credentials lie, and never they themselves.

    obstore knows no such files. It calls this when it needs credentials, and again later, so that
    those that expire can be renewed in the file while a study runs; and a store that is pickled,
    to be sent to another process, takes no secret along.
    """

    name: str
    files: tuple[str, str]

    @classmethod
    def of_environment(cls) -> "_Profile":
        """Return the one that the environment names, or the default one."""
        names = ("AWS_CONFIG_FILE", "config"), ("AWS_SHARED_CREDENTIALS_FILE", "credentials")
        config, credentials = (
            str(Path(os.environ.get(name) or f"~/.aws/{file}").expanduser()) for name, file in names
        )
        return cls(_first_set("AWS_PROFILE") or "default", (config, credentials))

    def read(self) -> dict[str, str]:
        """Return its settings; what is in the file of credentials goes first."""
        found: dict[str, str] = {}
        for file in self.files:
            parser = configparser.RawConfigParser()
            try:
                parser.read(file)
            except configparser.Error:
                continue  # its text may be a secret; it reads as if it had no credentials
            for section in (f"profile {self.name}", self.name):
                if parser.has_section(section):
                    found |= dict(parser[section])
        return found

    def __call__(self) -> "S3Credential":
        """Return its credentials, to be asked for again in a while."""
        settings = self.read()
        return {
            "access_key_id": settings["aws_access_key_id"],
            "secret_access_key": settings["aws_secret_access_key"],
            "token": settings.get("aws_session_token"),
            "expires_at": datetime.now(UTC) + timedelta(minutes=15),
        }


def _find_credentials(url: str, profile: _Profile) -> _Profile | None:
    """Return the profile if it has credentials, None if obstore finds others; else refuse.

    obstore reads the environment and asks the instance's own service. That service answers on AWS
    only: elsewhere the question hangs for minutes, so it is not asked without a sign of AWS.
    """
    if _first_set(
        "AWS_ACCESS_KEY_ID",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_SKIP_SIGNATURE",
    ):
        return None
    if {"aws_access_key_id", "aws_secret_access_key"} <= profile.read().keys():
        return profile
    vendor = Path("/sys/class/dmi/id/sys_vendor")
    if vendor.is_file() and vendor.read_text().startswith("Amazon EC2"):
        return None
    raise StoreError(
        expected="credentials for an s3:// URL",
        got=f"none in the environment, none for profile {profile.name!r} in "
        + " or ".join(profile.files),
        where=url,
        todo="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or write them into one of these "
        "files; for single sign-on and roles: aws configure export-credentials --format env",
    )
