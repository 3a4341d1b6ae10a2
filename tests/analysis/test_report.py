"""The report has every number and figure, loads no external file, and accepts missing data."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import made_results as made
import numpy as np
import pytest
import xarray as xr
from rich.console import Console

from sampimp.analysis import report
from sampimp.analysis.example_cube import example_cube
from sampimp.analysis.report import cli, contents, drawing, terminal, trial_facts, write
from sampimp.analysis.report.page import render_page
from sampimp.errors import RecordError, StoreError

ROOT = Path(__file__).parents[2]


class Page(HTMLParser):
    """Attributes and text of a page; fails if a tag is not closed."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.words = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, key, value) for key, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def cube():
    cube = example_cube(
        strategies=("shuffle", "rand", "rsio"),
        seeds=2,
        epochs=4,
        samples=60,
        missing=(),
        diverged={("rsio", 2): 3},
    )
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 5, 4, 1), dtype=np.uint8)
    return cube.assign(image=(("sample", "row", "column", "channel"), pixels))


@pytest.fixture(scope="module")
def section():
    results = made.make_results(epochs=5, samples=100, clusters=3, diverged=("rnlo",))
    cube = example_cube(samples=30, epochs=3)
    return contents.Section(
        name="mnist/<cnn>",
        facts=[("data set", "a < b & c"), *contents.describe_runs(cube, results, 41)],
        results=results,
        drawn=drawing.draw_figures(cube, {"stability": results["stability"]}),
    )


@pytest.fixture(scope="module")
def written(cube, tmp_path_factory):
    """Return a report on a tree of two nodes, one with as few variables as a cube can have."""
    bare = example_cube(strategies=("shuffle", "nlo"), seeds=1, epochs=2, samples=40, states=())
    tree = xr.DataTree.from_dict({"mnist": cube, "other/cnn": bare.drop_vars("nll")})
    tree.attrs = {"learning_rate": 0.1, "hidden": [8, 8, 8], "machine": '{"cpu": "a <fast> one"}'}
    out = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "open_cube", lambda _: tree)
        steps = []
        made = write.write_report(str(out), progress=steps.append)
    return out, made, steps


@pytest.fixture(scope="module")
def page_text(written):
    return Path(written[1].path).read_text()


def test_files_are_written_by_node(written):
    out, made, steps = written
    assert made.path == f"{out}/analysis/report.html"
    assert Path(made.path).is_file()
    names = sorted(path.name for path in (out / "analysis/mnist").glob("*.p*"))
    assert names == sorted(
        f"{plan.name}.{kind}"
        for plan in drawing.FIGURES
        if not plan.optional
        for kind in ("pdf", "png")
    )
    assert (out / "analysis/other/cnn/fig02_decomposition.png").is_file()
    assert [name for name in steps if name.endswith("analysing")] == [
        "mnist: analysing",
        "other/cnn: analysing",
    ]


def test_stored_results_equal_those_of_the_report(written):
    out, made, _ = written
    section = made.sections[0]
    for key, result in section.results.items():
        stored = xr.open_zarr(out / f"analysis/mnist/{key}.zarr", consolidated=False)
        assert stored.attrs["method"] == result.attrs["method"]
        xr.testing.assert_equal(stored.load(), result)


def test_the_page_loads_nothing_from_elsewhere(page_text):
    text, page = page_text, Page(page_text)
    # A caption may contain an address; no attribute may refer to one.
    assert not [item for item in page.attributes if "http" in str(item[2])[:100]]
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) == {"#"}
    assert not [value for _, key, value in page.attributes if key == "src"]
    images = [value for tag, key, value in page.attributes if (tag, key) == ("image", "href")]
    assert images
    assert all(value.startswith("data:image/png;base64,") for value in images)
    links = [value for tag, key, value in page.attributes if key == "href" and tag != "image"]
    assert all(value.startswith(("#", "data:")) for value in links)
    anchors = {value for _, key, value in page.attributes if key == "id"}
    assert {value[1:] for value in links if value.startswith("#")} <= anchors


def test_the_page_gives_the_reason_for_a_missing_figure(written, page_text):
    text = Page(page_text).text
    assert "It needs the parameters of the runs (stored unless switched off)." in text
    assert "It needs two seeds of a reference strategy" in text
    assert "Reason: expected at least two seeds of a reference" in text
    assert "It needs a complete run of shuffle, seed 1, with its NLL." in text
    drawn = {figure.number: bool(figure.png) for figure in written[1].sections[1].drawn}
    assert drawn == {
        "1": False,
        "2": True,
        "3": True,
        "4": False,
        "5": False,
        "7": True,
        "8": False,
        "9": False,
        "10": True,
    }


def test_a_second_report_replaces_the_first(written, page_text, cube, monkeypatch, recwarn):
    out, _, _ = written
    assert "other/cnn" in page_text
    tree = xr.DataTree.from_dict({"mnist": cube})
    monkeypatch.setattr(write, "open_cube", lambda _: tree)
    monkeypatch.setattr(write, "draw_figures", lambda *_, **__: [])
    made = write.write_report(str(out))
    messages = [str(warning.message) for warning in recwarn]
    assert not [message for message in messages if "Zarr" in message]
    assert "other/cnn" not in Path(made.path).read_text()


def test_numbers_verdicts_and_rules_are_on_the_page(section):
    text = Page(render_page([section], {})).text
    assert "0.97 [0.96, 0.98] at epoch 50" in text
    assert "✓ holds" in text
    assert "✗ does not hold" in text
    assert "? not enough data" in text
    assert "lower bound > 0.9" in text
    assert "1 holds, 1 does not hold, 1 lacks data" in text
    curves = section.results["strategy_curves"].sel(strategy="rnlo").isel(epoch=-1)
    error, spread = 100 * float(curves["test_error"]), 100 * float(curves["test_error_se"])
    assert f"RNLO {error:.2f} ± {spread:.2f} % 3 2" in text
    assert "of 41 planned" in text
    assert "Method: made up for <this> test & no other." in text


def test_text_is_escaped(section):
    provenance = {"code": {"note": "<script>alert(1)</script>", "quoted": "\"a\" & 'b'"}}
    text = render_page([section], provenance)
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "high importance &lt;b&gt;exist&lt;/b&gt;" in text
    assert "a &lt; b &amp; c" in text
    page = Page(text)
    assert "<script>alert(1)</script>" in page.text
    assert "upper bound < 0.1 \"or\" 'so'" in page.text
    assert ("h2", "id", "data-mnist--cnn-") in page.attributes


def test_provenance_is_flattened_and_long_lists_are_folded():
    provenance = {
        "hidden": [512, 512],
        "versions": {"torch": "2.13.0", "deep": {"a": 1}},
        "fingerprints": {f"trial-{i}": "ab" for i in range(40)},
    }
    text = render_page([], provenance)
    page = Page(text)
    assert "hidden 512, 512" in page.text
    assert "torch 2.13.0 deep.a 1" in page.text
    assert "fingerprints (40 entries)" in page.text
    assert text.count("<details>") == 1


def test_json_inside_attributes_is_decoded(written, page_text):
    assert written[1].provenance["machine"] == {"cpu": "a <fast> one"}
    assert "cpu a <fast> one" in Page(page_text).text


def test_images_of_representatives_are_in_their_place(cube):
    chosen = xr.DataArray([[7, 3], [59, -1]], dims=("cluster", "rank"))
    images = drawing.read_images(cube, chosen)
    np.testing.assert_array_equal(images[0, 0], cube["image"][7])
    np.testing.assert_array_equal(images[0, 1], cube["image"][3])
    np.testing.assert_array_equal(images[1, 0], cube["image"][59])
    assert (images[1, 1] == 255).all()


def test_versions_are_listed_once_and_every_fingerprint(monkeypatch, tmp_path):
    commits = {
        f"mnist-nlo-seed{seed}-ab": {
            "fingerprint": f"f{seed}",
            "versions": {"torch": "2.13.0", "zarr": "3.1.6"},
            "machine": {"host": f"node{seed}"},
            "seed": seed,
            "epochs": 50,
            "diverged_epoch": 7 if seed == 2 else None,
            "seconds": [3.0] * 50,
            "digests": {"nll": ["00"]},
        }
        for seed in (1, 2)
    }
    monkeypatch.setattr(trial_facts, "read_commits", lambda _: commits)
    trials = tmp_path / "trials"
    for name in commits:
        (trials / name).mkdir(parents=True)
        (trials / name / "trial.json").write_text('{"commit": "c0"}')
    facts = trial_facts.describe_trials(str(tmp_path))
    assert facts["versions"] == {"torch": "2.13.0", "zarr": "3.1.6"}
    assert facts["trials"] == {"commit": "c0"}
    assert facts["machine"] == {"host": "node1, node2"}
    assert facts["fingerprints"] == {
        "mnist-nlo-seed1-ab": "f1, 50 epochs, 150 s",
        "mnist-nlo-seed2-ab": "f2, 50 epochs, diverged in epoch 7, 150 s",
    }
    assert "digests" not in facts


@pytest.mark.parametrize("width", [80, 60, 200])
def test_summary_fits_the_terminal(section, width):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    path = "/a/very/long/path" * 8 + "/report.html"
    terminal.print_summary(contents.Report(path=path, sections=[section]), console)
    lines = console.export_text().splitlines()
    assert all(len(line) <= width for line in lines[:-1])
    assert lines[-1] == f"Report: {path}"
    (row,) = [line for line in lines if line.strip().startswith("RNLO")]
    assert re.fullmatch(r"RNLO\s+\d+\.\d\d ± \d\.\d\d %\s+3\s+2", row.strip())
    text = "\n".join(lines)
    for words in ("✓ holds", "✗ does not hold", "? not enough data", "0.97"):
        assert words in text


def test_a_single_run_has_no_standard_error():
    results = made.make_results(epochs=3, samples=100, clusters=2, seeds=1)
    curves = results["strategy_curves"]
    curves["test_error_se"][:] = np.nan
    curves["test_error"].loc[{"strategy": "sim"}] = np.nan
    rows = {row.strategy: row for row in contents.strategy_rows(results)}
    assert re.fullmatch(r"\d\.\d\d %", rows["rand"].words) or rows["rand"].words.endswith(" %")
    assert "±" not in rows["rand"].words
    assert rows["sim"].words == "—"
    assert contents.strategy_rows({}) == []


def test_a_cube_without_importance_is_a_clear_error(monkeypatch, tmp_path):
    monkeypatch.setattr(write, "open_cube", lambda _: xr.DataTree())
    with pytest.raises(RecordError, match="at least one recorded epoch"):
        write.write_report(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_command_line_prints_an_error_without_traceback(capsys, tmp_path):
    assert cli.main([str(tmp_path / "absent")]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("Expected a study")
    assert "Traceback" not in printed.err
    assert not (tmp_path / "absent").exists()


def test_the_command_line_prints_the_summary(monkeypatch, capsys, section):
    made = contents.Report(path="/x/report.html", sections=[section])
    monkeypatch.setattr(write, "write_report", lambda out, progress: made)
    assert cli.main(["/x"]) == 0
    assert "Report: /x/report.html" in capsys.readouterr().out


def test_the_command_line_prints_a_store_error(monkeypatch, capsys):
    def fail(out, progress):
        raise StoreError("a folder", "a file", out, "choose another")

    monkeypatch.setattr(write, "write_report", fail)
    assert cli.main(["s3://bucket/study"]) == 2
    assert "Where s3://bucket/study" in capsys.readouterr().err


def test_the_facts_of_a_study_under_adam_have_a_note_on_its_first_epoch():
    cube = example_cube(strategies=("shuffle",), seeds=1, epochs=2, samples=10)
    assert "note" not in dict(contents.describe_runs(cube, {}))
    cube["importance"].attrs["optimizer"] = "AdamW"
    assert "from the second on" in dict(contents.describe_runs(cube, {}))["note"]


@pytest.mark.parametrize("module", ["analysis.report", "sampimp.analysis.report"])
def test_the_module_runs_in_a_checkout(module, tmp_path):
    command = [sys.executable, "-m", module, str(tmp_path / "absent")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Expected a study" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("package", ["jinja2", "matplotlib", "rich", "scipy", "sklearn", "tyro"])
def test_a_missing_package_is_an_error_with_its_extra(package, tmp_path):
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        f"from sampimp.analysis.report import main; sys.exit(main([{str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "To do pip install 'sampimp[report]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_public_names_of_the_package_are_imported_at_first_use():
    for name in report.__all__:
        assert getattr(report, name).__module__.startswith("sampimp.analysis.report.")
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = report.absent
