"""JSON of a store is limited in size and depth, and has the type that its readers rely on."""

import contextlib
import json
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NotRequired, TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sampimp.errors import RecordError
from sampimp.store import location
from sampimp.store.file_types import KEY, CommitFile, check_file
from sampimp.store.json_types import DEEPEST_JSON, parse_json, require_type
from sampimp.store.location import Folder


class Inner(TypedDict):
    size: int
    note: NotRequired[str]


@dataclass
class Closed:
    LATER_ENTRIES: ClassVar = frozenset({"inner"})
    name: str
    inner: tuple[Inner, ...] = ()
    kind: Literal["a", "b"] | None = None


GOOD = [
    (int, 3),
    (float, 3),
    (float, float("nan")),
    (str, ""),
    (int | None, None),
    (Any, {"x": [1]}),
    (tuple[int, str], [1, "a"]),
    (dict[str, list[float]], {"a": [0.5, 1]}),
    (Annotated[str, KEY], "npz-my_data"),
    (Annotated[int, range(1, 4)], 3),
    (Inner, {"size": 1, "more": 2}),
    (Closed, {"name": "x", "inner": [{"size": 1}], "kind": "b"}),
    (Closed, {"name": "x", "kind": None}),
]

WRONG = [
    (int, -1, "a whole number from 0 at the top"),
    (int, True, "Got true"),
    (int, 2**63, "a number of 64 bits"),
    (int, 10**4000, "a number of 13288 bits"),
    (int, 1.0, "Got 1.0"),
    (float, "1", "a number at"),
    (float, 10**400, "a number at"),
    (str, None, "Got null"),
    (int | None, [], "a whole number from 0 or null"),
    (tuple[int, str], [1], "an array of 2"),
    (list[list[str]], [["a"], ["b", 3]], r"a text at \[1\]\[1\]"),
    (list[list[str]], [["a"], "b"], r"an array at \[1\]"),
    (list[list[str]], [["a"], {"b": 1}], r"an array at \[1\]"),
    (list[list[Annotated[str, KEY]]], [["a", "b/c"]], r"that matches .* at \[0\]\[1\]"),
    (dict[str, int], [], "an object at the top"),
    (dict[str, str], {"a": "b", "c": 3}, r"a text at \.c"),
    (dict[Annotated[str, KEY], str], {"a": "b", "c/d": "e"}, "as a name a text that matches"),
    (dict[str, Annotated[str, KEY]], {"a": "b", "c": None}, r"a text that matches .* at \.c"),
    (Annotated[str, KEY], "../../etc", "a text that matches"),
    (Annotated[str, KEY], "a\n", "a text that matches"),
    (Annotated[int, range(1, 4)], 4, "a whole number from 1 to 3"),
    (Annotated[float, (-10.0, 10.0)], float("inf"), "a number between -10 and 10"),
    (Inner, {"note": "x"}, "an entry 'size'"),
    (Closed, {"name": "x", "inner": [{"size": "1"}]}, r"at \.inner\[0\]\.size"),
    (Closed, {"name": "x", "kind": "c"}, r"one of a, b or null at \.kind"),
    (Closed, {"name": "x"}, "an entry 'kind' at the top"),
    (Closed, {"name": "x", "kind": None, "other": 1}, "also 'other'"),
]


@pytest.mark.parametrize(("hint", "value"), GOOD)
def test_a_value_of_its_type_passes(hint, value):
    require_type(value, hint, "file")


@pytest.mark.parametrize(("hint", "value", "words"), WRONG)
def test_another_value_is_named_with_its_place(hint, value, words):
    with pytest.raises(RecordError, match=words):
        require_type(value, hint, "file")


DOCUMENTS = {
    "empty": (b"", "0 bytes"),
    "no JSON": (b"{'a': 1}", "8 bytes"),
    "not UTF-8": (b'"\xff"', "3 bytes"),
    "deep": (b"[" * (DEEPEST_JSON + 1) + b"]" * (DEEPEST_JSON + 1), "nested deeper"),
    "too deep for Python": (b'{"a":' * 200_000, "nested deeper"),
    "half a character": (b'{"class_names": ["\\ud83d"]}', "surrogates not allowed"),
    "a number of 5,000 digits": (b"1" * 5000, "4300 digits"),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_is_no_json_of_a_study_is_a_named_error(name):
    content, words = DOCUMENTS[name]
    with pytest.raises(RecordError, match=words):
        parse_json(content, "file")


def test_a_whole_character_and_the_deepest_value_are_read():
    assert parse_json(b'"\\ud83d\\ude00"', "file") == "\N{GRINNING FACE}"
    parse_json(b"[" * DEEPEST_JSON + b"]" * DEEPEST_JSON, "file")


def test_the_size_is_compared_before_the_bytes_are_read(tmp_path, monkeypatch):
    folder = Folder.of(tmp_path)
    with (tmp_path / "study.json").open("wb") as file:
        file.truncate(2**40)  # a terabyte, of which the disk holds nothing
    with pytest.raises(RecordError, match=r"at most 67,108,864 bytes(.|\n)*1,099,511,627,776"):
        folder.read_json("study.json")
    monkeypatch.setattr(location, "LARGEST_JSON", 10)
    (tmp_path / "study.json").write_text('{"a": 1}')
    assert folder.read_json("study.json") == {"a": 1}


COMMIT = {"fingerprint": "f", "attempt": 1, "epochs": 1, "diverged_epoch": None}
COMMIT |= {"parts": [[0, "record-2.zarr"]], "digests": {}, "curves": {}}


def test_a_commit_passes():
    check_file(COMMIT, "trials/a/COMMIT.json", "file")
    assert set(COMMIT) == CommitFile.__required_keys__


FILES = [
    ("COMMIT.json", {**COMMIT, "parts": [[0, "../../other"]]}),
    ("COMMIT.json", []),
    ("attempts/0001.json", {}),
    ("attempts/0001.json", {"host": "h", "time": "now"}),
    ("checkpoints/x/MANIFEST.json", {"epoch": 1}),
    ("errors/0001.json", None),
    ("snapshots.json", {"trial": [1]}),
    ("trial.json", {"kind": "influence"}),
    ("trial.json", {"kind": ["influence"]}),
    ("zarr.json", {"attributes": []}),
]


@pytest.mark.parametrize(("path", "value"), FILES)
def test_a_file_of_another_type_is_refused_where_it_is_read(tmp_path, path, value):
    folder = Folder.of(tmp_path)
    folder.write_json(path, value)
    with pytest.raises(RecordError, match=f"Where {tmp_path}/{path}"):
        folder.read_json(path)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=12,
    ),
    st.sampled_from([path for path, _ in FILES]),
)
def test_any_value_passes_or_is_a_named_error(value, path):
    with contextlib.suppress(RecordError):
        check_file(parse_json(json.dumps(value).encode(), path), path, path)
