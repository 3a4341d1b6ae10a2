"""The explorer, opened from its folder: selections, histories, exports, URL and keyboard."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from browser import SHOWN_ERROR, draw_lasso, file_url, read_heatmap, wait_ready

from sampimp import open_cube, to_frame

LASSO = [(0.2, 0.9), (0.25, 0.4), (0.6, 0.2), (0.8, 0.5), (0.5, 0.5), (0.6, 0.8)]
"""Corners of a lasso that is not convex, as shares of the scatter."""


@pytest.fixture(scope="module")
def cube(digits_study):
    return open_cube(digits_study)["digits"].to_dataset()


@pytest.fixture
def explorer(page, explorer_page):
    """Return the page with the explorer of the digits, ready."""
    page.goto(file_url(explorer_page))
    wait_ready(page)
    return page


def count(page) -> int:
    return int(page.locator("#count").inner_text().split()[0].replace(",", ""))


def table_shows(page, selected):
    """Wait until the table, drawn after the plots, has `selected` ticked rows (one page)."""
    page.wait_for_function(
        "n => document.querySelectorAll('#table input:checked').length === n", arg=selected
    )


def save(page, button, path):
    """Press a button of the exports, and return the file."""
    with page.expect_download() as download:
        page.get_by_role("button", name=button, exact=True).click()
    target = path / download.value.suggested_filename
    download.value.save_as(target)
    return target


def even_odd(x, y, corners):
    """Return whether each point is inside of a polygon: crossings of a ray to the right, odd."""
    inside = np.zeros(len(x), bool)
    for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
        crosses = (y0 > y) != (y1 > y)
        with np.errstate(divide="ignore", invalid="ignore"):
            at = x0 + (y - y0) / (y1 - y0) * (x1 - x0)
        inside ^= crosses & (x < at)
    return inside


def test_page_opens_from_its_folder_alone(explorer, log, explorer_page):
    assert log.errors == []
    folder = file_url(explorer_page.parent)
    outside = [url for url in log.requests if not url.startswith((folder, "data:", "blob:"))]
    assert outside == []
    assert len(log.requests) > 5
    assert count(explorer) == 0
    assert explorer.locator("#progress").inner_text() == "3 runs"


def test_first_canvas_is_the_scatter_on_the_first_screen(explorer):
    box = explorer.locator("canvas").first.bounding_box()
    assert box["y"] + box["height"] < 900
    assert box["x"] + box["width"] < 1280
    assert min(box["width"], box["height"]) > 250


@pytest.mark.parametrize("scale", ["log", "linear"])
def test_exported_lasso_is_an_even_odd_test(explorer, cube, tmp_path, scale):
    if scale == "linear":
        for box in explorer.locator("#axes-0 input[type=checkbox]").all():
            box.uncheck()
    corners = LASSO if scale == "log" else [(x * 0.3, 1 - (1 - y) * 0.3) for x, y in LASSO]
    draw_lasso(explorer, corners)
    selection = json.loads(save(explorer, "JSON", tmp_path).read_text())
    assert selection["count"] == count(explorer) == len(selection["indices"])
    (step,) = selection["steps"]
    assert step["tool"] == "lasso"
    assert (step["x"]["column"], step["y"]["column"]) == ("nll", "importance")
    run = cube.sel(strategy="shuffle", seed=1)
    nll = run["nll"].isel(epoch=-1).values
    tau = run["importance"].sum(("epoch", "layer"), dtype=np.float64).values.astype(np.float32)
    axis = np.log10 if scale == "log" else np.asarray
    polygon = [(axis(x), axis(y)) for x, y in np.asarray(step["polygon"], np.float64)]
    with np.errstate(divide="ignore"):
        x, y = axis(nll.astype(np.float64)), axis(tau.astype(np.float64))
    inside = even_odd(x, y, polygon)
    assert 20 < inside.sum() < 1500
    assert np.flatnonzero(inside).tolist() == selection["indices"]
    assert step["x"]["scale"] == step["y"]["scale"] == scale


def test_history_of_a_sample_is_that_of_the_cube(explorer, cube):
    explorer.locator("#grid button").nth(3).click()
    sample = int(explorer.locator("#sample dd").first.inner_text())
    explorer.wait_for_function(
        "s => document.querySelector('#sample dd').textContent === s", arg=str(sample)
    )
    stored = cube["importance"].sel(strategy="shuffle", seed=1, sample=sample)
    shown = read_heatmap(explorer, "#sample")
    np.testing.assert_allclose(shown, stored.transpose("layer", "epoch").values, rtol=SHOWN_ERROR)


def test_mean_history_of_a_selection_is_that_of_the_cube(explorer, cube, tmp_path):
    draw_lasso(explorer, LASSO)
    indices = json.loads(save(explorer, "JSON", tmp_path).read_text())["indices"]
    run = cube["importance"].sel(strategy="shuffle", seed=1)
    expected = run.isel(sample=indices).mean("sample", dtype=np.float64).transpose("layer", "epoch")
    np.testing.assert_allclose(
        read_heatmap(explorer, "#history-heat"), expected.values, rtol=SHOWN_ERROR
    )


BIN_ERROR = 2**-6 + 2e-3
"""Quantiles are the middle of a bin of 3 %, of codes and digits that are rounded."""


@pytest.mark.parametrize("lasso", [LASSO, [(0.02, 0.02), (0.98, 0.02), (0.98, 0.75), (0.02, 0.75)]])
def test_lines_and_bands_are_means_and_quantiles_of_the_cube(explorer, cube, tmp_path, lasso):
    draw_lasso(explorer, lasso)
    indices = json.loads(save(explorer, "JSON", tmp_path).read_text())["indices"]
    assert 20 < len(indices) < 1480
    rest = np.setdiff1d(np.arange(1500), indices)
    beta = cube["importance"].sel(strategy="shuffle", seed=1).sum("layer").values.astype(np.float64)
    for row in ("total", "nll"):
        if row == "nll":
            explorer.locator("#history-row select").select_option(label="NLL")
            beta = cube["nll"].sel(strategy="shuffle", seed=1).values.astype(np.float64)
        plot = explorer.locator("#history .u-over")
        plot.scroll_into_view_if_needed()
        box = plot.bounding_box()
        for epoch, share in enumerate((0.02, 0.5, 0.98)):
            explorer.mouse.move(box["x"] + share * box["width"], box["y"] + 0.5 * box["height"])
            legend = explorer.locator("#history .u-legend .u-value").all_inner_texts()
            assert legend[0] == str(epoch + 1)
            shown = np.array(legend[1:], float)
            for first, samples in ((0, indices), (3, rest)):
                values = beta[epoch, samples]
                np.testing.assert_allclose(shown[first], values.mean(), rtol=SHOWN_ERROR)
                ends = np.quantile(values, [0.1, 0.9], method="inverted_cdf")
                np.testing.assert_allclose(shown[first + 1 : first + 3], ends, rtol=BIN_ERROR)


def test_ways_to_combine(explorer):
    size = 1500
    chip = explorer.locator("#classes button").first
    chip.click()
    first = count(explorer)
    explorer.locator("#classes button").nth(1).click()
    both = count(explorer)
    assert first < both < size
    explorer.get_by_role("button", name="Invert").click()
    assert count(explorer) == size - both
    explorer.get_by_role("button", name="Undo").click()
    assert count(explorer) == both
    explorer.get_by_role("textbox", name="Name of the selection").fill("zeros and ones")
    explorer.get_by_role("button", name="Keep the selection").click()
    draw_lasso(explorer, LASSO)
    lasso = count(explorer)
    explorer.get_by_role("button", name="Intersect: zeros and ones").click()
    common = count(explorer)
    explorer.get_by_role("button", name="Undo").click()
    explorer.get_by_role("button", name="Remove: zeros and ones").click()
    assert count(explorer) == lasso - common
    explorer.get_by_role("button", name="Add: zeros and ones").click()
    assert count(explorer) == lasso - common + both
    explorer.keyboard.press("Escape")
    assert count(explorer) == 0


def test_click_selects_a_sample_and_shows_it(explorer):
    ring = explorer.locator("#scatter-0 .ring").bounding_box()
    explorer.mouse.click(ring["x"] + ring["width"] / 2, ring["y"] + ring["height"] / 2)
    assert count(explorer) == 1


def test_copied_url_restores_everything(explorer, explorer_page, chromium):
    draw_lasso(explorer, LASSO)
    explorer.locator("#axes-1 select").first.select_option("variability")
    explorer.locator("#pickers select").nth(1).select_option("importance")
    explorer.get_by_role("button", name="Add", exact=True).click()
    explorer.locator("#grid button").nth(2).click()
    explorer.locator("#sorting select").nth(1).select_option("up")
    explorer.get_by_role("textbox", name="Name of the selection").fill("mine, 100 % & more")
    explorer.get_by_role("button", name="Keep the selection").click()
    box = explorer.locator("canvas").first.bounding_box()
    explorer.mouse.move(box["x"] + 100, box["y"] + 100)
    explorer.mouse.wheel(0, -300)
    explorer.wait_for_timeout(500)

    def state(page):
        return page.evaluate(
            """() => {
            const texts = (css) => [...document.querySelectorAll(css)].map((e) => e.textContent);
            return ({
                count: document.querySelector("#count").textContent,
                picked: [...document.querySelectorAll("select")].map((each) => each.value),
                pressed: texts("[aria-pressed=true]"),
                sample: document.querySelector("#sample dd").textContent,
                first: document.querySelector("#grid button").title,
                named: document.querySelector("#named li").textContent,
                ticks: texts("#scatter-0 text"),
            }); }"""
        )

    before = state(explorer)
    other = chromium.new_page(viewport={"width": 1280, "height": 900})
    other.goto(explorer.url)
    wait_ready(other)
    assert state(other) == before
    assert "mine, 100 % & more" in before["named"]
    other.close()


def test_exported_snippet_trains_on_the_selection(explorer, cube, tmp_path):
    draw_lasso(explorer, LASSO)
    indices = json.loads(save(explorer, "JSON", tmp_path).read_text())["indices"]
    np.testing.assert_array_equal(np.load(save(explorer, ".npy", tmp_path)), indices)
    snippet = save(explorer, "Python", tmp_path).read_text()
    script = (
        "import torch\n"
        "train_set = torch.utils.data.TensorDataset(torch.arange(1500))\n"
        f"{snippet}\n"
        "kept = [int(sample[0]) for sample in train_subset]\n"
        "print(kept == selected.tolist(), len(train_subset) + len(train_rest))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["True", "1500"]
    rows = list(csv.DictReader(save(explorer, "CSV", tmp_path).open(newline="")))
    assert [int(row["sample"]) for row in rows] == indices
    frame = to_frame(cube).loc[indices]
    assert set(frame) - set(rows[0]) == {"label", "correctness_bound"}
    assert set(rows[0]) - set(frame) == {"sample", "seed_spread_shuffle"}
    assert [row.pop("class_name") for row in rows] == frame["class_name"].tolist()
    for name in set(rows[0]) & set(frame):
        values = [np.float32(row[name]) for row in rows]
        np.testing.assert_allclose(values, frame[name].astype(np.float32), rtol=2e-7, err_msg=name)


def test_selection_by_keyboard_alone(explorer):
    announced = explorer.locator("#count")
    assert announced.get_attribute("aria-live") == "polite"

    def tab_to(selector):
        for _ in range(120):
            if explorer.evaluate("s => document.activeElement?.matches(s) ?? false", selector):
                return
            explorer.keyboard.press("Tab")
        raise AssertionError(f"{selector} cannot be reached by Tab")

    tab_to(".chip")
    explorer.keyboard.press("Space")
    of_class = count(explorer)
    assert 100 < of_class < 200
    tab_to("#ranges input[type=range]")
    explorer.keyboard.press("End")
    explorer.keyboard.press("ArrowLeft")
    before = count(explorer)
    assert 1 <= before < 10
    table_shows(explorer, before)
    tab_to("#table input[type=checkbox]")
    explorer.keyboard.press("Space")
    assert count(explorer) == before - 1


def test_touching_every_run_leaves_no_error(explorer, log):
    run = explorer.locator("#pickers select").first
    for value in ("nlo-seed1", "shuffle-seed2"):
        run.select_option(value)
        explorer.wait_for_function("v => location.hash.includes(v)", arg=value)
    assert "holds the history of shuffle-seed1" in explorer.locator("#history-row").inner_text()
    assert log.errors == []
