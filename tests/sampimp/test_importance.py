"""The pure functions against explicit outer products."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sampimp.importance import linear_importance, row_norm


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_importance_is_the_squared_norm_of_the_update_of_one_sample(data):
    samples, layers = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    rate = st.one_of(st.just(0.0), st.floats(1e-3, 10))
    delta_norm, activation_norm, weight_rates, bias_rates, expected = [], [], [], [], []
    for _ in range(layers):
        inputs, outputs = rng.integers(1, 6, 2)
        x_NI, delta_NO = rng.normal(size=(samples, inputs)), rng.normal(size=(samples, outputs))
        weight_rate, bias_rate = data.draw(rate), data.draw(rate)
        # The update itself, sample by sample: rate times the outer product, and rate times delta.
        weight_NOI = weight_rate * np.einsum("no,ni->noi", delta_NO, x_NI)
        bias_NO = bias_rate * delta_NO
        expected.append((weight_NOI**2).sum((1, 2)) + (bias_NO**2).sum(1))
        delta_norm.append(row_norm(torch.from_numpy(delta_NO)))
        activation_norm.append(row_norm(torch.from_numpy(x_NI)))
        weight_rates.append([weight_rate])
        bias_rates.append([bias_rate])
    got = linear_importance(
        torch.stack(delta_norm),
        torch.stack(activation_norm),
        torch.tensor(weight_rates, dtype=torch.float64),
        torch.tensor(bias_rates, dtype=torch.float64),
    )
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12)


def test_arguments_are_left_as_they_are():
    delta, activation = torch.rand(2, 3), torch.rand(2, 3)
    rate = torch.rand(2, 1)
    copies = [tensor.clone() for tensor in (delta, activation, rate)]
    linear_importance(delta, activation, rate, rate)
    assert all(map(torch.equal, (delta, activation, rate), copies))
