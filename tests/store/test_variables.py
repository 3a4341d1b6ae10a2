"""Stored variables: what the sorted strategies sort by, and arrays opened for reading."""

import numpy as np
import pytest
from trial_records import LAYOUT, checkpointed, make_record, make_records

from sampimp.store.location import Folder
from sampimp.store.variables import read_difficulty
from sampimp.store.zarr_arrays import open_array


def test_difficulty_is_the_final_nll_or_tau(tmp_path):
    records = make_records()
    checkpointed(tmp_path).commit(None)
    nll = read_difficulty(Folder.of(tmp_path), "final_nll", LAYOUT)
    np.testing.assert_array_equal(nll, records[-1].arrays["nll"].astype(np.float64))
    tau = read_difficulty(Folder.of(tmp_path), "overall_importance", LAYOUT)
    # tau: the sum over layers and epochs
    beta = np.array([r.arrays["importance"] for r in records[1:]], np.float64)
    np.testing.assert_allclose(tau, beta.sum((0, 1)), rtol=1e-12)
    assert nll.dtype == tau.dtype == np.float64


def test_an_array_is_opened_for_reading_only(tmp_path):
    make_record(tmp_path).write(make_records()[1])
    array = open_array(str(tmp_path), "record.zarr/nll")
    np.testing.assert_array_equal(array[0], make_records()[1].arrays["nll"])
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0
