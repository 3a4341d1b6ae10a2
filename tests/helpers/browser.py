"""Debian's Chromium under Playwright, for tests of the pages that people open.

Map: `open_browser`, `PageLog` (errors and requests of a page), `wait_ready`, `draw_lasso`,
`read_heatmap`.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

CHROMIUM = shutil.which("chromium")

SHOWN_ERROR = 1e-3 + 5e-4
"""A code is within 0.1 %, and a value is shown with four digits."""

FLAGS = (
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-angle=swiftshader",  # WebGL without a GPU
    "--enable-unsafe-swiftshader",
)


@contextlib.contextmanager
def open_browser(playwright: Any, *flags: str) -> Iterator[Any]:
    """Start Chromium with more flags, and stop it."""
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, *flags])
    try:
        yield browser
    finally:
        browser.close()


@dataclass
class PageLog:
    """What went wrong on a page, and what it asked for."""

    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def watch(self, page: Any) -> None:
        """Note errors and requests from now on."""
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("requestfailed", lambda request: self.errors.append(f"failed: {request.url}"))
        page.on("request", lambda request: self.requests.append(request.url))
        page.on(
            "console",
            lambda message: message.type == "error" and self.errors.append(message.text),
        )


def wait_ready(page: Any, *, history: bool = True) -> None:
    """Wait until the explorer reacts, and has loaded the histories."""
    page.wait_for_selector("html[data-ready]", state="attached", timeout=60_000)
    if history:
        page.wait_for_selector("html[data-history]", state="attached", timeout=60_000)


def draw_lasso(page: Any, corners: Sequence[tuple[float, float]]) -> None:
    """Draw a lasso on the first scatter, with shift; corners are shares of its width and height."""
    box = page.locator("canvas").first.bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in corners]
    page.keyboard.down("Shift")
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=5)
    page.mouse.up()
    page.keyboard.up("Shift")


def file_url(path: os.PathLike[str] | str) -> str:
    """Return the URL of a page on this machine."""
    return f"file://{os.fspath(path)}"


def read_heatmap(page: Any, selector: str) -> np.ndarray:
    """Return the values that a heatmap shows under the pointer, [layer, epoch]."""
    heat = page.locator(f"{selector} canvas.heatmap")
    heat.scroll_into_view_if_needed()
    box = heat.bounding_box()
    layers, epochs = (int(heat.get_attribute(name)) for name in ("height", "width"))
    values = np.empty((layers, epochs))
    for layer in range(layers):
        for epoch in range(epochs):
            page.mouse.move(
                box["x"] + (epoch + 0.5) / epochs * box["width"],
                box["y"] + (layer + 0.5) / layers * box["height"],
            )
            text = heat.get_attribute("title")
            assert f"epoch {epoch + 1}:" in text
            word = text.split(": ")[1]
            values[layer, epoch] = np.nan if word == "not measured" else float(word.split()[0])
    return values
