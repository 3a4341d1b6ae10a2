"""`ray up`, a host cut off in a study and one that dies in another, the same numbers, `ray down`.

Everything is real but the machines: hosts in namespaces (machines.py), with cluster-local.yaml as
it is but for addresses, key, environment, CPUs (none on the head, one on each worker), and how soon
the head gives a host up.
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
    pytest.mark.timeout(0),  # run.sh has one for all
    pytest.mark.skipif(
        "SAMPIMP_LAN" not in os.environ, reason="it needs namespaces: make cluster-test"
    ),
]

STUDY = (
    *("--preset", "digits", "--hidden", "128", "--epochs", "30", "--batch-size", "25"),
    *("--reference-seeds", "1", "--strategies", "nlo", "rand", "--seeds", "1", "2"),
)
"""The reference run, two that wait for it, and two that do not."""

LONG_EPOCHS = (
    *("--preset", "digits", "--hidden", "2560", "2560", "--epochs", "3"),
    *("--batch-size", "1", "--learning-rate", "0.001"),
    *("--reference-seeds", "1", "--strategies", "shuffle"),
)
"""One run, whose epochs of 17 s outlast the 8 s until another host goes on with it (measured)."""

HEALTH = (
    "RAY_health_check_period_ms=500 RAY_health_check_timeout_ms=500 "
    "RAY_health_check_failure_threshold=3"
)
"""The head gives a host up after three checks in vain, 3 s. Ray's own 3 s, 10 s and five checks
take a minute, and a host without its head stops Ray after 40 s: no two attempts would overlap."""

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
    """Print a line with the time, whatever pytest does with output."""
    start = time.monotonic()
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")

    def say(what):
        with capture.global_and_fixture_disabled():
            print(f"{time.monotonic() - start:7.1f} s  {what}", flush=True)

    return say


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
def cluster(hosts, say):
    """Return cluster-local.yaml with these hosts in it, after `ray up`."""
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


def attempts(trial):
    """Return who has begun a trial, the first first."""
    return [json.loads(path.read_text()) for path in sorted(trial.glob("attempts/*.json"))]


def epochs(record):
    """Return the epochs that a record holds, from 0."""
    return {int(path.name) for path in record.glob("nll/c/*")}


def numbers(out):
    """Return what each trial's commit says of its arrays and curves."""
    return {
        (commit["strategy"], commit["seed"]): (commit["digests"], commit["curves"])
        for commit in commits(out)
    }


def raylet(host):
    """Return the process that is Ray on a host, if any."""
    found = [pid for pid, line in host.processes().items() if "/raylet/raylet " in line]
    return found[0] if found else None


def trains(host):
    """Return whether a Ray worker of a host does something."""
    return any(
        command.startswith("ray::") and "IDLE" not in command and "Agent" not in command
        for command in host.processes().values()
    )


def in_epoch(host):
    """Return the process of a host's trial while it is in an epoch, as Ray titles it."""
    lines = host.processes().items()
    found = [pid for pid, line in lines if line.startswith("ray::") and line.endswith(".train")]
    return found[0] if found else None


@pytest.fixture(scope="module")
def undisturbed():
    """Return the studies that run on the laptop meanwhile, by the folder of what they are like."""
    return {}


def test_a_host_that_is_cut_off_and_returns_spoils_nothing(hosts, cluster, undisturbed, say):
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
    # On a slow machine it is ended in the middle, with all of Ray on a host without its head.
    how = "has seen the second, and stopped" if late in victim.processes() else "was ended"
    say(f"the first attempt {how}, {time.monotonic() - cut:.0f} s after the cut")
    assert epochs(trial / "record.zarr") == {0}
    assert not (trial / "checkpoints" / "epoch-000002-attempt-0001").exists()
    undisturbed["/srv/cut"] = Terminal(*DOOR, *LONG_EPOCHS, *ALONE, "/srv/cut-undisturbed")
    time.sleep(max(0, cut + 60 - time.monotonic()))
    victim.reconnect()
    say(f"{victim.name} is back, {time.monotonic() - cut:.0f} s after the cut")

    # Its Ray has stopped, without its head, which waits for its ssh server and starts it anew.
    took = wait_until(lambda: raylet(victim) not in (None, old), f"Ray on {victim.name}", 120)
    say(f"Ray runs anew on {victim.name}, {took:.0f} s later")
    code, text = study.end()
    assert code == 0, text
    assert "1 of 1 trials are committed." in text
    (commit,) = commits(out)
    assert (commit["attempt"], len(attempts(trial))) == (2, 2)
    assert commit["parts"] == [[0, "record.zarr"], [2, "record-2.zarr"]]
    assert (epochs(trial / "record.zarr"), epochs(trial / "record-2.zarr")) == ({0}, {1, 2})
    said = laptop(sys.executable, "sweeps/status.py", str(out), "--verify")
    assert "1 committed trials verified: every chunk is as it was written." in said
    say("the study is done, and verified")


def test_a_study_outlives_a_host(hosts, cluster, undisturbed, say):
    head, victim, survivor = hosts
    # /tmp is each host's own: a record written there would be lost with its host. To its end before
    # the study that is to be hurt in time begins.
    blind = Terminal(*DOOR, *STUDY, "--cluster", cluster, "--out", "/tmp/study")
    code, text = blind.end()
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
