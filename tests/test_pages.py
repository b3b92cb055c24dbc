"""Pages say what must be installed to run their code, as `.ci/pages.py` reads it."""

import pathlib
import re
import runpy
import shutil
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = runpy.run_path(str(ROOT / ".ci" / "pages.py"))
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
# What brings a module that a page imports: one of these extras or packages.
BROUGHT_BY = {
    "equinox": {"frameworks"},
    "flax": {"frameworks"},
    "haiku": {"frameworks"},
    "keras": {"keras", "frameworks"},
    "keras_hub": {"keras-hub"},
    "matplotlib": {"plot"},
    "optax": {"optax", "frameworks"},
    "orbax": {"frameworks"},
}
ALWAYS = {"jax", "jaxquant", "numpy", *sys.stdlib_module_names}
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize(
    ("text", "extras", "packages"),
    [
        ("Nothing.", (), ()),
        ("`pip install '.[optax,keras]'`.", ("keras", "optax"), ()),
        ("pip install -e '.[docs]' && sphinx-build", (), ()),
        ("`pip install\n'.[demo]'` and `pip install --no-deps a-b c`", ("demo",), ("a-b", "c")),
        ("    pip install --no-deps a && jaxquant demo\n", (), ("a",)),
    ],
)
def test_what_a_page_says_to_install_is_found(text, extras, packages):
    assert PAGES["needs_of"](text) == (extras, packages)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_page_says_what_brings_the_modules_that_it_imports(path):
    text = path.read_text()
    extras, packages = PAGES["needs_of"](text)
    assert set(extras) <= EXTRAS.keys()
    code = "\n".join(PAGES["blocks_of"](text))
    found = re.findall(
        r"^\s*(?:import|from) ([\w., ]+?)(?: import .*| as .*)?$", code, re.MULTILINE
    )
    modules = {name.strip().split(".")[0] for line in found for name in line.split(",")}
    for module in modules - ALWAYS:
        assert BROUGHT_BY[module] & {*extras, *packages}, f"{path.name} imports {module}"


def test_cells_of_notebooks_are_code_of_a_page():
    page = "```python\na\n```\n\n```py\nb\n```\n\n```{code-cell}\nc\n```\n"
    assert PAGES["blocks_of"](page) == ["a\n", "c\n"]


def test_a_page_that_fails_says_why(tmp_path):
    python = pathlib.Path(sys.executable)
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n```python\nassert x == 1\n```\n")
    assert PAGES["run_page"](page, python) is None
    page.write_text("```python\nx = 1\n```\n\n```python\nassert x == 2, 'other'\n```\n")
    assert PAGES["run_page"](page, python).endswith("AssertionError: other\n")


def test_the_command_fails_if_a_page_does(tmp_path, monkeypatch, capsys):
    fails = shutil.which("false")
    assert fails is not None
    for name, python in [("environment", fails), ("environment-optax", sys.executable)]:
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin" / "python").symlink_to(python)
    pages = [tmp_path / name for name in ("empty.md", "runs.md", "fails.md")]
    pages[0].write_text("No code.\n")
    pages[1].write_text("`pip install '.[optax]'`\n\n```python\nx = 1\n```\n")
    pages[2].write_text("```python\nx = 1\n```\n")
    outputs = []
    for count, status in [(2, 0), (3, 1)]:
        command = ["pages.py", "a.whl", *map(str, pages[:count]), "--folder", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", command)
        assert PAGES["main"]() == status
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == f"{pages[1]}: optax: runs\n"
    assert f"{pages[2]}: the wheel alone: FAILS\n" in outputs[1]
