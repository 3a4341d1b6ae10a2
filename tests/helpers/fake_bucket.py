"""An HTTP server on loopback that gives prepared S3 answers, and records the requests.

A real S3 server is in tests/sweeps/test_s3.py. The fixtures of tests/store/conftest.py start this
one and set the AWS variables.
"""

import http.server
import socket
import threading

from sampimp.store import aws_credentials, buckets


class FakeBucket:
    """An HTTP server with prepared answers."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        """Method, path and headers of each request."""
        self.answers: list[tuple[int | None, str]] = []
        """Status and body, in turn, the last for all further requests; None: cut the connection."""
        bucket = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                bucket.requests.append((self.command, self.path, dict(self.headers)))
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
        """Stop the server."""
        self._server.shutdown()
        self._server.server_close()


NO_SUCH_KEY = (404, "<Error><Code>NoSuchKey</Code></Error>")
EMPTY_LISTING = (200, "<ListBucketResult></ListBucketResult>")


def signature(request: tuple[str, str, dict[str, str]]) -> tuple[str, str, str | None]:
    """Return the access key, region and session token that a request is signed with."""
    headers = {name.lower(): value for name, value in request[2].items()}
    key, _, region, *_ = headers["authorization"].partition("Credential=")[2].split("/")
    return key, region, headers.get("x-amz-security-token")


def forget_stores() -> None:
    """Forget opened buckets and signed-in profiles."""
    buckets.open_store.cache_clear()
    aws_credentials._boto3_provider.cache_clear()
