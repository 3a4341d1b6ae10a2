"""Figures show the values of the results, with units, in any number of layers and classes."""

import made_results as made
import numpy as np
import pytest
import xarray as xr
from matplotlib.collections import PathCollection, PolyCollection, QuadMesh
from matplotlib.figure import Figure
from PIL import Image

from sampimp.analysis import figures
from sampimp.analysis.figures import reference_runs
from sampimp.schema import REFERENCES, STRATEGIES

SMALL = {"samples": 200, "clusters": 3}


@pytest.fixture(scope="module")
def results():
    return made.make_results(epochs=12, diverged=("rnlo",), **SMALL)


def lines_of(figure, label):
    return [line for ax in figure.axes for line in ax.get_lines() if line.get_label() == label]


def meshes_of(figure):
    meshes = [m for ax in figure.axes for m in ax.collections if isinstance(m, QuadMesh)]
    return [m for m in meshes if not is_colorbar(m.axes)]


def is_colorbar(ax):
    return getattr(ax, "_colorbar", None) is not None


def labels_of(figure):
    return " | ".join(
        text for ax in figure.axes for text in (ax.get_xlabel(), ax.get_ylabel()) if text
    )


def draw_all(results, images=None):
    return {
        "stability": figures.draw_stability(results["stability"]),
        "decomposition": figures.draw_decomposition(results["decomposition"]),
        "groups": figures.draw_groups(results["importance_groups"]),
        "nll": figures.draw_importance_against_nll(results["importance_against_nll"]),
        "clusters": figures.draw_clusters(results["clusters"], images),
        "curves": figures.draw_curves(results["strategy_curves"]),
        "paths": figures.draw_paths(results["parameter_paths"]),
        "class_nll": figures.draw_class_nll(results["strategy_curves"]),
        "histogram": figures.draw_histogram(results["importance_histogram"]),
    }


@pytest.mark.parametrize(
    "shape",
    [
        {"epochs": 1, "layers": 1, "labels": 2, "strategies": ("shuffle", "nlo"), "seeds": 1},
        {"epochs": 60, "layers": 60, "labels": 100, "strategies": ("shuffle", "mine")},
    ],
    ids=["smallest", "sixty layers"],
)
def test_every_figure_is_drawn_and_encoded_in_any_shape(shape):
    for name, figure in draw_all(made.make_results(**shape, **SMALL)).items():
        assert isinstance(figure, Figure), name
        assert len(figures.encode(figure, dpi=30)) > 2_000, name


def test_axes_carry_units(results):
    units = {
        "stability": ["(-1 to 1)", "epoch"],
        "decomposition": ["(parameter²)", "epoch"],
        "groups": ["(parameter²)", "(%)"],
        "nll": ["(nat)", "(parameter²)", "(-1 to 1)"],
        "clusters": ["(nat)", "(parameter²)", "epoch"],
        "curves": ["(% of samples)", "epoch"],
        "paths": ["(parameter; 63.0 % of variance)", "(parameter; 21.0 % of variance)"],
        "class_nll": ["error (%)", "NLL of a class (nat)"],
        "histogram": ["(parameter², log scale)", "number of samples"],
    }
    for name, figure in draw_all(results).items():
        for unit in units[name]:
            assert unit in labels_of(figure), name


def test_stability_draws_every_pair_of_every_reference(results):
    stability = results["stability"]
    figure = figures.draw_stability(stability)
    first, second = lines_of(figure, "1-3")
    for line, reference in ((first, "shuffle"), (second, "shuffle_by_seed")):
        expected = stability["rank_correlation"].sel(reference=reference, pair="1-3")
        np.testing.assert_array_equal(line.get_ydata(), expected)
        np.testing.assert_array_equal(line.get_xdata(), stability["epoch"])
    # 4 layers x 3 pairs in each of the lower panels.
    assert [len(ax.get_lines()) for ax in figure.axes[2:]] == [12, 12]


def test_stability_leaves_out_a_reference_without_values(results):
    stability = results["stability"].copy(deep=True)
    stability["rank_correlation"].loc[{"reference": "shuffle_by_seed"}] = np.nan
    figure = figures.draw_stability(stability)
    assert len(figure.axes) == 2
    stability["rank_correlation"][:] = np.nan
    assert "No two reference runs" in figures.draw_stability(stability).texts[0].get_text()


@pytest.fixture(scope="module")
def few_classes():
    return made.make_results(epochs=12, labels=5, **SMALL)


def test_decomposition_draws_layers_and_classes(few_classes):
    data = few_classes["decomposition"]
    figure = figures.draw_decomposition(data, [f"digit {i}" for i in range(5)])
    (line,) = lines_of(figure, "L2")
    np.testing.assert_array_equal(line.get_ydata(), data["importance_by_layer"].sel(layer="L2"))
    panels = lines_of(figure, "digit 3")
    assert len(panels) == 4
    np.testing.assert_array_equal(
        panels[3].get_ydata(), data["importance_by_class"].sel(layer="Out", label=3)
    )
    assert figure.axes[0].get_yscale() == "log"


@pytest.mark.parametrize("labels", [6, 10, 30])
def test_many_layers_and_classes_become_heat_maps_of_the_same_values(labels):
    data = made.make_results(layers=20, labels=labels, epochs=6, **SMALL)["decomposition"]
    figure = figures.draw_decomposition(data)
    above, *below = meshes_of(figure)
    np.testing.assert_allclose(above.get_array(), data["importance_by_layer"].T)
    assert len(below) == 4
    np.testing.assert_allclose(
        below[0].get_array(), data["importance_by_class"].isel(layer=0).transpose("label", "epoch")
    )
    assert above.get_cmap().name == "viridis"


def test_groups_show_shares_in_per_cent(results):
    figure = figures.draw_groups(results["importance_groups"])
    bars = figure.axes[-1].containers
    assert [bar.get_height() for bar in bars[0]] == pytest.approx([72.0] * 5)
    assert [container.get_label() for container in bars] == [
        "top 10 %",
        "next 10 %",
        "other 80 %",
    ]


def test_few_samples_are_drawn_as_points_and_many_as_a_density(results, monkeypatch):
    against = results["importance_against_nll"]
    figure = figures.draw_importance_against_nll(against)
    (points,) = [c for ax in figure.axes for c in ax.collections if isinstance(c, PathCollection)]
    expected = np.stack([against["final_nll"], against["overall_importance"]], axis=1)
    np.testing.assert_array_equal(points.get_offsets(), expected)
    monkeypatch.setattr(reference_runs, "MOST_POINTS", 100)
    figure = figures.draw_importance_against_nll(against)
    (density,) = [c for ax in figure.axes for c in ax.collections if type(c) is PolyCollection]
    assert density.get_array().sum() == 200
    assert "0.871" in " ".join(text.get_text() for ax in figure.axes for text in ax.texts)


def test_samples_that_a_log_axis_cannot_show_are_counted(results):
    against = results["importance_against_nll"].copy(deep=True)
    against["final_nll"][:3] = 0.0
    figure = figures.draw_importance_against_nll(against)
    assert "not drawn: 3 samples" in " ".join(
        text.get_text() for ax in figure.axes for text in ax.texts
    )


def test_clusters_show_images_profiles_and_quartiles(results):
    data = results["clusters"]
    images = made.make_images(clusters=3, ranks=8, size=6)
    figure = figures.draw_clusters(data, images)
    (mosaic,) = figure.axes[0].get_images()
    tiles = np.asarray(mosaic.get_array()).reshape(3, 8, 8, 8)  # 6 x 6 pixels and a white border
    np.testing.assert_array_equal(tiles[2, 1:7, 4, 1:7], images[2, 4, :, :, 0])
    strips = meshes_of(figure)
    assert len(strips) == 3
    np.testing.assert_allclose(strips[1].get_array(), data["profile"][1].T)
    size = int(data["size"][0])
    assert figure.axes[0].get_yticklabels()[0].get_text() == f"0  (n = {size})"
    medians = [
        line.get_xdata()[0] for line in figure.axes[-1].get_lines() if line.get_color() == "#D55E00"
    ]
    np.testing.assert_allclose(medians, data["nll_quantile"].sel(quantile=0.5))


def test_images_are_square_on_the_page():
    data = made.make_results(epochs=5, samples=100, clusters=30)["clusters"]
    figure = figures.draw_clusters(data, made.make_images(30, 12, 32, 3))
    box = figure.axes[0].get_position()
    width, height = figure.get_size_inches()
    assert box.width * width / 12 == pytest.approx(box.height * height / 30)


def test_curves_show_mean_standard_error_and_divergence(results):
    curves = results["strategy_curves"]
    figure = figures.draw_curves(curves)
    train, test = lines_of(figure, "SIO")
    np.testing.assert_allclose(train.get_ydata(), 100 * curves["train_error"].sel(strategy="sio"))
    np.testing.assert_allclose(test.get_ydata(), 100 * curves["test_error"].sel(strategy="sio"))
    assert lines_of(figure, "RNLO (2 diverged)")
    crosses = [
        line for ax in figure.axes for line in ax.get_lines() if line.get_color() == "#cc0000"
    ]
    # The number of runs falls from 5 to 3 at epoch 7 of 12, so that the crosses are at epoch 6.
    assert [line.get_xdata().tolist() for line in crosses] == [[6], [6]]
    bands = figure.axes[1].collections
    assert len(bands) == 9
    top = bands[0].get_paths()[0].vertices[:, 1].max()
    assert top == pytest.approx(
        100 * float((curves["test_error"] * 1.04).sel(strategy="shuffle")[0])
    )


def test_an_error_of_exactly_zero_is_on_the_axis(results):
    curves = results["strategy_curves"].copy(deep=True)
    curves["train_error"][:, -3:] = 0.0
    ax = figures.draw_curves(curves).axes[0]
    assert ax.get_yscale() == "symlog"
    assert ax.get_ylim()[0] == 0


def test_axes_of_paths_are_limited_to_runs_that_did_not_diverge(results):
    paths = results["parameter_paths"].copy(deep=True)
    paths["path"].loc[{"strategy": "rnlo"}] *= 1e6
    figure = figures.draw_paths(paths)
    assert figure.axes[0].get_xlim()[1] < 100
    first, second = lines_of(figure, "NLO")
    np.testing.assert_array_equal(first.get_xydata(), paths["path"].sel(strategy="nlo")[:, :2])
    np.testing.assert_array_equal(
        second.get_ydata(), paths["path"].sel(strategy="nlo", component=3)
    )
    assert lines_of(figure, "RNLO (diverged)")


def test_class_nll_has_a_block_for_each_strategy_that_ran(few_classes):
    curves = few_classes["strategy_curves"].sel(strategy=["rand", "nlo", "sim"]).copy(deep=True)
    for name in ("test_error", "class_nll"):
        curves[name].loc[{"strategy": "sim"}] = np.nan
    figure = figures.draw_class_nll(curves)
    assert [ax.get_title(loc="left") for ax in figure.axes[:2]] == ["Rand", "NLO"]
    line = lines_of(figure, "4")[1]
    np.testing.assert_array_equal(
        line.get_ydata(), curves["class_nll"].sel(strategy="nlo", label=4)
    )
    assert len(figure.axes) == 4


def test_histogram_shows_counts_and_quantiles(results):
    histogram = results["importance_histogram"]
    figure = figures.draw_histogram(histogram)
    ax = figure.axes[0]
    stairs = ax.patches[0].get_data()
    np.testing.assert_array_equal(stairs.values, histogram["count"])
    np.testing.assert_array_equal(stairs.edges, histogram["bin_edge"])
    places = [line.get_xdata()[0] for line in ax.get_lines()]
    np.testing.assert_allclose(places, np.log10(histogram["quantile"]))
    assert "Gini coefficient 0.913" in ax.get_title(loc="right")
    assert "3 samples at exactly 0" in ax.get_title(loc="right")


def test_strategies_differ_in_marker_and_in_colour():
    styles = [figures.strategy_style(name) for name in (*REFERENCES, *STRATEGIES)]
    assert len({style.marker for style in styles}) == 9
    assert len({style.color for style in styles}) == 9


def test_a_strategy_looks_the_same_in_every_figure(results):
    drawn = draw_all(results)
    for name in ("curves", "paths"):
        line = lines_of(drawn[name], "SIM")[0]
        assert (line.get_color(), line.get_marker()) == ("#882255", "<")


def test_files_have_their_format_and_are_reproducible(results, tmp_path):
    figure = figures.draw_histogram(results["importance_histogram"])
    path = tmp_path / "figure.png"
    path.write_bytes(figures.encode(figure))
    assert Image.open(path).size[0] == 1500
    pdf = figures.encode(figure, "pdf")
    assert pdf.startswith(b"%PDF")
    assert pdf == figures.encode(figure, "pdf")


def test_drawing_leaves_no_global_state(results):
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw_all(results)
    assert dict(matplotlib.rcParams) == before


def test_results_may_be_lazy(results):
    lazy = results["decomposition"].chunk(epoch=2)
    (line,) = lines_of(figures.draw_decomposition(lazy), "L1")
    assert isinstance(lazy["importance_by_layer"], xr.DataArray)
    np.testing.assert_array_equal(
        line.get_ydata(), results["decomposition"]["importance_by_layer"].sel(layer="L1")
    )
