"""The site: `sphinx-build -W docs site` writes the pages of this folder as HTML."""

import os
import pathlib
import re
import sys

os.environ.setdefault("KERAS_BACKEND", "jax")
sys.path.insert(0, str(pathlib.Path(__file__).parent))

import api_pages

import jaxquant

project = "jaxquant"
author = copyright = "the jaxquant developers"
release = jaxquant.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
# The fields of a frozen dataclass are its arguments.
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_rtype = False
html_theme = "sphinx_book_theme"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"jaxquant {release}"
html_theme_options = {"show_toc_level": 2, "navbar_persistent": []}
myst_heading_anchors = 4
# Notebooks are stored without outputs, and run here, in an empty folder.
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True


# Kinds of names whose docstrings are a sentence.
_VALUES = ("property", "attribute", "data")
_texts = {}
_ROW = re.compile(r"^\| `([\w.]+)` \| (.*) \| \[", re.MULTILINE)


def setup(app):
    """Makes the README, which is not part of the site, a word instead of a link, and API pages."""
    app.connect("source-read", _without_links_to_the_readme)
    app.connect("source-read", _with_public_names)
    app.connect("source-read", _with_links_to_public_names)
    # Before napoleon's, which reads the sections.
    app.connect("autodoc-process-docstring", _as_restructured_text, priority=100)
    app.connect("autodoc-process-docstring", _with_text_of_properties, priority=900)


def _without_links_to_the_readme(app, name, source):
    source[0] = re.sub(r"\[README\]\(\.\./README\.md[^)]*\)", "README", source[0])


def _with_public_names(app, name, source):
    if name.startswith("api/"):
        reference = pathlib.Path(app.srcdir, "reference.md").read_text()
        source[0] = api_pages.with_directives(source[0], dict(_ROW.findall(reference)))


def _with_links_to_public_names(app, name, source):
    """Links each name of the reference to its place on a page of docs/api."""
    if name == "reference":
        source[0] = re.sub(
            r"^\| `([\w.]+)` \|", r"| {py:obj}`\1 <jaxquant.\1>` |", source[0], flags=re.MULTILINE
        )


def _as_restructured_text(app, kind, name, value, options, lines):
    lines[:] = api_pages.markup(lines)
    if kind in _VALUES:
        # Napoleon takes what is before a colon for a type.
        _texts[name], lines[:] = lines[:], []


def _with_text_of_properties(app, kind, name, value, options, lines):
    lines[:] = _texts.pop(name, lines)
