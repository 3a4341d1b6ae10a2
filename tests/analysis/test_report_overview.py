"""The report's first screen: findings, samples, strategies and verdicts are those of the study."""

import io
import itertools
import re
from html.parser import HTMLParser

import made_results as made
import numpy as np
import pytest
import xarray as xr
from PIL import Image

from sampimp.analysis.claims.table import CLAIMS
from sampimp.analysis.claims.wording import write_claim, write_finding, write_number
from sampimp.analysis.example_cube import example_cube
from sampimp.analysis.report import contents, write
from sampimp.analysis.report.findings import count_verdicts, write_findings
from sampimp.analysis.report.page import render_page
from sampimp.analysis.report.page_text import hide_paths
from sampimp.analysis.report.sample_strip import COUNT, rank_samples
from sampimp.analysis.report.strategy_dots import place_dots

EVIL = "<script>alert(1)</script>"


class Outline(HTMLParser):
    """Levels of the headings, ids, links and their text."""

    def __init__(self, text):
        super().__init__()
        self.levels, self.ids, self.links, self.tags = [], [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        if re.fullmatch("h[1-6]", tag):
            self.levels.append(int(tag[1]))
        if "id" in attrs:
            self.ids.append(attrs["id"])
        if tag == "a":
            self.links.append(attrs["href"])


@pytest.fixture(scope="module")
def cube():
    cube = example_cube(strategies=("shuffle", "rand"), seeds=2, epochs=3, samples=70, missing=())
    pixels = np.random.default_rng(0).integers(0, 256, (70, 5, 4, 1), dtype=np.uint8)
    cube = cube.assign(image=(("sample", "row", "column", "channel"), pixels))
    return cube.assign_attrs(class_names=[EVIL, "b", "c"], dataset="folder:/data/me/secret/pets")


def section_of(cube, results=None, strip=None):
    results = {} if results is None else results
    return contents.Section(
        name="pets", facts=contents.describe_runs(cube, results, 4), results=results, strip=strip
    )


def tau_of(cube, strategy="shuffle", seed=1):
    beta = cube["importance"].sel(strategy=strategy, seed=seed).compute()
    return beta.transpose("sample", ...).values.astype(float).reshape(70, -1).sum(axis=1)


def test_the_strip_has_the_ends_of_an_independent_sort(cube):
    strip = rank_samples(cube)
    tau = tau_of(cube)
    order = sorted(range(70), key=lambda i: -tau[i])
    assert [sample.position for sample in strip.most] == order[:COUNT]
    assert [sample.position for sample in strip.least] == order[::-1][:COUNT]
    names = cube.attrs["class_names"]
    for sample in (*strip.most, *strip.least):
        assert sample.label == names[int(cube["label"][sample.position])]
        assert sample.share == pytest.approx(tau[sample.position] / tau.sum())
    picture = np.asarray(Image.open(io.BytesIO(strip.sprite)))
    assert picture.shape == (2 * 5, COUNT * 4)
    for row, end in enumerate((strip.most, strip.least)):
        for column, sample in enumerate(end):
            cell = picture[5 * row : 5 * row + 5, 4 * column : 4 * column + 4]
            np.testing.assert_array_equal(cell, cube["image"][sample.position, ..., 0])


def test_a_sample_without_measured_importance_is_in_no_rank_and_is_not_zero(cube):
    holes = cube.copy(deep=True)
    holes["importance"] = holes["importance"].where(~holes["sample"].isin([3, 4]))
    strip = rank_samples(holes)
    positions = {sample.position for sample in (*strip.most, *strip.least)}
    assert not positions & {3, 4}
    tau = np.delete(tau_of(cube), [3, 4])
    assert sum(s.share for s in strip.most) == pytest.approx(
        np.sort(tau)[-COUNT:].sum() / tau.sum()
    )


def test_the_first_complete_run_stands_in_for_the_reference():
    cube = example_cube(
        strategies=("shuffle", "rand"),
        seeds=2,
        samples=70,
        missing=(),
        diverged={("shuffle", 1): 2},
    )
    assert rank_samples(cube).run == "shuffle, seed 2"
    order = np.argsort(-tau_of(cube, seed=2), kind="stable")
    assert [sample.position for sample in rank_samples(cube).most] == order[:COUNT].tolist()
    nothing = example_cube(
        strategies=("rand",), seeds=1, samples=70, missing=(), diverged={("rand", 1): 2}
    )
    assert rank_samples(nothing) is None
    assert "that takes one complete run" in render_page([section_of(nothing)], {})


def test_a_sample_names_its_file(cube):
    files = [f"train/b/{number}<b>.png" for number in range(70)]
    named = cube.assign_coords(file=("sample", files))
    strip = rank_samples(named)
    assert [sample.file for sample in strip.most] == [files[each.position] for each in strip.most]
    page = render_page([section_of(named, strip=strip)], {})
    assert f"train/b/{strip.most[0].position}&lt;b&gt;.png: " in page
    assert rank_samples(cube).most[0].file == ""


def test_rows_stand_in_for_images():
    cube = example_cube(strategies=("shuffle",), seeds=1, epochs=2, samples=50)
    strip = rank_samples(cube, lambda position: np.array([position, 0.5]))
    assert strip.sprite == b""
    assert strip.most[0].row == f"{strip.most[0].position}, 0.5"
    text = render_page([section_of(cube, strip=strip)], {})
    assert f"<td>{strip.least[3].position}, 0.5</td>" in text
    texts = rank_samples(cube, lambda position: f"{EVIL} " + "word " * 50)
    page = render_page([section_of(cube, strip=texts)], {})
    assert "script" not in Outline(page).tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt; word" in page


@pytest.mark.parametrize("logarithmic", [False, True])
def test_dots_and_errors_are_those_of_numpy(logarithmic):
    rng = np.random.default_rng(1)
    errors = rng.uniform(0.02, 0.03, (3, 5))
    if logarithmic:
        errors[2] = rng.uniform(0.7, 0.9, 5)
    mean, se = errors.mean(1), errors.std(1, ddof=1) / np.sqrt(5)
    rows = [
        contents.StrategyRow(strategy=n, mean=m, error=e, runs=5, started=5, diverged=0)
        for n, m, e in zip(("nlo", "rand", "sim"), mean, se, strict=True)
    ]
    absent = {"mean": np.nan, "error": np.nan, "runs": 0, "started": 5, "diverged": 5}
    plot = place_dots([contents.StrategyRow(strategy="sio", **absent), *rows])
    assert plot.is_logarithmic is logarithmic
    scale = np.log if logarithmic else np.asarray
    low, high = scale((mean - se).min()), scale((mean + se).max())
    for dot in plot.dots[:-1]:
        place = [("nlo", "rand", "sim").index(dot.row.strategy)]
        for at, value in ((dot.mean, mean), (dot.low, mean - se), (dot.high, mean + se)):
            assert at == pytest.approx(5 + 90 * (scale(value[place][0]) - low) / (high - low))
    assert [dot.row.strategy for dot in plot.dots[:-1]] == [
        rows[i].strategy for i in mean.argsort()
    ]
    assert plot.dots[-1].row.strategy == "sio"
    assert not plot.dots[-1].is_drawn
    assert plot.reference == next(dot.mean for dot in plot.dots if dot.row.strategy == "rand")
    for place, label in plot.ticks:
        assert place == pytest.approx(5 + 90 * (scale(float(label) / 100) - low) / (high - low))


def test_one_run_has_a_dot_without_an_error(cube):
    row = contents.StrategyRow(
        strategy="rand", mean=0.2, error=np.nan, runs=1, started=1, diverged=0
    )
    (dot,) = place_dots([row]).dots
    assert dot.mean == pytest.approx(50)
    assert not dot.has_error
    assert place_dots([]).dots == []


def test_the_sentence_of_findings_is_made_by_rule():
    def claim(section, verdict, finding=""):
        return {"section": section, "verdict": verdict, "finding": finding}

    claims = [
        claim("3.2", "does not hold", "a is 1"),
        claim("3.2", "does not hold", "b is 2"),
        claim("3.3", "holds"),
        claim("3.3", "holds", "c is 3"),
        claim("3.3", "holds", "d is 4"),
        claim("3.4", "not enough data", "e is 5"),
        claim("3.5", "holds", "f is 6"),
        claim("3.6", "holds", "g is 7"),
    ]
    assert write_findings(claims) == (
        "Of 8 claims, 5 hold, 2 do not hold, 1 lacks data: "
        "c is 3; f is 6; against the paper, a is 1."
    )
    assert count_verdicts([claim("3", "does not hold")] * 6) == "6 do not hold"
    assert "No claim can be judged yet" in write_findings([claim("3", "not enough data")])
    assert "No claim can be judged yet" in write_findings([])


def test_every_claim_is_written_in_words_with_unit_and_interval():
    assert write_number("ratio", (4.31, 3.92, 4.36)) == "4.3 (3.9 to 4.4)"
    assert (
        write_number("points", (-0.001, -0.0019, -0.0002)) == "lower by 0.10 points (0.02 to 0.19)"
    )
    assert write_number("ratio", (np.inf, np.nan, np.nan)) == "infinity"
    for claim in CLAIMS:
        words = write_claim(claim, (0.5, 0.4, 0.6))
        assert re.search(
            r"0\.\d+ .*\(0\.4\d* to 0\.6\d*\)|50\.\d+ .*\(40\.0.* to 60\.0.*\)", words
        ), words
        assert write_claim(claim, (np.nan,) * 3).startswith(("none", "not computed: sampimp"))
        assert write_finding(claim, (np.nan,) * 3) == ""
        assert claim.sentence[0].isupper()
        assert claim.sentence.endswith(".")
        assert len(claim.short) <= 32
    output = next(claim for claim in CLAIMS if "importance per parameter" in claim.sentence)
    assert write_claim(output, (4.31, 3.92, 4.36)) == "at least 4.3 (3.9 to 4.4) times the next"


@pytest.fixture(scope="module")
def written(cube, tmp_path_factory):
    """Return a study's folder with the page of a report."""
    out = tmp_path_factory.mktemp("study")
    (out / "analysis/explore").mkdir(parents=True)
    (out / "analysis/explore/index.html").write_text("")
    tree = xr.DataTree.from_dict({"pets": cube})
    tree.attrs = {"study": str(out), "source": "/data/me/secret/pets", "note": "from /data/me/x.py"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "open_cube", lambda _: tree)
        made = write.write_report(str(out))
    return out, made, (out / "analysis/report.html").read_text()


def test_chips_and_samples_link_to_what_is_there(written):
    _, made, text = written
    outline = Outline(text)
    claims = contents.claim_rows(made.sections[0].results)
    chips = [link for link in outline.links if "-claim-" in link]
    assert len(chips) == len(claims) > 20
    assert {link[1:] for link in outline.links if link.startswith("#")} <= set(outline.ids)
    assert len(set(outline.ids)) == len(outline.ids)
    strip = made.sections[0].strip
    samples = [link for link in outline.links if "select=" in link]
    assert samples == [
        f"explore/index.html#node=pets&select={sample.position}"
        for sample in (*strip.most, *strip.least)
    ]


def test_without_an_explorer_its_command_is_shown(cube):
    text = render_page([section_of(cube, strip=rank_samples(cube))], {})
    assert "sampimp explore OUT" in text
    assert "explore/index.html" not in text


def test_headings_are_in_order_and_regions_have_names_of_their_own(written):
    names = re.findall(r'role="region" aria-label="([^"]*)"', written[2])
    assert len(names) == len(set(names)) > 5
    levels = Outline(written[2]).levels
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_no_path_of_the_machine_is_in_the_page(written):
    out, _, text = written
    assert str(out) not in text
    assert "/data/me" not in text
    assert "secret" not in text
    assert "from x.py" in text
    assert "open_cube(&#39;OUT&#39;)" in text
    assert (
        hide_paths("3/4 of a/b, <b>x</b>, s3://bucket/key")
        == "3/4 of a/b, <b>x</b>, s3://bucket/key"
    )


def test_no_class_name_becomes_markup(written):
    assert "script" not in Outline(written[2]).tags
    assert "&lt;script&gt;alert(1)" in written[2]


def test_many_layers_and_made_up_results_make_a_page():
    results = made.make_results(layers=60, epochs=5, samples=100, clusters=3, diverged=("rnlo",))
    cube = example_cube(samples=30, epochs=3)
    text = render_page([section_of(cube, results)], {})
    assert "2 hold" not in text
    assert "Of 3 claims, 1 holds, 1 does not hold, 1 lacks data" in text
