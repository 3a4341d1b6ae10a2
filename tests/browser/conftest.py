"""Fixtures of the tests in a browser: a small study of the digits, its explorer, and Chromium."""

from pathlib import Path

import pytest
from browser import CHROMIUM, PageLog, open_browser
from playwright.sync_api import sync_playwright
from study_here import command, make_config

from sampimp.data.digits import load_digits


def pytest_collection_modifyitems(items):
    if CHROMIUM is None:
        skip = pytest.mark.skip(reason="needs chromium: tests/browser/install.sh")
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def digits_study(tmp_path_factory):
    """Return a study of the digits: three runs of three epochs, one of them nlo."""
    out = tmp_path_factory.mktemp("study") / "digits"
    command(make_config(out, hidden=(12, 8), batch_size=50), source=load_digits())
    return out


@pytest.fixture(scope="session")
def explorer_page(digits_study):
    """Return the path of the explorer's page."""
    from sampimp.analysis.explorer import write_explorer

    return Path(write_explorer(str(digits_study)).page)


# Stopped after each file: its event loop would be in the way of other tests' own.
@pytest.fixture(scope="module")
def playwright():
    with sync_playwright() as running:  # a process has one at a time
        yield running


@pytest.fixture(scope="module")
def chromium(playwright):
    with open_browser(playwright) as browser:
        yield browser


@pytest.fixture
def log():
    return PageLog()


@pytest.fixture
def page(chromium, log):
    """Return an empty page of 1280 x 900 pixels whose errors and requests are in `log`."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    log.watch(page)
    yield page
    context.close()
