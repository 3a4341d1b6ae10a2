"""cluster.yaml says what Ray understands and what the project promises; nothing is contacted."""

import copy
import json
import re
from pathlib import Path

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "cluster.yaml").read_text()


@pytest.fixture
def written():
    return yaml.safe_load(TEXT)


@pytest.fixture
def prepared(written):
    """Return the configuration as `ray up` has it before it first asks the cloud for anything."""
    return prepare_config(copy.deepcopy(written))


def node_types(config):
    types = dict(config["available_node_types"])
    return types.pop(config["head_node_type"]), list(types.values())


def test_ray_accepts_it(written, prepared):
    schema = Path(ray.autoscaler.__file__).with_name("ray-schema.json")
    jsonschema.validate(written, json.loads(schema.read_text()))
    validate_config(prepared)


def test_ray_refuses_a_misspelt_key(prepared):
    prepared["idle_timeout_minute"] = 5
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minute"):
        validate_config(prepared)


def test_the_head_is_on_demand_and_runs_no_trial(prepared):
    head, _ = node_types(prepared)
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    (start,) = [c for c in prepared["head_start_ray_commands"] if " start " in c]
    assert "--num-cpus=0" in start
    assert "--num-gpus=0" in start


def test_workers_are_spot_gpus_that_come_and_go(prepared):
    _, workers = node_types(prepared)
    assert workers
    for worker in workers:
        assert worker["min_workers"] == 0
        assert 0 < worker["max_workers"] <= prepared["max_workers"]
        assert worker["resources"]["GPU"] >= 1
        assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert worker["node_config"]["IamInstanceProfile"]["Name"]
    assert 0 < prepared["idle_timeout_minutes"] <= 30
    zones = prepared["provider"]["availability_zone"].split(",")
    assert len(set(zones)) >= 2
    assert all(re.fullmatch(prepared["provider"]["region"] + "[a-z]", zone) for zone in zones)
    assert prepared["provider"]["cache_stopped_nodes"] is False


def test_one_image_is_pinned_for_all_nodes(prepared):
    head, workers = node_types(prepared)
    images = {kind["node_config"]["ImageId"] for kind in [head, *workers]}
    assert len(images) == 1
    assert re.fullmatch(r"ami-[0-9a-f]{17}", images.pop())


def test_the_world_sees_ssh_alone(prepared):
    # Ray adds ssh and the group's own members to what is listed here.
    assert prepared["provider"]["security_group"]["IpPermissions"] == []
    starts = prepared["head_start_ray_commands"] + prepared["worker_start_ray_commands"]
    for start in (command for command in starts if " start " in command):
        assert "RAY_AUTH_MODE=token" in start
        assert "0.0.0.0" not in start
    (head,) = [c for c in prepared["head_start_ray_commands"] if " start " in c]
    assert "--dashboard-host=127.0.0.1" in head
    assert "~/.ray/auth_token" in prepared["file_mounts"]


def test_nodes_install_this_project_with_its_pins(prepared):
    setup = prepared["setup_commands"] + prepared["worker_setup_commands"]
    assert any("-c constraints.txt -e '.[cluster]'" in command for command in setup)
    # Ray's defaults fetch a nightly wheel.
    assert not any("ray-wheels" in command or "latest" in command for command in setup)
    assert re.search(r"^ray==2\.60\.\d+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def test_what_is_mounted_exists(written):
    local = [path for path in written["file_mounts"].values() if not path.startswith("~")]
    missing = [path for path in local if not (ROOT / path).exists() and path != ".git"]
    assert not missing, f"cluster.yaml mounts {missing}, which the checkout lacks"


def test_every_key_has_its_comment():
    lines = TEXT.splitlines()
    bare = [
        f"{number}: {line.strip()}"
        for number, line in enumerate(lines, start=1)
        if re.match(r"(?! )[a-z_]+:", line) and not lines[number - 2].startswith("#")
    ]
    assert not bare
