"""The built site: every link leads somewhere; in Chromium, opened from a folder, its search finds pages and asks no other host."""

from __future__ import annotations

import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("material", reason="mkdocs-material is not installed (the extra 'docs')")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True)
    return folder


@pytest.mark.parametrize("width", [1280, 390])
def test_the_search_finds_pages_without_a_server(site, width):
    with playwright.sync_playwright() as engines:
        browser = engines.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 844})
        faults: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((site / "howto" / "bench.html").as_uri())
        page.locator("label[for=__search].md-header__button" if width < 900 else "input.md-search__input").click()
        page.locator("input.md-search__input").press_sequentially("rollback")
        page.wait_for_selector(".md-search-result__link", timeout=60_000)
        found = [link.get_attribute("href") for link in page.locator(".md-search-result__link").all()]
        browser.close()
    assert any("reference/cli.html" in link for link in found)
    assert not faults
    assert all(url.startswith(("file:", "data:", "blob:", "about:")) for url in asked)


class _Page(HTMLParser):
    """What a page links to, and where it can be linked to."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = {"__search", "__drawer"}  # which the theme answers by itself
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.places.add(named.get("id", ""))
        self.links += [named[name] for name in ("href", "src") if named.get(name)]


def test_every_link_leads_somewhere(site):
    """Strict mkdocs passes over links to files that it leaves out."""
    pages = {path: _Page(path) for path in site.resolve().rglob("*.html") if path.name != "404.html"}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            to = urlparse(link)
            if to.scheme or to.netloc:
                continue
            target = (path.parent / unquote(to.path)).resolve() if to.path else path
            place = unquote(to.fragment)
            if not target.exists() or (place and target in pages and place not in pages[target].places):
                broken.append((path.name, link))
    assert len(pages) > 30
    assert not broken
