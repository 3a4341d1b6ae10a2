"""A sealed file shows every changed byte."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sampimp.store.seals import DamagedFileError, json_bytes, seal, unseal

VALUE = {
    "epochs": 3,
    "curves": {"train_nll": [0.5, 1e-320, 2.0]},
    "name": "caf\u00e9",
    "none": None,
}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text().filter(lambda key: key != "seal"), json_values, max_size=5))
def test_a_value_comes_back(value):
    assert unseal(seal(value), "x") == value


def test_nan_and_infinity_come_back():
    value = unseal(seal({"curve": [math.nan, math.inf]}), "x")
    assert math.isnan(value["curve"][0])
    assert value["curve"][1] == math.inf


def test_every_flipped_bit_is_found():
    content = seal(VALUE)
    for position in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            with pytest.raises(DamagedFileError):
                unseal(bytes(changed), "x")


def test_every_truncation_is_found():
    content = seal(VALUE)
    for length in range(len(content)):
        with pytest.raises(DamagedFileError):
            unseal(content[:length], "x")


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (b"[" * 100_000, "nested deeper"),
        (b"[1]", "a JSON list"),
        (b"\xff", "decode"),
        (json_bytes(VALUE), "no seal"),
        (json.dumps({**VALUE, "seal": 3}).encode(), "other content"),
        (json.dumps(json.loads(seal(VALUE))).encode(), "other content"),  # the values are equal
    ],
)
def test_other_content_is_damage(content, got):
    with pytest.raises(DamagedFileError) as error:
        unseal(content, "COMMIT.json")
    assert got in error.value.got
    assert error.value.where == "COMMIT.json"


def test_a_file_of_an_earlier_version_may_have_no_seal():
    assert unseal(json_bytes(VALUE), "x", required=False) == VALUE
    with pytest.raises(DamagedFileError):
        unseal(json_bytes(VALUE)[:-4], "x", required=False)
