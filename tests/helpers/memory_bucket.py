"""An S3 server in memory, on loopback, of which any request can fail.

It knows what obstore asks for: GET with Range, HEAD, PUT with If-None-Match, DELETE, POST ?delete,
and listings with a prefix, a delimiter and pages. It checks no signature. A real server is in
`seaweed.py`.

Map: `MemoryBucket`, `serving` (a context: such a server, named by the AWS variables), `KINDS` (of
faults).
"""

import asyncio
import contextlib
import hashlib
import re
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any, NamedTuple
from xml.sax.saxutils import escape, unescape

from sampimp.store import buckets
from sampimp.store.zarr_arrays import open_array

KINDS = ("503", "500", "cut off", "lost", "late")
"""Faults: an answer 503 SlowDown or 500 without an effect; an answer that ends in the middle; no
answer, or one after the client's patience. Of the last three, the request has its effect."""

_ERROR = "<Error><Code>{}</Code><Message>as the test wishes</Message></Error>"
_DATE = "Last-Modified: Sun, 06 Nov 1994 08:49:37 GMT\r\n"


class Answer(NamedTuple):
    """An answer of the server."""

    status: int
    body: bytes = b""
    headers: str = ""


class MemoryBucket:
    """The server, in a thread.

    Parameters
    ----------
    page
        Number of entries in a page of a listing.
    """

    def __init__(self, page: int = 1000) -> None:
        self.objects: dict[str, bytes] = {}
        """Content by path, the bucket first."""
        self.requests: list[str] = []
        """Method and path of each request, and its query."""
        self.latency = 0.0
        """Seconds before each answer."""
        self.late = 2.0
        """Seconds before an answer that is late."""
        self._page = page
        self._fails_at, self._kind = 0, ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        self.endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _listen(self) -> Any:
        return await self._loop.create_server(lambda: _Connection(self), "127.0.0.1", 0)

    def close(self) -> None:
        """Stop the server."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def fail(self, number: int, kind: str = KINDS[0]) -> None:
        """Let the request of this number fail, counted from 1 from now on; 0: none."""
        self.requests.clear()
        self._fails_at, self._kind = number, kind

    def copy(self, source: str, target: str) -> None:
        """Copy all objects below a path."""
        names = [name for name in self.objects if name.startswith(f"{source}/")]
        for name in names:
            self.objects[target + name.removeprefix(source)] = self.objects[name]

    def remove(self, path: str) -> None:
        """Delete all objects below a path."""
        for name in [name for name in self.objects if name.startswith(f"{path}/")]:
            del self.objects[name]

    def answer(self, head: str, body: bytes, transport: Any) -> None:
        """Answer a request, or let it fail."""
        method, target = head.split(" ", 2)[:2]
        self.requests.append(f"{method} {target}")
        kind = self._kind if len(self.requests) == self._fails_at else ""
        if kind in ("500", "503"):
            code = "SlowDown" if kind == "503" else "InternalError"
            answer = Answer(int(kind), _ERROR.format(code).encode())
        else:
            answer = self._perform(method, target, head, body)
        content = b"HTTP/1.1 %d answer\r\n" % answer.status + answer.headers.encode()
        if "Content-Length" not in answer.headers:
            content += b"Content-Length: %d\r\n" % len(answer.body)
        content += b"\r\n" + answer.body
        if kind == "cut off":
            transport.write(content[: len(content) - max(1, len(answer.body) // 2)])
        if kind in ("cut off", "lost"):
            transport.close()
            return
        latency = self.late if kind == "late" else self.latency
        if latency:
            self._loop.call_later(latency, transport.write, content)
        else:
            transport.write(content)

    def _perform(self, method: str, target: str, head: str, body: bytes) -> Answer:
        path, _, query = target.partition("?")
        key = urllib.parse.unquote(path).strip("/")
        if method == "GET" and "list-type=2" in query:
            return self._list(key, dict(urllib.parse.parse_qsl(query)))
        if method in ("GET", "HEAD"):
            return self._get(key, head, method == "HEAD")
        if method == "PUT":
            if re.search(r"(?im)^if-none-match: *\*", head) and key in self.objects:
                return Answer(412, _ERROR.format("PreconditionFailed").encode())
            self.objects[key] = body
            return Answer(200, headers=_etag(body))
        if method == "DELETE":
            self.objects.pop(key, None)
            return Answer(204)
        names = [unescape(name) for name in re.findall("<Key>(.*?)</Key>", body.decode())]
        for name in names:
            self.objects.pop(f"{key}/{name}", None)
        deleted = "".join(f"<Deleted><Key>{escape(name)}</Key></Deleted>" for name in names)
        return Answer(200, f"<DeleteResult>{deleted}</DeleteResult>".encode())

    def _get(self, key: str, head: str, is_head: bool) -> Answer:
        content = self.objects.get(key)
        if content is None:
            return Answer(404, b"" if is_head else _ERROR.format("NoSuchKey").encode())
        headers = _DATE + _etag(content)
        if is_head:
            return Answer(200, headers=headers + f"Content-Length: {len(content)}\r\n")
        if span := re.search(r"(?im)^range: *bytes=(\d*)-(\d*)", head):
            first, last = (int(part) if part else None for part in span.groups())
            if first is None:  # the last bytes
                start, stop = max(0, len(content) - (last or 0)), len(content)
            else:
                start, stop = first, min(len(content), len(content) if last is None else last + 1)
            headers += f"Content-Range: bytes {start}-{stop - 1}/{len(content)}\r\n"
            return Answer(206, content[start:stop], headers)
        return Answer(200, content, headers)

    def _list(self, bucket: str, query: dict[str, str]) -> Answer:
        start, prefix = f"{bucket}/", query.get("prefix", "")
        delimiter, after = query.get("delimiter"), query.get("continuation-token", "")
        entries: dict[str, bytes | None] = {}
        for path, content in self.objects.items():
            if not path.startswith(start + prefix):
                continue
            name = path.removeprefix(start)
            inner, found, _ = name.removeprefix(prefix).partition(delimiter or "\0")
            if found:
                entries[prefix + inner + found] = None
            else:
                entries[name] = content
        left = sorted(name for name in entries if name > after)
        shown = left[: self._page]
        parts = [
            f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
            if (content := entries[name]) is None
            else f"<Contents><Key>{escape(name)}</Key><Size>{len(content)}</Size>"
            "<LastModified>1994-11-06T08:49:37.000Z</LastModified><ETag>1</ETag></Contents>"
            for name in shown
        ]
        if left[self._page :]:
            parts.append(f"<NextContinuationToken>{escape(shown[-1])}</NextContinuationToken>")
        truncated = str(bool(left[self._page :])).lower()
        body = f"<IsTruncated>{truncated}</IsTruncated>{''.join(parts)}"
        return Answer(200, f"<ListBucketResult>{body}</ListBucketResult>".encode())


def _etag(content: bytes) -> str:
    return f'ETag: "{hashlib.md5(content, usedforsecurity=False).hexdigest()}"\r\n'


class _Connection(asyncio.Protocol):
    """A connection, on which one request follows another."""

    def __init__(self, bucket: MemoryBucket) -> None:
        self._bucket, self._received = bucket, b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, rest = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        text = head.decode("latin-1")
        length = re.search(r"(?im)^content-length: *(\d+)", text)
        if len(rest) >= (size := int(length[1]) if length else 0):
            self._received = rest[size:]
            self._bucket.answer(text, rest[:size], self._transport)


@contextlib.contextmanager
def serving(monkeypatch: Any, page: int = 1000) -> Iterator[MemoryBucket]:
    """Run such a server, used by all buckets that are opened inside the block."""
    bucket = MemoryBucket(page)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", bucket.endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "KEY")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-tests")
        patch.setenv("AWS_REGION", "us-east-1")
        _forget()
        yield bucket
    _forget()
    bucket.close()


def _forget() -> None:
    buckets.open_store.cache_clear()
    open_array.cache_clear()
