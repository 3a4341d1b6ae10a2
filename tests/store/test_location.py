"""A folder stores bytes and JSON, and its errors name the path."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from sampimp.errors import RecordError, StoreError
from sampimp.store.location import Folder


def test_a_folder_holds_bytes_and_json(tmp_path):
    folder = Folder.of(tmp_path) / "a" / "b"
    assert str(folder) == f"{tmp_path}/a/b"
    assert folder.is_local
    assert folder.read_bytes("x") is None
    assert folder.read_json("x") is None
    assert folder.is_empty()
    folder.write_bytes("x", b"one")
    folder.write_bytes("x", b"two")
    folder.write_json("deep/y.json", {"k": [1, 2.5, None]})
    assert folder.read_bytes("x") == b"two"
    assert (tmp_path / "a/b/x").read_bytes() == b"two"
    assert folder.read_json("deep/y.json") == {"k": [1, 2.5, None]}
    assert not folder.is_empty()
    assert folder.folders() == ["deep"]
    assert Folder.of(tmp_path).folders() == ["a"]


def test_an_existing_object_is_not_created_again(tmp_path):
    folder = Folder.of(tmp_path / "new") / "trial"
    assert folder.create_json("owner.json", {"attempt": "a"})
    assert not folder.create_json("owner.json", {"attempt": "b"})
    assert folder.create_json("owner.json", {"attempt": "a"})  # repeated by the same caller
    assert folder.read_json("owner.json") == {"attempt": "a"}
    folder.write_json("owner.json", {"attempt": "c"})
    assert not folder.create_json("owner.json", {"attempt": "a"})
    assert folder.read_json("owner.json") == {"attempt": "c"}
    assert [path.name for path in (tmp_path / "new" / "trial").iterdir()] == ["owner.json"]


@pytest.mark.parametrize("kind", ["folder", "dangling link", "loop of links", "pipe"])
def test_what_is_no_file_is_not_waited_for(tmp_path, kind):
    place = tmp_path / "owner.json"
    if kind == "folder":
        place.mkdir()
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to("nothing" if kind == "dangling link" else "owner.json")
    with pytest.raises((StoreError, RecordError), match=r"owner\.json"):
        Folder.of(tmp_path).create_json("owner.json", {"attempt": "a"})


def test_one_of_several_threads_creates_an_object(tmp_path):
    folder, start = Folder.of(tmp_path), threading.Barrier(8)

    def race(number):
        won = []
        for r in range(100):
            start.wait()
            won.append(folder.create_bytes(f"round-{r}", b"%d" % number))
        return won

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(race, range(8)))
    for r in range(100):
        (winner,) = (number for number in range(8) if won[number][r])
        assert folder.read_bytes(f"round-{r}") == b"%d" % winner


RACE = """
import sys
from sampimp.store.location import Folder
folder, me = Folder.of(sys.argv[1]), sys.argv[2].encode()
print("ready", flush=True)
sys.stdin.readline()
print(*(r for r in range(200) if folder.create_bytes(f"round-{r}", me)))
"""


def test_one_of_several_processes_creates_an_object(tmp_path):
    folder = Folder.of(tmp_path / "new")
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(folder), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 3
    for racer in racers:
        racer.stdin.write("\n")
        racer.stdin.flush()
    won = [{int(r) for r in racer.communicate()[0].split()} for racer in racers]
    for r in range(200):
        (winner,) = (number for number in range(3) if r in won[number])
        assert folder.read_bytes(f"round-{r}") == b"%d" % winner


def test_relative_paths_become_absolute_on_construction(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Folder.of("study/")
    assert folder == Folder.of(tmp_path / "study") == Folder.of(folder)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    folder.write_bytes("x", b"1")
    assert (tmp_path / "study" / "x").read_bytes() == b"1"


def test_removing_a_folder_leaves_its_neighbours(tmp_path):
    folder = Folder.of(tmp_path)
    for name in ("epoch-1", "epoch-10", "epoch-1/deep"):
        (folder / name).write_bytes("x", b"1")
    (folder / "epoch-1").remove()
    assert not (tmp_path / "epoch-1").exists()
    assert (tmp_path / "epoch-10" / "x").read_bytes() == b"1"
    (folder / "never").remove()
    assert folder.folders() == ["epoch-10"]


def test_damaged_json_is_refused(tmp_path):
    (tmp_path / "study.json").write_text('{"seed": ')
    with pytest.raises(RecordError, match=rf"9 bytes(.|\n)*{tmp_path}/study.json"):
        Folder.of(tmp_path).read_json("study.json")


def test_the_write_test_leaves_no_file(tmp_path):
    Folder.of(tmp_path / "new").check_writable()
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("below", ["", "study"])
def test_a_file_in_place_of_a_folder_is_refused_and_kept(tmp_path, below):
    file = tmp_path / "results"
    file.write_text("precious")
    for use in (Folder.check_writable, lambda folder: folder.write_bytes("x", b"1")):
        with pytest.raises(StoreError, match=f"Where {file}"):
            use(Folder.of(file / below))
    assert file.read_text() == "precious"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(StoreError, match=f"Where {tmp_path}/study"):
            Folder.of(tmp_path / "study").check_writable()
    finally:
        tmp_path.chmod(0o755)


def test_a_file_larger_than_the_memory_is_a_named_error(tmp_path):
    with (tmp_path / "state.pt").open("wb") as file:
        file.truncate(2**43)  # of which the disk holds nothing; obstore would abort the process
    with pytest.raises(RecordError, match="8,796,093,022,208 bytes"):
        Folder.of(tmp_path).read_bytes("state.pt")


@pytest.mark.parametrize("use", [Folder.walk, Folder.size, Folder.remove])
def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path, monkeypatch, use):
    folder = Folder.of(tmp_path)
    folder.write_bytes("a/inner/x", b"1")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("inner"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        with pytest.raises(StoreError, match="Permission denied"):
            use(folder / "a")
    assert folder.read_bytes("a/inner/x") == b"1"


def test_what_is_deleted_during_a_walk_is_no_error(tmp_path, monkeypatch):
    folder, scandir = Folder.of(tmp_path), os.scandir
    folder.write_bytes("a/inner/x", b"1")

    def lose(path):
        if str(path).endswith("inner"):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", lose)
    assert folder.walk() == []
