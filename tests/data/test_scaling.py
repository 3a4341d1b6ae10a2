"""Scaling against plain NumPy in float64."""

import numpy as np
import pytest
from sources import tiny_source

from sampimp.data import scale_inputs, scaling
from sampimp.errors import ConfigError


def test_unit_scaling_equals_one_line_of_numpy():
    values = np.random.default_rng(2).integers(0, 256, (6, 3, 4, 5), dtype=np.uint8)
    source = tiny_source(train_values=values[:4], test_values=values[4:], full_scale=255.0)
    dataset = scale_inputs(source, "unit")
    plain = values.astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(dataset.train_inputs, plain[:4], strict=True)
    np.testing.assert_array_equal(dataset.test_inputs, plain[4:], strict=True)
    np.testing.assert_array_equal(dataset.train_labels, source.train_labels, strict=True)
    assert dataset.train_inputs.flags.c_contiguous


@pytest.mark.parametrize("block_bytes", [1, 1000, 2**25])
@pytest.mark.parametrize(("shape", "axes"), [((3, 4, 5), (0, 2, 3)), ((4, 5), 0), ((7,), 0)])
def test_standard_scaling_against_float64(monkeypatch, block_bytes, shape, axes):
    monkeypatch.setattr(scaling, "_BLOCK_BYTES", block_bytes)
    values = np.random.default_rng(3).integers(0, 256, (40, *shape), dtype=np.uint8)
    labels = np.zeros(40, np.int64)
    source = tiny_source(
        train_values=values[:30],
        train_labels=labels[:30],
        test_values=values[30:],
        test_labels=labels[30:],
        full_scale=255.0,
    )
    dataset = scale_inputs(source, "standard")
    plain = values / 255
    mean = plain[:30].mean(axis=axes, keepdims=True)
    deviation = plain[:30].std(axis=axes, keepdims=True)
    expected = (plain - mean) / deviation
    np.testing.assert_allclose(dataset.train_inputs, expected[:30], atol=2e-6)
    np.testing.assert_allclose(dataset.test_inputs, expected[30:], atol=2e-6)
    assert dataset.train_inputs.dtype == np.float32
    np.testing.assert_array_equal(source.train_values, values[:30])  # unchanged


def test_standard_scaling_of_a_constant_feature_is_zero():
    values = np.full((4, 3), 0.1, np.float32)
    values[:, 1] = [1, 2, 3, 4]
    source = tiny_source(train_values=values, test_values=values[:2])
    dataset = scale_inputs(source, "standard")
    assert not dataset.train_inputs[:, [0, 2]].any()
    # Mean 2.5, deviation sqrt(5/4) = 1.1180340: 1.5 / 1.1180340 = 1.3416408.
    np.testing.assert_allclose(dataset.train_inputs[3, 1], 1.3416408, rtol=1e-6)


def test_scaled_inputs_are_copies():
    source = tiny_source()
    scale_inputs(source, "unit").train_inputs[0] = 99
    assert source.train_values[0, 0] == 0


def test_unknown_scaling_is_refused():
    with pytest.raises(ConfigError, match="unit, standard"):
        scale_inputs(tiny_source(), "standart")
