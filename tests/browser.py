"""A headless Chromium for tests of pages; they are skipped if there is none."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def open_page(address: str, scheme: str = "light", **options) -> Iterator:
    """Open a page without network and check that it logs no error; needs playwright and a Chromium."""
    playwright = pytest.importorskip("playwright.sync_api")
    if PROGRAM is None:
        pytest.skip("no Chromium on this machine")
    faults: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox"])
        page = browser.new_context(color_scheme=scheme, **options).new_page()
        page.on("console", lambda message: faults.append(message.text) if message.type != "log" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.set_default_timeout(300_000)  # a loaded machine is slow, not wrong
        page.goto(address)
        yield page
        browser.close()
    assert faults == []
