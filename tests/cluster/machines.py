"""Hosts in namespaces: processes, network, /tmp and ssh server are private, /srv is shared."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
UNSHARE = ("unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child")
GATEWAY = "10.83.0.1"
"""Address of the laptop, on the bridge of lan.sh."""


class Host:
    """A machine that runs from its construction until `kill`."""

    def __init__(self, name: str, number: int, public_key: str) -> None:
        self.name, self.address = name, f"10.83.0.{number}"
        self.folder = Path("/srv") / name
        self.home = self.folder / "home"
        (self.home / ".ssh").mkdir(parents=True)
        (self.home / ".ssh" / "authorized_keys").write_text(public_key)
        # The environment that cluster-local.yaml would create exists already.
        (self.home / "venv").symlink_to(sys.prefix)
        keep = (str(ROOT), sys.prefix, sys.base_prefix)
        script = str(Path(__file__).with_name("host.sh"))
        self._unshare = subprocess.Popen(
            [*UNSHARE, script, name, self.address, GATEWAY, str(self.folder), *keep],
            stdin=subprocess.DEVNULL,
            stderr=(self.folder / "host.log").open("w"),
        )
        wait_until(lambda: bool(self._init()), f"{name} to start", 20)
        self._link = f"to-{name}"
        peer = ("type", "veth", "peer", "name", "eth0", "netns", self._init())
        run("ip", "link", "add", self._link, *peer)
        run("ip", "link", "set", self._link, "master", "lan", "up")
        self._namespace = os.readlink(f"/proc/{self._init()}/ns/pid")
        wait_until(self._answers, f"{name}'s ssh server", 20)

    def processes(self) -> dict[int, str]:
        """Return the running commands by process id, without process 1 and the ssh server."""
        commands = {}
        for pid in _pids():
            with contextlib.suppress(OSError):
                if (
                    os.readlink(f"/proc/{pid}/ns/pid") != self._namespace
                    or str(pid) == self._init()
                ):
                    continue
                command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
                if command and not command.startswith(("sshd:", "/usr/sbin/sshd")):
                    commands[pid] = command  # a zombie has no command line
        return commands

    def cut_off(self) -> None:
        """Take the network link down; processes and disks, /srv included, stay."""
        run("ip", "link", "set", self._link, "down")

    def reconnect(self) -> None:
        """Bring the network link up again."""
        run("ip", "link", "set", self._link, "up")

    def kill(self) -> None:
        """Kill every process at once, as a power failure does."""
        if self._unshare.poll() is None:
            os.kill(int(self._init()), signal.SIGKILL)
            self._unshare.wait()

    def _init(self) -> str:
        """Return the process id, outside the namespace, of process 1 of the host."""
        children = f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children"
        return Path(children).read_text().strip()

    def _answers(self) -> bool:
        assert self._unshare.poll() is None, f"{self.name} did not start"
        probe = ["bash", "-c", f"exec 3<>/dev/tcp/{self.address}/22"]
        return not subprocess.run(probe, capture_output=True, timeout=10, check=False).returncode


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def everything() -> dict[int, str]:
    """Return all commands in these namespaces, without this process, its parents and zombies."""
    mine, pid = set(), os.getpid()
    while pid:
        mine.add(pid)
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    commands = {}
    for pid in set(_pids()) - mine:
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
            if command:
                commands[pid] = command
    return commands


def wait_until(happened: Callable[[], bool], what: str, seconds: float) -> float:
    """Wait until a condition holds; return the seconds it took."""
    start = time.monotonic()
    while not happened():
        assert time.monotonic() - start < seconds, (
            f"waited {seconds:g} s without success for {what}"
        )
        time.sleep(0.1)
    return time.monotonic() - start


def start(*command: str, **options) -> subprocess.Popen[str]:
    """Start a command without input, with standard output and error in one pipe."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def run(*command: str, **options) -> str:
    """Run a command and return its output; a failure is an assertion with the output."""
    process = start(*command, **options)
    text, _ = process.communicate()
    assert not process.returncode, f"{command} ended with {process.returncode}:\n{text}"
    return text
