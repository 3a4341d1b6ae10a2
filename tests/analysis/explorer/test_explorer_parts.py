"""Every part of an explorer, decoded by NumPy alone, against the cube and the data set."""

import dataclasses
import io

import numpy as np
import oracles
import pytest
from explored import Written, array, commit_influence, commit_trial, make_study, write
from influence_made import write_made
from PIL import Image

import sampimp
from sampimp.data import Source
from sampimp.store.plan import read_commits


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An explorer of three runs, one of them diverged in epoch 3, with influence of one."""
    out = tmp_path_factory.mktemp("study")
    folder, plan, source = make_study(out)
    commit_trial(folder, plan, "rand-seed2", diverged=3)
    commit_trial(folder, plan, "shuffle-seed2")
    run = plan.resolve(read_commits(folder))[0]
    write_made(folder, plan, run, "influence", ["mean", "class:1"], seed=3)
    written, _ = write(out, runs=["all"])
    return written, sampimp.open_cube(out)["one"].to_dataset().load(), source


def test_the_manifest_names_the_study(made):
    written, cube, source = made
    assert written.study["kind"] == "study"
    assert written.study["report"] is None
    node = written.node
    assert (node["samples"], node["epochs"], node["planned"]) == (40, 4, 4)
    assert (node["committed"], node["diverged"]) == (4, 1)
    assert node["layers"] == cube["layer"].values.tolist()
    assert node["classes"] == list(source.class_names)
    assert node["units"] == {"importance": "parameter^2", "nll": "nat"}
    assert [run["id"] for run in node["runs"]] == [
        *("shuffle-seed1", "shuffle-seed2", "rand-seed1", "rand-seed2")
    ]
    labels = array(written.part(node["labels"]["file"])["array"], "<u2")
    np.testing.assert_array_equal(labels, source.train_labels)


@pytest.mark.parametrize("number", range(4))
def test_columns_equal_sums_of_the_cube_in_float64(made, number):
    written, cube, _ = made
    columns, entry = written.run(number)
    run = cube.sel(strategy=entry["strategy"], seed=entry["seed"])
    if entry["diverged_epoch"] is not None:
        assert entry["status"] == "diverged"
        run = run.sel(epoch=slice(1, int(run.diverged_epoch) - 1))
    beta, nll = (run[name].values.astype(np.float64) for name in ("importance", "nll"))
    tau = beta.sum((0, 1))
    expected = {
        "importance": tau,
        "mean_epoch": (beta.sum(1) * run["epoch"].values[:, None]).sum(0) / np.where(tau, tau, 1),
        "nll": nll[-1],
        "confidence": np.exp(-nll).mean(0),
        "variability": np.exp(-nll).std(0),
    }
    for place, layer in enumerate(cube["layer"].values):
        expected[f"importance:{layer}"] = beta[:, place].sum(0)
        expected[f"share:{layer}"] = beta[:, place].sum(0) / np.where(tau, tau, 1)
    for name, values in expected.items():
        without = (tau == 0) & name.startswith(("mean_epoch", "share"))
        wanted = np.where(without, np.nan, values).astype(np.float32)
        np.testing.assert_allclose(columns[name], wanted, rtol=2e-7, err_msg=name)
    assert columns["importance"][3] == 0
    assert set(columns) - set(expected) == (
        {"influence:mean", "influence:class:1"} if number == 0 else set()
    )


@pytest.mark.parametrize("number", [0, 1])
def test_columns_are_those_of_a_frame(made, number):
    written, cube, _ = made
    columns, entry = written.run(number)
    frame = sampimp.to_frame(cube, strategy=entry["strategy"], seed=entry["seed"])
    named = {name.replace(":", "_", 1): values for name, values in columns.items()}
    named["final_nll"] = named.pop("nll")
    assert set(frame) - set(named) == {"label", "class_name", "file", "correctness_bound"}
    for name, values in named.items():
        column = frame[name].to_numpy().astype(np.float32)
        np.testing.assert_allclose(values, column, rtol=2e-7, err_msg=name)


def test_influence_is_that_of_the_cube(made):
    written, cube, _ = made
    columns, entry = written.run(0)
    run = cube.sel(strategy="shuffle", seed=1)
    for target in ("mean", "class:1"):
        np.testing.assert_array_equal(
            columns[f"influence:{target}"], run["influence_total"].sel(target=target)
        )
    (column,) = (each for each in entry["columns"] if each["name"] == "influence:mean")
    assert (column["unit"], column["scale"]) == ("nat", "linear")


def test_the_spread_over_seeds_is_of_percentile_ranks(made):
    written, cube, _ = made
    shared = written.node["shared"]
    assert [column["name"] for column in shared["columns"]] == ["seed_spread:shuffle"]
    tau = cube["importance"].sel(strategy="shuffle").sum(("epoch", "layer"), dtype=np.float64)
    above = np.array([[(row < value).sum() + (row <= value).sum() for value in row] for row in tau])
    percentile = 100 * ((above + 1) / 2 - 1) / 39
    spread = np.abs(percentile[0] - percentile[1]) / np.sqrt(2)
    values = array(written.part(shared["file"])["columns"]["seed_spread:shuffle"], "<f4")
    np.testing.assert_allclose(values, spread, rtol=1e-6)


@pytest.mark.parametrize("number", range(4))
def test_histories_are_within_a_thousandth_of_the_cube(made, number):
    written, cube, _ = made
    values, entry = written.history(number)
    strategy, _, seed = entry["run"].partition("-seed")
    run = cube.sel(strategy=strategy, seed=int(seed), epoch=entry["epochs"])
    assert entry["epochs"] == ([1, 2, 3] if entry["run"] == "rand-seed2" else [1, 2, 3, 4])
    assert [(row["variable"], row["layer"]) for row in entry["rows"]] == [
        *(("importance", layer) for layer in cube["layer"].values),
        ("nll", None),
    ]
    beta = np.moveaxis(run["importance"].values, 1, 0)
    expected = np.concatenate([beta, run["nll"].values[None]]).astype(np.float64)
    np.testing.assert_allclose(values, expected, rtol=1e-3)
    assert (expected == 0).any()
    if entry["run"] == "rand-seed2":
        assert np.isinf(values).sum() == 1
        assert np.isnan(values).sum() == 1


def test_influence_by_epoch_is_within_a_thousandth_of_the_cube(tmp_path):
    folder, plan, _ = make_study(tmp_path)
    made = commit_influence(folder, plan, "shuffle-seed1", ["mean", "class:1"])
    written, _ = write(tmp_path)
    assert [(each["run"], each["target"]) for each in written.node["influence"]] == [
        ("shuffle-seed1", "mean"),
        ("shuffle-seed1", "class:1"),
    ]
    run = sampimp.open_cube(tmp_path)["one"].to_dataset().sel(strategy="shuffle", seed=1)
    for place, target in enumerate(("mean", "class:1")):
        values, entry = written.influence(place)
        assert entry["epochs"] == [1, 2, 3, 4]
        assert entry["unit"] == "nat per unit of sample weight"
        assert [row["layer"] for row in entry["rows"]] == run["layer"].values.tolist()
        stored = run["influence"].sel(target=target).transpose("layer", "epoch", "sample").values
        np.testing.assert_array_equal(stored, made[:, place].swapaxes(0, 1))
        np.testing.assert_allclose(values, stored.astype(np.float64), rtol=1e-3)
        np.testing.assert_array_equal(np.sign(values), np.sign(stored))  # zero, NaN, infinities
    assert (stored == 0).any()
    assert np.isnan(written.influence(0)[0]).sum() == 1
    assert np.isinf(written.influence(0)[0]).sum() == 2


def test_influence_by_epoch_is_that_of_the_chosen_runs(tmp_path):
    folder, plan, _ = make_study(tmp_path)
    commit_influence(folder, plan, "rand-seed1", ["mean"])
    assert write(tmp_path)[0].node["influence"] == []
    written, _ = write(tmp_path, runs=["rand:1"])
    assert [each["run"] for each in written.node["influence"]] == ["rand-seed1"]


def test_epochs_then_targets_then_samples_are_left_out(tmp_path):
    source = oracles.make_source(samples=3000, shape=(1, 2, 2))
    folder, plan, _ = make_study(tmp_path, source=source, commit=("shuffle-seed1",), epochs=20)
    commit_influence(folder, plan, "shuffle-seed1", ["mean", "class:0", "class:1", "class:2"])
    whole, made = write(tmp_path, to=str(tmp_path / "whole"))
    assert made.notes == []
    assert len(whole.node["influence"]) == 4
    full = whole.influence(1)[0]
    seen = []
    for megabytes in (3.6, 2.2, 0.9):
        some, made = write(tmp_path, to=str(tmp_path / f"{megabytes}"), megabytes=megabytes)
        assert made.bytes < 1e6 * megabytes
        assert made.notes == some.node["notes"]
        step = -(-3000 // some.run()[0]["importance"].size)
        held = [each["target"] for each in some.node["influence"]]
        assert held == [each["target"] for each in whole.node["influence"]][: len(held)]
        assert any("Influence by epoch" in note for note in made.notes) == (len(held) < 4)
        entry = some.node["influence"][0]
        assert entry["epochs"] == some.node["histories"][0]["epochs"] == [*range(1, 20, 2), 20]
        seen.append((len(held), step > 1))
        if len(held) > 1:
            values, at = some.influence(1)[0], [epoch - 1 for epoch in entry["epochs"]]
            np.testing.assert_allclose(values, full[:, at][..., ::step], rtol=2e-3)
    assert seen[0] == (4, False)
    assert 1 <= seen[1][0] < 4
    assert not seen[1][1]
    assert seen[2] == (1, True)


def cells(written, form):
    """Return the cells of all sprites, [N or more, row, column, ...]."""
    sprites, parts = written.node["sprites"], []
    for file in sprites["files"]:
        assert file.endswith(form)
        pixels = np.asarray(Image.open(io.BytesIO((written.folder / file).read_bytes())))
        height, width, across = sprites["height"], sprites["width"], sprites["per_row"]
        rows = len(pixels) // height
        assert pixels.shape[:2] == (rows * height, across * width)
        cut = pixels.reshape(rows, height, across, width, -1).transpose(0, 2, 1, 3, 4)
        parts.append(cut.reshape(rows * across, height, width, -1))
    return parts


def test_small_grey_images_are_exact(tmp_path):
    source = oracles.make_source(samples=1030, shape=(1, 5, 3))
    make_study(tmp_path, source=source, commit=())
    written, _ = write(tmp_path)
    first, second = cells(written, ".png")
    assert (len(first), len(second)) == (1024, 32)  # as many rows as it needs
    images = source.train_values.transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(np.concatenate([first, second])[:1030], images)
    assert written.node["sprites"]["pixelated"] is True
    assert written.node["runs"] == []
    assert written.node["shared"] is None


@pytest.mark.parametrize(
    ("shape", "cell", "image"),
    [((3, 12, 20), (16, 24), (12, 20)), ((3, 100, 50), (64, 32), (64, 32)),
     ((1, 36, 70), (40, 64), (33, 64))],
)  # fmt: skip
def test_other_images_are_close_and_padded(tmp_path, shape, cell, image):
    source = oracles.make_source(samples=40, shape=shape)
    smooth = np.linspace(0, 200, 40)[:, None, None, None] + np.linspace(0, 50, shape[2])
    values = np.broadcast_to(smooth, (40, *shape)).astype(np.uint8)
    make_study(tmp_path, source=Source(**{**vars(source), "train_values": values}), commit=())
    written, _ = write(tmp_path)
    sprites = written.node["sprites"]
    assert (sprites["height"], sprites["width"]) == cell
    assert sprites["pixelated"] is (max(shape) <= 32)
    (sheet,) = cells(written, ".jpg")
    columns = np.arange(image[1]) * (shape[2] - 1) / (image[1] - 1)
    expected = values[:, 0, 0][:, np.rint(columns).astype(int)].astype(float)
    shown = sheet[:40, : image[0], : image[1]]
    assert np.abs(shown - expected[:, None, :, None]).max() < 10
    assert np.abs(sheet[:40, :, image[1] :] - expected[:, None, -1:, None]).max(initial=0) < 10


def test_values_of_samples_without_images_have_six_digits(tmp_path):
    source = oracles.make_source(samples=40)
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1000, (40, 3)).astype(np.float32)
    tests = np.zeros((9, 3), np.float32)
    source = Source(**{**vars(source), "train_values": values, "test_values": tests})
    make_study(tmp_path, source=source)
    written, _ = write(tmp_path)
    assert written.node["sprites"] is None
    (file,) = written.node["rows"]["files"]
    rows = written.part(file)["values"]
    np.testing.assert_allclose(rows, values, rtol=5e-6)
    assert max(len(f"{value:.15g}".strip("-").replace(".", "")) for value in rows[0]) <= 7


def test_a_part_of_the_epochs_then_of_the_samples_is_left_out(tmp_path):
    source = oracles.make_source(samples=5000, shape=(1, 2, 2))
    make_study(tmp_path, source=source, commit=("shuffle-seed1",), epochs=24)
    whole, made = write(tmp_path, to=str(tmp_path / "whole"))
    assert made.notes == []
    assert [len(whole.node["histories"][0]["files"])] == [2]  # of 4096 samples and the others
    some, made = write(tmp_path, to=str(tmp_path / "some"), megabytes=2.6)
    assert some.node["histories"][0]["epochs"] == [*range(1, 24, 2), 24]
    assert some.node["sample_ids"] is None
    assert made.notes == some.node["notes"]
    assert "below 2.6 MB" in made.notes[0]
    assert made.bytes < 2.6e6
    few, made = write(tmp_path, to=str(tmp_path / "few"), megabytes=0.8)
    ids = array(few.part(few.node["sample_ids"]["file"])["array"], "<i4")
    step = ids[1]
    assert step > 1
    np.testing.assert_array_equal(ids, np.arange(0, 5000, step))
    assert few.node["samples"] == 5000
    assert made.bytes < 0.8e6
    assert len(few.node["notes"]) == 2
    for name, values in whole.run()[0].items():
        np.testing.assert_array_equal(few.run()[0][name], values[::step], name)
    kept = few.node["histories"][0]["epochs"]
    all_values, few_values = whole.history()[0], few.history()[0]
    at = [epoch - 1 for epoch in kept]
    np.testing.assert_allclose(few_values, all_values[:, at][..., ::step], rtol=2e-3)
    labels = array(few.part(few.node["labels"]["file"])["array"], "<u2")
    np.testing.assert_array_equal(labels, source.train_labels[::step])
    images = source.train_values.transpose(0, 2, 3, 1)[::step]
    np.testing.assert_array_equal(np.concatenate(cells(few, ".png"))[: len(images)], images)


def test_files_of_samples_are_named(tmp_path):
    names = tuple(f"a/<{number}>.png" for number in range(40))
    source = dataclasses.replace(oracles.make_source(samples=40), train_files=names)
    make_study(tmp_path, source=source)
    written, _ = write(tmp_path)
    assert written.part(written.node["names"]["file"])["values"] == list(names)
    assert isinstance(written, Written)
