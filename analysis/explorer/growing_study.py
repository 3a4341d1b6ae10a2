"""The explorer of a study that grows: written again when runs are committed, and served.

The server answers on 127.0.0.1 only, to requests for that host, and serves the files of the
explorer alone.

Map: `watch_study`, `serve_folder`, `committed_records`.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from sampimp.analysis.explorer.explorer_folder import PAGE_FILE
from sampimp.errors import ResourceError, UserError
from sampimp.store.influence_layouts import INFLUENCE_FOLDER
from sampimp.store.location import Folder

HOST = "127.0.0.1"
LOOK_PAUSE = 3.0
"""Seconds between two looks at the store (arbitrary)."""
_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "png": "image/png",
    "jpg": "image/jpeg",
}


def committed_records(out: str) -> list[str]:
    """Return the names of the records that have a commit, without reading them."""
    folder = Folder.of(out)
    names = []
    for records in ("trials", INFLUENCE_FOLDER):
        place = folder / records
        names += [
            f"{records}/{name}"
            for name in place.folders()
            if "COMMIT.json" in (place / name).files()
        ]
    return names


def watch_study(
    out: str, write: Callable[[], None], *, pause: float = LOOK_PAUSE, warn: Callable[[str], None]
) -> None:
    """Call `write` whenever another record is committed, until KeyboardInterrupt.

    Parameters
    ----------
    out
        The study's folder or `s3://` URL.
    write
        Writes the explorer; it has been called once.
    pause
        Seconds between two looks at the store.
    warn
        Called with the message of a `UserError`, after which the next look tries again.
    """
    seen = committed_records(out)
    failed = ""
    while True:
        time.sleep(pause)
        try:
            records = committed_records(out)
            if records != seen or failed:
                write()
            seen, failed = records, ""
        except UserError as error:
            if str(error) != failed:
                warn(str(error))
            failed = str(error)


@contextlib.contextmanager
def serve_folder(folder: Folder, port: int = 0) -> Iterator[str]:
    """Serve the files of an explorer on 127.0.0.1, and yield the address of the page.

    Parameters
    ----------
    folder
        The explorer.
    port
        Port of the server; 0: a free one.

    Raises
    ------
    ResourceError
        The port is taken.
    """

    class Handler(_Handler):
        served = folder

    try:
        server = ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise ResourceError(
            expected=f"a free port {port} of {HOST}",
            got=str(error.strerror),
            where="option --port",
            todo="choose another one, or leave the option out",
        ) from None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://{HOST}:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD for the files of `served`."""

    served: Folder
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        content, kind = self._find()
        status = 200 if content is not None else 404
        content = b"" if content is None else content
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-cache")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _find(self) -> tuple[bytes | None, str]:
        """Return the content and type of the requested file; None if there is none."""
        path = unquote(urlsplit(self.path).path).lstrip("/") or PAGE_FILE
        kind = _TYPES.get(path.rpartition(".")[2])
        # Another name that resolves to 127.0.0.1 would let the page of another site read this one.
        host = self.headers.get("Host", "").rpartition(":")[0]
        parts = path.split("/")
        if kind is None or host not in (HOST, "localhost") or not all(p.strip(".") for p in parts):
            return None, "text/plain"
        try:
            return self.served.read_bytes(path), kind
        except UserError:  # a link out of the folder, or a store that is away
            return None, "text/plain"

    def log_message(self, format: str, *values: object) -> None:
        """Print nothing: a page asks every few seconds."""
