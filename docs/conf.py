"""The site: `sphinx-build -W docs site` writes the pages of this folder as HTML."""

import re

import jaxquant

project = "jaxquant"
copyright = "the jaxquant developers"
release = jaxquant.__version__
extensions = ["myst_parser", "sphinx_copybutton"]
html_theme = "sphinx_book_theme"
html_title = f"jaxquant {release}"
html_theme_options = {"show_toc_level": 2}
myst_heading_anchors = 4


def setup(app):
    """Makes the README, which is not part of the site, a word instead of a link."""
    app.connect("source-read", _without_links_to_the_readme)


def _without_links_to_the_readme(app, name, source):
    source[0] = re.sub(r"\[README\]\(\.\./README\.md[^)]*\)", "README", source[0])
