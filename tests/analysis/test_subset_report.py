"""Figures and page of section 5 show the numbers of its results, unfavourable findings first."""

import re
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from influence_study import make_study
from matplotlib.collections import PathCollection

from sampimp.analysis import figures
from sampimp.analysis.example_cube import example_cube, with_subsets
from sampimp.analysis.report import write
from sampimp.analysis.report.sample_images import read_images
from sampimp.analysis.report.subset_table import subset_findings, subset_tables
from sampimp.analysis.results.selected_samples import selected_samples
from sampimp.analysis.results.subset_errors import subset_errors
from sampimp.store.cube import open_cube
from sampimp.sweeps.derived_study import run_here
from sampimp.sweeps.subset_study import SubsetRequest, prepare_subsets

SHAPE = {"strategies": ("shuffle", "rand"), "seeds": 2, "epochs": 4, "samples": 60, "missing": ()}


@pytest.fixture(scope="module")
def cube():
    pixels = np.random.default_rng(0).integers(0, 256, (60, 5, 4, 1), dtype=np.uint8)
    cube = with_subsets(example_cube(**SHAPE)).compute()
    return cube.assign(image=(("sample", "row", "column", "channel"), pixels))


@pytest.fixture(scope="module")
def errors(cube):
    return subset_errors(cube, resamples=50)


@pytest.fixture(scope="module")
def selected(cube):
    return selected_samples(cube).compute()


def line_of(ax, label):
    """Return the points of the line with a label, with error bars or without."""
    for container in ax.containers:
        if container.get_label() == label:
            return container.lines[0]
    (line,) = [line for line in ax.get_lines() if line.get_label() == label]
    return line


# Figures


def test_errors_are_drawn_by_size_with_those_of_all_samples(errors):
    figure = figures.draw_subset_errors(errors)
    for ax, budget in zip(figure.axes, ("steps", "epochs"), strict=True):
        here = errors.sel(budget=budget)
        for rule in ("random", "balanced", "tau-high", "chosen"):
            label = "chosen by validation" if rule == "chosen" else rule
            line = line_of(ax, label)
            np.testing.assert_array_equal(line.get_xdata(), [0.1, 0.3, 0.5])
            np.testing.assert_allclose(line.get_ydata(), 100 * here["error"].sel(rule=rule))
        full = line_of(ax, "all samples, the study's epochs").get_ydata()
        assert full[0] == pytest.approx(100 * float(here["full_error"]))
        converged = line_of(ax, "all samples, at convergence").get_ydata()
        assert converged[0] == pytest.approx(100 * float(here["converged_error"]))
        assert ax.get_title(loc="left") == f"equal {budget}"
        assert [tick.get_text() for tick in ax.get_xticklabels()] == ["10", "30", "50"]
        bars = next(c for c in ax.containers if c.get_label() == "random").lines[2][0]
        heights = [np.ptp(segment[:, 1]) for segment in bars.get_segments()]
        np.testing.assert_allclose(heights, 200 * here["error_se"].sel(rule="random"))
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "chosen by validation" in words
    assert len(words) == 6


def test_every_rule_has_a_style_of_its_own():
    rules = ["chosen", "random", "balanced", "tau-high", "tau-low", "nll-high", "nll-low"]
    rules += ["strata", "power", "final-importance"]
    cube = with_subsets(example_cube(**SHAPE)).compute()
    data = subset_errors(cube, resamples=5).isel(rule=[0] * len(rules))
    figure = figures.draw_subset_errors(data.assign_coords(rule=rules))
    lines = [container.lines[0] for container in figure.axes[0].containers]
    looks = {(line.get_color(), str(line.get_linestyle()), line.get_marker()) for line in lines}
    assert len(looks) == len(rules)


def test_a_rule_that_was_not_trained_at_a_size_has_no_point_there(errors):
    data = errors.copy(deep=True)
    data["error"].loc[{"rule": "random", "size": 0.3, "budget": "steps"}] = np.nan
    left, right = figures.draw_subset_errors(data).axes
    assert line_of(left, "random").get_xdata().tolist() == [0.1, 0.5]
    assert line_of(right, "random").get_xdata().tolist() == [0.1, 0.3, 0.5]


def test_who_is_kept_is_drawn_in_the_plane_by_class_and_as_images(selected, cube):
    images = read_images(cube, selected["position"])
    figure = figures.draw_selected_samples(selected, images, ["cat", "horse", "ship"])
    plane, classes = (ax for ax in figure.axes if not ax.get_images())
    strip = [ax for ax in figure.axes if ax.get_images()]
    points = next(c for c in plane.collections if isinstance(c, PathCollection))
    blue = points.get_facecolors()[:, 2] > points.get_facecolors()[:, 0] + 0.3
    offsets = np.sort(points.get_offsets()[blue], axis=0)
    kept = selected["kept"].values
    expected = np.stack([selected[n].values[kept] for n in ("final_nll", "overall_importance")], 1)
    np.testing.assert_allclose(offsets, np.sort(expected, axis=0))
    assert len(points.get_offsets()) == 60
    assert plane.get_xscale() == plane.get_yscale() == "log"
    whole, part = ([bar.get_width() for bar in bars] for bars in classes.containers)
    np.testing.assert_allclose(whole, 100 * np.bincount(cube["label"].values) / 60)
    np.testing.assert_allclose(part, 100 * selected["kept_count"] / kept.sum())
    assert [tick.get_text() for tick in classes.get_yticklabels()] == ["cat", "horse", "ship"]
    assert len(strip) == 32
    for row, place in ((0, 0), (1, 16)):
        (picture,) = strip[place].get_images()
        sample = int(selected["position"][row, 0])
        np.testing.assert_array_equal(picture.get_array(), cube["image"].values[sample, ..., 0])
    assert "tau-high (chosen by validation): 30 %" in figure.subfigs[0].get_suptitle()
    assert len(figures.draw_selected_samples(selected).axes) == 2


def test_many_samples_are_thinned(selected):
    data = selected.isel(sample=np.tile(np.arange(60), 100))
    plane = figures.draw_selected_samples(data).axes[0]
    points = next(c for c in plane.collections if isinstance(c, PathCollection))
    assert len(points.get_offsets()) == 4_000
    assert "4,000 drawn at random" in plane.get_title(loc="left")


def test_both_figures_are_drawn_in_the_smallest_shape():
    cube = with_subsets(
        example_cube(
            strategies=("shuffle",), seeds=1, epochs=1, layers=1, samples=20, classes=1, missing=()
        ),
        seeds=1,
    )
    cube = cube.sel(rule=["balanced"], size=[0.1])
    for figure in (
        figures.draw_subset_errors(subset_errors(cube)),
        figures.draw_selected_samples(selected_samples(cube).compute()),
    ):
        assert len(figures.encode(figure, dpi=30)) > 1_000


# Findings and tables


def with_interval(errors, changes):
    """Return the result with other intervals of the difference from balanced, at both budgets."""
    data = errors.copy(deep=True)
    interval = data["difference_from_balanced_interval"]
    interval.loc[{}] = [-0.01, 0.01]
    for (rule, size), bounds in changes.items():
        interval.loc[{"rule": rule, "size": size}] = list(bounds)
    return data


def test_the_first_line_says_where_the_chosen_rule_is_worse_than_random(errors):
    worse = {("chosen", 0.1): (0.01, 0.02), ("tau-high", 0.5): (-0.03, -0.01)}
    first, *rest = subset_findings(with_interval(errors, worse))
    assert first == (
        "The rule that the validation split chose is worse than balanced random subsets at 10 % "
        "(either budget)."
    )
    assert rest == [
        "No rule is better than balanced random subsets at 10 %, 30 % (either budget).",
        "At least one rule is better than balanced random subsets at 50 % (either budget).",
    ]
    one = with_interval(errors, {})
    cell = {"rule": "chosen", "size": 0.3, "budget": "epochs"}
    one["difference_from_balanced_interval"].loc[cell] = [0.001, 0.002]
    assert subset_findings(one)[0].endswith("at 30 % (equal epochs).")


def test_it_is_said_that_nothing_beats_random(errors):
    never = "No rule is better than balanced random subsets at any size."
    assert subset_findings(with_interval(errors, {})) == [never]
    # That random subsets are better than balanced ones is no success of a rule.
    random = {("random", size): (-0.03, -0.01) for size in (0.1, 0.3, 0.5)}
    assert subset_findings(with_interval(errors, random)) == [never]
    always = {("tau-high", size): (-0.03, -0.01) for size in (0.1, 0.3, 0.5)}
    (line,) = subset_findings(with_interval(errors, always))
    assert line.startswith("At least one rule is better")
    assert "10 %, 30 %, 50 %" in line


def test_without_a_choice_or_intervals_that_is_said(errors):
    unchosen = with_interval(errors, {}).sel(rule=["random", "balanced", "tau-high"])
    assert subset_findings(unchosen)[-1].startswith("No rule was chosen")
    few = subset_errors(with_subsets(example_cube(**SHAPE), seeds=2))
    (line,) = subset_findings(few)
    assert "at least 3 seeds" in line


def test_the_table_has_each_error_and_what_was_chosen(errors):
    data = errors.copy(deep=True)
    cell = {"rule": "tau-high", "size": 0.1, "budget": "epochs"}
    data["diverged"].loc[cell], data["count"].loc[cell] = 2, 3
    data["missing_classes"].loc[cell] = 1
    tables = subset_tables({"subset_errors": data})
    assert tables["sizes"] == ["10 %", "30 %", "50 %"]
    assert [budget["name"] for budget in tables["budgets"]] == ["equal steps", "equal epochs"]
    for budget, name in zip(tables["budgets"], ("steps", "epochs"), strict=True):
        assert [row for row, _ in budget["rows"]] == [
            *("chosen by validation", "random", "balanced", "tau-high"),
        ]
        for (_, cells), rule in zip(budget["rows"], data["rule"].values, strict=True):
            for (value, _, _), size in zip(cells, data["size"].values, strict=True):
                here = data.sel(rule=rule, size=size, budget=name)
                mean, spread = 100 * float(here["error"]), 100 * float(here["error_se"])
                assert value == f"{mean:.2f} ± {spread:.2f}"
        assert budget["full"].startswith(f"{100 * float(data['full_error'].sel(budget=name)):.2f}")
        assert budget["converged"].startswith(f"{100 * float(data['converged_error']):.2f}")
    chosen = tables["budgets"][0]["rows"][0][1]
    assert [details for _, details, _ in chosen] == ["balanced", *["better, tau-high"] * 2]
    assert [style for *_, style in chosen] == ["", "holds", "holds"]
    _, details, style = tables["budgets"][1]["rows"][3][1][0]
    assert details == "worse, 2 of 5 diverged, 1 class missing"
    assert style == "fails"
    name, ((steps, interval), (epochs, none)) = tables["smallest"][3]
    assert name == "tau-high"
    assert steps == f"{100 * float(data['smallest_size'].sel(rule=name, budget='steps')):.0f} %"
    assert interval.endswith(" %")
    assert (epochs, none) == ("none measured", "")
    assert subset_tables({}) == {}


def test_sizes_of_bisections_do_not_widen_the_table(errors):
    """Sizes at which few rules were trained are left out first."""
    wide = errors.isel(size=[0] * 12).assign_coords(size=np.linspace(0.01, 0.5, 12))
    wide = wide.copy(deep=True)
    wide["count"].loc[{"rule": "random", "size": wide["size"][[2, 3, 5, 7]]}] = 0
    tables = subset_tables({"subset_errors": wide})
    assert tables["sizes"] == [
        *("1 %", "5.45 %", "19 %", "28 %", "37 %", "41 %", "46 %", "50 %"),
    ]


# The page


def write_page(cube, out):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "open_cube", lambda _: xr.DataTree.from_dict({"mnist": cube}))
        return write.write_report(str(out))


def test_the_page_has_the_section_and_without_subsets_one_line(cube, tmp_path):
    made = write_page(cube, tmp_path / "with")
    text = Path(made.path).read_text()
    assert [figure.number for figure in made.sections[0].drawn_subsets] == ["18", "19"]
    names = sorted(path.name for path in (tmp_path / "with/analysis/mnist").glob("fig1[89]*"))
    assert names == [
        *("fig18_subsets.pdf", "fig18_subsets.png", "fig19_selected.pdf", "fig19_selected.png")
    ]
    heading = text.index("The smallest subset that suffices (section 5)")
    (first, *_) = re.findall(r"<p>(.*?)</p>", text[heading:], re.DOTALL)
    assert first.startswith("<b>No rule is better than balanced random subsets at 10 %")
    table = subset_tables(made.sections[0].results)
    for value, _, _ in table["budgets"][1]["rows"][2][1]:
        assert f'<td class="number">{value}' in text[heading:]
    assert text.count("A small subset, chosen by importance") == 3  # verdict, section, table
    plain = example_cube(**SHAPE)
    without = Path(write_page(plain, tmp_path / "without").path).read_text()
    lines = [line for line in without.splitlines() if "ubset" in line]
    assert len(lines) == 1
    assert "<code>sampimp subset OUT</code>" in lines[0]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A tiny stored study, with trainings on subsets by two rules."""
    folder, _, _ = make_study(tmp_path_factory.mktemp("subsets") / "study")
    request = SubsetRequest(
        rules=("tau-high", "power:0.5"), sizes=(0.25, 0.5), seeds=(1, 2, 3), runs=("shuffle:1",)
    )
    run_here(prepare_subsets(folder, request))
    return folder


def test_a_stored_study_with_subsets_is_reported(study):
    made = write.write_report(str(study))
    (section,) = made.sections
    assert all(figure.png for figure in section.drawn_subsets)
    node = open_cube(str(study))["one"].to_dataset().compute()
    run = node.sel(strategy="shuffle", seed=1)
    errors = section.results["subset_errors"]
    for rule in ("chosen", "random", "balanced", "tau-high", "power:0.5"):
        for size in (0.25, 0.5):
            stored = run["subset_error"].sel(rule=rule, size=size, budget="steps").values
            here = errors.sel(rule=rule, size=size, budget="steps")
            assert float(here["error"]) == pytest.approx(stored.mean())
            assert int(here["count"]) == 3
    assert int(errors["diverged"].sum()) == 0
    full = run["subset_error"].sel(rule="full", size=1.0)
    assert float(errors["converged_error"]) == pytest.approx(
        float(full.sel(budget="convergence").mean())
    )
    # Of 24 samples, a quarter: the six of the highest importance over the whole run.
    tau = run["importance"].values.astype(np.float64).sum((0, 1))
    most = selected_samples(node, rule="tau-high", size=0.25).compute()
    np.testing.assert_array_equal(np.flatnonzero(most["kept"]), np.sort(np.argsort(-tau)[:6]))
    kept = node["label"].values[np.argsort(-tau)[:6]]
    empty = errors["missing_classes"].sel(rule="tau-high", size=0.25, budget="steps")
    assert int(empty) == 3 - len(set(kept.tolist()))
    verdicts = section.results["claims"]
    sections = verdicts["section"].values
    assert (sections == "5").sum() == 2
    assert (sections == "4").sum() == 0
    assert (
        "Influence on the final model (section 4 of the paper) was not computed"
        in Path(made.path).read_text()
    )
