"""Fixtures that the tests of importance share."""

import pytest
import torch


@pytest.fixture(scope="module")
def double_on_one_thread():
    """Compute in float64, and in one thread: an order of sums that is always the same."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="module")
def one_thread():
    """Compute in one thread, so that the order of sums is always the same."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
