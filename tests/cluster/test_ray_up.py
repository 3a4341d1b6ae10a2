"""`ray up`; a host without network, a host that dies; the same numbers; `ray down`.

All parts are real except the machines, which are hosts in namespaces (machines.py). The cluster is
cluster-local.yaml with other addresses, key, environment, CPUs (none on the head, one per worker)
and a shorter time until the head declares a host dead.
"""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml
from machines import ROOT, Host, everything, run, start, wait_until

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(0),  # run.sh limits the whole run
    pytest.mark.skipif(
        "SAMPIMP_LAN" not in os.environ, reason="requires namespaces: make cluster-test"
    ),
]

STUDY = (
    *("--preset", "digits", "--hidden", "128", "--epochs", "30", "--batch-size", "25"),
    *("--influence", "--subsets"),  # none
    *("--reference-seeds", "1", "--strategies", "nlo", "rand", "--seeds", "1", "2"),
)
"""The reference run, two trials that sort by it, and two that do not."""

LONG_EPOCHS = (
    *("--preset", "digits", "--hidden", "2560", "2560", "--epochs", "3"),
    *("--influence", "--subsets"),  # none
    *("--batch-size", "1", "--learning-rate", "0.001"),
    *("--reference-seeds", "1", "--strategies", "shuffle"),
)
"""One run with epochs of 17 s, longer than the 8 s until another host continues it (measured)."""

HEALTH = (
    "RAY_health_check_period_ms=500 RAY_health_check_timeout_ms=500 "
    "RAY_health_check_failure_threshold=3"
)
"""The head declares a host dead after three failed checks, 3 s. Ray's defaults (3 s, 10 s, five
checks) take a minute, and a host without its head stops Ray after 40 s: no two attempts would
overlap."""

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
ALONE = ("--address", "local", "--max-concurrent", "1", "--out")


@pytest.fixture(scope="module")
def say(pytestconfig):
    """Return a function that prints a line with the time, past pytest's capture."""
    start = time.monotonic()
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")

    def say(what):
        with capture.global_and_fixture_disabled():
            print(f"{time.monotonic() - start:7.1f} s  {what}", flush=True)

    return say


@pytest.fixture(scope="module")
def hosts():
    """Return a head and two workers that run and accept the laptop's key."""
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
def cluster(hosts, say):
    """Start a cluster with `ray up`; return the path of its YAML file."""
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
    # The environment exists already; PYTHONPATH selects the mounted project.
    make, install, profile = config["setup_commands"]
    assert "venv" in make
    assert "pip install" in install
    profile = profile.replace("export ", "export PYTHONPATH=$HOME/sampimp ")
    config["setup_commands"] = [profile]
    for kind, cpus in (("head_start_ray_commands", 0), ("worker_start_ray_commands", 1)):
        options = f"--num-cpus={cpus} --object-store-memory=100000000"
        config[kind][1] = config[kind][1].replace("ray start ", f"ray start {options} ")
        assert options in config[kind][1]
    head_start = config["head_start_ray_commands"]
    head_start[1] = f"export {HEALTH}; {head_start[1]}"
    path = Path("/srv/laptop/cluster.yaml")
    path.write_text(yaml.safe_dump(config))
    laptop(*RAY, "get-auth-token", "--generate")
    laptop(*RAY, "up", "--yes", "--no-config-cache", str(path))
    say("`ray up` has returned")
    for worker in workers:
        wait_until(lambda worker=worker: raylet(worker), f"a raylet on {worker.name}", 150)
    say("both workers run Ray")
    return str(path)


def laptop(*command):
    return run(*command, env=ENVIRONMENT, cwd=ROOT)


class Terminal:
    """A command on the laptop, in its own process session."""

    def __init__(self, *command):
        self._process = start(*command, env=ENVIRONMENT, cwd=ROOT, start_new_session=True)

    def interrupt(self):
        """Press Ctrl-C; return the exit code and the output."""
        os.killpg(self._process.pid, signal.SIGINT)
        return self.end()

    def end(self):
        """Wait for the command; return the exit code and the output."""
        text, _ = self._process.communicate(timeout=180)
        return self._process.returncode, text


def commits(out):
    return [json.loads(path.read_text()) for path in Path(out).glob("trials/*/COMMIT.json")]


def attempts(trial):
    """Return the attempts at a trial, in order."""
    return [json.loads(path.read_text()) for path in sorted(trial.glob("attempts/*.json"))]


def epochs(record):
    """Return the indices of the epochs in a record, from 0."""
    return {int(path.name) for path in record.glob("nll/c/*")}


def numbers(out):
    """Return digests and curves of each committed trial."""
    return {
        (commit["strategy"], commit["seed"]): (commit["digests"], commit["curves"])
        for commit in commits(out)
    }


def raylet(host):
    """Return the process id of the raylet on a host, or None."""
    lines = host.processes().items()
    return next((pid for pid, line in lines if "/raylet/raylet " in line), None)


def trains(host):
    """Return whether a Ray worker of a host is busy."""
    return any(
        command.startswith("ray::") and "IDLE" not in command and "Agent" not in command
        for command in host.processes().values()
    )


def in_epoch(host):
    """Return the process id of a trial that is in an epoch (Ray sets the title), or None."""
    lines = host.processes().items()
    return next(
        (pid for pid, line in lines if line.startswith("ray::") and line.endswith(".train")), None
    )


@pytest.fixture(scope="module")
def undisturbed():
    """Return undisturbed studies on the laptop, by the folder of the disturbed study."""
    return {}


def test_a_host_without_network_and_its_return_change_no_result(hosts, cluster, undisturbed, say):
    out = Path("/srv/cut")
    study = Terminal(*DOOR, *LONG_EPOCHS, "--cluster", cluster, "--out", str(out))
    wait_until(lambda: any(out.glob("trials/*/checkpoints/*/M*")), "the first epoch", 150)
    (trial,) = out.glob("trials/*")
    victim, other = sorted(hosts[1:], key=lambda host: host.name != attempts(trial)[0]["host"])
    old = raylet(victim)
    victim.cut_off()
    cut = time.monotonic()
    say(f"{victim.name} is cut off in the second of three epochs")

    took = wait_until(lambda: len(attempts(trial)) > 1, "a second attempt", 90)
    late = in_epoch(victim)
    assert late, "the epoch ended before a second attempt began: make it longer"
    assert attempts(trial)[1]["host"] == other.name
    say(f"a second attempt has begun on {other.name}, {took:.0f} s later; the first trains on")
    wait_until(lambda: not in_epoch(victim), "the first attempt to end its epoch", 120)
    # On a slow machine it is killed within the epoch: a host without its head stops all of Ray.
    how = "found the second and stopped" if late in victim.processes() else "was killed"
    say(f"the first attempt {how}, {time.monotonic() - cut:.0f} s after the cut")
    assert epochs(trial / "record.zarr") == {0}
    assert not (trial / "checkpoints" / "epoch-000002-attempt-0001").exists()
    undisturbed["/srv/cut"] = Terminal(*DOOR, *LONG_EPOCHS, *ALONE, "/srv/cut-undisturbed")
    time.sleep(max(0, cut + 60 - time.monotonic()))
    victim.reconnect()
    say(f"{victim.name} is back, {time.monotonic() - cut:.0f} s after the cut")

    # Ray stopped on the host; the head waits for its ssh server and starts Ray again.
    took = wait_until(lambda: raylet(victim) not in (None, old), f"Ray on {victim.name}", 120)
    say(f"Ray runs anew on {victim.name}, {took:.0f} s later")
    code, text = study.end()
    assert code == 0, text
    assert "1 of 1 trials are committed." in text
    (commit,) = commits(out)
    assert (commit["attempt"], len(attempts(trial))) == (2, 2)
    assert commit["parts"] == [[0, "record.zarr"], [2, "record-2.zarr"]]
    assert (epochs(trial / "record.zarr"), epochs(trial / "record-2.zarr")) == ({0}, {1, 2})
    output = laptop(sys.executable, "sweeps/status.py", str(out), "--verify")
    assert re.search("committed trials +1 +every byte is as it was written", output)
    say("the study is done, and verified")


def test_a_study_outlives_a_host(hosts, cluster, undisturbed, say):
    head, victim, survivor = hosts
    # /tmp is private to each host: a record there would be lost with its host. This study ends
    # before the next one, which is to be disturbed at a certain time, begins.
    private = Terminal(*DOOR, *STUDY, "--cluster", cluster, "--out", "/tmp/study")
    code, text = private.end()
    assert code == 2, text
    assert "Expected a folder that every node of the cluster sees" in text

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

    victim.kill()
    done = len(commits("/srv/study"))
    assert done < 5
    say(f"worker1 is dead, with {done} of 5 trials committed")
    undisturbed["/srv/study"] = Terminal(*DOOR, *STUDY, *ALONE, "/srv/study-undisturbed")
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


def test_undisturbed_studies_have_the_same_numbers(undisturbed, say):
    assert list(undisturbed) == ["/srv/cut", "/srv/study"]
    for out, study in undisturbed.items():
        code, text = study.end()
        assert code == 0, text
        assert numbers(out) == numbers(f"{out}-undisturbed")
    assert (len(numbers("/srv/cut")), len(numbers("/srv/study"))) == (1, 5)
    say("undisturbed studies on the laptop have the same numbers")
