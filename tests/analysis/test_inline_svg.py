"""A figure inside the page is small, the same every time, and no text of it becomes markup."""

import gzip
import re
import subprocess
import sys
from xml.etree import ElementTree

import made_results as made
import numpy as np
import pytest
from matplotlib.figure import Figure

from sampimp.analysis import figures
from sampimp.analysis.figures.inline_svg import INK, LEAST_LUMINANCE, PAPER, dark_color

EVIL = '"><script>alert(1)</script> id="x" #0072b2'

DRAW = """
import hashlib, sys
import made_results as made
from sampimp.analysis import figures
results = made.make_results(epochs=12, samples=400, clusters=3)
drawn = [
    figures.draw_curves(results["strategy_curves"]),
    figures.draw_groups(results["importance_groups"]),
    figures.draw_importance_against_nll(results["importance_against_nll"]),
    figures.draw_class_nll(results["strategy_curves"]),
]
text = "".join(figures.inline_svg(figure, "a", "b") for figure in drawn)
print(hashlib.sha256(text.encode()).hexdigest())
"""


def test_two_processes_draw_the_same_bytes():
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{DRAW}"]
    runs = [
        subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert len(runs[0].strip()) == 64


def test_line_plots_are_below_40_kilobytes():
    results = made.make_results(epochs=50, samples=200, clusters=3)
    for figure in (
        figures.draw_stability(results["stability"]),
        figures.draw_curves(results["strategy_curves"]),
        figures.draw_groups(results["importance_groups"]),
    ):
        assert len(gzip.compress(figures.inline_svg(figure, "a", "b").encode())) < 40_000


def test_the_points_of_a_line_are_those_of_the_figure():
    figure = Figure((4, 3))
    axes = figure.add_axes((0.1, 0.1, 0.8, 0.8))
    (line,) = axes.plot([0, 1, 2, 3], [1, 3, 2, 5], color="#0072b2")
    root = ElementTree.fromstring(figures.inline_svg(figure, "a", "b"))
    (path,) = [
        e.get("d") for e in root.iter("path") if "stroke:var(--c0072b2" in e.get("style", "")
    ]
    drawn = np.array(re.findall(r"-?[\d.]+", path), dtype=float).reshape(-1, 2)
    expected = axes.transData.transform(line.get_xydata()) * 72 / figure.dpi
    np.testing.assert_allclose(drawn[:, 0], expected[:, 0], atol=0.011)
    np.testing.assert_allclose(drawn[:, 1], 3 * 72 - expected[:, 1], atol=0.011)


def test_text_stays_text():
    figure = Figure((4, 3))
    figure.text(0.5, 0.5, EVIL)
    text = figures.inline_svg(figure, EVIL, "b")
    root = ElementTree.fromstring(text)
    assert [element.text for element in root.iter("text")] == [EVIL]
    assert root.get("aria-label") == EVIL
    assert "<script" not in text
    assert "font-family" not in text


def test_ids_have_the_prefix_and_are_those_referred_to():
    results = made.make_results(epochs=5, samples=100, clusters=3)
    figure = figures.draw_groups(results["importance_groups"])  # clips, markers and hatches
    text = figures.inline_svg(figure, "a", "mine")
    ids = [
        element.get("id") for element in ElementTree.fromstring(text).iter() if element.get("id")
    ]
    assert len(ids) == len(set(ids)) > 5
    assert all(name.startswith("mine-") for name in ids)
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', text)) == set(ids)


@pytest.mark.parametrize("color", ["440154", "882255", "0072b2", "d55e00", "009e73", "555555"])
def test_every_colour_is_seen_on_the_dark_background(color):
    def luminance(rgb):
        share = np.array(rgb) / 255
        linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
        return linear @ (0.2126, 0.7152, 0.0722)

    dark = dark_color(color)
    rgb = [int(dark[at : at + 2], 16) for at in (1, 3, 5)]
    assert (luminance(rgb) + 0.05) / (luminance(PAPER) + 0.05) > 3
    assert luminance(INK) > LEAST_LUMINANCE


def test_the_values_of_the_dark_scheme_are_for_the_colours_that_are_used():
    figure = Figure((4, 3))
    figure.add_axes((0.1, 0.1, 0.8, 0.8)).plot([0, 1], color="#882255")
    text = figures.inline_svg(figure, "a", "b")
    values = dict(rule.split(":") for rule in figures.dark_colors([text]).split(";"))
    assert {f"--c{color}" for color in re.findall(r"var\(--c(\w+),", text)} == set(values)
    assert values["--cffffff"] == "#14181c"
    assert values["--c000000"] == "#e6e9ec"
    assert values["--c882255"] == dark_color("882255") != "#882255"
