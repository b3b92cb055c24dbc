"""Looks at the built site in a browser: `sphinx-build docs site && python -m tests.site site`.

Prints links between pages that lead nowhere, pages and tables that are wider than the window of a
desktop or a phone, pictures that do not load and text in pictures that is too small to read. It
needs Chromium, and playwright from PyPI.
"""

import argparse
import functools
import html.parser
import importlib
import pathlib
import re
import shutil
import sys
import urllib.parse

WIDTHS = {"desktop": 1280, "phone": 390}
# In CSS pixels: what a phone's browser still shows clearly.
SMALLEST_TEXT = 8
# Milliseconds to load a page. Playwright's 30 seconds are too few on a busy machine.
PATIENCE = 300_000
# Chromium under the names that distributions give it.
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

# Elements beyond the right edge, unless they are in a box that scrolls or is cut off.
_OVERFLOW = """
() => {
  const scrolls = e => {
    for (let p = e.parentElement; p; p = p.parentElement)
      if (p !== document.body && p !== document.documentElement
          && getComputedStyle(p).overflowX !== "visible") return true;
    return false;
  };
  const root = document.querySelector("article") || document.body;
  const all = [...root.querySelectorAll("*")].filter(e => {
    const box = e.getBoundingClientRect();
    return box.width > 0 && box.right > innerWidth + 1 && !scrolls(e);
  });
  const text = e => e.textContent.trim().split(/\\s+/).join(" ").slice(0, 60);
  const wide = all.filter(e => !all.includes(e.parentElement)).map(
    e => e.tagName.toLowerCase() + ": " + text(e));
  const page = document.documentElement.scrollWidth;
  return page > innerWidth + 1 ? ["the page is " + page + " wide", ...wide] : wide;
}
"""
_PICTURES = """
() => [...document.querySelectorAll("article img")].map(
  e => [e.getAttribute("src"), e.naturalWidth, e.getBoundingClientRect().width])
"""


class _Page(html.parser.HTMLParser):
    """Links and anchors of a page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = set(), set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id" or (tag == "a" and name == "name"):
                self.anchors.add(value)
            if name == "href" and tag == "a" and value:
                self.links.add(value)


_page = functools.cache(_Page)


def pages_of(site):
    """Pages of the site, without those that Sphinx makes for itself."""
    made = ("genindex.html", "search.html", "py-modindex.html")
    pages = (p for p in site.rglob("*.html") if "_static" not in p.parts)
    return sorted(p for p in pages if p.name not in made)


def broken_links(site):
    """Links to files and anchors that do not exist, as texts."""
    found = []
    for path in pages_of(site):
        for link in sorted(_page(path).links):
            url = urllib.parse.urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / urllib.parse.unquote(url.path)).resolve() if url.path else path
            anchor = urllib.parse.unquote(url.fragment)
            is_page = target.suffix == ".html"
            if not target.exists() or (anchor and is_page and anchor not in _page(target).anchors):
                found.append(f"{path.relative_to(site)}: {link} leads nowhere")
    return found


def browser():
    """Path of Chromium; None if it is not installed, for the one that playwright installs."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def layout_problems(paths, smallest_text):
    """What does not fit the windows, as texts.

    Args:
        paths: of pages.
        smallest_text: function of the path of a picture that returns the size of its smallest text
            where the picture has its natural width; None if that is not known.
    """
    # Not installed everywhere.
    api = importlib.import_module("playwright.sync_api")
    found = []
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser(), args=["--no-sandbox"])
        for device, width in WIDTHS.items():
            tab = chromium.new_page(viewport={"width": width, "height": 900})
            for path in paths:
                tab.goto(path.as_uri(), timeout=PATIENCE)
                problems = tab.evaluate(_OVERFLOW)
                for source, natural, shown in tab.evaluate(_PICTURES):
                    size = smallest_text(path.parent / source)
                    problems += _picture_problems(source, natural, shown, size)
                page = f"{path.parent.name}/{path.name} on a {device}"
                found += [f"{page}: {problem}" for problem in problems]
        chromium.close()
    return found


def _picture_problems(source, natural, shown, size):
    if not natural:
        return [f"{source} does not load"]
    if size is not None and size * shown / natural < SMALLEST_TEXT:
        return [f"{source} has text of {size * shown / natural:.1f} pixels"]
    return []


def smallest_text(path):
    """Size of the smallest text in an SVG; None if it does not say."""
    if path.suffix != ".svg" or not path.exists():
        return None
    sizes = re.findall(r"font-size[:=][\"' ]*([\d.]+)", path.read_text())
    return min(map(float, sizes), default=None)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site", type=pathlib.Path)
    site = parser.parse_args().site.resolve()
    problems = broken_links(site) + layout_problems(pages_of(site), smallest_text)
    print("\n".join(problems) or "no problem")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
