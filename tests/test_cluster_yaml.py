"""cluster.yaml and cluster-local.yaml: Ray accepts both, and they have the documented properties.

Connections are refused, so nothing outside this process is contacted. A test of a running cluster
from cluster-local.yaml is `make cluster-test`.
"""

import copy
import json
import os
import re
import socket
import subprocess
from pathlib import Path

import botocore.session
import jsonschema
import pytest
import ray.autoscaler
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.aws import config as aws
from ray.autoscaler._private.local.config import bootstrap_local
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]
TEXTS = {name: (ROOT / name).read_text() for name in ("cluster.yaml", "cluster-local.yaml")}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(params=TEXTS)
def text(request):
    return TEXTS[request.param]


@pytest.fixture
def written(text):
    return yaml.safe_load(text)


@pytest.fixture
def prepared(written):
    """Return the configuration as `ray up` prepares it before its first request."""
    return prepare_config(copy.deepcopy(written))


@pytest.fixture
def on_aws():
    return prepare_config(yaml.safe_load(TEXTS["cluster.yaml"]))


@pytest.fixture
def on_own_machines():
    return prepare_config(yaml.safe_load(TEXTS["cluster-local.yaml"]))


def node_types(config):
    types = dict(config["available_node_types"])
    return types.pop(config["head_node_type"]), list(types.values())


def starts(config):
    """Return the commands that start Ray: on the head, on a worker."""
    kinds = ("head_start_ray_commands", "worker_start_ray_commands")
    found = [command for kind in kinds for command in config[kind] if " start " in command]
    assert len(found) == 2
    return found


# ---------------------------------------------------------------------------------- both


def test_ray_accepts_it(written, prepared):
    schema = Path(ray.autoscaler.__file__).with_name("ray-schema.json")
    jsonschema.validate(written, json.loads(schema.read_text()))
    validate_config(prepared)


def test_ray_refuses_a_misspelt_key(prepared):
    prepared["idle_timeout_minute"] = 5
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minute"):
        validate_config(prepared)


def test_every_key_has_its_comment(text):
    lines = text.splitlines()
    bare = [
        f"{number}: {line.strip()}"
        for number, line in enumerate(lines, start=1)
        if re.match(r" *(- )?[A-Za-z_-]+:", line) and "#" not in lines[number - 2]
    ]
    assert not bare


def test_ray_requires_a_token_and_listens_on_no_public_address(prepared):
    for start in starts(prepared):
        assert "RAY_AUTH_MODE=token" in start
        assert "0.0.0.0" not in start
    assert "--dashboard-host=127.0.0.1" in starts(prepared)[0]
    assert prepared["file_mounts"]["~/.ray/auth_token"].endswith("/.ray/auth_token")


def test_nodes_install_this_project_with_its_pins(prepared):
    setup = prepared["setup_commands"] + prepared["worker_setup_commands"]
    assert any("-c constraints.txt -e '.[study,report,cluster]'" in command for command in setup)
    # Ray's defaults fetch a nightly wheel.
    assert not any("ray-wheels" in command or "latest" in command for command in setup)
    assert re.search(r"^ray==2\.60\.\d+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def test_mounted_paths_exist(written):
    local = [path for path in written["file_mounts"].values() if not path.startswith("~")]
    missing = [path for path in local if not (ROOT / path).exists() and path != ".git"]
    assert not missing, f"the checkout lacks {missing}"


def test_every_command_is_valid_bash(prepared):
    kinds = [kind for kind in prepared if kind.endswith("_commands")]
    commands = [command for kind in kinds for command in prepared[kind]]
    assert len(commands) >= 7
    for command in commands:
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_a_second_ray_up_leaves_the_profile_alone(prepared, tmp_path):
    (profile,) = [command for command in prepared["setup_commands"] if ".bashrc" in command]
    home = {**os.environ, "HOME": str(tmp_path)}
    (tmp_path / ".bashrc").write_text("# mine\n")
    for _ in range(2):
        subprocess.run(["bash", "-c", profile], env=home, check=True)
    assert (tmp_path / ".bashrc").read_text().count("\n") == 2
    show = "source ~/.bashrc; echo $RAY_AUTH_MODE ${PATH%%:*}"
    shown = subprocess.run(["bash", "-c", show], env=home, check=True, capture_output=True)
    assert shown.stdout.decode().split() == ["token", f"{tmp_path}/venv/bin"]


# ----------------------------------------------------------------------------------- AWS


def test_the_head_is_on_demand_and_runs_no_trial(on_aws):
    head, _ = node_types(on_aws)
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    assert "--num-cpus=0 --num-gpus=0" in starts(on_aws)[0]


def test_workers_are_spot_gpus_that_come_and_go(on_aws):
    _, workers = node_types(on_aws)
    assert workers
    for worker in workers:
        assert worker["min_workers"] == 0
        assert 0 < worker["max_workers"] <= on_aws["max_workers"]
        assert worker["resources"]["GPU"] >= 1
        assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert worker["node_config"]["IamInstanceProfile"]["Name"]
    assert 0 < on_aws["idle_timeout_minutes"] <= 30
    zones = on_aws["provider"]["availability_zone"].split(",")
    assert len(set(zones)) >= 2
    assert all(re.fullmatch(on_aws["provider"]["region"] + "[a-z]", zone) for zone in zones)
    assert on_aws["provider"]["cache_stopped_nodes"] is False


def test_one_image_is_pinned_for_all_nodes(on_aws):
    head, workers = node_types(on_aws)
    images = {kind["node_config"]["ImageId"] for kind in [head, *workers]}
    assert len(images) == 1
    assert re.fullmatch(r"ami-[0-9a-f]{17}", images.pop())


def test_the_bootstrap_replaces_neither_image_nor_profile(on_aws):
    """Run its steps that send no request to AWS; others find subnets and create key and group."""
    before = copy.deepcopy(on_aws)
    aws.check_legacy_fields(on_aws)
    config = aws._configure_from_launch_template(on_aws)
    config = aws._configure_from_network_interfaces(config)
    config = aws._configure_iam_role(config)
    aws._check_ami(config)
    assert config["available_node_types"] == before["available_node_types"]


def test_every_key_of_the_nodes_is_a_parameter_of_ec2(on_aws):
    ec2 = botocore.session.get_session().get_service_model("ec2")
    shape = ec2.operation_model("RunInstances").input_shape
    for kind in on_aws["available_node_types"].values():
        request = {**kind["node_config"], "MinCount": 1, "MaxCount": 1}
        assert not request.keys() - shape.members.keys()
        report = ParamValidator().validate(request, shape)
        assert not report.has_errors(), report.generate_report()


def test_only_ssh_is_open_to_all_addresses(on_aws):
    # Ray adds these two to what is listed: ssh, and the group's own members.
    assert on_aws["provider"]["security_group"]["IpPermissions"] == []
    rules = aws._create_default_inbound_rules(["sg-own"], [])
    open_to_all = [rule for rule in rules if rule.get("IpRanges")]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in open_to_all] == [(22, 22)]


# ------------------------------------------------------------------ on-premises machines


def test_all_listed_machines_are_started_and_kept(on_own_machines):
    config = bootstrap_local(on_own_machines)
    (kind,) = config["available_node_types"].values()
    count = len(config["provider"]["worker_ips"])
    assert kind["min_workers"] == kind["max_workers"] == config["max_workers"] == count >= 2


def test_the_workers_are_started(on_own_machines):
    # `ray up` exports RAY_enable_autoscaler_v2=1 before the command, and the second version does
    # not start the workers of this provider.
    head, _ = starts(on_own_machines)
    assert re.search(r"RAY_enable_autoscaler_v2=0 .*ray start --head", head)
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head


def test_example_addresses_are_reserved_for_documentation(on_own_machines):
    provider = on_own_machines["provider"]
    for address in (provider["head_ip"], *provider["worker_ips"]):
        assert address.startswith("192.0.2."), "RFC 5737, for documentation"
