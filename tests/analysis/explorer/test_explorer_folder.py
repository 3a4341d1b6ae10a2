"""Which files an explorer writes: cached parts, damage, hostile text, buckets and other folders."""

import json
import shutil

import numpy as np
import oracles
import pytest
from explored import (
    Written,
    commit_influence,
    commit_trial,
    damage_chunk,
    make_study,
    write,
)
from memory_bucket import serving
from study_here import QUIET

from sampimp.analysis.explorer import explore, explorer_folder, write_explorer
from sampimp.analysis.explorer.choice import MEGABYTES, Choice
from sampimp.analysis.explorer.explorer_folder import script
from sampimp.data import Source
from sampimp.errors import ConfigError, StoreError
from sampimp.store.location import Folder
from sampimp.store.manifests import file_damage, read_manifest_of, strays
from sampimp.sweeps import full_study


def changed(before, after):
    """Return the files that were written or removed."""
    return {name for name in before | after if before.get(name) != after.get(name)}


def contents(written):
    """Return the content of each file."""
    return {name: content for name, (_, content) in written.files().items()}


def assert_listed(folder):
    """Assert that analysis.manifest.json lists the files as they are."""
    files = read_manifest_of(folder, "analysis")
    assert not strays(files)
    assert not [path for path in files.files if file_damage(files, path)]


def test_a_second_write_touches_nothing(tmp_path):
    folder, _, _ = make_study(tmp_path)
    written, made = write(tmp_path)
    assert made.changes == len(written.files())
    assert_listed(folder)
    before, manifest = written.files(), (tmp_path / "analysis.manifest.json").stat()
    _, made = write(tmp_path)
    assert made.changes == 0
    assert written.files() == before
    assert (tmp_path / "analysis.manifest.json").stat() == manifest


def test_one_more_run_writes_its_parts_alone(tmp_path):
    folder, plan, _ = make_study(tmp_path)
    before = write(tmp_path, runs=["all"])[0].files()
    commit_trial(folder, plan, "rand-seed2")
    written, _ = write(tmp_path, runs=["all"])
    after = written.files()
    new = changed(before, after)
    own = {name for name in new if "rand-seed2" in name}
    assert len(own) == 2  # columns, and one page of its history
    (shared,) = (name for name in after if "/shared-" in name)
    assert new == own | {"data/study.js", shared}
    assert_listed(folder)


def test_influence_writes_its_parts_and_the_columns_of_its_run_alone(tmp_path):
    folder, plan, _ = make_study(tmp_path)
    before = write(tmp_path, runs=["all"])[0].files()
    commit_influence(folder, plan, "rand-seed1", ["mean"])
    middle = write(tmp_path, runs=["all"])[0].files()
    new = changed(before, middle) - {"data/study.js"}
    assert {name.split("/")[-1][:14] for name in new} == {"influence-rand", "run-rand-seed1"}
    commit_influence(folder, plan, "rand-seed1", ["class:0", "class:1"])
    written, _ = write(tmp_path, runs=["all"])
    new = changed(middle, written.files())
    assert not [name for name in new if "/influence-rand-seed1-mean-" in name]
    assert len([name for name in new if "/influence-" in name]) == 2
    write(tmp_path, runs=["shuffle:1"])
    assert not [name for name in written.files() if "/influence-" in name]
    assert_listed(folder)


def test_damaged_influence_is_named_and_nan(tmp_path):
    folder, plan, _ = make_study(tmp_path)
    values = commit_influence(folder, plan, "shuffle-seed1", ["mean"])
    damage_chunk(tmp_path, "shuffle-seed1", "influence", 3)
    written, made = write(tmp_path)
    words = "influence of shuffle-seed1 on mean, epoch 3, samples 0 to 39: the digest differs"
    assert made.damaged == written.node["damaged"] == [words]
    shown, expected = written.influence()[0], values[:, 0].swapaxes(0, 1)
    assert np.isnan(shown[:, 2]).all()
    whole = [0, 1, 3]
    np.testing.assert_allclose(shown[:, whole], expected[:, whole], rtol=1e-3)


def test_parts_that_are_not_named_are_removed_and_others_are_not(tmp_path):
    folder, _, _ = make_study(tmp_path)
    written, _ = write(tmp_path, runs=["all"])
    (written.folder / "data/one/mine.txt").write_text("mine")
    before = set(written.files())
    write(tmp_path, runs=["shuffle:1"])
    removed = before - set(written.files())
    assert len(removed) == 1
    assert removed.pop().startswith("data/one/history-rand-seed1-")
    assert_listed(folder)


def test_a_part_that_the_manifest_does_not_name_is_written_again(tmp_path):
    """It may be empty after a power cut."""
    make_study(tmp_path)
    written, _ = write(tmp_path)
    before = {name: content for name, (_, content) in written.files().items()}
    file = written.node["runs"][0]["file"]
    (written.folder / file).write_bytes(b"")
    (written.folder / "data/study.js").unlink()
    (written.folder / "index.html").unlink()
    write(tmp_path)
    assert {name: content for name, (_, content) in written.files().items()} == before


@pytest.mark.parametrize("content", [b"", b"sampimpData([]);\n", b'{"file": 3}', b"\xff", b"x"])
def test_an_unreadable_manifest_counts_as_none(tmp_path, content):
    make_study(tmp_path)
    written, _ = write(tmp_path)
    before = {name: content for name, (_, content) in written.files().items()}
    (written.folder / "data/study.js").write_bytes(content)
    write(tmp_path)
    assert {name: content for name, (_, content) in written.files().items()} == before


def test_the_same_store_gives_the_same_bytes(tmp_path):
    folder, plan, _ = make_study(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    write(tmp_path / "one")
    commit_trial(folder, plan, "rand-seed2")
    shutil.copytree(tmp_path / "one/trials", tmp_path / "two/trials", dirs_exist_ok=True)
    first, second = (write(tmp_path / name)[0].files() for name in ("one", "two"))
    assert {name: content for name, (_, content) in first.items()} == {
        name: content for name, (_, content) in second.items()
    }


def test_no_part_names_the_folder(tmp_path):
    make_study(tmp_path)
    damage_chunk(tmp_path, "rand-seed1", "nll", 2)
    written, _ = write(tmp_path)
    assert not [
        name for name, (_, text) in written.files().items() if tmp_path.name.encode() in text
    ]


@pytest.mark.parametrize("variable", ["importance", "nll"])
def test_damage_is_named_and_its_values_are_nan(tmp_path, variable):
    make_study(tmp_path)
    whole = write(tmp_path, runs=["all"], to=str(tmp_path / "whole"))[0]
    damage_chunk(tmp_path, "rand-seed1", variable, 4)
    written, made = write(tmp_path, runs=["all"])
    words = f"{variable} of rand-seed1, epoch 4, samples 0 to 39: the digest differs"
    assert written.node["damaged"] == made.damaged == [words]
    columns, intact = written.run(1)[0], whole.run(1)[0]
    lost = {
        "importance": {name for name in columns if name.startswith(("imp", "share", "mean_"))},
        "nll": {"nll", "confidence", "variability"},
    }[variable]
    for name, values in columns.items():
        if name in lost:
            assert np.isnan(values).all(), name
        else:
            np.testing.assert_array_equal(values, intact[name], name)
    values, expected = written.history(1)[0], whole.history(1)[0]
    rows = slice(0, -1) if variable == "importance" else slice(-1, None)
    assert np.isnan(values[rows, 3]).all()
    assert not np.isnan(values).sum() - values[rows, 3].size
    np.testing.assert_allclose(values[:, :3], expected[:, :3], rtol=2e-3)
    for name, array in written.run(0)[0].items():
        np.testing.assert_array_equal(array, whole.run(0)[0][name])
    before = written.files()
    write(tmp_path, runs=["all"])
    assert written.files() == before  # made again, with the same bytes


def test_damaged_images_are_grey_and_repaired_ones_are_shown(tmp_path):
    make_study(tmp_path)
    intact = write(tmp_path)[0].node["sprites"]["files"]
    (chunk,) = (
        p for p in (tmp_path / "datasets/one.zarr/train_values/c").rglob("*") if p.is_file()
    )
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-4] + b"1234")
    written, _ = write(tmp_path, to=str(tmp_path / "other"))
    assert written.node["damaged"] == ["images of one, samples 0 to 39: the digest differs"]
    assert written.node["sprites"]["files"] != intact
    chunk.write_bytes(content)
    written, _ = write(tmp_path, to=str(tmp_path / "other"))
    assert written.node["damaged"] == []
    assert written.node["sprites"]["files"] == intact


HOSTILE = '</script><script>alert(1)</script>\u2028"\\\x00<!--'


def test_no_text_ends_a_script(tmp_path):
    source = oracles.make_source(samples=40, name=HOSTILE)
    names = (HOSTILE, "b", "c")
    make_study(tmp_path, source=Source(**{**vars(source), "class_names": names}))
    written, _ = write(tmp_path)
    assert written.node["classes"] == list(names)
    scripts = [text for name, (_, text) in written.files().items() if name.startswith("data/")]
    assert not [text for text in scripts if b"<" in text and not text.startswith(b"\x89PNG")]
    assert json.loads(script({"a": HOSTILE})[12:-3]) == {"a": HOSTILE}


NO_MANIFESTS = {
    "deep": lambda text: text[:12] + "[" * 10**5 + "]" * 10**5 + ");\n",
    "nan": lambda text: text.replace('"format":1', '"format":NaN'),
    "infinite": lambda text: text.replace('"format":1', '"format":1e999'),
    "other entries": lambda text: text.replace('"status":"complete"', '"status":"<b>"'),
    "no entries": lambda text: text.replace('"strategy"', '"other"'),
}


@pytest.mark.parametrize("name", NO_MANIFESTS)
def test_a_manifest_of_somebody_else_is_written_again(tmp_path, name):
    folder, plan, _ = make_study(tmp_path)
    commit_trial(folder, plan, "shuffle-seed2")
    before = contents(write(tmp_path)[0])
    path = tmp_path / "analysis/explore/data/study.js"
    changed_text = NO_MANIFESTS[name](path.read_text())
    assert changed_text != path.read_text()
    path.write_text(changed_text)
    assert contents(write(tmp_path)[0]) == before


@pytest.mark.parametrize(
    "content",
    [
        b"alert(1);\n",
        b'sampimpData({"a":alert(1)});\n',
        b"sampimpData({});\nalert(1);\n",
        b'{"a":1}',
        b"",
    ],
)
def test_a_part_that_is_another_script_is_written_again(tmp_path, monkeypatch, content):
    """The page runs its parts."""
    make_study(tmp_path)
    before = contents(write(tmp_path)[0])
    (name,) = (name for name in before if "/run-shuffle-seed1-" in name)
    (tmp_path / "analysis/explore" / name).write_bytes(content)
    monkeypatch.setattr(explorer_folder, "CHECKED", set())  # as another process
    assert contents(write(tmp_path)[0]) == before


@pytest.mark.parametrize("part", [b"", b'sampimpData({"columns":{"importance":"AAAA"}});\n'])
def test_a_damaged_part_of_a_run_is_named(tmp_path, part):
    """The importance of a run is read from its part for the spread over the seeds."""
    folder, plan, _ = make_study(tmp_path)
    commit_trial(folder, plan, "shuffle-seed2")
    written, _ = write(tmp_path)
    name = written.node["runs"][0]["file"]
    (tmp_path / "analysis/explore" / name).write_bytes(part)
    commit_trial(folder, plan, "rand-seed2")
    written, _ = write(tmp_path)
    assert written.node["damaged"] == [f"{name} of the explorer: damaged; remove it"]


@pytest.mark.parametrize("size", [10**400, float("nan"), -1, float("inf"), "9"])
def test_a_size_that_is_none_is_not_kept(tmp_path, size):
    _, plan, _ = make_study(tmp_path)
    assert Choice.of({"megabytes": size}, plan).megabytes == MEGABYTES
    assert Choice.of({"megabytes": 30}, plan).megabytes == 30


def test_another_folder_is_not_listed_and_a_strange_one_is_refused(tmp_path, capsys):
    make_study(tmp_path / "study")
    target = tmp_path / "folder"
    assert explore.main([str(tmp_path / "study"), "--to", str(target)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"Samples: {target}/index.html"
    assert "2 of 4 runs, 1 by epoch; " in lines[-2]
    assert not (tmp_path / "study/analysis").exists()
    assert not (tmp_path / "study/analysis.manifest.json").exists()
    assert Written(target).study["report"] is None
    (tmp_path / "site").mkdir()
    (tmp_path / "site/index.html").write_text("mine")
    assert explore.main([str(tmp_path / "study"), "--to", str(tmp_path / "site")]) == 2
    assert "choose another folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "site").iterdir()] == ["index.html"]


def test_the_report_is_named_where_there_is_one(tmp_path):
    make_study(tmp_path)
    (tmp_path / "analysis").mkdir()
    (tmp_path / "analysis/report.html").write_text("report")
    assert write(tmp_path)[0].study["report"] == "../report.html"


def test_a_run_or_node_that_the_study_does_not_have_is_refused(tmp_path):
    make_study(tmp_path)
    with pytest.raises(ConfigError, match="shuffle-seed1, shuffle-seed2"):
        write_explorer(str(tmp_path), runs=["rand-seed9"])
    with pytest.raises(ConfigError, match="option --node"):
        write_explorer(str(tmp_path), nodes=["two"])
    assert not (tmp_path / "analysis").exists()
    written, _ = write(tmp_path, runs=["rand-seed2"])  # planned, and not committed
    assert written.node["histories"] == []


def shown(written):
    """Return the nodes, the runs by epoch, and whether samples are left out."""
    runs = {node["name"]: [each["run"] for each in node["histories"]] for node in written["nodes"]}
    return runs, [bool(node["sample_ids"]) for node in written["nodes"]]


def test_a_study_keeps_what_its_explorer_was_asked_for(tmp_path):
    source = oracles.make_source(samples=900, shape=(1, 2, 2))
    folder, plan, _ = make_study(tmp_path, source=source, epochs=12)
    options = [str(tmp_path), "--runs", "rand:1", "rand:2", "--node", "one"]
    assert explore.main([*options, "--megabytes", "0.3"]) == 0
    page = Written(tmp_path / "analysis/explore")
    assert shown(page.study) == ({"one": ["rand-seed1"]}, [True])
    commit_trial(folder, plan, "rand-seed2")
    full_study.write_study_explorer(str(tmp_path), QUIET, QUIET)
    page = Written(tmp_path / "analysis/explore")
    assert page.node["committed"] == 3
    assert shown(page.study) == ({"one": ["rand-seed1", "rand-seed2"]}, [True])
    before = page.files()
    full_study.write_study_explorer(str(tmp_path), QUIET, QUIET)
    assert page.files() == before
    assert explore.main([str(tmp_path)]) == 0  # asks for the defaults
    assert shown(Written(page.folder).study) == ({"one": ["shuffle-seed1"]}, [False])
    full_study.write_study_explorer(str(tmp_path), QUIET, QUIET)
    assert shown(Written(page.folder).study) == ({"one": ["shuffle-seed1"]}, [False])


@pytest.mark.parametrize(
    "asked",
    [None, 3, {"runs": "all", "nodes": 3, "megabytes": "x"}, {"runs": ["gone-seed1", 3]},
     {"nodes": ["gone", None]}],
)  # fmt: skip
def test_what_was_asked_for_and_is_gone_is_the_default(tmp_path, asked):
    make_study(tmp_path)
    written, _ = write(tmp_path)
    before = {name: content for name, (_, content) in written.files().items()}
    (written.folder / "data/study.js").write_bytes(script({**written.study, "asked": asked}))
    write(tmp_path, keep=True)
    assert {name: content for name, (_, content) in written.files().items()} == before


def test_no_part_is_written_through_a_link(tmp_path):
    make_study(tmp_path / "study")
    (tmp_path / "outside").mkdir()
    (tmp_path / "study/analysis").mkdir()
    (tmp_path / "study/analysis/explore").symlink_to(tmp_path / "outside")
    with pytest.raises(StoreError, match="a link to"):
        write_explorer(str(tmp_path / "study"))
    assert not list((tmp_path / "outside").iterdir())


def test_a_bucket_gets_the_bytes_of_a_disk_and_no_secret(tmp_path, monkeypatch, capsys):
    make_study(tmp_path)
    local = write(tmp_path)[0].files()
    with serving(monkeypatch) as bucket:
        for path in Folder(str(tmp_path)).walk():
            if not path.startswith("analysis"):
                bucket.objects[f"lab/study/{path}"] = (tmp_path / path).read_bytes()
        assert explore.main(["s3://lab/study"]) == 0
        printed = capsys.readouterr().out
        assert "Samples: s3://lab/study/analysis/explore/index.html" in printed
        assert "It opens only from a folder" in printed
        stored = {
            name.removeprefix("lab/study/analysis/explore/"): content
            for name, content in bucket.objects.items()
            if name.startswith("lab/study/analysis/explore/")
        }
        assert stored == {name: content for name, (_, content) in local.items()}
        assert_listed(Folder.of("s3://lab/study"))
        bucket.requests.clear()
        assert explore.main(["s3://lab/study"]) == 0
        assert not [request for request in bucket.requests if request.startswith(("PUT", "DEL"))]
        assert explore.main(["s3://lab/study", "--to", str(tmp_path / "here")]) == 0
        for content in stored.values():
            for secret in (b"secret-of-the-tests", b"127.0.0.1", b"s3:", b"lab/study"):
                assert secret not in content
    fetched = Written(tmp_path / "here").files()
    assert {name: content for name, (_, content) in fetched.items()} == stored
