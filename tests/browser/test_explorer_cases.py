"""The explorer of damaged, hostile and growing studies and without images; its accessibility."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import SHOWN_ERROR, draw_lasso, file_url, open_browser, read_heatmap, wait_ready
from explored import commit_influence, make_study
from oracles import make_source
from study_here import command, make_config

from sampimp.analysis.explorer import write_explorer
from sampimp.analysis.explorer.growing_study import serve_folder
from sampimp.data import Source

SCRIPT = "<script>alert(1)</script>"


def explore(out: Path, source: Source | None = None, **options) -> Path:
    """Train a small study, and return the page of its explorer."""
    command(make_config(out), source=source)
    return Path(write_explorer(str(out), **options).page)


def serious(page) -> list[str]:
    """Return the serious violations that axe finds, with the elements."""
    found = Axe().run(page).response["violations"]
    return [
        f"{each['id']}: {node['target']}"
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 420])
def test_axe_finds_nothing_serious(chromium, explorer_page, scheme, width):
    context = chromium.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True
    )
    page = context.new_page()
    page.goto(file_url(explorer_page))
    wait_ready(page)
    page.locator("#classes button").first.click()
    page.get_by_role("textbox", name="Name of the selection").fill("zeros")
    page.get_by_role("button", name="Keep the selection").click()
    assert serious(page) == []
    overflow = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert overflow <= 0
    context.close()


def test_class_names_are_text(page, log, tmp_path):
    source = make_source(name="digits")
    source = Source(**{**vars(source), "class_names": (SCRIPT, "=1+1", 'a"b,c')})
    page.on("dialog", lambda dialog: pytest.fail("a script of the data ran"))
    page.goto(file_url(explore(tmp_path, source)))
    wait_ready(page)
    assert page.locator("#classes button").first.inner_text().startswith(SCRIPT)
    page.locator("#classes button").nth(1).click()
    with page.expect_download() as download:
        page.get_by_role("button", name="CSV", exact=True).click()
    text = Path(download.value.path()).read_text()
    assert ",'=1+1," in text  # a spreadsheet shows the text and computes nothing
    assert log.errors == []


NO_NAME = """
    // The name of the graphics processor is hidden, so that WebGL in software is taken for one.
    const getExtension = WebGLRenderingContext.prototype.getExtension;
    WebGLRenderingContext.prototype.getExtension = function (name) {
        return name === "WEBGL_debug_renderer_info" ? null : getExtension.call(this, name);
    };
    window.drawn = 0;
    const drawArrays = WebGLRenderingContext.prototype.drawArrays;
    WebGLRenderingContext.prototype.drawArrays = function (...rest) {
        window.drawn += 1;
        return drawArrays.apply(this, rest);
    };
"""

COLOURED = """() => {
    const canvas = document.querySelector("canvas");
    const { width, height } = canvas;
    const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
    let [coloured, painted] = [0, 0];
    for (let i = 0; i < data.length; i += 4) {
        if (data[i + 3] < 100) continue;
        painted += 1;
        const [r, g, b] = data.slice(i, i + 3);
        if (Math.max(r, g, b) - Math.min(r, g, b) > 40) coloured += 1;
    }
    return [coloured, painted];
}"""


@pytest.mark.parametrize("has_webgl", [True, False])
def test_points_are_drawn_with_and_without_webgl(playwright, explorer_page, has_webgl):
    flags = [] if has_webgl else ["--disable-3d-apis"]
    with open_browser(playwright, *flags) as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        if has_webgl:
            page.add_init_script(NO_NAME)
        page.goto(file_url(explorer_page))
        wait_ready(page)
        page.wait_for_timeout(500)
        coloured, painted = page.evaluate(COLOURED)
        assert painted > 1000
        assert coloured > 0.7 * painted
        draw_lasso(page, [(0.4, 0.4), (0.6, 0.4), (0.6, 0.6), (0.4, 0.6)])
        page.wait_for_timeout(500)
        count = int(page.locator("#count").inner_text().split()[0])
        assert 10 < count < 700
        fewer, still_painted = page.evaluate(COLOURED)
        assert 0 < fewer < 0.7 * coloured  # the others are grey
        assert still_painted > 0.8 * painted
        if has_webgl:
            assert page.evaluate("window.drawn") > 0


def test_data_without_images_show_their_values(page, log, tmp_path):
    source = make_source(name="digits", shape=(3,))
    page.goto(file_url(explore(tmp_path, source)))
    wait_ready(page)
    cell = page.locator("#grid button").first
    sample = int(cell.get_attribute("aria-label").split()[1].rstrip(","))
    expected = ", ".join(str(value) for value in source.train_values[sample])
    page.wait_for_function(
        "text => document.querySelector('#grid button').textContent === text", arg=expected
    )
    assert page.locator("#sample .words").inner_text() == expected
    assert log.errors == []


def test_influence_of_a_sample_is_that_of_the_cube(page, log, tmp_path):
    folder, plan, _ = make_study(tmp_path)
    values = commit_influence(folder, plan, "shuffle-seed1", ["mean", "class:1"])
    page.goto(file_url(write_explorer(str(tmp_path), runs=["all"]).page))
    wait_ready(page)

    def show(sample: int) -> None:
        page.evaluate("s => { location.hash = `sample=${s}` }", sample)
        page.wait_for_function(
            "s => document.querySelector('#sample dd').textContent === s", arg=str(sample)
        )
        page.wait_for_selector("#sample .influence canvas")

    heat = page.locator("#sample .influence canvas")
    for sample in (0, 3, 6):  # 3 is zero, 6 not measured in one cell of the second layer
        show(sample)
        expected = values[:, 0, :, sample].T
        shown = read_heatmap(page, "#sample .influence")
        np.testing.assert_allclose(shown, expected, rtol=SHOWN_ERROR)
        assert heat.get_attribute("aria-label").startswith("influence on mean by layer (3)")
    target = page.get_by_role("combobox", name="Target of influence")
    assert target.locator("option").all_inner_texts() == ["mean", "class:1"]
    target.focus()
    page.keyboard.press("ArrowDown")
    page.wait_for_selector("#sample .influence canvas[aria-label^='influence on class:1']")
    assert target.evaluate("select => document.activeElement === select")
    shown = read_heatmap(page, "#sample .influence")
    np.testing.assert_allclose(shown, values[:, 1, :, 6].T, rtol=SHOWN_ERROR)
    page.wait_for_function("location.hash.includes('target=class')")
    page.reload()
    wait_ready(page)
    page.wait_for_selector("#sample .influence canvas")
    assert "on class:1 by layer" in heat.get_attribute("aria-label")
    page.locator("#pickers select").first.select_option("rand-seed1")
    page.wait_for_selector("#sample .influence", state="hidden")
    page.locator("#pickers select").first.select_option("shuffle-seed1")
    page.wait_for_selector("#sample .influence", state="visible")
    assert log.errors == []
    assert serious(page) == []


def pixel(page, place: tuple[int, int]) -> list[int]:
    """Return the colour of a pixel of the heatmap of influence."""
    return page.locator("#sample .influence canvas").evaluate(
        "(canvas, [x, y]) => [...canvas.getContext('2d').getImageData(x, y, 1, 1).data]", place
    )


def test_colours_of_influence_diverge_from_zero(page, tmp_path):
    folder, plan, _ = make_study(tmp_path)
    values = commit_influence(folder, plan, "shuffle-seed1", ["mean"])
    page.goto(file_url(write_explorer(str(tmp_path)).page) + "#sample=0")
    wait_ready(page)
    page.wait_for_selector("#sample .influence canvas")
    shown = values[:, 0, :, 0]
    epoch, layer = np.unravel_index(np.abs(shown).argmax(), shown.shape)
    red, _, blue, alpha = pixel(page, (int(epoch), int(layer)))
    assert (red > 150 > blue) if shown[epoch, layer] > 0 else (blue > 150 > red)
    assert alpha == 255
    epoch, layer = np.unravel_index(np.abs(shown).argmin(), shown.shape)
    assert min(pixel(page, (int(epoch), int(layer)))) > 240
    page.evaluate("location.hash = 'sample=6'")
    page.wait_for_function("document.querySelector('#sample dd').textContent === '6'")
    page.wait_for_selector("#sample .influence canvas")
    assert pixel(page, (1, 1))[3] == 0  # NaN: not painted
    page.evaluate("location.hash = 'sample=3'")
    page.wait_for_function("document.querySelector('#sample dd').textContent === '3'")
    page.wait_for_selector("#sample .influence canvas")
    assert min(pixel(page, (0, 0))) > 240  # zero


def test_damaged_chunk_is_named_and_not_zero(page, tmp_path):
    command(make_config(tmp_path))
    (chunk,) = tmp_path.glob("trials/*shuffle-seed1-*/record.zarr/nll/c/2/0")
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    page.goto(file_url(write_explorer(str(tmp_path)).page))
    wait_ready(page)
    words = page.locator("#messages").inner_text()
    assert "Damaged: " in words
    assert "nll" in words
    assert "shuffle-seed1" in words
    shown = page.locator("#sample dl").inner_text()
    assert "not measured" in shown


def test_selection_stays_while_the_study_grows(page, log, tmp_path):
    class StoppedError(Exception):
        pass

    def stop(label: str) -> None:
        raise StoppedError

    config = make_config(tmp_path)
    with pytest.raises(StoppedError):
        command(config, committed=stop)
    folder = write_explorer(str(tmp_path)).folder
    with serve_folder(folder) as address:
        page.goto(address)
        wait_ready(page)
        assert page.locator("#progress").inner_text() == "1 of 3 runs"
        draw_lasso(page, [(0.1, 0.1), (0.9, 0.1), (0.9, 0.9), (0.1, 0.9)])
        before = page.locator("#count").inner_text()
        assert not before.startswith("0 ")
        command(config)
        write_explorer(str(tmp_path))
        page.wait_for_function("document.querySelector('#progress').textContent === '3 runs'")
        assert page.locator("#count").inner_text() == before
        run = page.locator("#pickers select").first
        assert run.locator("option").count() == 3
        run.select_option("nlo-seed1")
        page.wait_for_function("location.hash.includes('nlo-seed1')")
        assert page.locator("#count").inner_text() == before
    assert log.errors == []


def test_bundle_is_made_from_its_source(tmp_path):
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("needs node and npm")
    source = Path(__file__).parents[2] / "analysis/explorer/application"
    copy = tmp_path / "application"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("node_modules", "dist"))
    install = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    if subprocess.run(install, cwd=copy, capture_output=True, timeout=200).returncode:
        pytest.skip("npm reaches no registry")
    subprocess.run([npm, "run", "--silent", "build"], cwd=copy, check=True, timeout=60)
    built = {path.name: path.read_bytes() for path in (copy / "dist").iterdir()}
    stored = {path.name: path.read_bytes() for path in (source / "dist").iterdir()}
    assert built == stored


def test_lasso_of_many_samples_is_quick(page, log, tmp_path):
    """A wide bound, since the machine of the tests is shared; `make explore-bench` measures."""
    source = make_source(samples=6000, name="digits")
    command(make_config(tmp_path, batch_size=500), source=source)
    page.goto(file_url(write_explorer(str(tmp_path)).page))
    wait_ready(page)
    for _ in range(4):
        draw_lasso(page, [(0.1, 0.1), (0.9, 0.1), (0.9, 0.9), (0.1, 0.9)])
        page.wait_for_timeout(400)
    times = page.evaluate("performance.getEntriesByName('lasso to paint').map((e) => e.duration)")
    assert len(times) == 4
    assert min(times) < 1500


@pytest.mark.parametrize("wheel", [0, -300, -600, -1200])
def test_texts_of_the_axes_do_not_overlap(page, log, tmp_path, wheel):
    """Also where an axis covers less than a power of ten, so that its ticks have digits."""
    page.goto(file_url(explore(tmp_path / "study")))
    wait_ready(page)
    page.locator(".overlay").first.hover()
    page.mouse.wheel(0, wheel)
    page.wait_for_timeout(300)
    for scatter in page.locator(".overlay").all():
        texts = [text for text in scatter.locator("text").all() if text.text_content()]
        boxes = [(text.text_content(), text.bounding_box()) for text in texts]
        assert len(boxes) > 4
        for number, (text, one) in enumerate(boxes):
            for other_text, other in boxes[:number]:
                apart = (
                    one["x"] + one["width"] <= other["x"]
                    or other["x"] + other["width"] <= one["x"]
                    or one["y"] + one["height"] <= other["y"]
                    or other["y"] + other["height"] <= one["y"]
                )
                assert apart, (text, other_text)
    assert log.errors == []
