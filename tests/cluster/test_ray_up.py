"""`ray up`, a study sent to it, a host that dies in the middle, the same numbers, `ray down`.

Everything is real but the machines: hosts in namespaces (machines.py), with cluster-local.yaml as
it is but for addresses, key, environment, and CPUs (none on the head, one on each worker).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml
from machines import ROOT, Host, everything, run, start, wait_until

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(
        "SAMPIMP_LAN" not in os.environ, reason="it needs namespaces: make cluster-test"
    ),
]

STUDY = (
    *("--preset", "digits", "--hidden", "128", "--epochs", "30", "--batch-size", "25"),
    *("--reference-seeds", "1", "--strategies", "nlo", "rand", "--seeds", "1", "2"),
)
"""The reference run, two that wait for it, and two that do not."""

HOME = Path("/srv/laptop/home")
ENVIRONMENT = {
    **os.environ,
    "HOME": str(HOME),
    "PYTHONPATH": str(ROOT),
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
}
RAY = (sys.executable, "-m", "ray.scripts.scripts")
DOOR = (sys.executable, "sweeps/full_study.py")


@pytest.fixture(scope="module")
def hosts():
    """Return a head and two workers, switched on, that the laptop's key opens."""
    (HOME / ".ssh").mkdir(parents=True)
    key = HOME / ".ssh" / "id_ed25519"
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
    public_key = key.with_suffix(".pub").read_text()
    hosts = []
    try:
        for number, name in enumerate(("head", "worker1", "worker2"), start=10):
            hosts.append(Host(name, number, public_key))
        yield hosts
    finally:
        for host in hosts:
            host.kill()
    wait_until(lambda: not everything(), "all processes to end", 10)


@pytest.fixture(scope="module")
def cluster(hosts):
    """Return cluster-local.yaml with these hosts in it."""
    head, *workers = hosts
    config = yaml.safe_load((ROOT / "cluster-local.yaml").read_text())
    config["provider"] |= {
        "head_ip": head.address,
        "worker_ips": [worker.address for worker in workers],
    }
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(HOME / ".ssh" / "id_ed25519")}
    del config["file_mounts"]["~/sampimp/.git"]
    config["file_mounts"] = {
        there: str(ROOT / here) if not here.startswith("~") else here
        for there, here in config["file_mounts"].items()
    }
    # The environment is there; that it is the mounted project which runs is left to PYTHONPATH.
    make, install, profile = config["setup_commands"]
    assert "venv" in make
    assert "pip install" in install
    profile = profile.replace("export ", "export PYTHONPATH=$HOME/sampimp ")
    config["setup_commands"] = [profile]
    for kind, cpus in (("head_start_ray_commands", 0), ("worker_start_ray_commands", 1)):
        config[kind][1] += f" --num-cpus={cpus} --object-store-memory=100000000"
    path = Path("/srv/laptop/cluster.yaml")
    path.write_text(yaml.safe_dump(config))
    return str(path)


def laptop(*command):
    return run(*command, env=ENVIRONMENT, cwd=ROOT)


class Terminal:
    """A command on the laptop, in a terminal of its own."""

    def __init__(self, *command):
        self._process = start(*command, env=ENVIRONMENT, cwd=ROOT, start_new_session=True)

    def interrupt(self):
        """Press Ctrl-C; return the exit code and the output."""
        os.killpg(self._process.pid, signal.SIGINT)
        return self.end()

    def end(self):
        """Return the exit code and the output, once it has ended."""
        text, _ = self._process.communicate(timeout=180)
        return self._process.returncode, text


def commits(out):
    return [json.loads(path.read_text()) for path in Path(out).glob("trials/*/COMMIT.json")]


def numbers(out):
    """Return what each trial's commit says of its arrays and curves."""
    return {
        (commit["strategy"], commit["seed"]): (commit["digests"], commit["curves"])
        for commit in commits(out)
    }


def trains(host):
    """Return whether a Ray worker of a host does something."""
    return any(
        command.startswith("ray::") and "IDLE" not in command and "Agent" not in command
        for command in host.processes().values()
    )


@pytest.fixture
def say(capfd):
    """Print a line with the time, whatever pytest does with output."""
    start = time.monotonic()

    def say(what):
        with capfd.disabled():
            print(f"{time.monotonic() - start:7.1f} s  {what}", flush=True)

    return say


def test_a_study_outlives_a_host(hosts, cluster, say):
    head, victim, survivor = hosts
    laptop(*RAY, "get-auth-token", "--generate")
    laptop(*RAY, "up", "--yes", "--no-config-cache", cluster)
    say("`ray up` has returned")
    for worker in (victim, survivor):
        wait_until(
            lambda worker=worker: any("raylet" in line for line in worker.processes().values()),
            f"a raylet on {worker.name}",
            60,
        )
    say("both workers run Ray")

    blind = Terminal(*DOOR, *STUDY, "--cluster", cluster, "--out", "/tmp/study")
    command = (*DOOR, *STUDY, "--cluster", cluster, "--out", "/srv/study")
    first = Terminal(*command)
    trials = Path("/srv/study/trials")
    wait_until(
        lambda: trains(victim) and trains(survivor) and any(trials.glob("*/checkpoints/*/M*")),
        "trials on both workers",
        150,
    )
    say("both workers train")
    code, text = first.interrupt()
    assert code == 130
    assert "Detached; the study goes on as job sampimp-" in text
    assert f"Stop it: ray exec {cluster} 'ray job stop sampimp-" in text
    say("Ctrl-C has detached the laptop")

    # /tmp is each host's own: a record written there would be lost with its host.
    code, text = blind.end()
    assert code == 2, text
    assert "Expected a folder that every node of the cluster sees" in text

    victim.kill()
    done = len(commits("/srv/study"))
    assert done < 5
    say(f"worker1 is dead, with {done} of 5 trials committed")
    undisturbed = Terminal(
        *(*DOOR, *STUDY, "--address", "local", "--max-concurrent", "1"),
        *("--out", "/srv/undisturbed"),
    )
    code, text = Terminal(*command).end()
    say("the same command has attached, and the study is done")
    assert code == 0, text
    assert "The study runs already, as job sampimp-" in text
    assert "5 of 5 trials are committed." in text
    assert any(commit["attempt"] > 1 for commit in commits("/srv/study"))

    laptop(*RAY, "down", "--yes", cluster)
    say("`ray down` has returned")
    took = wait_until(lambda: not head.processes(), "the head to be empty", 30)
    say(f"nothing runs on the head, {took:.0f} s later")
    took = wait_until(lambda: not survivor.processes(), "worker2 to be empty", 100)
    say(f"nothing runs on worker2, {took:.0f} s later")
    code, text = undisturbed.end()
    assert code == 0, text
    assert len(numbers("/srv/study")) == 5
    assert numbers("/srv/study") == numbers("/srv/undisturbed")
    say("an undisturbed study on the laptop has the same numbers")
