"""Small changes of the source of one file, each a `Mutant`."""

import ast
import copy
import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# What takes the place of an operator. Two that bind equally strongly, as far as there are such.
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
# Functions of two arguments in any order, and `isinstance`, which raises in the other.
COMMUTE = {"add", "equal", "gcd", "lcm", "max", "maximum", "min", "minimum", "multiply", "vdot"}
COMMUTE |= {"isinstance"}
# Places that have no effect, or whose positions Python 3.11 does not know.
SKIPPED_FIELDS = ("annotation", "returns", "type_params")
SKIPPED_NODES = (ast.JoinedStr, ast.Assert)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A file with one change.

    Attributes:
        path: of the file, as it was given.
        kind: of the change.
        line, end: first and last line of the statement that is changed.
        scopes: (first, last) line of the functions and classes around it, from the innermost.
        start: index of the first changed character.
        before, after: source of what is changed.
    """

    path: str
    kind: str
    line: int
    end: int
    scopes: tuple[tuple[int, int], ...]
    start: int
    before: str
    after: str

    def apply(self, source: str) -> str:
        """The source of the file, changed."""
        return source[: self.start] + self.after + source[self.start + len(self.before) :]

    def __str__(self):
        before, after = (" ".join(text.split()) for text in (self.before, self.after))
        return f"{self.path}:{self.line}: {before} -> {after}"


def mutants_of(path: str, source: str) -> list[Mutant]:
    """All changes of a file, in the order of their places."""
    return [
        _mutant(path, source, kind, changed, other, statement, scopes)
        for node, statement, scopes in _places(ast.parse(source), None, ())
        for kind, change in CHANGES.items()
        for changed, other in change(node)
    ]


def draw(mutants: Sequence[Mutant], count: int, generator: random.Random) -> list[Mutant]:
    """So many different changes: each kind is equally probable, and so is each place of a kind."""
    left = {kind: [m for m in mutants if m.kind == kind] for kind in CHANGES}
    drawn = []
    while len(drawn) < count and any(left.values()):
        places = left[generator.choice([kind for kind, places in left.items() if places])]
        drawn.append(places.pop(generator.randrange(len(places))))
    return drawn


def _places(node, statement, scopes) -> Iterator[tuple[Any, Any, tuple]]:
    """(node, statement, scopes) of what may be changed below a node."""
    for name, field in ast.iter_fields(node):
        if name in SKIPPED_FIELDS:
            continue
        for child in field if isinstance(field, list) else [field]:
            if not isinstance(child, ast.AST) or isinstance(child, SKIPPED_NODES):
                continue
            within = child if isinstance(child, ast.stmt) else statement
            if within is not None and hasattr(child, "lineno"):
                yield child, within, scopes
            is_scope = isinstance(child, (*_FUNCTIONS, ast.ClassDef))
            inner = ((child.lineno, child.end_lineno), *scopes) if is_scope else scopes
            yield from _places(child, within, inner)


def _with(node, **fields):
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _other_operator(node):
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in OPERATORS:
        yield node, _with(node, op=OPERATORS[type(node.op)]())


def _other_comparison(node):
    if isinstance(node, ast.Compare):
        yield node, _with(node, ops=[COMPARISONS[type(node.ops[0])](), *node.ops[1:]])


def _other_constant(node):
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield node, ast.Constant(not node.value)
        elif isinstance(node.value, int):
            yield node, ast.Constant(node.value + 1)
        elif isinstance(node.value, float):
            yield node, ast.Constant(node.value * 2 or 1.0)


def _negated_condition(node):
    loops = getattr(node, "generators", ())
    conditions = [condition for loop in loops for condition in loop.ifs]
    conditions += [node.test] if isinstance(node, ast.If | ast.IfExp | ast.While) else []
    for condition in conditions:
        yield condition, ast.UnaryOp(ast.Not(), condition)


def _removed_statement(node):
    """Calls, raises, and assignments without which each name still has a value."""
    is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    if is_call or isinstance(node, ast.Raise | ast.AugAssign | ast.Delete | ast.Continue):
        yield node, ast.Pass()
    elif isinstance(node, ast.Assign):
        read = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
        if all(_is_set_without(target, read) for target in node.targets):
            yield node, ast.Pass()


def _is_set_without(target, read):
    if isinstance(target, ast.Name):
        return target.id in read
    return isinstance(target, ast.Attribute | ast.Subscript)


def _swapped_arguments(node):
    if isinstance(node, ast.Call) and len(node.args) > 1:
        first, second, *others = node.args
        starred = isinstance(first, ast.Starred) or isinstance(second, ast.Starred)
        name = ast.unparse(node.func).rpartition(".")[2]
        if not starred and name not in COMMUTE and ast.dump(first) != ast.dump(second):
            yield node, _with(node, args=[second, first, *others])


# Each yields (a node, what takes its place), or nothing, for the node that it is given.
CHANGES: dict[str, Callable[[Any], Iterator[tuple[Any, Any]]]] = {
    "operator": _other_operator,
    "comparison": _other_comparison,
    "constant": _other_constant,
    "negated condition": _negated_condition,
    "removed statement": _removed_statement,
    "swapped arguments": _swapped_arguments,
}


def _mutant(path, source, kind, node, other, statement, scopes) -> Mutant:
    lines = source.split("\n")
    start = _offset(lines, node.lineno, node.col_offset)
    stop = _offset(lines, node.end_lineno, node.end_col_offset)
    text = ast.unparse(ast.fix_missing_locations(other))
    if isinstance(node, ast.expr) and not isinstance(node, ast.Constant):
        text = f"({text})"
    # Of a compound statement, its head alone.
    body = getattr(statement, "body", None)
    end = body[0].lineno - 1 if body else statement.end_lineno
    return Mutant(
        path=path,
        kind=kind,
        line=node.lineno,
        end=max(end, node.end_lineno or end),
        scopes=scopes,
        start=start,
        before=source[start:stop],
        after=text,
    )


def _offset(lines, line, column):
    """Index in the text of a position of `ast`, which counts bytes of UTF-8."""
    before = lines[line - 1].encode()[:column].decode()
    return sum(len(text) + 1 for text in lines[: line - 1]) + len(before)
