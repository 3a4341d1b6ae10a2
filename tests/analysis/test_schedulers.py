"""Where dask computes makes no difference to what it computes."""

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
    sources = {"one": oracles.make_source()}
    plan = oracles.make_plan(sources, {"shuffle": (1, 2, 3), "nlo": (1, 2)})
    oracles.run_trials(oracles.start_study(out, plan, sources), plan, sources)
    return out


@pytest.fixture(scope="module")
def scheduler():
    """The address of a dask.distributed scheduler of this process, which workers reach by TCP."""
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
    """Return results over every kind of stored array: records, curves, images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mean of no runs at all
        cube = open_cube(out)["one"].to_dataset()
        results = {
            "decomposition": decomposition(cube),
            "against": importance_against_nll(cube),
            "sums": cube[["parameters", "batch", "image", "test_error"]].mean(["strategy", "seed"]),
        }
        return compute_together(results)


def assert_identical(found, expected):
    assert found.keys() == expected.keys()
    for key, result in expected.items():
        xr.testing.assert_identical(found[key], result)


def test_distributed_computes_what_threads_compute(study, scheduler):
    before = dask.config.get("scheduler")
    with use_scheduler("threads"):
        expected = compute(study)
    with use_scheduler("distributed", scheduler):
        assert_identical(compute(study), expected)
        # Which fails outside of a worker.
        assert dask.compute(dask.delayed(lambda: distributed.get_worker().address)())
    assert dask.config.get("scheduler") == before


def test_its_address_is_found_in_the_environments_place(study, scheduler):
    with dask.config.set({"scheduler-address": scheduler}), use_scheduler("distributed"):
        assert distributed.get_client().scheduler.address == scheduler


def test_a_wrong_address_is_said(study, monkeypatch, capsys):
    monkeypatch.setattr("sampimp.analysis.schedulers.CONNECT_TIMEOUT", "1 s")
    address = "tcp://127.0.0.1:9"
    assert main([str(study), "--scheduler", "distributed", "--scheduler-address", address]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "that answers Got" in said
    assert f"Where address {address}" in said
    assert not (study / "analysis").exists()


def test_a_wrong_address_of_ray_is_said(study):
    """Ask in a process of its own: another test may have connected this one to Ray."""
    command = [sys.executable, "-m", "sampimp.analysis.report", str(study), "--scheduler", "ray"]
    done = subprocess.run(
        [*command, "--scheduler-address", "nonsense:port"], capture_output=True, text=True
    )
    said = " ".join(done.stderr.split())
    assert done.returncode == 2, said
    assert "that answers Got" in said
    assert "Where address nonsense:port" in said
    assert not (study / "analysis").exists()


def test_a_package_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ResourceError, match="pip install"), use_scheduler("distributed"):
        pass
