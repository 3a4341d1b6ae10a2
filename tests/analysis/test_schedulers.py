"""The results do not depend on the scheduler that dask computes with."""

import subprocess
import sys
import warnings

import dask
import oracles
import pytest
import xarray as xr

from sampimp.analysis.report import main
from sampimp.analysis.results.analyse import compute_together
from sampimp.analysis.results.decomposition import decomposition
from sampimp.analysis.results.difficulty import importance_against_nll
from sampimp.analysis.schedulers import use_scheduler
from sampimp.errors import ResourceError
from sampimp.store.cube import open_cube

distributed = pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    sources = {"blobs": oracles.make_source()}
    plan = oracles.make_plan(sources, {"shuffle": (1, 2, 3), "nlo": (1, 2)})
    oracles.run_trials(oracles.start_study(out, plan, sources), plan, sources)
    return out


@pytest.fixture(scope="module")
def scheduler():
    """Yield the address of a dask.distributed scheduler in this process, reached by TCP."""
    with distributed.LocalCluster(
        processes=False,
        protocol="tcp",
        host="127.0.0.1",
        dashboard_address=None,
        n_workers=2,
        threads_per_worker=1,
    ) as cluster:
        yield cluster.scheduler_address


def compute(out):
    """Return results that read every kind of stored array: records, curves, images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mean of no runs at all
        cube = open_cube(out)["blobs"].to_dataset()
        results = {
            "decomposition": decomposition(cube),
            "against": importance_against_nll(cube),
            "sums": cube[["parameters", "batch", "image", "test_error"]].mean(["strategy", "seed"]),
        }
        return compute_together(results)


def assert_identical(results, expected):
    assert results.keys() == expected.keys()
    for key, result in expected.items():
        xr.testing.assert_identical(results[key], result)


def test_distributed_computes_what_threads_compute(study, scheduler):
    before = dask.config.get("scheduler")
    with use_scheduler("threads"):
        expected = compute(study)
    with use_scheduler("distributed", scheduler):
        assert_identical(compute(study), expected)
        # get_worker() fails outside a worker.
        assert dask.compute(dask.delayed(lambda: distributed.get_worker().address)())
    assert dask.config.get("scheduler") == before


def test_the_address_is_read_from_the_configuration(study, scheduler):
    with dask.config.set({"scheduler-address": scheduler}), use_scheduler("distributed"):
        assert distributed.get_client().scheduler.address == scheduler


def test_a_wrong_address_is_an_error(study, monkeypatch, capsys):
    monkeypatch.setattr("sampimp.analysis.schedulers.CONNECT_TIMEOUT", "1 s")
    address = "tcp://127.0.0.1:9"
    assert main([str(study), "--scheduler", "distributed", "--scheduler-address", address]) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert "that answers Got" in printed
    assert f"Where address {address}" in printed
    assert not (study / "analysis").exists()


def test_a_wrong_address_of_ray_is_an_error(study):
    """Run in a subprocess: another test may have connected this process to Ray."""
    command = [sys.executable, "-m", "sampimp.analysis.report", str(study), "--scheduler", "ray"]
    done = subprocess.run(
        [*command, "--scheduler-address", "nonsense:port"], capture_output=True, text=True
    )
    printed = " ".join(done.stderr.split())
    assert done.returncode == 2, printed
    assert "that answers Got" in printed
    assert "Where address nonsense:port" in printed
    assert not (study / "analysis").exists()


def test_a_missing_package_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ResourceError, match="pip install"), use_scheduler("distributed"):
        pass
