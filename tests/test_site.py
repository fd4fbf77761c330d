"""The built documentation, as a reader meets it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.browser import open_page

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    result = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


def test_every_page_fits_a_window_of_720_pixels(site):
    with open_page((site / "index.html").as_uri(), viewport={"width": 720, "height": 900}) as page:
        for path in sorted(site.rglob("*.html")):
            if path.name == "404.html":  # is written for the root of a server
                continue
            page.goto(path.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= 720, path.name
            cut = page.evaluate(
                "[...document.querySelectorAll('.md-content pre > code, .md-content table')]"
                ".filter((one) => one.scrollWidth > one.clientWidth + 1).map((one) => one.innerText.slice(0, 80))"
            )
            assert cut == [], path.name


@pytest.mark.parametrize(
    ("words", "page_of_it"), [("register_loss", "api/plugins"), ("uncertain patches", "api/masking")]
)
def test_the_search_finds_names_and_words_in_pages_that_are_read_from_the_disk(site, words, page_of_it):
    with open_page((site / "index.html").as_uri(), viewport={"width": 1280, "height": 900}) as page:
        page.fill(".md-search__input", words)
        page.wait_for_selector(".md-search-result__item a")
        found = page.eval_on_selector_all(".md-search-result__item a", "(all) => all.map((one) => one.href)")
    assert any(page_of_it in address for address in found)


def test_the_api_names_no_internals(site):
    names = [path.stem for path in (site / "api").glob("*.html")]
    assert len(names) >= 15
    for path in (site / "api").glob("*.html"):
        text = path.read_text()
        assert 'id="fsr_fast.method.step.Cams"' not in text
        assert "._" not in "".join(part.split('"')[0] for part in text.split('id="fsr_fast.')[1:]), path.name
