"""Screenshots of a study's report and explorer for README and docs, at 1280 and 420 pixels.

python tests/browser/screenshots.py results/digits docs/images
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from browser import draw_lasso, file_url, open_browser, wait_ready
from playwright.sync_api import sync_playwright

LASSO = [(0.3, 0.45), (0.55, 0.3), (0.75, 0.5), (0.55, 0.62), (0.4, 0.6)]
"""Samples of middle NLL and importance, in the digits."""

HEIGHTS = {1280: 900, 420: 860}


def main(study: Path, images: Path) -> None:
    """Take the screenshots of a study and write them as PNG."""
    with sync_playwright() as playwright, open_browser(playwright) as browser:
        for width, height in HEIGHTS.items():
            suffix = "" if width == 1280 else f"_{width}"
            page = browser.new_page(viewport={"width": width, "height": height})
            page.goto(file_url(study.resolve() / "analysis/report.html"))
            page.wait_for_timeout(500)
            page.screenshot(path=images / f"report{suffix}.png")
            page.goto(file_url(study.resolve() / "analysis/explore/index.html"))
            wait_ready(page)
            draw_lasso(page, LASSO)
            page.mouse.move(0, 0)
            page.wait_for_timeout(1500)
            page.evaluate("scrollTo(0, 0)")
            page.screenshot(path=images / f"explorer{suffix}.png")
            page.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
