"""The cube has the records' values under the right labels, and reads only what is asked for."""

import json
import pickle
import re
import time
import warnings

import numpy as np
import oracles
import pytest
import xarray as xr
import zarr

import sampimp
from sampimp.data import scale_inputs
from sampimp.errors import StoreError
from sampimp.schema import CURVES, REFERENCES, STRATEGIES, VARIABLES
from sampimp.store.location import Folder
from sampimp.store.plan import read_commits
from sampimp.store.snapshots import write_snapshot

GRID = {"sim": (1, 3), "shuffle": (1, 2), "nlo": (1, 3), "shuffle_by_seed": (1,)}


UNCOMMITTED = "one-nlo-seed3"


DIMS = ("strategy", "seed")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two data sets, four strategies, one uncommitted trial: folder, plan, sources, records."""
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
        # In the order of the schema, not of the grid.
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


def test_importance_states_its_scale(tree):
    expected = {
        "learning_rate": 0.3,
        "batch_size": 5,
        "loss_reduction": "mean",
        "weight_decay": 1e-5,
        "optimizer": "SGD",
        "activation": "relu",
    }
    attrs = tree["one"]["importance"].attrs
    assert {name: attrs[name] for name in expected} == expected
    assert {name: tree.attrs[name] for name in expected} == expected
    json.dumps([dict(attrs), tree["one"].attrs])  # types that every file format can hold


def test_values_equal_the_records_and_are_nan_elsewhere(study, tree):
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


def test_a_selection_equals_the_whole_there(tree):
    node = tree["one"]
    whole = node["importance"].compute()
    part = node["importance"].sel(strategy="sim", epoch=2, layer="Out", sample=[20, 3])
    np.testing.assert_array_equal(
        part.compute(), whole.sel(strategy="sim", epoch=2, layer="Out", sample=[20, 3])
    )


def test_images_equal_the_training_samples(study, tree):
    _, _, sources, _ = study
    image = tree["one"]["image"]
    assert image.dims == ("sample", "row", "column", "channel")
    np.testing.assert_array_equal(image, np.moveaxis(sources["one"].train_values, 1, 3))
    assert "image" not in tree["two"]


def test_file_names_are_those_of_the_data_set(study, tree):
    _, _, sources, _ = study
    assert tuple(tree["one"]["file"].values) == sources["one"].train_files


def test_labels_equal_those_of_training(study, tree):
    _, _, sources, _ = study
    data = scale_inputs(sources["one"], "unit")
    np.testing.assert_array_equal(tree["one"]["label"], data.train_labels)


@pytest.fixture
def reads(monkeypatch):
    """List the path of every Zarr array of which a value is read."""
    paths = []
    getitem = zarr.Array.__getitem__

    def counted(array, selection):
        values = getitem(array, selection)
        if np.size(values):  # dask reads array[0:0] for its type
            paths.append(array.path)
        return values

    monkeypatch.setattr(zarr.Array, "__getitem__", counted)
    return paths


def test_opening_and_showing_reads_no_record(study, reads):
    tree = sampimp.open_cube(study[0])
    assert all(path.endswith(("train_labels", "train_files")) for path in reads)  # coordinates
    reads.clear()
    text, html = str(tree), tree._repr_html_()
    tree["one"]["importance"].sel(strategy="nlo").mean("sample")
    assert reads == []
    for shown in (text, html):
        assert "importance" in shown
        assert "parameters" in shown
    for name in set(VARIABLES) - {"snapshot_importance"}:
        assert tree["one"][name].chunks is not None


def test_a_selection_reads_only_its_chunks(study, reads):
    node = sampimp.open_cube(study[0])["one"]
    reads.clear()
    node["importance"].sel(strategy="nlo", seed=1, epoch=2).compute()
    assert len(reads) == 1  # one trial, one epoch: one chunk
    assert reads[0].endswith("importance")
    node["importance"].sel(strategy="nlo", seed=3).compute()  # not committed: not read
    assert len(reads) == 1


def test_equal_paths_and_digests_give_equal_dask_names(study):
    first, second = (sampimp.open_cube(study[0])["one"] for _ in range(2))
    other = sampimp.open_cube(study[0])["two"]
    for name in ("importance", "parameters", "image"):
        assert first[name].data.name == second[name].data.name
    names = [node[name].data.name for node in (first, other) for name in ("importance", "nll")]
    assert len(set(names)) == 4


def test_a_pickled_cube_reads_the_same_values(tree):
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
def test_a_diverged_trial_states_its_last_epoch(tmp_path):
    sources = {"one": oracles.make_source()}
    plan = oracles.make_plan(
        sources, {"shuffle": (1, 2), "nlo": (1,)}, learning_rate=1e18, epochs=4
    )
    folder = oracles.start_study(tmp_path, plan, sources)
    done = oracles.run_trials(folder, plan, sources)
    # The reference diverged, so `nlo` has nothing to sort by.
    assert set(done) == {"one-shuffle-seed1", "one-shuffle-seed2"}
    node = sampimp.open_cube(tmp_path)["one"].compute()
    last = [done[label][-1].epoch for label in sorted(done)]
    assert node["diverged_epoch"].sel(strategy="shuffle").values.tolist() == last
    assert node["diverged_epoch"].sel(strategy="nlo").isnull().all()
    batch = node["batch"].sel(strategy="shuffle", seed=1)
    assert batch.sel(epoch=slice(1, last[0])).notnull().all()
    assert batch.sel(epoch=slice(last[0] + 1, None)).isnull().all()


def test_snapshots_appear_once_they_are_scored(tmp_path):
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


def test_three_hundred_trials(tmp_path, reads):
    sources = {"one": oracles.make_source()}
    seeds = tuple(range(1, 41))
    grid = dict.fromkeys(STRATEGIES, seeds) | dict.fromkeys(REFERENCES, seeds[:10])
    plan = oracles.make_plan(sources, grid, epochs=50)
    folder = oracles.start_study(tmp_path, plan, sources)
    for _ in range(2):  # the reference, then the strategies that sort by it
        for trial in plan.resolve(read_commits(folder)):
            if trial.trial_id and trial.commit is None:
                digests = {name: [["0" * 64]] * 50 for name in ("importance", "nll", "batch")}
                (folder / "trials" / trial.trial_id).write_json(
                    "COMMIT.json",
                    {
                        **oracles.identity_of(trial),
                        "attempt": 1,
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
    # The records do not exist.
    assert all(path.endswith(("train_labels", "train_files")) for path in reads)
    node = tree["one"]
    assert node["importance"].shape == (9, 40, 50, 3, 24)
    assert (node["trial"] != "").sum() == 7 * 40 + 2 * 10
    assert node["diverged_epoch"].notnull().sum() == 1
    assert node["diverged_epoch"].sel(strategy="sim", seed=9) == 7


def test_a_folder_without_a_study_is_refused_and_unchanged(tmp_path):
    with pytest.raises(StoreError, match=rf"study.json(.|\n)*{tmp_path}"):
        sampimp.open_cube(tmp_path)
    absent = tmp_path / "absent"
    with pytest.raises(StoreError, match=f"Where {absent}"):
        sampimp.open_cube(absent)
    file = tmp_path / "file"
    file.write_text("no study")
    with pytest.raises(StoreError, match=f"Where {file}"):
        sampimp.open_cube(file)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # nothing was created


def test_paths_strings_and_folders_open_the_same_study(study, monkeypatch):
    out = study[0]
    monkeypatch.chdir(out.parent)
    opened = [sampimp.open_cube(form) for form in (out, str(out), out.name, Folder.of(out))]
    assert {tree.attrs["study"] for tree in opened} == {str(out)}


@pytest.fixture
def small_study(tmp_path):
    """One committed trial: its folder, and its node of the cube."""
    sources = {"one": oracles.make_source()}
    plan = oracles.make_plan(sources, {"shuffle": (1,)})
    folder = oracles.start_study(tmp_path, plan, sources)
    oracles.run_trials(folder, plan, sources)
    (trial,) = (tmp_path / "trials").iterdir()
    return trial, sampimp.open_cube(tmp_path)["one"]


def test_a_selection_with_steps_equals_the_whole_there(small_study):
    node = small_study[1]
    whole = node["importance"].values
    for region in (np.s_[..., ::2], np.s_[..., 20:3:-4], np.s_[..., 1::2, 5:6], np.s_[..., 4:4]):
        np.testing.assert_array_equal(node["importance"][region], whole[region])


def test_every_coordinate_is_described(tree):
    for name, coordinate in tree["one"].coords.items():
        assert coordinate.attrs["long_name"]
        assert ("units" in coordinate.attrs) == (coordinate.dtype.kind != "U"), name
    label = tree["one"]["label"].attrs
    assert label["flag_values"] == [0, 1, 2]
    assert label["flag_meanings"] == "class_0 class_1 class_2"


def test_it_is_written_to_zarr_without_a_warning(tree, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tree.to_zarr(tmp_path / "tree.zarr")
        again = xr.open_datatree(tmp_path / "tree.zarr", engine="zarr")
        assert again.attrs == tree.attrs
        for node in tree.leaves:
            assert again[node.path].to_dataset().identical(node.to_dataset().load())
            node.to_dataset().to_zarr(tmp_path / f"{node.name}.zarr")
            assert xr.open_zarr(tmp_path / f"{node.name}.zarr").identical(node.to_dataset().load())


def test_the_html_shows_its_content_at_first_sight(tree):
    assert tree.attrs["trials"] == "13 of 14 committed"
    assert tree.attrs["data_sets"] == ["one", "two"]
    html = tree._repr_html_()
    assert "<div class='xr-obj-type'>xarray.DataTree</div>" in html
    groups = re.findall(r"<input id='group-[^>]*>", html)
    assert len(groups) == 2
    assert not any("checked" in group for group in groups)  # a checked box collapses a group
    attributes = re.findall(r"type='checkbox'( checked)? />\s*<label[^>]*>Attributes:", html)
    assert attributes == [" checked"] * 3  # a checked box expands a section
    with xr.set_options(display_expand_attrs=False):
        closed = re.findall(r"type='checkbox'( checked)? />\s*<label[^>]*>Attr", tree._repr_html_())
    assert closed == [""] * 3
