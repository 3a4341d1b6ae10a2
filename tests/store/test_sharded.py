"""A consolidated store has the cube's values and attributes; an incomplete one cannot be opened."""

import gc

import numpy as np
import oracles
import pytest
import xarray as xr
import zarr
from faulty_disk import FaultyDisk, faulty
from hypothesis import given
from hypothesis import strategies as st
from zarr.dtype import VariableLengthUTF8 as VariableText

import sampimp
import sampimp.store.sharded
from sampimp.errors import RecordError, StoreError
from sampimp.schema import VARIABLES
from sampimp.store.location import Folder
from sampimp.store.plan import read_commits
from sampimp.store.sharded import chunk_and_shard, consolidate
from sampimp.store.snapshots import write_snapshot

GRID = {"shuffle": (1, 2), "nlo": (1, 3)}


def make_study(out, **others):
    sources = {"one": oracles.make_source(samples=24, name="one"), **others}
    plan = oracles.make_plan(sources, GRID)
    return oracles.start_study(out, plan, sources), plan, sources


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A finished study, with snapshots of one trial."""
    folder, plan, sources = make_study(tmp_path_factory.mktemp("study"))
    oracles.run_trials(folder, plan, sources)
    trial = plan.resolve(read_commits(folder))[0]
    values = np.random.default_rng(0).random((3, 24), dtype=np.float32)
    digests = write_snapshot(folder / "trials" / trial.trial_id, plan.layout("one"), 2, values)
    folder.write_json("snapshots.json", {trial.trial_id: {"2": digests}})
    return folder


@pytest.fixture
def small(monkeypatch):
    """Chunks of about 5 samples, several chunks in a shard, and several blocks of one shard."""
    monkeypatch.setattr(sampimp.store.sharded, "CHUNK_BYTES", 200)
    monkeypatch.setattr(sampimp.store.sharded, "SHARD_BYTES", 400)
    monkeypatch.setattr(sampimp.store.sharded, "WRITE_BLOCK_BYTES", 400)


@pytest.mark.usefixtures("small")
def test_it_equals_the_cube(study, tmp_path):
    (store,) = consolidate(study, tmp_path)
    assert store.path == str(tmp_path / "one.zarr")
    cube, written = sampimp.open_cube(study)["one"].to_dataset(), xr.open_zarr(store.path)
    assert (
        set(written.variables) == set(cube.variables) >= {"snapshot_importance", "image", "label"}
    )
    assert set(written.coords) == set(cube.coords)
    for name in cube.variables:
        assert written[name].dims == cube[name].dims
        assert written[name].attrs == cube[name].attrs
        np.testing.assert_array_equal(written[name], cube[name])  # NaN where there is no trial
        if cube[name].dtype.kind == "U":  # Zarr 3 has text of variable length
            assert isinstance(
                zarr.open_array(store.path, path=name).metadata.data_type, VariableText
            )
        else:
            assert written[name].dtype == cube[name].dtype
    assert written["importance"].sel(strategy="nlo", seed=2).isnull().all()
    assert written.attrs["learning_rate"] == 0.3
    assert written.attrs["digest"] == cube.attrs["digest"]
    assert str(study) not in str(written.attrs)  # for other readers, without a path of this machine
    array = zarr.open_array(tmp_path / "one.zarr" / "importance", mode="r")
    assert array.chunks == (1, 1, 3, 3, 5)
    assert array.shards == (1, 1, 3, 3, 10)


def test_a_store_of_the_same_records_is_not_rewritten(study, tmp_path):
    assert all(store.written for store in consolidate(study, tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert not any(store.written for store in consolidate(study, tmp_path))
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}


def test_an_interrupted_store_cannot_be_opened_and_is_rewritten(study, tmp_path):
    consolidate(study, tmp_path)
    whole = xr.open_zarr(tmp_path / "one.zarr").load()

    def interrupt(words):
        if words == "one: comparing nll":
            raise KeyboardInterrupt

    (tmp_path / "one.zarr" / "zarr.json").unlink()
    with pytest.raises(KeyboardInterrupt):
        consolidate(study, tmp_path, progress=interrupt)
    with pytest.raises(FileNotFoundError):
        xr.open_zarr(tmp_path / "one.zarr")
    assert [store.written for store in consolidate(study, tmp_path)] == [True]
    xr.testing.assert_identical(xr.open_zarr(tmp_path / "one.zarr").load(), whole)


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")  # Zarr's, of failed writes
def test_a_store_interrupted_at_the_start_is_rewritten(study, tmp_path, monkeypatch):
    for number in range(32, 56, 2):  # the group is made, then its first arrays
        to = tmp_path / str(number)
        with faulty(monkeypatch, to, FaultyDisk(number)), pytest.raises(StoreError):
            consolidate(study, to)
        assert [store.written for store in consolidate(study, to)] == [True]
    gc.collect()  # while that warning is ignored


def test_a_value_changed_after_writing_is_an_error(study, tmp_path):
    def damage(words):
        if words == "one: comparing nll":
            array = zarr.open_array(tmp_path / "one.zarr" / "nll", mode="r+")
            array[0, 1, 2, 7] += 1e-6

    with pytest.raises(RecordError, match=r"Where .*one.zarr/nll"):
        consolidate(study, tmp_path, progress=damage)
    assert not (tmp_path / "one.zarr" / "zarr.json").exists()


def test_other_content_in_its_place_is_refused_and_kept(study, tmp_path):
    other = xr.Dataset({"importance": ("sample", np.arange(3.0))})
    other.to_zarr(tmp_path / "one.zarr", consolidated=False)
    with pytest.raises(StoreError, match="nothing there was touched"):
        consolidate(study, tmp_path)
    xr.testing.assert_identical(
        xr.open_zarr(tmp_path / "one.zarr", consolidated=False).load(), other
    )
    notes = tmp_path / "other" / "one.zarr" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    with pytest.raises(StoreError, match=r"Got notes.txt"):
        consolidate(study, tmp_path / "other")
    assert notes.read_text() == "mine"


def test_an_unfinished_study_is_refused_with_its_missing_trials(tmp_path):
    two = oracles.make_source(samples=15, classes=2, shape=(6,), seed=1, name="two")
    folder, plan, sources = make_study(tmp_path, two=two)
    oracles.run_trials(folder, plan, sources, commit=lambda trial: trial.label != "two-nlo-seed3")
    with pytest.raises(RecordError, match=r"Got 1 of 8 trials missing: two-nlo-seed3"):
        consolidate(folder)
    assert not (tmp_path / "consolidated").exists()


def test_a_damaged_record_is_an_error_and_no_store(tmp_path):
    folder, plan, sources = make_study(tmp_path)
    oracles.run_trials(folder, plan, sources)
    (chunk,) = tmp_path.glob("trials/one-nlo-seed3-*/record.zarr/batch/c/1/0")
    chunk.unlink()
    with pytest.raises(RecordError, match="batch, epoch 2"):
        consolidate(folder)
    assert not (tmp_path / "consolidated" / "one.zarr" / "zarr.json").exists()


def test_added_seeds_rewrite_the_store(tmp_path):
    folder, plan, sources = make_study(tmp_path)
    oracles.run_trials(folder, plan, sources)
    (first,) = consolidate(folder)
    plan = oracles.make_plan(sources, GRID | {"shuffle": (1, 2, 4)})
    folder.write_json("study.json", plan.to_json())
    oracles.run_trials(folder, plan, sources, commit=lambda trial: trial.commit is None)
    (second,) = consolidate(folder)
    assert (second.path, second.written) == (first.path, True)
    assert xr.open_zarr(second.path)["seed"].values.tolist() == [1, 2, 3, 4]


@given(
    name=st.sampled_from(["importance", "nll", "parameters"]),
    sizes=st.lists(st.integers(1, 300), min_size=3, max_size=3),
    length=st.integers(1, 2_000_000),
)
def test_shards_are_whole_chunks_of_one_trial_within_the_limits(name, sizes, length):
    dims = ("strategy", "seed", *VARIABLES[name].dims)
    shape = (*sizes, *([5] if "layer" in dims else []), length)
    chunk, shard = chunk_and_shard(dims, shape, 4)
    assert chunk[:2] == shard[:2] == (1, 1)
    assert all(size % part == 0 for size, part in zip(shard, chunk, strict=True))
    assert 4 * np.prod(chunk, dtype=float) <= 2**20 or chunk[-1] == 1
    assert 4 * np.prod(shard, dtype=float) <= 2**25 or shard[-1] == chunk[-1]
    assert chunk[2] == (1 if name == "parameters" else shape[2])


def test_a_store_without_the_list_of_its_files_is_written_again(study, tmp_path):
    consolidate(study, tmp_path)
    (listed,) = (name for name in Folder.of(tmp_path).files() if name.startswith("one.zarr"))
    Folder.of(tmp_path).delete(listed)  # as after a fault at the end
    (store,) = consolidate(study, tmp_path)
    assert store.written
    assert Folder.of(tmp_path).files() == [listed]
    (store,) = consolidate(study, tmp_path)
    assert not store.written
