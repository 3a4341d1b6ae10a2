"""A Ray started by a study listens on the loopback alone; SIGTERM ends a study as Ctrl-C does."""

import glob
import os
import signal
import socket
import tempfile
from pathlib import Path

from processes import TRAIN, Driver

from sampimp.sweeps.door import INTERRUPTED, TERMINATED


def listening(pids):
    """Return the addresses that processes listen at."""
    inodes = set()
    for pid in pids:
        for descriptor in glob.glob(f"/proc/{pid}/fd/*"):
            try:
                target = os.readlink(descriptor)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                words = bytes.fromhex(fields[1].partition(":")[0])
                address = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
                addresses.add(socket.inet_ntop(family, address).removeprefix("::ffff:"))
    return addresses


def test_the_reader_of_addresses_sees_all_kinds():
    with socket.socket() as everywhere, socket.socket(socket.AF_INET6) as here:
        everywhere.bind(("0.0.0.0", 0))
        here.bind(("::1", 0))
        everywhere.listen()
        here.listen()
        assert {"0.0.0.0", "::1"} <= listening([os.getpid()])


def test_sigterm_ends_a_study_and_its_ray_listened_on_the_loopback_alone(tmp_path, tiny):
    env = {
        name: value
        for name, value in os.environ.items()
        if name != "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # which conftest.py sets
    }
    scratch = Path(tempfile.gettempdir()).glob
    more = ("--strategies", "rand", "--seeds", "1", "--epochs", "2000", "--max-concurrent", "1")
    driver = Driver(tmp_path / "study", (*tiny, *more), env=env, door=TRAIN)
    try:
        driver.wait_until(lambda: any(tmp_path.glob("study/trials/*/checkpoints/*")))
        addresses = listening([driver.process.pid, *driver.family.alive()])
        assert addresses
        assert addresses <= {"127.0.0.1", "::1"}
        # A study removes folders that killed ones left; others on this machine come and go.
        pattern = f"sampimp-tune-*-{driver.process.pid}-*"
        assert set(scratch(pattern))
        driver.process.send_signal(signal.SIGTERM)
        code, text = driver.communicate()
    finally:
        driver.close()
    assert code == TERMINATED == 143
    assert INTERRUPTED in text
    for word in ("SIGTERM", "Traceback", "PC:", "Aborted"):
        assert word not in text
    assert not set(scratch(pattern))
