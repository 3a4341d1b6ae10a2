"""An error says its four parts, wherever it was raised."""

import pickle

import pytest

from sampimp import errors

CLASSES = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.UserError)
]


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_comes_back_from_a_worker_as_it_was(kind):
    error = kind("a bucket", "none", "s3://b", "make it")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    expected = "Expected a bucket\n     Got none\n   Where s3://b\n   To do make it"
    assert str(again) == str(error) == expected
