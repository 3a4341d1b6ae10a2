"""Metadata and chunks that claim other sizes than the layout are refused before allocation."""

import json
import resource
import subprocess
import sys

import numpy as np
import oracles
import pytest
from numcodecs import zstd
from trial_records import LAYOUT, make_record, make_records

import sampimp
from sampimp.errors import RecordError
from sampimp.store.array_forms import ArrayForm, check_chunk
from sampimp.store.location import Folder
from sampimp.store.variables import StoredVariable

FORM = ArrayForm((3, 10), "float32", (1, 10))

CHANGES = {
    "longer": lambda value: value["shape"].__setitem__(1, 10**12),
    "larger chunks": lambda value: value["chunk_grid"]["configuration"].update(
        chunk_shape=[1, 10**12]
    ),
    "another type": lambda value: value.update(data_type="float64"),
    "a type of objects": lambda value: value.update(data_type="variable_length_bytes"),
    "another codec": lambda value: value["codecs"].append({"name": "gzip"}),
    "no codec": lambda value: value.update(codecs=[]),
    "a shard": lambda value: value["codecs"][0].update(name="sharding_indexed"),
    "another grid": lambda value: value["chunk_grid"].update(name="rectangular"),
    "a group": lambda value: value.update(node_type="group"),
    "a negative size": lambda value: value["shape"].__setitem__(0, -3),
    "another codec's setting": lambda value: value["codecs"][0].update(configuration=7),
    "another fill value": lambda value: value.update(fill_value={"a": []}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_metadata_of_another_form_are_refused(tmp_path, name):
    record, records = make_record(tmp_path), make_records()
    for epoch_record in records:
        record.write(epoch_record)
    record.commit(None)
    commit = Folder.of(tmp_path).read_json("COMMIT.json")
    path = tmp_path / "record.zarr/nll/zarr.json"
    value = json.loads(path.read_text())
    CHANGES[name](value)
    path.write_text(json.dumps(value))
    with pytest.raises(RecordError, match="nll, epoch 2"):
        StoredVariable.of(Folder.of(tmp_path), "nll", LAYOUT, commit).read(1)


@pytest.mark.parametrize("size", [1, 255, 256, 300, 65_791, 65_792, 2**20])
def test_the_size_in_a_frame_is_read_in_each_of_its_forms(size):
    content = zstd.compress(bytes(size))
    check_chunk(content, ArrayForm((size,), "uint8", (size,)), "chunk")
    with pytest.raises(RecordError, match=rf"decode to {size + 1:,} bytes\n +Got {size:,} bytes"):
        check_chunk(content, ArrayForm((size + 1,), "uint8", (size + 1,)), "chunk")


@pytest.mark.parametrize(
    "content", [b"", b"\x28\xb5\x2f\xfd", bytes(100), b"\x28\xb5\x2f\xfd\x00\x58\x00"]
)
def test_a_chunk_that_states_no_size_is_refused(content):
    with pytest.raises(RecordError, match="no such size"):
        check_chunk(content, FORM, "chunk")


HUGE = b"\x28\xb5\x2f\xfd\xe0" + (2**40).to_bytes(8, "little") + b"\x02\x00\x00" + bytes(1000)
"""A frame of 1 KB that claims to decode to a terabyte."""

READ = """
import resource, sys
import sampimp
tree = sampimp.open_cube(sys.argv[1])
limit = 2**30 + int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    tree["one"]["importance"].sel(epoch=1).compute(scheduler="synchronous")
except sampimp.errors.RecordError as error:
    print(error.summary)
"""


def test_a_kilobyte_that_claims_a_terabyte_is_a_named_error_within_a_gigabyte(tmp_path):
    sources = {"one": oracles.make_source()}
    plan = oracles.make_plan(sources, {"shuffle": (1,)})
    folder = oracles.start_study(tmp_path, plan, sources)
    oracles.run_trials(folder, plan, sources)
    (trial,) = (tmp_path / "trials").iterdir()
    (trial / "record.zarr/importance/c/0/0/0").write_bytes(HUGE)
    command = [sys.executable, "-c", READ, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "1,099,511,627,776 bytes" in result.stdout, result.stderr
    assert not result.stderr


def test_a_chunk_larger_than_a_chunk_can_be_is_not_read(tmp_path):
    record, records = make_record(tmp_path), make_records()
    for epoch_record in records:
        record.write(epoch_record)
    record.commit(None)
    with (tmp_path / "record.zarr/nll/c/1/0").open("r+b") as file:
        file.truncate(2**40)
    commit = Folder.of(tmp_path).read_json("COMMIT.json")
    stored = StoredVariable.of(Folder.of(tmp_path), "nll", LAYOUT, commit)
    with pytest.raises(RecordError, match="1,099,511,627,776 bytes"):
        stored.read(1)
    np.testing.assert_array_equal(stored.read(0), records[1].arrays["nll"])


CLAIMS = {
    "samples": lambda plan: plan["datasets"]["one"].update(sample_count=10**12),
    "no samples": lambda plan: plan["datasets"]["one"].update(sample_count=0),
    "more samples than stored": lambda plan: plan["datasets"]["one"].update(sample_count=10**6),
    "parameters": lambda plan: plan["datasets"]["one"].update(layers=[["L1", 2**40]]),
    "another shape": lambda plan: plan["datasets"]["one"].update(input_shape=[10**6, 10**6]),
    "a path as key": lambda plan: plan["datasets"].update({"../one": plan["datasets"]["one"]}),
    "epochs": lambda plan: plan["training"].update(epochs=10**9),
    "an unknown entry": lambda plan: plan["training"].update(evil=1),
    "an optimizer": lambda plan: plan["training"].update(optimizer="other"),
    "a long seed": lambda plan: plan["grid"].update(shuffle=[1, 10**30]),
    "no seed": lambda plan: plan["grid"].update(shuffle=[]),
    "a list of seeds": lambda plan: plan.update(grid=[1]),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_plan_that_claims_too_much_is_a_named_error(tmp_path, name):
    sources = {"one": oracles.make_source()}
    oracles.start_study(tmp_path, oracles.make_plan(sources, {"shuffle": (1,)}), sources)
    plan = json.loads((tmp_path / "study.json").read_text())
    CLAIMS[name](plan)
    (tmp_path / "study.json").write_text(json.dumps(plan))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RecordError, match=r"study\.json"):
        sampimp.open_cube(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
