"""The examples run as they are written, print no error, and find what their text says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import xarray as xr

ROOT = Path(__file__).parents[1]


def run(name, folder, *arguments):
    """Return what an example prints; nothing may be written to its standard error."""
    search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1", "MPLBACKEND": "template"},
    )
    assert (process.returncode, process.stderr) == (0, "")
    return process.stdout


def table(text):
    """Return the printed rows of numbers, by the name in their first column."""
    rows = {}
    for line in text.splitlines():
        name, *cells = re.split(r"\s{2,}", line.strip())
        if cells and all(re.fullmatch(r"\d+(\.\d+)?", cell) for cell in cells):
            rows[name] = [float(cell) for cell in cells]
    return rows


def test_plain_loop(tmp_path):
    text = run("plain_loop.py", tmp_path, "importance.zarr")
    stored = xr.open_zarr(tmp_path / "importance.zarr", consolidated=False).load()
    importance = stored["importance"].sel(epoch=slice(2, None))
    assert dict(stored.sizes) == {"epoch": 10, "layer": 3, "sample": 1500}
    tau = importance.sum(["epoch", "layer"])
    rows = table(text)
    for epoch in importance["epoch"].values:
        expected = 100 * importance.sel(epoch=epoch).sum("sample") / tau.sum()
        assert rows[str(epoch)] == pytest.approx(expected.values, abs=0.051)  # as printed
    largest = re.findall(r"digit +(\d+), a (\d)", text)
    assert [int(sample) for sample, _ in largest] == tau.argsort().values[::-1][:10].tolist()
    assert [int(label) for _, label in largest] == [
        int(stored["label"][int(i)]) for i, _ in largest
    ]
    tenth = int(re.search(r"most important tenth of the digits has (\d+)%", text)[1])
    assert tenth == pytest.approx(100 * float(tau.sortby(-tau)[:150].sum() / tau.sum()), abs=0.51)
    assert tenth > 50  # few samples shape the network, as in the paper


def test_harmful_digits(tmp_path):
    text = run("harmful_digits.py", tmp_path)
    rows = table(text.partition("(mean size, nat / 1e6)")[2])
    assert [*rows] == [str(epoch) for epoch in range(1, 9)]
    assert min(rows["8"]) > max(rows["2"][:2])  # what came last acts most on the final network
    assert int(re.search(r"most harmful digits, (\d+)% have a wrong label", text)[1]) >= 90
    predicted, actual = map(float, re.search(r"predicted (\S+), actual (\S+)\.", text).groups())
    assert actual < 0
    assert predicted == pytest.approx(actual, rel=0.25)  # a derivative, of ten removals at once


def test_with_lightning(tmp_path):
    text = run("with_lightning.py", tmp_path)
    rows = table(text)
    assert [*rows] == [str(epoch) for epoch in range(1, 13)]
    assert (
        max(rows["1"]) < 10
    )  # in epoch 1 the wrong labels, 5 % of all labels, have the average importance
    assert min(rows["12"]) > 30  # at the end wrong labels have a large share of the importance
    assert int(re.search(r"overall importance, (\d+)% have a wrong label", text)[1]) > 60


def test_language_model(tmp_path):
    text = run("language_model.py", tmp_path)
    rows = table(text)
    plain, question, disagrees = rows.pop("sentences")
    assert plain + question + disagrees == 400
    assert [*rows][:3] == ["words", "positions", "block 1, norms"]
    for values in rows.values():  # the mean over all sentences is 1
        mean = plain * values[0] + question * values[1] + disagrees * values[2]
        assert mean == pytest.approx(400, abs=2.5)
    assert rows["epoch 8"][2] > 3 > rows["epoch 2"][2]  # exceptions are learned last
    assert text.count(" disagrees\n") > 3  # and shape most parts in the last epoch
