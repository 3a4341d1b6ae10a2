"""No text of a store puts script into the report; no link brings a file into it from outside."""

from html.parser import HTMLParser

import oracles
import pytest

from sampimp.analysis import report
from sampimp.data import Source
from sampimp.errors import StoreError

SCRIPT = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
MATH = r"$\frac{1}{$ $\unknown$ \x <b>"


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs


def make_study(out, texts):
    """Make a study whose texts are hostile; trial.json has them as keys and values."""
    made = oracles.make_source()
    names = tuple(f"{text} {label}" for label, text in zip(range(99), texts * 50, strict=False))
    source = Source(
        **{**vars(made), "name": texts[0], "class_names": names[: len(made.class_names)]}
    )
    plan = oracles.make_plan({"one": source}, {"shuffle": (1,)}, epochs=2)
    folder = oracles.start_study(out, plan, {"one": source})
    oracles.run_trials(folder, plan, {"one": source})
    for trial in (out / "trials").iterdir():
        facts = {text: {"versions": text, text: [text]} for text in texts}
        (folder / "trials" / trial.name).write_json("trial.json", facts)
    return folder


def test_no_text_of_a_store_becomes_markup_or_breaks_a_figure(tmp_path):
    make_study(tmp_path, [SCRIPT, MATH])
    report.write_report(str(tmp_path))
    text = (tmp_path / "analysis/report.html").read_text()
    tags = Tags(text)
    assert "script" not in tags.tags
    assert not [name for name, _ in tags.attributes if name.startswith("on")]
    sources = [value for name, value in tags.attributes if name in ("src", "href")]
    assert all(value.startswith(("data:image/png", "data:,", "#", "https://")) for value in sources)
    assert "&lt;script&gt;" in text  # it is shown as text
    assert MATH.replace("<b>", "&lt;b&gt;") in text


@pytest.mark.parametrize("name", ["trial.json", "COMMIT.json", "record.zarr"])
def test_no_file_from_outside_comes_into_the_report(tmp_path, name):
    make_study(tmp_path / "study", ["a"])
    (trial,) = (tmp_path / "study" / "trials").iterdir()
    (trial / name).rename(tmp_path / "secret")
    (trial / name).symlink_to(tmp_path / "secret")
    with pytest.raises(StoreError, match="a link to"):
        report.write_report(str(tmp_path / "study"))
    assert not (tmp_path / "study/analysis/report.html").exists()


def test_the_report_is_not_written_through_a_link(tmp_path):
    make_study(tmp_path / "study", ["a"])
    (tmp_path / "outside").mkdir()
    (tmp_path / "study/analysis").symlink_to(tmp_path / "outside")
    with pytest.raises(StoreError, match="a link to"):
        report.write_report(str(tmp_path / "study"))
    assert not list((tmp_path / "outside").iterdir())
