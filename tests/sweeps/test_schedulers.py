"""dask on Ray computes what dask computes on threads."""

import dask
import pytest
import xarray as xr

from sampimp.analysis.results.analyse import compute_together
from sampimp.analysis.results.decomposition import decomposition
from sampimp.analysis.schedulers import use_scheduler
from sampimp.store.cube import open_cube


@pytest.mark.usefixtures("cluster")
def test_ray_computes_what_threads_compute(finished):
    import ray

    cube = open_cube(finished.out)["digits"].to_dataset()
    lazy = {
        "decomposition": decomposition(cube),
        "means": cube[["parameters", "test_error"]].mean(["strategy", "seed"]),
    }
    expected = compute_together(lazy)
    with use_scheduler("ray"):
        assert dask.config.get("scheduler").__module__.startswith("ray.util.dask")
        found = compute_together(lazy)
    for key, result in expected.items():
        xr.testing.assert_identical(found[key], result)
    assert ray.is_initialized()  # it was there before
