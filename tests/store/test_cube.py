"""The cube: DESIGN.md's contract, the records' values, and nothing read before it is asked for."""

import itertools
import json
import pickle
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import oracles
import pytest
import xarray as xr
import zarr

import sampimp
from sampimp.data import scale_inputs
from sampimp.errors import RecordError, StoreError
from sampimp.schema import CURVES, REFERENCES, STRATEGIES, VARIABLES
from sampimp.store import datasets
from sampimp.store.datasets import read_source, write_source
from sampimp.store.location import Folder
from sampimp.store.plan import read_commits
from sampimp.store.record import TrialRecord
from sampimp.store.snapshots import write_snapshot
from sampimp.sweeps import status

GRID = {"sim": (1, 3), "shuffle": (1, 2), "nlo": (1, 3), "shuffle_by_seed": (1,)}
UNCOMMITTED = "one-nlo-seed3"
DIMS = ("strategy", "seed")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two data sets, four strategies, one trial still running: folder, plan, sources, records."""
    out = tmp_path_factory.mktemp("study")
    sources = {
        "one": oracles.make_source(samples=24, classes=3, name="one"),
        "two": oracles.make_source(samples=15, classes=2, shape=(6,), seed=1, name="two"),
    }
    plan = oracles.make_plan(sources, GRID)
    folder = oracles.start_study(out, plan, sources)
    done = oracles.run_trials(
        folder, plan, sources, commit=lambda trial: trial.label != UNCOMMITTED
    )
    return out, plan, sources, done


@pytest.fixture
def tree(study):
    return sampimp.open_cube(study[0])


def test_dims_types_and_coordinates(study, tree):
    _, plan, sources, _ = study
    assert isinstance(tree, xr.DataTree)
    assert set(tree.children) == {"one", "two"}
    for key, source in sources.items():
        node, info = tree[key], plan.datasets[key]
        assert set(node.data_vars) - {"diverged_epoch", "trial", "image"} == (
            set(VARIABLES) - {"snapshot_importance"}
        )
        for name in set(VARIABLES) - {"snapshot_importance"}:
            assert node[name].dims == (*DIMS, *VARIABLES[name].dims)
            assert node[name].dtype == VARIABLES[name].dtype
            assert node[name].attrs["units"] == VARIABLES[name].units
        # In the order of the schema, whatever the order of the grid.
        assert node["strategy"].values.tolist() == ["shuffle", "shuffle_by_seed", "nlo", "sim"]
        assert node["seed"].values.tolist() == [1, 2, 3]
        assert node["epoch"].values.tolist() == [1, 2, 3]
        assert node["state"].values.tolist() == [0, 1, 2, 3]
        assert node["layer"].values.tolist() == ["L1", "L2", "Out"]
        assert node["sample"].values.tolist() == list(range(len(source.train_labels)))
        np.testing.assert_array_equal(node["label"], source.train_labels)
        assert node["label"].dims == ("sample",)
        expected = [name for name, size in info.layers for _ in range(size)]
        assert node["layer_of_parameter"].values.tolist() == expected
        assert node["layer_of_parameter"].dims == ("parameter",)
        assert node["order_seed"].dims == DIMS
        assert node["order_seed"].sel(strategy="shuffle").values.tolist() == [0, 0, 0]
        assert node["order_seed"].sel(strategy="shuffle_by_seed").values.tolist() == [1, 2, 3]
        assert node.attrs["digest"] == source.digest
        assert node.attrs["class_names"] == list(source.class_names)


def test_importance_names_the_scale_it_is_in(tree):
    expected = {
        "learning_rate": 0.3,
        "batch_size": 5,
        "loss_reduction": "mean",
        "weight_decay": 1e-5,
        "optimizer": "SGD",
    }
    attrs = tree["one"]["importance"].attrs
    assert {name: attrs[name] for name in expected} == expected
    assert {name: tree.attrs[name] for name in expected} == expected
    json.dumps([dict(attrs), tree["one"].attrs])  # types that any file format can hold


def test_values_are_those_of_the_records_and_nan_elsewhere(study, tree):
    _, _, sources, done = study
    assert UNCOMMITTED in done
    for key in sources:
        node = tree[key].compute()
        for strategy in node["strategy"].values:
            for seed in node["seed"].values:
                label = f"{key}-{strategy}-seed{seed}"
                cell = node.sel(strategy=strategy, seed=seed)
                if label not in done or label == UNCOMMITTED:
                    assert cell["trial"].item() == ""
                    for name in set(VARIABLES) - {"snapshot_importance"}:
                        assert cell[name].isnull().all()
                    continue
                start, *epochs = done[label]
                assert cell["trial"].item().startswith(label)
                np.testing.assert_array_equal(
                    cell["parameters"],
                    [record.arrays["parameters"] for record in (start, *epochs)],
                )
                for name in ("importance", "nll", "batch", *CURVES):
                    np.testing.assert_array_equal(
                        cell[name], [record.arrays[name] for record in epochs]
                    )


def test_a_part_is_what_it_is_in_the_whole(tree):
    node = tree["one"]
    whole = node["importance"].compute()
    part = node["importance"].sel(strategy="sim", epoch=2, layer="Out", sample=[20, 3])
    np.testing.assert_array_equal(
        part.compute(), whole.sel(strategy="sim", epoch=2, layer="Out", sample=[20, 3])
    )


def test_images_are_those_of_the_training_samples(study, tree):
    _, _, sources, _ = study
    image = tree["one"]["image"]
    assert image.dims == ("sample", "row", "column", "channel")
    np.testing.assert_array_equal(image, np.moveaxis(sources["one"].train_values, 1, 3))
    assert "image" not in tree["two"]


def test_labels_and_samples_are_those_of_training(study, tree):
    _, _, sources, _ = study
    data = scale_inputs(sources["one"], "unit")
    np.testing.assert_array_equal(tree["one"]["label"], data.train_labels)


@pytest.fixture
def reads(monkeypatch):
    """List the path of every Zarr array of which a value is read."""
    seen = []
    getitem = zarr.Array.__getitem__

    def counted(array, selection):
        values = getitem(array, selection)
        if np.size(values):  # dask asks for array[0:0] to learn its type
            seen.append(array.path)
        return values

    monkeypatch.setattr(zarr.Array, "__getitem__", counted)
    return seen


def test_nothing_is_computed_to_open_print_or_show(study, reads):
    tree = sampimp.open_cube(study[0])
    assert all(path.endswith("train_labels") for path in reads)  # a coordinate
    reads.clear()
    text, html = str(tree), tree._repr_html_()
    tree["one"]["importance"].sel(strategy="nlo").mean("sample")
    assert reads == []
    for shown in (text, html):
        assert "importance" in shown
        assert "parameters" in shown
    for name in set(VARIABLES) - {"snapshot_importance"}:
        assert tree["one"][name].chunks is not None


def test_only_what_is_asked_for_is_read(study, reads):
    node = sampimp.open_cube(study[0])["one"]
    reads.clear()
    node["importance"].sel(strategy="nlo", seed=1, epoch=2).compute()
    assert len(reads) == 1  # one trial, one epoch: one chunk
    assert reads[0].endswith("importance")
    node["importance"].sel(strategy="nlo", seed=3).compute()  # not committed: not looked at
    assert len(reads) == 1


def test_a_trial_committed_later_is_there_when_it_is_opened_again(tmp_path):
    sources = {"one": oracles.make_source()}
    plan = oracles.make_plan(sources, {"shuffle": (1,), "nlo": (1,)})
    folder = oracles.start_study(tmp_path, plan, sources)
    empty = sampimp.open_cube(tmp_path)["one"]
    assert empty["nll"].sizes == {"strategy": 2, "seed": 1, "epoch": 3, "sample": 24}
    done = oracles.run_trials(folder, plan, sources)
    assert empty["nll"].isnull().all()  # what is open does not change
    full = sampimp.open_cube(tmp_path)["one"]
    assert full["nll"].notnull().all()
    np.testing.assert_array_equal(
        full["nll"].sel(strategy="nlo", seed=1, epoch=3), done["one-nlo-seed1"][3].arrays["nll"]
    )


def grow(folder, plan, sources, done):
    """Write a study as it comes about, with attempts that overlap; `done` has its records."""
    folder.write_json("study.json", plan.to_json())
    for key, source in sources.items():
        write_source(folder / "datasets" / f"{key}.zarr", source)

    def begin(trial):
        place = folder / "trials" / trial.trial_id
        return TrialRecord(place, oracles.identity_of(trial), plan.layout(trial.config.dataset))

    for _ in range(2):  # the references, then those that sort by them
        for trial in plan.resolve(read_commits(folder)):
            if trial.trial_id is None or trial.commit is not None:
                continue
            start, *epochs = done[trial.label]
            zeros = [
                replace(r, arrays={n: np.zeros_like(v) for n, v in r.arrays.items()})
                for r in (start, *epochs)
            ]
            first = begin(trial)
            first.write(start)
            first.write(epochs[0])
            first.checkpoint(1, b"state")
            second = begin(trial)
            assert second.newest_checkpoint() == (1, b"state")
            first._require_newest = lambda: None  # it asked just before the second began
            first.write(zeros[2])
            for record in epochs[1:]:
                second.write(record)
            second.commit(None)
            third = begin(trial)  # of a driver that did not see the commit
            third.write(zeros[0])
            third.write(zeros[1])


def test_a_growing_study_opens_at_any_time_and_a_trial_is_nan_or_whole(tmp_path):
    sources = {"one": oracles.make_source()}
    plan = oracles.make_plan(sources, {"shuffle": (1, 2), "nlo": (1, 2), "sim": (1,)})
    model = oracles.start_study(tmp_path / "model", plan, sources)
    done = oracles.run_trials(model, plan, sources)
    folder, seen = Folder.of(tmp_path / "growing"), set()
    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(grow, folder, plan, sources, done)
        finished = False
        while not finished:
            finished = writer.done()  # before it is opened: the last look sees all
            try:
                node = sampimp.open_cube(folder)["one"].compute()
            except StoreError:  # until study.json is there, there is no study
                assert not seen
                continue
            for strategy, seed in itertools.product(node["strategy"].values, (1, 2)):
                cell, label = node.sel(strategy=strategy, seed=seed), f"one-{strategy}-seed{seed}"
                if not cell["trial"].item():
                    assert label not in seen
                    assert all(cell[name].isnull().all() for name in ("importance", "parameters"))
                    continue
                seen.add(label)
                start, *epochs = done[label]
                for name in ("importance", "nll", "batch", *CURVES):
                    expected = [record.arrays[name] for record in epochs]
                    np.testing.assert_array_equal(cell[name], expected)
                expected = [record.arrays["parameters"] for record in (start, *epochs)]
                np.testing.assert_array_equal(cell["parameters"], expected)
        writer.result()
    assert seen == set(done)


def test_a_data_set_that_is_not_stored_yet_has_no_labels(tmp_path):
    sources = {"one": oracles.make_source()}
    plan = oracles.make_plan(sources, {"shuffle": (1,)})
    folder = Folder.of(tmp_path)
    folder.write_json("study.json", plan.to_json())
    node = sampimp.open_cube(tmp_path)["one"]
    assert node["importance"].shape == (1, 1, 3, 3, 24)
    assert node["importance"].isnull().all()
    assert not {"label", "image"} & set(node.variables)
    write_source(folder / "datasets" / "one.zarr", sources["one"])
    np.testing.assert_array_equal(
        sampimp.open_cube(tmp_path)["one"]["label"], sources["one"].train_labels
    )


# Damage to a data set.


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A study of one committed trial, and its data set in chunks of four images or 16 labels."""
    monkeypatch.setattr(datasets, "SOURCE_CHUNK", 128)
    sources = {"one": oracles.make_source(samples=24, shape=(2, 4, 4))}
    plan = oracles.make_plan(sources, {"shuffle": (1,)}, epochs=1)
    folder = oracles.start_study(tmp_path, plan, sources)
    oracles.run_trials(folder, plan, sources)
    return tmp_path, tmp_path / "datasets" / "one.zarr", sources["one"]


def rewrite(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def exchange(first, second):
    first.rename(first.with_name("third"))
    second.rename(first)
    first.with_name("third").rename(second)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def stretch(value):
    value["shape"][0] += 8


def of_another_type(value):
    value["data_type"] = "int8"


def forget_digests(value):
    del value["attributes"]["chunks"]


def with_another_scale(value):
    value["attributes"]["chunks"]["full_scale"] = 16.0


DAMAGE = {
    "labels deleted": ("train_labels", lambda at: shutil.rmtree(at / "train_labels")),
    "chunk of labels deleted": ("train_labels", lambda at: (at / "train_labels/c/1").unlink()),
    "byte of labels": ("train_labels", lambda at: flip(at / "train_labels/c/1")),
    "labels swapped": (
        "train_labels",
        lambda at: exchange(at / "train_labels/c/0", at / "train_labels/c/1"),
    ),
    "more labels": ("train_labels", lambda at: rewrite(at / "train_labels/zarr.json", stretch)),
    "array of labels unnamed": (
        "train_labels",
        lambda at: (at / "train_labels/zarr.json").unlink(),
    ),
    "digests forgotten": ("zarr.json", lambda at: rewrite(at / "zarr.json", forget_digests)),
    "another scale": ("zarr.json", lambda at: rewrite(at / "zarr.json", with_another_scale)),
    "no JSON": ("zarr.json", lambda at: (at / "zarr.json").write_text("{")),
    "unnamed": ("one.zarr", lambda at: (at / "zarr.json").unlink()),
    "all deleted": ("one.zarr", shutil.rmtree),
    "images deleted": ("train_values", lambda at: shutil.rmtree(at / "train_values")),
    "chunk of images deleted": (
        "train_values, rows 12 to 15",
        lambda at: (at / "train_values/c/3/0/0/0").unlink(),
    ),
    "byte of images": (
        "train_values, rows 12 to 15",
        lambda at: flip(at / "train_values/c/3/0/0/0"),
    ),
    "images swapped": (
        "train_values",  # of the two that are exchanged, whichever is read first
        lambda at: exchange(at / "train_values/c/1", at / "train_values/c/2"),
    ),
    "images of another type": (
        "train_values",
        lambda at: rewrite(at / "train_values/zarr.json", of_another_type),
    ),
    "test labels swapped": (
        "test_labels",
        lambda at: flip(at / "test_labels/c/0"),
    ),
    "test images deleted": ("test_values", lambda at: (at / "test_values/c/0/0/0/0").unlink()),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_to_a_data_set_is_an_error_and_never_a_number(made, capsys, name):
    out, where, source = made
    node = sampimp.open_cube(out)["one"]
    np.testing.assert_array_equal(node["label"], source.train_labels)
    expected = np.moveaxis(source.train_values, 1, 3)
    np.testing.assert_array_equal(node["image"], expected)
    np.testing.assert_array_equal(node["image"][7:16:3, 1], expected[7:16:3, 1])
    np.testing.assert_array_equal(node["image"].data[20], expected[20])
    assert status.main([str(out), "--verify"]) == 0
    assert "data set one verified: every chunk is as it was written." in capsys.readouterr().out

    place, damage = DAMAGE[name]
    damage(where)
    assert status.main([str(out), "--verify"]) == 1
    said = capsys.readouterr().out
    assert "data set one is damaged: " in said
    assert "1 committed trials verified: every chunk is as it was written." in said
    if place.startswith("test_"):
        sampimp.open_cube(out)["one"]["image"].compute()
    else:
        with pytest.raises(RecordError, match=f"Where {where.parent}.*{place}") as caught:
            sampimp.open_cube(out)["one"]["image"].compute()
        assert all(part.strip() for part in caught.value.args)
        if place.startswith("train_values"):  # the labels are right, and so is what they say
            assert sampimp.open_cube(out)["one"]["label"].shape == (24,)
    if (where / "zarr.json").is_file() and name != "digests forgotten":
        # Without the plan, what is read as a whole has the digest of the whole.
        with pytest.raises(RecordError):
            read_source(Folder.of(where))


def test_a_data_set_that_was_stored_without_digests_is_read_unverified(made, capsys):
    out, where, source = made
    rewrite(where / "zarr.json", forget_digests)
    rewrite(out / "study.json", lambda plan: plan["datasets"]["one"].pop("chunks"))
    node = sampimp.open_cube(out)["one"]
    np.testing.assert_array_equal(node["label"], source.train_labels)
    np.testing.assert_array_equal(node["image"], np.moveaxis(source.train_values, 1, 3))
    assert read_source(Folder.of(where)).digest == source.digest
    assert status.main([str(out), "--verify"]) == 0
    assert "data set one is unverified" in capsys.readouterr().out
    flip(where / "train_values/c/3/0/0/0")
    assert status.main([str(out), "--verify"]) == 1
    assert "data set one is damaged" in capsys.readouterr().out
    shutil.rmtree(where / "train_labels")
    with pytest.raises(RecordError, match="the arrays train_values, train_labels"):
        sampimp.open_cube(out)


def test_equal_places_and_digests_have_equal_names(study):
    first, second = (sampimp.open_cube(study[0])["one"] for _ in range(2))
    other = sampimp.open_cube(study[0])["two"]
    for name in ("importance", "parameters", "image"):
        assert first[name].data.name == second[name].data.name
    names = [node[name].data.name for node in (first, other) for name in ("importance", "nll")]
    assert len(set(names)) == 4


def test_a_cube_that_was_pickled_reads_the_same(tree):
    node = tree["one"]
    copy = pickle.loads(pickle.dumps(node))
    for name in ("importance", "parameters", "image"):
        np.testing.assert_array_equal(copy[name], node[name])


def test_thinned_parameters(tmp_path):
    sources = {"one": oracles.make_source()}
    plan = oracles.make_plan(sources, {"shuffle": (1,)}, epochs=5, parameters_every=2)
    folder = oracles.start_study(tmp_path, plan, sources)
    records = oracles.run_trials(folder, plan, sources)["one-shuffle-seed1"]
    parameters = sampimp.open_cube(tmp_path)["one"]["parameters"]
    assert parameters["state"].values.tolist() == [0, 2, 4, 5]
    assert parameters.dtype == np.float32
    for state in (0, 2, 4, 5):
        np.testing.assert_array_equal(
            parameters.sel(strategy="shuffle", seed=1, state=state),
            records[state].arrays["parameters"],
        )


def test_parameters_switched_off(tmp_path):
    sources = {"one": oracles.make_source()}
    plan = oracles.make_plan(sources, {"shuffle": (1,)}, parameters_every=0)
    folder = oracles.start_study(tmp_path, plan, sources)
    records = oracles.run_trials(folder, plan, sources)["one-shuffle-seed1"]
    node = sampimp.open_cube(tmp_path)["one"]
    assert "parameters" not in node
    assert "state" not in node.dims
    np.testing.assert_array_equal(
        node["importance"].sel(strategy="shuffle", seed=1, epoch=3), records[3].arrays["importance"]
    )


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_a_diverged_trial_says_from_which_epoch(tmp_path):
    sources = {"one": oracles.make_source()}
    plan = oracles.make_plan(
        sources, {"shuffle": (1, 2), "nlo": (1,)}, learning_rate=1e18, epochs=4
    )
    folder = oracles.start_study(tmp_path, plan, sources)
    done = oracles.run_trials(folder, plan, sources)
    assert set(done) == {"one-shuffle-seed1", "one-shuffle-seed2"}  # nlo has no reference
    node = sampimp.open_cube(tmp_path)["one"].compute()
    last = [done[label][-1].epoch for label in sorted(done)]
    assert node["diverged_epoch"].sel(strategy="shuffle").values.tolist() == last
    assert node["diverged_epoch"].sel(strategy="nlo").isnull().all()
    batch = node["batch"].sel(strategy="shuffle", seed=1)
    assert batch.sel(epoch=slice(1, last[0])).notnull().all()
    assert batch.sel(epoch=slice(last[0] + 1, None)).isnull().all()


def test_snapshots_are_there_where_they_were_asked_for(tmp_path):
    sources = {"one": oracles.make_source()}
    plan = oracles.make_plan(sources, {"shuffle": (1, 2)})
    folder = oracles.start_study(tmp_path, plan, sources)
    oracles.run_trials(folder, plan, sources)
    scored = next(t for t in plan.resolve(read_commits(folder)) if t.config.seed == 2)
    values = np.random.default_rng(0).random((3, 24), dtype=np.float32)
    trial = folder / "trials" / scored.trial_id
    digests = write_snapshot(trial, plan.layout("one"), 2, values)
    assert "snapshot_importance" not in sampimp.open_cube(tmp_path)["one"]
    folder.write_json("snapshots.json", {scored.trial_id: {"2": digests}})
    snapshot = sampimp.open_cube(tmp_path)["one"]["snapshot_importance"]
    assert snapshot.dims == (*DIMS, "epoch", "layer", "sample")
    assert snapshot.dtype == np.float32
    assert snapshot.attrs["learning_rate"] == 0.3
    np.testing.assert_array_equal(snapshot.sel(strategy="shuffle", seed=2, epoch=2), values)
    assert snapshot.notnull().sum() == values.size


def test_samples_split_over_several_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(sampimp.schema, "CHUNK_VALUES", 30)  # 3 layers x 10 of 24 samples
    sources = {"one": oracles.make_source()}
    plan = oracles.make_plan(sources, {"shuffle": (1,)})
    folder = oracles.start_study(tmp_path, plan, sources)
    records = oracles.run_trials(folder, plan, sources)["one-shuffle-seed1"]
    importance = sampimp.open_cube(tmp_path)["one"]["importance"]
    assert importance.chunks[-1] == (10, 10, 4)
    assert importance.chunks[2] == (1, 1, 1)
    np.testing.assert_array_equal(
        importance.sel(strategy="shuffle", seed=1), [r.arrays["importance"] for r in records[1:]]
    )


@pytest.fixture
def small_study(tmp_path):
    """One committed trial: its folder and its cube's node."""
    sources = {"one": oracles.make_source()}
    plan = oracles.make_plan(sources, {"shuffle": (1,)})
    folder = oracles.start_study(tmp_path, plan, sources)
    oracles.run_trials(folder, plan, sources)
    (trial,) = (tmp_path / "trials").iterdir()
    return trial, sampimp.open_cube(tmp_path)["one"]


DAMAGES = {
    "deleted": lambda chunk: chunk.unlink(),
    "truncated": lambda chunk: chunk.write_bytes(chunk.read_bytes()[:-3]),
    "empty": lambda chunk: chunk.write_bytes(b""),
    "of another epoch": lambda chunk: chunk.write_bytes(
        (chunk.parents[chunk.parts[::-1].index("c") - 1] / "0" / "0" / chunk.name).read_bytes()
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_chunk_is_an_error_and_never_a_number(small_study, name):
    trial, node = small_study
    (chunk,) = (trial / "record.zarr" / "importance" / "c" / "1").rglob("0/0")
    whole = node["importance"].compute()
    DAMAGES[name](chunk)
    for part in (node["importance"], node["importance"].sel(epoch=2, layer="L1", sample=[3, 5])):
        with pytest.raises(RecordError, match=r"importance, epoch 2\n +To do run sweeps/status.py"):
            part.compute()
    rest = node["importance"].sel(epoch=[1, 3])  # the other chunks are as they were
    np.testing.assert_array_equal(rest, whole.sel(epoch=[1, 3]))


@pytest.mark.parametrize("offset", [0, 7, 40])
def test_no_flipped_bit_is_read(small_study, offset):
    trial, node = small_study
    (chunk,) = (trial / "record.zarr" / "parameters" / "c").glob("3/0")
    content = bytearray(chunk.read_bytes())
    content[offset] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(RecordError, match="parameters, state 3"):
        node["parameters"].compute()


def test_a_part_with_steps_is_what_it_is_in_the_whole(small_study):
    node = small_study[1]
    whole = node["importance"].values
    for region in (np.s_[..., ::2], np.s_[..., 20:3:-4], np.s_[..., 1::2, 5:6], np.s_[..., 4:4]):
        np.testing.assert_array_equal(node["importance"][region], whole[region])


def test_three_hundred_trials(tmp_path, reads):
    sources = {"one": oracles.make_source()}
    seeds = tuple(range(1, 41))
    grid = dict.fromkeys(STRATEGIES, seeds) | dict.fromkeys(REFERENCES, seeds[:10])
    plan = oracles.make_plan(sources, grid, epochs=50)
    folder = oracles.start_study(tmp_path, plan, sources)
    for _ in range(2):  # the reference, then those that sort by it
        for trial in plan.resolve(read_commits(folder)):
            if trial.trial_id and trial.commit is None:
                digests = {name: [["0" * 64]] * 50 for name in ("importance", "nll", "batch")}
                (folder / "trials" / trial.trial_id).write_json(
                    "COMMIT.json",
                    {
                        **oracles.identity_of(trial),
                        "epochs": 50,
                        "diverged_epoch": 7 if trial.label == "one-sim-seed9" else None,
                        "parts": [[0, "record.zarr"]],
                        "digests": digests,
                        "curves": {"test_error": [0.5] * 50},
                    },
                )
    start = time.perf_counter()
    tree = sampimp.open_cube(tmp_path)
    print(f"300 trials opened in {time.perf_counter() - start:.2f} s")
    str(tree), tree._repr_html_()
    assert all(path.endswith("train_labels") for path in reads)  # the records are not even there
    node = tree["one"]
    assert node["importance"].shape == (9, 40, 50, 3, 24)
    assert (node["trial"] != "").sum() == 7 * 40 + 2 * 10
    assert node["diverged_epoch"].notnull().sum() == 1
    assert node["diverged_epoch"].sel(strategy="sim", seed=9) == 7


def test_a_folder_that_is_no_study_is_refused_and_left(tmp_path):
    with pytest.raises(StoreError, match=rf"study.json(.|\n)*{tmp_path}"):
        sampimp.open_cube(tmp_path)
    absent = tmp_path / "absent"
    with pytest.raises(StoreError, match=f"Where {absent}"):
        sampimp.open_cube(absent)
    file = tmp_path / "file"
    file.write_text("no study")
    with pytest.raises(StoreError, match=f"Where {file}"):
        sampimp.open_cube(file)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # nothing was made


def test_paths_strings_and_folders_are_the_same_study(study, monkeypatch):
    out = study[0]
    monkeypatch.chdir(out.parent)
    opened = [sampimp.open_cube(form) for form in (out, str(out), out.name, Folder.of(out))]
    assert {tree.attrs["study"] for tree in opened} == {str(out)}
