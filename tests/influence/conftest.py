"""Fixtures that the tests of influence share."""

import pytest
import torch


@pytest.fixture
def double_precision():
    """Compute in float64."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(dtype)
