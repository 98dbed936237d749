"""The site of the documentation: it builds without a warning, loads nothing from elsewhere, and its links hold."""

import os
import posixpath
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
pytest.importorskip("material", reason="the extra `docs` is not installed")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    # No proxy answers at this port: what asks the network fails.
    offline = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **offline})
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Elements(HTMLParser):
    """What a page loads, and what it links to."""

    def __init__(self, text):
        super().__init__()
        self.loaded, self.links, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids.add(given.get("id"))
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(given["href"])
        elif given.get("src"):
            self.loaded.append(given["src"])


def pages_of(site):
    return {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}


def test_no_page_loads_anything_from_elsewhere(site):
    pages = pages_of(site)
    assert len(pages) > 35
    for place, text in pages.items():
        elsewhere = [one for one in Elements(text).loaded if re.match(r"(https?:)?//", one)]
        assert elsewhere == [], place
        assert 'class="mermaid"' not in text, f"{place}: Mermaid's script would come from a CDN"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", style.read_text(encoding="utf-8")), style


def test_links_within_the_site_lead_to_pages_and_to_their_headings(site):
    pages = {place: Elements(text) for place, text in pages_of(site).items()}
    followed = 0
    for place, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:", link) or link.startswith("/") or place == "404.html":
                continue
            path, _, anchor = link.partition("#")
            there = posixpath.normpath(posixpath.join(posixpath.dirname(place), path)) if path else place
            assert (site / there).exists(), (place, link)
            if anchor and there in pages and not anchor.startswith("__"):
                assert anchor in pages[there].ids, (place, link)
                followed += 1
    assert followed > 500


def test_pages_from_outside_of_docs_are_there_and_link_to_the_site(site):
    contributing = (site / "contributing.html").read_text(encoding="utf-8")
    assert 'href="strategies.html#adding-one"' in contributing
    assert 'href="changelog.html"' in (site / "operations.html").read_text(encoding="utf-8")
    assert (site / "examples" / "real_models.html").is_file()


def test_a_link_to_a_file_that_the_site_lacks_stays_as_words_and_one_to_nothing_is_left_to_be_refused():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import site_hook
    finally:
        sys.path.remove(str(ROOT / "docs"))

    class Page:
        class file:
            src_uri = "howto/gpu.md"

    text = (
        "[a](../../CHANGELOG.md#x) [b](../../pyproject.toml) [c](../../gone.md) [d](#here) [e](https://example.org)\n"
        "![f](../report.png) [g](../../examples/real_text/)\n\n```\n[h](../../pyproject.toml)\n```\n"
    )
    assert site_hook.on_page_markdown(text, page=Page) == (
        "[a](../changelog.md#x) b [c](../../gone.md) [d](#here) [e](https://example.org)\n"
        "![f](../report.png) [g](../examples/real_text.md)\n\n```\n[h](../../pyproject.toml)\n```\n"
    )
