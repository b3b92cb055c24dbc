"""Every public name is on a page of docs/api, and its docstring becomes proper markup."""

import importlib.util
import inspect
import os
import pathlib
import re

import pytest

import jaxquant

os.environ.setdefault("KERAS_BACKEND", "jax")
DOCS = pathlib.Path(__file__).parents[1] / "docs"


def _import_api_pages():
    # The folder of the site is not a package.
    spec = importlib.util.spec_from_file_location("api_pages", DOCS / "api_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


api_pages = _import_api_pages()
NAMES = [
    (path, name)
    for path in api_pages.MODULES
    for name in api_pages.names_of(path)
    if api_pages.has_docstring(getattr(api_pages.module_of(path), name))
]


def test_every_public_module_has_a_page_on_the_site():
    marks = [
        re.search(r"^\{every-public-name\} (\S+)$", path.read_text(), re.MULTILINE)
        for path in (DOCS / "api").glob("*.md")
    ]
    assert sorted(m[1] for m in marks if m) == sorted(api_pages.MODULES)
    source = inspect.getsource(jaxquant)
    modules = re.findall(r"^ *from \.(?:ops)? import (\w+) as", source, re.MULTILINE)
    public = {m for m in modules if inspect.ismodule(getattr(jaxquant, m))}
    assert public == {"allocation", "checkpoints", "kv", "methods", "training", "tree", "tuning"}
    assert {f"jaxquant.{m}" for m in public} <= set(api_pages.MODULES)
    listed = (DOCS / "index.md").read_text().splitlines()
    assert {f"api/{path.stem}" for path in (DOCS / "api").glob("*.md")} <= set(listed)


@pytest.mark.parametrize("path", api_pages.MODULES)
def test_a_page_has_a_directive_for_every_public_name(path):
    pytest.importorskip("keras")
    text = api_pages.with_directives(f"{{every-public-name}} {path}\n", {"INT8": "a \\| b"})
    found = re.findall(r"^\.\. auto\w+:: ([\w.]+)$", text, re.MULTILINE)
    entries = re.findall(r"^\.\. py:\w+:: (\w+)\n   :module: (\S+)$", text, re.MULTILINE)
    found += [f"{module}.{name}" for name, module in entries]
    module = api_pages.module_of(path)
    public = [n for n in dir(module) if n[0] != "_" and not inspect.ismodule(getattr(module, n))]
    assert sorted(found) == sorted(f"{path}.{name}" for name in public)


@pytest.mark.parametrize("path, name", NAMES)
def test_every_public_function_class_and_method_has_a_docstring(path, name):
    value = getattr(api_pages.module_of(path), name)
    assert inspect.getdoc(inspect.unwrap(value) if not inspect.isclass(value) else value)
    if inspect.isclass(value) and api_pages.is_ours(value):
        kinds = (property, classmethod, staticmethod)
        own = {k: v for k, v in vars(value).items() if not k.startswith("_")}
        methods = [k for k, v in own.items() if inspect.isfunction(v) or isinstance(v, kinds)]
        missing = [k for k in methods if not inspect.getdoc(getattr(value, k, None) or own[k])]
        assert not missing


DOCSTRING = """Scales `x`s by |s|, and `y` too.

    y = x * s

Args:
    x, s: arrays that `f(*a,
        b)` returns.

Returns:
    Pair of
        y: the product, two
            lines;
        s: as it was.
    Both are arrays.

Error: at most
    half a step.
Source: somebody.

Example:
    >>> f(*a)
"""


def test_docstrings_become_markup():
    assert api_pages.markup(DOCSTRING.splitlines()) == [
        r"Scales ``x``\ s by \|s\|, and ``y`` too.",
        "",
        "::",
        "",
        "    y = x * s",
        "",
        "Args:",
        "    x, s: arrays that ``f(*a, b)`` returns.",
        "",
        ":returns:",
        "    Pair of",
        "",
        "    * y: the product, two",
        "      lines;",
        "",
        "    * s: as it was.",
        "",
        "    Both are arrays.",
        "",
        "",
        "**Error:** at most",
        "half a step.",
        "",
        "**Source:** somebody.",
        "",
        "Example:",
        "    >>> f(*a)",
    ]


def test_configs_are_shown_without_their_defaults():
    config = "ArrayConfig(format=int4, group_size=128, symmetric=False)"
    assert api_pages.brief(jaxquant.W4A16_ASYM) == f"Scheme(weights={config})"
    assert api_pages.brief({"a": (jaxquant.AbsMax, 1)}) == "{'a': (AbsMax, 1)}"
