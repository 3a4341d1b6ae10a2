"""`sampimp explore --watch`: what is served, and that a committed run appears."""

import http.client
import threading

import pytest
from explored import Written, commit_trial, make_study

from sampimp.analysis.explorer import explore, growing_study, write_explorer
from sampimp.errors import ResourceError, StoreError
from sampimp.store.location import Folder


@pytest.fixture
def served(tmp_path):
    (tmp_path / "outside.js").write_text("outside")
    make_study(tmp_path / "study")
    made = write_explorer(str(tmp_path / "study"))
    with growing_study.serve_folder(made.folder) as address:
        yield tmp_path / "study/analysis/explore", int(address.rstrip("/").rpartition(":")[2])


def get(port, path, host=None, method="GET"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.getheader("Content-Type"), content


def test_the_files_are_served_with_their_types(served):
    folder, port = served
    page = (folder / "index.html").read_bytes()
    assert get(port, "/") == (200, "text/html; charset=utf-8", page)
    for path in ("app.js", "data/study.js", Written(folder).node["sprites"]["files"][0]):
        status, kind, content = get(port, f"/{path}?0")
        assert (status, content) == (200, (folder / path).read_bytes())
        assert kind.startswith("image/png" if path.endswith("png") else "text/javascript")
    assert get(port, "/data/study.js", method="HEAD")[2] == b""


def test_nothing_else_is_served(served):
    folder, port = served
    (folder / "link.js").symlink_to(folder.parents[2] / "outside.js")
    (folder / "notes.txt").write_text("notes")
    for path in (
        *("/link.js", "/notes.txt", "/data/", "/data", "/..//../../outside.js"),
        *("/../../../outside.js", "/%2e%2e/%2e%2e/%2e%2e/outside.js", "/absent.js"),
    ):
        assert get(port, path)[0] == 404, path
    assert get(port, "/index.html", host=f"localhost:{port}")[0] == 200
    assert get(port, "/index.html", host=f"elsewhere.example:{port}")[0] == 404
    assert get(port, "/index.html", method="POST")[0] == 501


def test_a_port_that_is_taken_is_a_clear_error(served):
    folder, port = served
    with (
        pytest.raises(ResourceError, match="option --port"),
        growing_study.serve_folder(Folder.of(folder), port),
    ):
        pass


def test_a_committed_run_appears_and_ctrl_c_ends(tmp_path, monkeypatch, capsys):
    folder, plan, _ = make_study(tmp_path)
    page, looks = Written, iter(range(9))

    def look(seconds):
        """Stand for the time between two looks."""
        number = next(looks)
        shown = page(tmp_path / "analysis/explore").node["committed"]
        assert shown == (2 if number < 2 else 3)
        if number == 1:
            commit_trial(folder, plan, "rand-seed2")
        if number == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(growing_study.time, "sleep", look)
    threads = threading.active_count()
    assert explore.main([str(tmp_path), "--watch"]) == 130
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line for line in lines if line.startswith("Open http://127.0.0.1:")]
    assert lines[-1].startswith("3 of 4 runs, 1 by epoch; ")
    assert "Traceback" not in printed.err
    assert threading.active_count() == threads


def test_a_store_that_is_away_is_said_once_and_tried_again(tmp_path, monkeypatch):
    make_study(tmp_path)
    looks, said, written = iter(range(9)), [], []

    def look(seconds):
        if next(looks) == 4:
            raise KeyboardInterrupt

    def write():
        written.append(1)

    answers = iter([[], None, None, ["trials/a"], ["trials/a"]])

    def records(out):
        answer = next(answers)
        if answer is None:
            raise StoreError("an answer", "none", out, "wait")
        return answer

    monkeypatch.setattr(growing_study.time, "sleep", look)
    monkeypatch.setattr(growing_study, "committed_records", records)
    with pytest.raises(KeyboardInterrupt):
        growing_study.watch_study(str(tmp_path), write, warn=said.append)
    assert len(said) == 1
    assert len(written) == 1
