"""The report in a browser: it loads nothing, fits, and is accessible in both schemes."""

import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import file_url

from sampimp.analysis.report import write_report


@pytest.fixture(scope="module")
def report_page(digits_study, explorer_page):
    """Return the path of the report, beside the explorer."""
    return write_report(str(digits_study)).path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 420])
def test_report_is_accessible_and_fits(chromium, report_page, scheme, width, log):
    context = chromium.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True
    )
    page = context.new_page()
    log.watch(page)
    page.goto(file_url(report_page))
    violations = Axe().run(page).response["violations"]
    found = [
        (each["id"], node["target"])
        for each in violations
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]
    assert found == []
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    assert [url for url in log.requests if not url.startswith("data:")] == [file_url(report_page)]
    assert log.errors == []
    context.close()


def test_first_screen_shows_samples_and_leads_to_the_explorer(page, report_page):
    page.goto(file_url(report_page))
    heading = page.get_by_text("The 24 most important samples").first
    assert heading.bounding_box()["y"] < 900
    sample = page.locator("a[href*='explore/index.html#']").first
    sample.click()
    page.wait_for_selector("html[data-ready]", state="attached", timeout=60_000)
    assert page.locator("#count").inner_text().startswith("1 of 1,500")
