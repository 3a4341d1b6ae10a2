"""The explorer of 50,000 samples in a browser on one core: until it reacts, from lasso to paint.

A study of random images is trained in this process and its explorer written, as after any study.
Chromium opens the folder from file://, on one core, with WebGL in software. Lassos select a share
of the samples, and all; the time runs from the release of the pointer until the frame with points,
images and history of the selection is painted.

Map: `make_explorer`, `measure`, `main` (`python benchmarks/explore.py --help`).
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
from browser import draw_lasso, file_url, open_browser, wait_ready
from oracles import make_source
from study_here import command, make_config

from sampimp import open_cube
from sampimp.analysis.explorer import write_explorer

MARGIN = 0.04 / 1.08
"""Share of an axis that is margin, at each end."""


def make_explorer(out: Path, samples: int, epochs: int) -> Path:
    """Train one run with five layers on random images, and return the page of its explorer."""
    config = make_config(
        out,
        hidden=(16, 16, 16, 16),
        epochs=epochs,
        batch_size=500,
        strategies=("shuffle",),
        reference_seeds=(1,),
    )
    command(config, source=make_source(samples, classes=10, shape=(1, 28, 28), name="digits"))
    return Path(write_explorer(str(out)).page)


def strip(out: Path, share: float) -> list[tuple[float, float]]:
    """Return a lasso over the whole height that holds a share of the samples, about the median."""
    cube = open_cube(out)["digits"].to_dataset()
    nll = np.log10(cube["nll"].sel(strategy="shuffle", seed=1).isel(epoch=-1).values)
    ends = np.quantile(nll, [0.5 - share / 2, 0.5 + share / 2])
    low, high = nll.min(), nll.max()
    left, right = MARGIN + (1 - 2 * MARGIN) * (ends - low) / (high - low)
    left, right = max(0.002, left), min(0.998, right)
    return [(left, 0.002), (right, 0.002), (right, 0.998), (left, 0.998)]


def measure(page: Any, lasso: list[tuple[float, float]], rounds: int) -> tuple[int, list[float]]:
    """Return the number of selected samples, and milliseconds of each round."""
    page.evaluate("performance.clearMeasures()")
    for _ in range(rounds):
        draw_lasso(page, lasso)
        page.wait_for_timeout(700)
        count = page.locator("#count").inner_text().split()[0]
        page.keyboard.press("Escape")
        page.wait_for_timeout(400)
    entries = page.evaluate(
        "performance.getEntriesByName('lasso to paint').map((entry) => entry.duration)"
    )
    return int(count.replace(",", "")), entries


def main(samples: int = 50_000, epochs: int = 50, rounds: int = 7, core: int = 0) -> None:
    """Measure the explorer.

    Parameters
    ----------
    samples, epochs
        Size of the study.
    rounds
        Lassos of each size.
    core
        The core that the browser runs on.
    """
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "study"
        page_file = make_explorer(out, samples, epochs)
        size = sum(file.stat().st_size for file in page_file.parent.rglob("*") if file.is_file())
        lassos = [strip(out, share) for share in (4_000 / 50_000, 1.0)]
        os.sched_setaffinity(0, {core})
        with sync_playwright() as playwright, open_browser(playwright) as browser:
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            start = time.perf_counter()
            page.goto(file_url(page_file), wait_until="commit")
            wait_ready(page, history=False)
            ready = time.perf_counter() - start
            wait_ready(page)
            complete = time.perf_counter() - start
            print(f"{samples:,} samples, {epochs} epochs, folder of {size / 1e6:.0f} MB")
            print(f"reacts after {ready:.1f} s, histories after {complete:.1f} s")
            for lasso in lassos:
                count, times = measure(page, lasso, rounds)
                middle, worst = statistics.median(times), max(times)
                print(f"lasso over {count:,}: {middle:.0f} ms to paint, at most {worst:.0f} ms")


if __name__ == "__main__":
    tyro.cli(main)
