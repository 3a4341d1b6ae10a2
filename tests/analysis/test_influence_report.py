"""Figures and page of section 4 show the numbers of its results, their conventions and ceilings."""

import re
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from influence_study import make_study
from matplotlib.collections import LineCollection, PathCollection, QuadMesh

import sampimp
from sampimp.analysis import figures
from sampimp.analysis.example_cube import example_cube, with_influence
from sampimp.analysis.figures import removals
from sampimp.analysis.report import write
from sampimp.analysis.report.influence_figures import INFLUENCE_FIGURES
from sampimp.analysis.report.method_table import method_table
from sampimp.analysis.results.analyse import analyse
from sampimp.analysis.results.influential_samples import influential_samples
from sampimp.sweeps.derived_study import run_here
from sampimp.sweeps.retrain_study import RetrainRequest, prepare_retrain

SHAPE = {"strategies": ("shuffle", "rand"), "seeds": 2, "epochs": 4, "samples": 60}


@pytest.fixture(scope="module")
def cube():
    pixels = np.random.default_rng(0).integers(0, 256, (60, 5, 4, 1), dtype=np.uint8)
    plain = example_cube(**SHAPE, missing=(), diverged={})
    plain = plain.assign(image=(("sample", "row", "column", "channel"), pixels))
    cube = with_influence(plain, noise=0.3)
    tests = np.random.default_rng(1).integers(0, 256, (12, 5, 4, 1), dtype=np.uint8)
    return cube.assign(
        test_image=(("test_sample", "row", "column", "channel"), tests)
    ).assign_coords(test_label=("test_sample", np.arange(12) % 3))


@pytest.fixture(scope="module")
def results(cube):
    return analyse(cube)


def write_page(cube, out):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "open_cube", lambda _: xr.DataTree.from_dict({"mnist": cube}))
        return write.write_report(str(out))


@pytest.fixture(scope="module")
def written(cube, tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    return out, write_page(cube, out)


def draw_all(results, images=None):
    return {
        "12": figures.draw_influence_by_layer(results["influence_by_layer"]),
        "13": figures.draw_removal_effects(results["removal_effects"]),
        "14": figures.draw_method_scores(results["method_scores"]),
        "15": figures.draw_share_left(results["influence_by_layer"]),
        "16": figures.draw_removal_sizes(results["removal_sizes"]),
        "17": figures.draw_influential_samples(results["influential_samples"], images),
    }


def lines_of(ax, label):
    return [line for line in ax.get_lines() if line.get_label() == label]


def words_of(figure):
    texts = [*figure.texts, *(text for ax in figure.axes for text in (*ax.texts, ax.title))]
    return " | ".join(text.get_text() for text in texts)


# Figures


def test_importance_and_influence_are_drawn_layer_by_layer(results):
    data = results["influence_by_layer"]
    left, right = draw_all(results)["12"].axes
    for ax, name in ((left, "mean_importance"), (right, "mean_influence")):
        (line,) = lines_of(ax, "L2")
        np.testing.assert_array_equal(line.get_ydata(), data[name].sel(layer="L2"))
        np.testing.assert_array_equal(line.get_xdata(), data["epoch"])
    assert "nat per unit of weight" in right.get_ylabel()
    left, right = draw_all(results)["15"].axes
    (line,) = lines_of(right, "Out")
    np.testing.assert_array_equal(line.get_ydata(), data["share_left"].sel(layer="Out"))
    (line,) = lines_of(left, "Out")
    np.testing.assert_array_equal(line.get_ydata(), data["mean_arriving"].sel(layer="Out"))


def test_many_layers_become_heat_maps():
    cube = with_influence(example_cube(**{**SHAPE, "samples": 30}, layers=12, missing=()))
    data = analyse(cube)["influence_by_layer"]
    for figure, names in (
        (figures.draw_influence_by_layer(data), ("mean_importance", "mean_influence")),
        (figures.draw_share_left(data), ("mean_arriving", "share_left")),
    ):
        meshes = [m for ax in figure.axes[:2] for m in ax.collections if isinstance(m, QuadMesh)]
        for mesh, name in zip(meshes, names, strict=True):
            np.testing.assert_allclose(mesh.get_array(), data[name].T)


def test_predictions_and_the_repeated_truth_are_in_the_same_axes(results):
    data = results["removal_effects"].sel(target="mean")
    figure = draw_all(results)["13"]
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert len(shown) == 3
    for kind, ax in enumerate(shown):
        mine = data["kind_of"].values == kind
        repeated, predicted = (c for c in ax.collections if isinstance(c, PathCollection))
        actual = data["actual"].values[mine]
        np.testing.assert_array_equal(repeated.get_offsets(), actual[:, :2])
        np.testing.assert_array_equal(
            predicted.get_offsets(), np.stack([actual[:, 0], data["predicted"].values[mine]], 1)
        )
        assert f"rank correlation {float(data['agreement'][kind]):.2f}" in ax.texts[0].get_text()
        assert f"{float(data['agreement_of_repeats'][kind]):.2f}" in ax.texts[0].get_text()


def test_every_score_has_its_ceiling_in_the_panel(results):
    data = results["method_scores"]
    for kind, ax in enumerate(draw_all(results)["14"].axes):
        here = data.isel(kind=kind)
        (ceiling,) = [line for line in ax.get_lines() if str(line.get_label()).startswith("ceil")]
        assert ceiling.get_xdata()[0] == float(here["ceiling"])
        (points,) = lines_of(ax, "score (line: 95 %)")
        np.testing.assert_array_equal(points.get_xdata(), here["score"])
        (bars,) = [c for c in ax.collections if isinstance(c, LineCollection)]
        ends = np.array([segment[:, 0] for segment in bars.get_segments()])
        np.testing.assert_array_equal(ends, here["score_interval"])
    names = [label.get_text() for label in draw_all(results)["14"].axes[0].get_yticklabels()]
    assert names[0] == "unrolled influence"
    assert "-GGN⁻¹ g, best damping" in names


def test_a_method_that_was_not_computed_is_named(results):
    data = results["method_scores"].copy(deep=True)
    data["score"][1, 0] = np.nan
    data["ceiling"][0] = np.nan
    first = figures.draw_method_scores(data).axes[0]
    assert "not computed" in [text.get_text() for text in first.texts]
    assert not [line for line in first.get_lines() if str(line.get_label()).startswith("ceil")]


def test_sizes_are_drawn_against_the_mean_absolute_effect(results):
    data = results["removal_sizes"]
    figure = draw_all(results)["16"]
    for kind, ax in enumerate(figure.axes[:2]):
        mine = data["kind_of"].values == kind
        (points,) = [c for c in ax.collections if isinstance(c, PathCollection)]
        expected = np.stack([data["size"].values[0, mine], data["actual_size"].values[mine, 0]], 1)
        np.testing.assert_array_equal(points.get_offsets(), expected)
    (points,) = lines_of(figure.axes[2], "score (line: 95 %)")
    np.testing.assert_array_equal(points.get_xdata(), data["rank_correlation"].isel(kind=0))


def test_images_stand_in_the_order_of_their_influence(results, cube):
    data = results["influential_samples"]
    images = xr.DataArray(
        cube["image"].values[data["position"].values],
        dims=("target", "end", "rank", "row", "column", "channel"),
    )
    figure = figures.draw_influential_samples(
        data, images, {"class:1": "class horse"}, ["cat", "horse", "ship"]
    )
    first = data.sel(target="class:0")
    # 8 helpful ones, then 8 harmful ones, of each of 3 classes and 6 of the 12 test samples.
    assert len(figure.axes) == 9 * 16
    for place, end in ((0, "helpful"), (8, "harmful")):
        ax = figure.axes[place]
        (picture,) = ax.get_images()
        sample = int(first["position"].sel(end=end)[0])
        np.testing.assert_array_equal(picture.get_array(), cube["image"].values[sample, ..., 0])
        label = ["cat", "horse", "ship"][int(cube["label"][sample])]
        share = abs(float(first["value"].sel(end=end)[0])) / float(abs(first["value"]).max())
        assert ax.get_xlabel() == f"{label}: {100 * share:.0f} %"
    assert "class horse" in words_of(figure)
    shown = figures.draw_influential_samples(
        data, images, target_images={"sample:2": np.full((5, 4, 1), 7, np.uint8)}
    )
    assert len(shown.axes) == 9 * 16 + 1
    (mine,) = [ax for ax in shown.axes if (ax.get_images()[0].get_array() == 7).all()]
    assert mine.get_position().x1 < shown.axes[0].get_position().x0
    assert "no images" in words_of(draw_all(results)["17"])


def test_every_figure_is_drawn_in_the_smallest_shape():
    shape = {"strategies": ("shuffle",), "seeds": 1, "epochs": 1, "layers": 1, "samples": 20}
    cube = with_influence(example_cube(**shape, missing=()), removals=5, repeats=1, test_samples=1)
    for number, figure in draw_all(analyse(cube)).items():
        assert len(figures.encode(figure, dpi=30)) > 1_000, number


# The page


def test_files_and_results_of_section_4_are_written(written):
    out, made = written
    names = sorted(path.name for path in (out / "analysis/mnist").glob("fig1[2-7]*"))
    assert names == sorted(f"{p.name}.{kind}" for p in INFLUENCE_FIGURES for kind in ("pdf", "png"))
    assert (out / "analysis/mnist/method_scores.zarr").is_dir()
    assert len(made.sections[0].drawn_influence) == 6


def test_every_caption_states_sign_unit_denominator_and_ceiling(written):
    captions = {figure.number: figure.caption for figure in written[1].sections[0].drawn_influence}
    for number, caption in captions.items():
        assert "effect of a removal = -influence" in caption, number
        assert "mean loss stays when a sample is removed" in caption, number
        assert "run shuffle, seed 1" in caption, number
    for number in ("12", "13", "14", "15", "17"):
        assert "Smoothing:" in captions[number]
    assert "1/(eta T) = " in captions["14"]
    for number in ("13", "14", "16"):
        assert "Ceiling: " in captions[number]


def test_the_table_has_each_score_and_the_ceiling(written, results):
    text = Path(written[1].path).read_text()
    assert "split by the epoch and the layer" in text
    table = method_table(results)
    scores = results["method_scores"]
    name, cells = table["rows"][0]
    assert name == "unrolled influence"
    for place, (value, interval) in enumerate(cells):
        here = scores.isel(predictor=0, kind=place)
        assert value == f"{float(here['score']):.3f}"
        low, high = here["score_interval"].values
        assert interval == f"{low:.2f} to {high:.2f}"
        assert re.search(rf"<td class=\"number\">{re.escape(value)}<span class=\"small\">", text)
    assert [score for score, _ in table["columns"]] == ["TSLOO", "TSLOO", "LDS"]
    assert table["columns"][2][1] == "95 % kept (20)"
    assert table["ceiling"][1][0] == f"{float(scores['ceiling'][1]):.3f}"
    *_, (last, values) = table["against_mean"]
    assert last == "one retraining (ceiling)"
    assert values[0] == f"{float(scores['ceiling_against_mean'][0]):.3f}"
    assert method_table({}) == {}


def test_a_report_without_influence_gains_one_line(cube, written, tmp_path):
    plain = cube.drop_dims(["target", "removal", "damping", "test_sample"]).drop_vars(
        [name for name in cube.data_vars if "arriving" in name or "final_" in name]
    )
    pages = {
        "with": Path(written[1].path).read_text(),
        "without": Path(write_page(plain, tmp_path).path).read_text(),
    }
    lines = [line for line in pages["without"].splitlines() if "nfluence" in line]
    assert len(lines) == 1
    assert "<code>sampimp influence OUT</code>, <code>sampimp retrain OUT</code>" in lines[0]
    # The other figures, and the claims of section 3, are the same ones.
    images = [re.findall(r"<svg [^>]*role=\"img\".*?</svg>", page) for page in pages.values()]
    assert images[0][: len(images[1])] == images[1] != []
    row = re.compile(r"<tr id=\"[^\"]*\"><td>3\.\d</td>.*?</tr>", re.DOTALL)
    claims = [row.findall(page) for page in pages.values()]
    assert claims[0] == claims[1] != []
    assert not list((tmp_path / "analysis/mnist").glob("fig1[2-7]*"))


def test_what_was_not_computed_is_named_with_its_command(cube, tmp_path):
    part = cube.drop_dims(["removal"]).drop_vars("arriving_importance")
    page = Path(write_page(part, tmp_path).path).read_text()
    retrain = "sampimp retrain OUT --targets sample:0..11"
    assert f"It needs retrainings without single samples: {retrain}." in page
    assert "It needs probes: sampimp influence OUT --targets probe:16." in page
    assert "not computed: sampimp retrain OUT" in page


def test_a_stored_study_with_influence_is_reported(tmp_path):
    """From the store: influence, fixed point, probes and a few retrainings of a tiny run."""
    folder, _, _ = make_study(tmp_path / "study")
    targets = ["mean", "class", "sample:0..1"]
    sampimp.compute_influence(folder, targets, fixed_point=True)
    sampimp.compute_influence(folder, ["probe:2"])
    removals = ("random:6", "subset-0.75:5", "class:1")
    request = RetrainRequest(removals=removals, targets=(*targets,), runs=("shuffle:1",))
    run_here(prepare_retrain(folder, request))
    made = write.write_report(str(folder))
    (section,) = made.sections
    assert all(figure.png for figure in section.drawn_influence)
    scores = section.results["method_scores"]
    assert scores["kind"].values.tolist() == ["random", "subset-0.75", "class"]
    assert np.isfinite(scores["score"].sel(kind="random")).all()
    assert np.isnan(scores["score_interval"].sel(kind="class")).all()  # of one removal
    text = Path(made.path).read_text()
    for words in ("-Hessian⁻¹ g, best damping", "75 % kept (5)", "one class (1)"):
        assert words in text
    assert "not computed: " not in text


def test_kinds_have_names():
    assert removals.name_kind("mine", 0.9, 3) == "mine (3)"


@pytest.mark.parametrize("name", ["class:abc", "sample:12", "class:" + "9" * 5000, "sample:"])
def test_a_target_that_is_no_class_or_test_sample_is_not_listed(cube, name):
    """Of 12 test samples; targets of a study of somebody else have any names."""
    targets = cube["target"].values.astype(object)
    targets[-1] = name
    listed = influential_samples(cube.assign_coords(target=targets))["target"].values
    assert name not in listed
    assert len(listed) > 1
