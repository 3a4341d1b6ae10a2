"""The machines of a study: their room for trials, and errors where the room is too small."""

import socket
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
import ray
import yaml
from processes import command_of
from ray.autoscaler._private.util import prepare_config
from rich.console import Console

from sampimp.data import load_source
from sampimp.errors import ResourceError, StoreError
from sampimp.store.location import Folder
from sampimp.sweeps import cluster as cluster_module
from sampimp.sweeps import estimate
from sampimp.sweeps.cluster import autoscaling_config, check_shared, connect
from sampimp.sweeps.machines import (
    Cluster,
    Machines,
    check_answers,
    machines_to_come,
    noted_address,
)
from sampimp.sweeps.options import parse
from sampimp.sweeps.preflight import check_cluster
from sampimp.sweeps.study import Study, concurrent_trials, make_plan

ROOT = Path(__file__).parents[2]
HEAD = Machines(1, cpus=0, gpus=0)


@pytest.mark.parametrize(
    ("machines", "cpus", "gpus", "trials"),
    [
        (Machines(1, cpus=8, gpus=0), 3, 0, 2),
        (Machines(3, cpus=8, gpus=0), 3, 0, 6),  # not 24 // 3: a trial runs on one machine
        (Machines(1, cpus=8, gpus=1), 1, 0.25, 4),
        (Machines(1, cpus=3, gpus=1), 1, 0.25, 3),
        (Machines(1, cpus=32, gpus=4), 1, 0.4, 8),  # not 10: a trial runs on one GPU
        (Machines(1, cpus=32, gpus=2), 1, 0.1, 20),
        (Machines(2, cpus=8, gpus=3), 1, 2, 2),
        (Machines(2, cpus=8, gpus=0), 1, 0.5, 0),
        (Machines(2, cpus=float("inf"), gpus=0), 4, 1, 2),  # unknown: at least one trial each
    ],
)
def test_the_room_of_machines(machines, cpus, gpus, trials):
    assert machines.room(cpus, gpus) == trials


def test_machines_to_come_on_aws_are_those_of_cluster_yaml():
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    assert machines_to_come(config, [HEAD]) == (Machines(16, cpus=4, gpus=1),)
    two = [HEAD, Machines(1, cpus=4, gpus=1), Machines(1, cpus=4, gpus=1)]
    assert machines_to_come(config, two) == (Machines(14, cpus=4, gpus=1),)
    cluster = Cluster("Ray cluster", (HEAD,), machines_to_come(config, [HEAD]))
    assert str(cluster) == (
        "Ray cluster: 1 node, 0 CPUs, 0 GPUs; up to 16 more with 64 CPUs, 16 GPUs"
    )
    options = parse(["--gpus-per-trial", "0.25"])
    check_cluster(options, cluster)
    assert concurrent_trials(options, cluster) == 64


def test_all_kinds_together_stay_below_the_limit_of_the_cluster():
    config = {
        "max_workers": 5,
        "available_node_types": {
            "big": {"resources": {"CPU": 64}, "max_workers": 3},
            "small": {"resources": {"CPU": 2}, "max_workers": 9},
        },
    }
    expected = (Machines(3, 64, 0), Machines(2, 2, 0))
    assert machines_to_come(config, [HEAD]) == expected
    assert machines_to_come(config, [HEAD, *[Machines(1, 2, 0)] * 5]) == ()
    assert machines_to_come({}, [HEAD]) == ()


def test_listed_machines_that_have_not_joined_count_as_to_come():
    config = yaml.safe_load((ROOT / "cluster-local.yaml").read_text())
    to_come = machines_to_come(prepare_config(config), [HEAD])
    assert [kind.count for kind in to_come] == [2]
    cluster = Cluster("Ray cluster", (HEAD,), to_come)
    assert str(cluster) == "Ray cluster: 1 node, 0 CPUs, 0 GPUs; up to 2 more"
    check_cluster(parse(["--gpus-per-trial", "1"]), cluster)


def test_autoscaling_config_is_read_from_the_command_line_of_its_process(tmp_path):
    path = tmp_path / "bootstrap.yaml"
    path.write_text("max_workers: 7\n")
    command = [sys.executable, "-c", "input()", "--gcs-address=10.0.0.1:6379"]
    process = subprocess.Popen([*command, f"--autoscaling-config={path}"], stdin=subprocess.PIPE)
    try:
        while str(path) not in command_of(process.pid):
            time.sleep(0.01)  # the process has not replaced its image yet
        assert autoscaling_config("10.0.0.1:6379") == {"max_workers": 7}
        assert autoscaling_config("10.0.0.1:637") == {}
        path.unlink()
        assert autoscaling_config("10.0.0.1:6379") == {}
    finally:
        process.communicate(b"\n")


# Checks before a study begins.


def test_a_cluster_without_a_node_that_has_room_is_refused():
    # 8 GPUs in all, and no trial of 2 fits.
    cluster = Cluster("eight nodes", (Machines(8, cpus=4, gpus=1),))
    with pytest.raises(ResourceError, match="a node with 1 CPUs and 2 GPU a trial") as caught:
        check_cluster(parse(["--gpus-per-trial", "2"]), cluster)
    assert "eight nodes: 8 nodes, 32 CPUs, 8 GPUs" in str(caught.value)


def test_max_concurrent_accepts_a_cluster_without_room_that_grows():
    options = ["--gpus-per-trial", "1"]
    cluster = Cluster("Ray cluster", (HEAD,))
    with pytest.raises(ResourceError, match="--max-concurrent"):
        check_cluster(parse(options), cluster)
    more = parse([*options, "--max-concurrent", "12"])
    check_cluster(more, cluster)
    assert concurrent_trials(more, cluster) == 12
    # This machine does not grow.
    with pytest.raises(ResourceError):
        check_cluster(more, Cluster("Ray started here", (HEAD,), started_here=True))


def test_a_folder_that_another_node_cannot_read_is_refused(monkeypatch, tmp_path, cluster):
    (tmp_path / "study.json").write_text("{}")
    check_shared(tmp_path / "study.json")  # one node
    node = next(node for node in cluster_module.ray.nodes() if node["Alive"])
    elsewhere = {"Alive": True, "NodeID": "0" * 56, "NodeManagerAddress": "10.0.0.2"}
    monkeypatch.setattr(cluster_module.ray, "nodes", lambda: [node, elsewhere])
    check_shared(tmp_path / "study.json")  # the second node has left: its answer is unknown

    # Each process reads another text there, as from a local disk.
    local_file = Path("/proc/self/stat")
    with pytest.raises(StoreError, match="a folder that every node of the cluster sees") as caught:
        check_shared(local_file)
    assert f"one that {node['NodeManagerAddress']} cannot read" in str(caught.value)
    assert "/proc/self" in str(caught.value)


@pytest.mark.parametrize(
    ("seconds", "says"),
    [
        (1.0, "for about 12 min: 5 trials, 2 at a time. To send it to a cluster: ray up"),
        (0.9, "for about 11 min: 5 trials, 2 at a time.\n"),
    ],
)
def test_a_study_on_this_machine_prints_its_time_and_a_long_one_how_to_use_a_cluster(
    monkeypatch, tmp_path, seconds, says
):
    monkeypatch.setattr(estimate, "measure_epoch", lambda *_: seconds)
    monkeypatch.setattr(estimate, "LONG_STUDY", 700)
    config = parse(["--preset", "digits", "--strategies", "rand", "--epochs", "288"])
    sources = {"digits": load_source("digits")}
    plan = make_plan(config, sources)
    cluster = Cluster("x", (Machines(1, cpus=2, gpus=0),), started_here=True)
    console = Console(file=StringIO(), width=200)
    # 5 seeds x (288 epochs x 1 s + 2.5 s of its start and record) / 2 at a time = 726.25 s
    study = Study(
        config=config,
        folder=Folder.of(tmp_path),
        cluster=cluster,
        sources=sources,
        plan=plan,
        trials=plan.resolve({}),
    )
    assert estimate.announce_time(study, console) == pytest.approx(720 * seconds + 6.25)
    assert says in console.file.getvalue()


def test_a_ray_that_does_not_start_is_named(monkeypatch):
    def hanging(**_):
        raise Exception("The current node timed out during startup.\nMore.")

    monkeypatch.setattr(ray, "init", hanging)
    with pytest.raises(ResourceError, match=r"timed out during startup\.\n(.|\n)*run the same"):
        connect("local")


def test_a_killed_cluster_is_no_cluster(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    noted = tmp_path / "ray" / "ray_current_cluster"
    noted.parent.mkdir()
    assert noted_address() is None
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        noted.write_text(address)
        assert noted_address() == address
    assert noted_address() is None
    with pytest.raises(ResourceError, match=f"no answer at {address}: Connection refused"):
        connect(address)
    with pytest.raises(ResourceError, match=r"not a node of a cluster(.|\n)*address auto"):
        connect("auto")
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        check_answers(f"[::1]:{server.getsockname()[1]}")
