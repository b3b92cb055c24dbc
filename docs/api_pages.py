"""The pages of docs/api: which names each has, and docstrings as reStructuredText."""

import dataclasses
import importlib
import inspect
import re
import types

# Each page has the public names of its module, except those that an earlier page has.
MODULES = (
    "jaxquant",
    "jaxquant.tree",
    "jaxquant.methods",
    "jaxquant.calibration",
    "jaxquant.allocation",
    "jaxquant.tuning",
    "jaxquant.training",
    "jaxquant.checkpoints",
    "jaxquant.kv",
    "jaxquant.keras",
    "jaxquant.keras.layers",
)
# Longer values of constants are not shown.
MAX_VALUE = 400
_MARK = re.compile(r"^\{every-public-name\} ([\w.]+)$", re.MULTILINE)
_SECTIONS = ("Args:", "Attributes:", "Raises:", "Returns:", "Yields:", "Example:", "Examples:")
_CODE = re.compile(r"(`[^`]+`)")
_NOTE = re.compile(r"^([A-Z]\w+(?: and \w+)?): (\S.*)")
_PART = re.compile(r"\w+(?:, \w+)*: ")
_SPECIAL = re.compile(r"([*|\\]|(?<=\w)_(?!\w))")


def module_of(path):
    """The module of that public path; `jaxquant.kv` is a name of `jaxquant`."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        parent, _, name = path.rpartition(".")
        return getattr(importlib.import_module(parent), name)


def names_of(path):
    """Public names of a module, other modules left out, in the order of their sources."""
    module = module_of(path)
    source = inspect.getsource(module)
    return [
        name
        for name in re.findall(r"^from \.\S* import \S+ as (\w+)$", source, re.MULTILINE)
        if not name.startswith("_") and not isinstance(getattr(module, name), types.ModuleType)
    ]


def described_at():
    """The first public path of each public name: {(module, name): path}."""
    first, found = {}, {}
    for path in MODULES:
        for name in names_of(path):
            value = getattr(module_of(path), name)
            # Equal constants, such as two presets, are different names.
            key = id(value) if has_docstring(value) else (path, name)
            found[path, name] = first.setdefault(key, f"{path}.{name}")
    return found


def has_docstring(value):
    """Whether a value has a docstring; constants are documented by their value."""
    return inspect.isclass(value) or inspect.isroutine(inspect.unwrap(value))


def is_ours(value):
    """Whether this package defines it; constants are."""
    return not inspect.isclass(value) or value.__module__.startswith("jaxquant")


def with_directives(text, reference):
    """The text of a page, its mark replaced by a directive for each name.

    Args:
        text: of the page.
        reference: what names are, by path below `jaxquant`, as in docs/reference.md, whose order
            the page has. Only constants need it.
    """
    return _MARK.sub(lambda mark: _directives(mark[1], reference), text)


def _directives(path, reference):
    found, blocks, order = described_at(), [], list(reference)

    def place(name):
        key = f"{path}.{name}".removeprefix("jaxquant.")
        return order.index(key) if key in reference else len(order)

    for name in sorted(names_of(path), key=place):
        value, full = getattr(module_of(path), name), f"{path}.{name}"
        first = found[path, name]
        if not is_ours(value):
            # Keras' layers that work as they are.
            blocks.append(_entry("class", path, name, "Keras' own layer, which needs no change."))
        elif first != full:
            # An entry for the index and for links, with the text on the other page.
            kind = "class" if inspect.isclass(value) else "function"
            blocks.append(_entry(kind, path, name, f"The same as :py:obj:`{first}`."))
        elif inspect.isclass(value):
            blocks.append(f".. autoclass:: {full}\n   :members:")
        elif has_docstring(value):
            blocks.append(f".. autofunction:: {full}")
        else:
            blocks.append(_constant(path, name, value, reference))
    body = "\n\n".join(blocks)
    return f"```{{eval-rst}}\n{body}\n```"


def _entry(kind, path, name, text):
    """A directive for a name without a docstring on this page."""
    return f".. py:{kind}:: {name}\n   :module: {path}\n\n   {text}"


def _constant(path, name, value, reference):
    what = reference.get(f"{path}.{name}".removeprefix("jaxquant."), "").replace("\\|", "|")
    text = " ".join(markup([what]))
    shown = brief(value)
    # Some rules are long patterns.
    shown = f"\n\n   ``{shown}``" if len(shown) < MAX_VALUE else ""
    return _entry("data", path, name, f"{text}{shown}")


def brief(value):
    """A value as text, its configs without the fields that have their defaults."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {brief(v)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(brief, value)) + ")"
    if inspect.isclass(value):
        return value.__name__
    if not dataclasses.is_dataclass(value) or not value.__dataclass_params__.repr:
        return str(value)
    fields = [(f, getattr(value, f.name)) for f in dataclasses.fields(value)]
    texts = [f"{f.name}={brief(v)}" for f, v in fields if v != f.default]
    return f"{type(value).__name__}({', '.join(texts)})"


def markup(lines):
    """Lines of a docstring as reStructuredText; napoleon reads the sections that are left."""
    out, section, is_formula, was_blank = [], None, False, False
    for line in _joined(lines):
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if not text:
            out.append("")
            was_blank = True
            continue
        note = _NOTE.match(line)
        if not indent:
            section = "note" if note else text if text in _SECTIONS else None
        # An indented block after an empty line is a formula, unless it belongs to a section.
        starts = was_blank and not is_formula
        is_formula = indent >= 4 and section is None and (is_formula or was_blank)
        out += ["::", ""] if is_formula and starts else []
        if is_formula or section in ("Example:", "Examples:"):
            out.append(line)
        elif section == "note":
            out += _note(text, note)
        elif section == "Returns:":
            out += _result(indent, text, out)
        else:
            out.append(" " * indent + _escaped(text))
        was_blank = False
    return out


def _joined(lines):
    """Lines without code in backticks that goes on in the next line."""
    open_line = ""
    for line in lines:
        line = f"{open_line} {line.strip()}" if open_line else line
        open_line = line if line.count("`") % 2 else ""
        if not open_line:
            yield line


def _escaped(text):
    parts, out = _CODE.split(text), []
    for code, prose in zip(["", *parts[1::2]], parts[::2], strict=True):
        # Code ends before a letter only if an escaped space is between them.
        space = "\\ " if code and re.match(r"\w", prose) else ""
        out.append((f"`{code}`" if code else "") + space + _SPECIAL.sub(r"\\\1", prose))
    return "".join(out)


def _note(text, note):
    """A line of a paragraph such as "Source: ...", whose later lines are indented."""
    return ["", f"**{note[1]}:** {_escaped(note[2])}"] if note else [_escaped(text)]


def _result(indent, text, out):
    """A line of the section on what is returned; named parts become a list."""
    if not indent:
        return [":returns:"]
    if _PART.match(text):
        return ["", f"    * {_escaped(text)}"]
    is_part = indent >= 8 and any(line.startswith("    * ") for line in out[-9:])
    back = [""] if indent == 4 and out[-1].startswith(("    * ", "      ")) else []
    return [*back, "    " + "  " * is_part + _escaped(text)]
