"""A folder of a local disk or of an object store, as bytes and JSON, behind one set of calls.

Every object is put whole or not at all: obstore renames a finished file, and so does S3. What is
read as missing is None; what cannot be reached at all is a `StoreError`.

Map: `Folder`, and `open_store` for who reads the same place in another format (`sampimp.store`).
"""

import configparser
import functools
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

import obstore
from obstore.exceptions import AlreadyExistsError
from obstore.store import LocalStore, S3Store

from sampimp.errors import RecordError, StoreError

if TYPE_CHECKING:
    from obstore.store import S3Config


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
        """Return the folder of a path, made absolute, or of an URL."""
        if isinstance(out, Folder):
            return out
        text = os.fspath(out)
        return cls(text.rstrip("/") if "://" in text else os.path.abspath(text))

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
            return bytes(obstore.get(open_store(self.root), self._key(name)).bytes())
        except FileNotFoundError:
            return None

    def write_bytes(self, name: str, content: bytes) -> None:
        """Put an object whole; a reader sees the old one or the new one."""
        obstore.put(open_store(self.root), self._key(name), content)

    def create_bytes(self, name: str, content: bytes) -> bool:
        """Put an object whole if there is none, and return whether it is there by this call.

        A server may store an object and die before it answers; the client asks again and is told
        that there is one already. So what is there is compared: the same bytes count as put by
        this call. `content` has to be the caller's alone (with a random token in it, say):
        otherwise two callers with the same bytes are both told that it is theirs.
        """
        try:
            obstore.put(open_store(self.root), self._key(name), content, mode="create")
        except AlreadyExistsError:
            return self.read_bytes(name) == content
        return True

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
        if self._is_absent:
            return []
        prefix = f"{self.path}/" if self.path else ""
        listed = obstore.list_with_delimiter(open_store(self.root), prefix)
        return sorted(PurePosixPath(path).name for path in listed["common_prefixes"])

    def is_empty(self) -> bool:
        """Return whether nothing is in it."""
        if self._is_absent:
            return True
        prefix = f"{self.path}/" if self.path else ""
        listed = obstore.list_with_delimiter(open_store(self.root), prefix)
        return not listed["common_prefixes"] and not listed["objects"]

    def remove(self) -> None:
        """Delete everything in it."""
        store = open_store(self.root)
        for page in obstore.list(store, f"{self.path}/"):
            obstore.delete(store, [item["path"] for item in page])
        if self.is_local:
            shutil.rmtree(str(self), ignore_errors=True)  # the empty folders that are left

    def check_writable(self) -> None:
        """Raise StoreError unless an object can be put here, and delete it again."""
        name = ".sampimp-write-test"
        try:
            self.write_bytes(name, b"")
            obstore.delete(open_store(self.root), self._key(name))
        except StoreError:
            raise
        except Exception as error:  # obstore's own, OSError or PermissionError, by store and kind
            raise StoreError(
                expected="a folder or bucket that can be written",
                got=str(error).split("\n")[0],
                where=str(self),
                todo="check the path, its permissions and, for s3://, bucket and credentials",
            ) from None

    @property
    def _is_absent(self) -> bool:
        """Whether its root is a local folder that is not there; to read does not make it."""
        return self.is_local and not Path(self.root).is_dir()

    def _key(self, name: str) -> str:
        return str(PurePosixPath(self.path, name))


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


@functools.lru_cache(maxsize=512)
def open_store(url: str) -> LocalStore | S3Store:
    """Return obstore's view of an absolute path, which is made, or of an s3:// URL.

    Raises
    ------
    StoreError
        The path cannot be a folder, the URL is of another kind, or S3 has no credentials.
    """
    if "://" not in url:
        try:
            return LocalStore(url, mkdir=True)
        except Exception as error:  # obstore raises its GenericError for a file in the way
            raise StoreError(
                expected="a folder, or a place where one can be made",
                got=str(error).split("\n")[0],
                where=url,
                todo="choose another --out or mend its permissions",
            ) from None
    if not url.startswith("s3://"):
        raise StoreError(
            expected="a folder or an s3:// URL",
            got=url.split("://")[0] + "://",
            where=url,
            todo="write --out as a path, or as s3://bucket/prefix",
        )
    return S3Store.from_url(url, config=_s3_credentials(url))


def _s3_credentials(url: str) -> "S3Config":
    """Return what obstore does not find on its own, the profile files; refuse if there is nothing.

    obstore reads the environment and asks the instance's own service. That service answers on AWS
    only: elsewhere the question hangs for minutes, so it is not asked without a sign of AWS.
    """
    on_aws = ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_WEB_IDENTITY_TOKEN_FILE")
    if os.environ.get("AWS_ACCESS_KEY_ID") or any(map(os.environ.get, on_aws)):
        return {}
    profile = os.environ.get("AWS_PROFILE", "default")
    file = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")).expanduser()
    parser = configparser.ConfigParser()
    parser.read(file)
    if parser.has_option(profile, "aws_access_key_id"):
        names = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
        found = {name: parser[profile][name] for name in names if name in parser[profile]}
        return cast("S3Config", found)
    vendor = Path("/sys/class/dmi/id/sys_vendor")
    if vendor.is_file() and vendor.read_text().startswith("Amazon EC2"):
        return {}
    raise StoreError(
        expected="credentials for an s3:// URL",
        got=f"none in the environment, none for profile {profile!r} in {file}",
        where=url,
        todo="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or write them into that file",
    )
