"""The architecture, checked from the source text; only the front door is imported.

Layers import downwards only, and through each other's doors: a folder's `__init__` is for users
and for other folders, its `internal` for other folders alone.
"""

import ast
import collections
import functools
import inspect
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import jaxquant
from jaxquant.late_modules import LATE

PACKAGE = "jaxquant"
ROOT = pathlib.Path(__file__).parents[1] / PACKAGE
# A layer may import the layers before it in this list.
LAYERS = [
    "version",
    "late_modules",
    "core",
    "jaxprs",
    "kernels",
    "ops",
    "explain",
    "methods",
    "tree",
    "checkpoints",
    "inspection",
    "lift",
    "calibration",
    "allocation",
    "tuning",
    "training",
    "keras",
    "demo",
    "__main__",
]
MAX_FILE_LINES = 400
MAX_NESTING = 4
MAX_BODY_LINES = 60
# Modules that may import inside a function, each with its reason.
LATE_IMPORTS = {
    "allocation/allocation.py": "rich is slow to import, and only tables need it",
    "allocation/picture.py": "matplotlib is an optional package, and slow to import",
    "calibration/collected.py": "rich is slow to import, and only tables need it",
    "checkpoints/report.py": "rich is slow to import, and only tables need it",
    "demo/text.py": "tokenizers is an optional package",
    "demo/vocabulary.py": "jinja2 is an optional package",
    "explain/table.py": "rich is slow to import, and only tables need it",
    "lift/uses.py": "rich is slow to import, and only tables need it",
    "tree/plot.py": "matplotlib is an optional package, and slow to import",
    "tree/progress.py": "rich is slow to import, and only a progress bar needs it",
    "tree/report_table.py": "rich is slow to import, and only tables need it",
}
# Optional packages, which `import jaxquant` must not need.
OPTIONAL = ["jinja2", "keras", "optax", "matplotlib", "rich", "safetensors", "tokenizers"]
# Slow to import, and needed by few programs.
SLOW = ["jax.experimental.pallas", "jax.scipy.linalg"]
SLOW += [f"{PACKAGE}.{name}" for name in LATE]
# Parts of JAX without a promise of stability: one folder names them, and these tests.
INTERNALS = ("jax._src", "jax.core", "jax.extend", "jax.interpreters")
READS_INTERNALS = {
    "tests/conftest.py": "JAX has no public way to compile a whole process quickly",
}
# Names that several files may have, because they hold the same concept for different layers.
SHARED_NAMES = {
    "__init__.py": "Python's",
    "internal.py": "a folder's door for other folders",
    "dot.py": "dot_general and matmul: in ops of QTensors, in training of floats",
    "lora.py": "adapters: of trees, and of Keras layers",
    "specs.py": "PartitionSpecs: of the arrays of a QTensor, of a lifted function's arguments",
    "low_rank.py": "an array with adapters, and operations on it",
    "report.py": "what a tree, or a checkpoint, holds, as a table",
    "quantize.py": "an array, a tree and a Keras model, quantized",
}
# Name of methods that return an error whose text shows what was got.
SHOWING = "invalid"
# Exceptions that are caught within the library, and say why another way is chosen.
REASONS = ("Unsupported",)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.ClassDef, *FUNCTIONS)

MODULES = sorted(ROOT.rglob("*.py"))
SOURCES = sorted(p for p in ROOT.rglob("*") if p.suffix in (".py", ".cc", ".h"))


def for_each(paths):
    """One test of all paths: a test for each would take longer than its check."""

    def decorate(check):
        def test():
            for path in paths:
                check(path)

        test.__doc__ = check.__doc__
        return test

    return decorate


each_module = for_each(MODULES)


@functools.cache
def parsed(path):
    return ast.parse(path.read_text())


def nodes_of(path, *kinds) -> list[Any]:
    return [node for node in ast.walk(parsed(path)) if isinstance(node, kinds)]


def layer_of(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


def targets_of(node, folder):
    """What an import statement names, as paths that start with the package."""
    if isinstance(node, ast.Import):
        return [alias.name.split(".") for alias in node.names]
    above = folder[: len(folder) - node.level + 1] if node.level else ()
    base = [PACKAGE, *above] if node.level else []
    base += node.module.split(".") if node.module else []
    # `from .. import core` names the layer after `import`.
    names = node.names if base == [PACKAGE] else []
    return [[*base, alias.name] for alias in names] or [base]


def internal_imports(path):
    """(line, target below the package) of each import of our own code."""
    folder = path.relative_to(ROOT).parts[:-1]
    for node in nodes_of(path, ast.Import, ast.ImportFrom):
        for package, *target in targets_of(node, folder):
            if package == PACKAGE and target:
                yield node.lineno, target


def test_the_checks_see_the_whole_package():
    assert {layer_of(path) for path in MODULES} - {"__init__"} <= set(LAYERS)
    assert {"core", "jaxprs", "kernels", "ops", "explain"} <= {layer_of(path) for path in MODULES}
    dot = list(internal_imports(ROOT / "ops" / "dot.py"))
    assert ["core"] in [target for _, target in dot]
    assert ["ops", "operands"] in [target for _, target in dot]


@each_module
def test_imports_point_down_and_use_the_front_door(path):
    here = layer_of(path)
    if here == "__init__":
        return
    for line, target in internal_imports(path):
        if target[0] == here:
            continue
        assert target[0] in LAYERS, f"{path}:{line}: {target[0]} is not a layer"
        assert LAYERS.index(target[0]) < LAYERS.index(here), (
            f"{path}:{line}: {here} may not import {target[0]}"
        )
        assert len(target) == 1 or target[1:] == ["internal"], (
            f"{path}:{line}: import from {target[0]} or {target[0]}.internal, not from "
            f"{'.'.join(target)}"
        )


def internals_of_jax(path):
    """Each part of JAX's internals that a file names, in imports and after `jax.`."""
    named = [ast.unparse(node) for node in nodes_of(path, ast.Attribute)]
    for node in nodes_of(path, ast.Import, ast.ImportFrom):
        module = getattr(node, "module", None)
        named += [f"{module}.{a.name}" if module else a.name for a in node.names]
    return sorted(i for i in INTERNALS if any(f"{name}.".startswith(f"{i}.") for name in named))


def test_only_one_folder_reads_internals_of_jax():
    repository = ROOT.parent
    files = [*MODULES, *repository.glob("tests/**/*.py"), *repository.glob("benchmarks/**/*.py")]
    found = {
        name: internals_of_jax(path)
        for path in files
        if not (name := str(path.relative_to(repository))).startswith("jaxquant/jaxprs/")
    }
    assert {name for name, internals in found.items() if internals} == set(READS_INTERNALS)
    assert internals_of_jax(ROOT / "jaxprs" / "params.py") == ["jax.core", "jax.extend"]
    assert internals_of_jax(ROOT / "jaxprs" / "lowering.py") == ["jax.extend", "jax.interpreters"]


@each_module
def test_imports_are_at_the_top(path):
    name = str(path.relative_to(ROOT))
    for function in nodes_of(path, *FUNCTIONS):
        late = [n.lineno for n in ast.walk(function) if isinstance(n, ast.Import | ast.ImportFrom)]
        assert not late or name in LATE_IMPORTS, f"{path}:{late}: imports inside a function"


@for_each(SOURCES)
def test_module_is_small(path):
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_FILE_LINES, f"{path}: {lines} lines; split it by concept"


def test_files_of_one_name_hold_one_concept():
    by_name = collections.defaultdict(list)
    for path in SOURCES:
        by_name[path.name].append(str(path.relative_to(ROOT)))
    shared = {name: paths for name, paths in by_name.items() if len(paths) > 1}
    unexpected = {name: paths for name, paths in shared.items() if name not in SHARED_NAMES}
    assert not unexpected, f"rename all but one: {unexpected}"
    assert set(SHARED_NAMES) <= set(shared), "names that are not shared"


def body_lines(function):
    """Lines from the first statement after the docstring to the last."""
    has_docstring = ast.get_docstring(function) is not None
    statements = function.body[has_docstring:]
    return statements[-1].end_lineno - statements[0].lineno + 1 if statements else 0


@each_module
def test_functions_fit_in_the_eye(path):
    for function in nodes_of(path, *FUNCTIONS):
        lines = body_lines(function)
        where = f"{path}:{function.lineno}: {function.name}"
        assert lines <= MAX_BODY_LINES, f"{where} has {lines} lines; split it by step"


def nesting(node, depth=0):
    """Deepest block below `node`; an `elif` is no deeper than its `if`."""
    deepest = depth
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and node.orelse == [child]
        deeper = isinstance(child, BLOCKS) and not is_elif
        deepest = max(deepest, nesting(child, depth + deeper))
    return deepest


@each_module
def test_nesting_is_shallow(path):
    depth = nesting(parsed(path))
    assert depth <= MAX_NESTING, f"{path}: {depth} levels deep"


def strings_in(nodes):
    parts = [part for node in nodes for part in ast.walk(node)]
    return [p.value for p in parts if isinstance(p, ast.Constant) and isinstance(p.value, str)]


def is_entry_point(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


@each_module
def test_no_branch_on_a_name(path):
    """`if mode == "int4"` is a row missing from a table; branch on a property."""
    for node in nodes_of(path, ast.If, ast.IfExp, ast.match_case):
        if isinstance(node, ast.match_case):
            names = strings_in([node.pattern])
        else:
            compares = [n for n in ast.walk(node.test) if isinstance(n, ast.Compare)]
            # `"..." in text` asks what a text contains, which is no name.
            names = strings_in(c for compare in compares for c in compare.comparators)
        line = getattr(node, "lineno", None)
        assert not names or is_entry_point(node), f"{path}:{line}: branches on {names}"


@each_module
def test_every_error_shows_what_was_got(path):
    for node in nodes_of(path, ast.Raise):
        if isinstance(node.exc, ast.Call) and getattr(node.exc.func, "id", "") in REASONS:
            continue
        if isinstance(node.exc, ast.Call) and getattr(node.exc.func, "attr", "") == SHOWING:
            continue
        is_reraised = node.exc is None or isinstance(node.exc, ast.Name)
        shows = node.exc is not None and any(
            isinstance(n, ast.FormattedValue) for n in ast.walk(node.exc)
        )
        assert shows or is_reraised, f"{path}:{node.lineno}: the message shows no value"


def test_methods_that_make_errors_show_what_was_got():
    functions = [f for path in MODULES for f in nodes_of(path, ast.FunctionDef)]
    methods = [f for f in functions if f.name == SHOWING]
    assert methods
    for method in methods:
        assert any(isinstance(node, ast.FormattedValue) for node in ast.walk(method)), method.name


def front_doors():
    return [path for path in MODULES if path.name in ("__init__.py", "internal.py")]


def statements_of(door) -> Iterator[Any]:
    """Its statements but the docstring; those below `if TYPE_CHECKING` are in their place."""
    for node in parsed(door).body[1:]:
        yield from [*node.body, *node.orelse] if isinstance(node, ast.If) else [node]


@for_each(front_doors())
def test_front_doors_only_name_what_they_export(path):
    assert ast.get_docstring(parsed(path)), path
    for node in statements_of(path):
        assert isinstance(node, ast.ImportFrom), f"{path}:{node.lineno}"
        for alias in node.names if node.level else ():
            assert alias.asname == alias.name, f"{path}:{node.lineno}: write `x as x`"


@for_each([p for p in MODULES if p.name == "internal.py"])
def test_what_is_public_is_not_internal_too(path):
    doors = [path, path.with_name("__init__.py")]
    names = [{a.name for n in nodes_of(door, ast.ImportFrom) for a in n.names} for door in doors]
    assert not names[0] & names[1], path


def public_names():
    imports = [node for node in statements_of(ROOT / "__init__.py") if node.level]
    return [alias.name for node in imports for alias in node.names]


@for_each(public_names())
def test_every_public_name_is_documented(name):
    is_special = name.startswith("__") and name.endswith("__")
    assert is_special or not name.startswith("_"), f"{name} is not public"
    value = getattr(jaxquant, name)
    if inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value):
        documentation = inspect.getdoc(value) or ""
        is_generated = inspect.isclass(value) and documentation.startswith(f"{name}(")
        assert documentation, f"{name} has no docstring"
        assert not is_generated, f"{name} has the docstring that dataclasses make up"


def test_nothing_public_is_missing_from_the_list():
    listed = set(public_names())
    found = {name for name in vars(jaxquant) if not name.startswith("_")}
    # Folders become attributes when they are imported, and it asks for TYPE_CHECKING.
    assert found - {*LAYERS, "TYPE_CHECKING"} <= listed
    assert set(LATE) <= listed
    assert len(public_names()) == len(listed)


def test_importing_the_package_imports_nothing_optional_or_slow():
    code = f"import sys, jaxquant; print([m for m in {OPTIONAL + SLOW} if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "[]"


def test_modules_that_are_imported_late_are_attributes():
    assert set(LATE) <= set(dir(jaxquant))
    for name in LATE:
        assert getattr(jaxquant, name) is sys.modules[f"{PACKAGE}.{name}"]
    with pytest.raises(AttributeError, match="module 'jaxquant' has no attribute 'trainings'"):
        getattr(jaxquant, "trainings")  # noqa: B009
