"""The command `consolidate`; tests/store tests the content of the stores."""

import numpy as np
import xarray as xr

from sampimp.store.cube import open_cube
from sampimp.sweeps.consolidate import main


def test_a_finished_study_is_one_store(finished, tmp_path, capsys):
    assert main([str(finished.out), "--to", str(tmp_path)]) == 0
    assert f"{tmp_path}/digits.zarr: 0.7 MB" in capsys.readouterr().out
    store, cube = xr.open_zarr(tmp_path / "digits.zarr"), open_cube(finished.out)["digits"]
    np.testing.assert_array_equal(store["importance"], cube["importance"])
    assert main([str(finished.out), "--to", str(tmp_path)]) == 0
    assert "there already, of the same records" in capsys.readouterr().out


def test_a_mistake_is_printed_without_a_traceback(tmp_path, capsys):
    assert main([str(tmp_path / "absent")]) == 2
    assert "Expected a study, with a study.json" in capsys.readouterr().err
