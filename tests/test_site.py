"""The built documentation, as a reader sees it."""

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.browser import open_page

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    result = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def address(site) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_nothing_is_loaded_from_elsewhere(site):
    for path in site.rglob("*.html"):
        assert not re.search(r'<(script|img|iframe)[^>]* src="?(https?:)?//', path.read_text()), path.name


def test_every_page_fits_a_window_of_720_pixels(site, address):
    with open_page(f"{address}/index.html", viewport={"width": 720, "height": 900}) as page:
        for path in sorted(site.rglob("*.html")):
            if path.name == "404.html":  # is written for the root of a server
                continue
            page.goto(f"{address}/{path.relative_to(site)}")
            assert page.evaluate("document.documentElement.scrollWidth") <= 720, path.name
            cut = page.evaluate(
                "[...document.querySelectorAll('.md-content pre > code, .md-content table')]"
                ".filter((one) => one.scrollWidth > one.clientWidth + 1).map((one) => one.innerText.slice(0, 80))"
            )
            assert cut == [], path.name


@pytest.mark.parametrize(
    ("words", "page_of_it"), [("register_loss", "api/plugins"), ("uncertain patches", "api/masking")]
)
def test_the_search_finds_names_and_words(address, words, page_of_it):
    with open_page(f"{address}/index.html", viewport={"width": 1280, "height": 900}) as page:
        page.fill(".md-search__input", words)
        page.wait_for_selector(".md-search-result__item a")
        found = page.eval_on_selector_all(".md-search-result__item a", "(all) => all.map((one) => one.href)")
    assert any(page_of_it in link for link in found)


def test_the_api_names_no_internals(site):
    names = [path.stem for path in (site / "api").glob("*.html")]
    assert len(names) >= 15
    for path in (site / "api").glob("*.html"):
        text = path.read_text()
        assert 'id="fsr_fast.method.step.Cams"' not in text
        assert "._" not in "".join(part.split('"')[0] for part in text.split('id="fsr_fast.')[1:]), path.name
