"""The command line interface."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import rich.console
import rich.table

from . import demo, tree
from .core import SCHEMES, Scheme
from .tree.internal import check_target, progress_bar, read_tree
from .version import __version__

Commands = Any  # `argparse` does not export the type of `add_subparsers(...)`.
_EXAMPLES = """examples:
  jaxquant demo
  jaxquant quantize model.safetensors small.safetensors --scheme W4A16
  jaxquant quantize model.safetensors small.safetensors --scheme W8A8 \\
      --rule '*lm_head*=W8A16' --rule 're:.*gate.*=none'
  jaxquant inspect small.safetensors --plot small.png
"""
# Metadata key of the SQNR, which cannot be computed later without the float weights.
_SQNR = "jaxquant.sqnr"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, or 2 after an error, without a traceback."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"jaxquant {options.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxquant",
        description="Quantize arrays in JAX.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"jaxquant {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_demo(commands)
    _add_quantize(commands)
    _add_inspect(commands)
    return parser


def _add_demo(commands: Commands) -> None:
    text = "Quantize a pretrained sentence encoder with several schemes and compare them."
    parser = _add(commands, "demo", _demo, text)
    parser.add_argument("--encoder", type=Path, metavar="DIR", help="folder of a BERT encoder")
    parser.add_argument("--sentences", type=int, default=600, metavar="N", help="default: 600")
    parser.add_argument(
        "--only", action="append", choices=list(demo.SCHEMES), metavar="NAME",
        help="run only this scheme; repeatable; default: all",
    )  # fmt: skip


def _add_quantize(commands: Commands) -> None:
    text = "Quantize the matrices of a safetensors file; norms and biases stay in float."
    parser = _add(commands, "quantize", _quantize, text)
    parser.add_argument("source", metavar="IN.safetensors", type=Path)
    parser.add_argument("target", metavar="OUT.safetensors", type=Path)
    names = ", ".join(SCHEMES)
    parser.add_argument("--scheme", type=_scheme, metavar="NAME", help=f"one of {names}")
    parser.add_argument(
        "--rule", type=_rule, action="append", default=[], metavar="PATTERN=NAME",
        help="scheme of the tensors whose names match a glob or re:REGEX; none keeps them in "
        "float; repeatable; the first match decides; rules take precedence over --scheme",
    )  # fmt: skip
    parser.add_argument(
        "--axis", type=int, default=-1,
        help="contracted axis of the matrices: -1 (default) for (out, in), as in PyTorch; -2 for "
        "(in, out), as in JAX and Keras",
    )  # fmt: skip


def _add_inspect(commands: Commands) -> None:
    text = "Show the tensors of a safetensors file and how they are quantized."
    parser = _add(commands, "inspect", _inspect, text)
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.add_argument(
        "--plot", metavar="PNG", help="write a picture of the SQNR and code histograms"
    )


def _add(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], None], text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    return parser


def _scheme(name: str) -> Scheme | None:
    schemes: dict[str, Scheme | None] = {**SCHEMES, "NONE": None}
    if name.upper() not in schemes:
        raise argparse.ArgumentTypeError(
            f"{name!r} is not a scheme; choose one of {', '.join(SCHEMES)}, none"
        )
    return schemes[name.upper()]


def _rule(text: str) -> tuple[str, Scheme | None]:
    pattern, equals, name = text.rpartition("=")
    if not (pattern and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form PATTERN=NAME")
    return pattern, _scheme(name)


def _demo(options: argparse.Namespace) -> None:
    folder = options.encoder or demo.packaged_encoder()
    params, config = demo.load_encoder(folder)
    tokens = demo.tokenize(demo.documentation_sentences(options.sentences), folder)
    names = options.only or list(demo.SCHEMES)
    schemes = {name: demo.SCHEMES[name] for name in names}
    with progress_bar(True, None, "Comparing") as progress:
        results = demo.compare(params, config, tokens, schemes, progress=progress)
    _print(demo.table(results), [dataclasses.asdict(r) for r in results], options)


def _quantize(options: argparse.Namespace) -> None:
    rules: list[Any] = [
        tree.Rule(pattern, scheme, axis=options.axis) for pattern, scheme in options.rule
    ]
    if options.scheme is not None:
        rules += tree.default_rules(options.scheme, axis=options.axis)
    if not rules:
        raise ValueError(
            f"nothing to do for {options.source}: give --scheme NAME, --rule PATTERN=NAME, or both"
        )
    check_target(options.target)
    if options.target.exists() and options.target.samefile(options.source):
        raise ValueError(
            f"{options.source} and {options.target} are the same file; name another for the result"
        )
    params, _ = read_tree(options.source)
    quantized = tree.quantize(params, rules, progress=not options.json)
    report = tree.report(params, quantized, rules)
    sqnr = {r["path"]: r["sqnr"] for r in report.to_json()["rows"] if r["sqnr"] is not None}
    tree.save(options.target, quantized, {_SQNR: json.dumps(sqnr)})
    _print(report.table(), report.to_json(), options)


def _inspect(options: argparse.Namespace) -> None:
    params, metadata = read_tree(options.file)
    known = _stored_sqnr(options.file, metadata)
    rows = tree.report(None, params).rows
    report = tree.Report(tuple(dataclasses.replace(r, sqnr=known.get(r.path)) for r in rows))
    if options.plot:
        report.plot(options.plot)
    _print(report.table(), report.to_json(), options)


def _stored_sqnr(path: Path, metadata: dict[str, str]) -> dict[str, float]:
    """SQNR by path, as stored when the file was quantized."""
    text = metadata.get(_SQNR, "{}")
    try:
        return {name: float(value) for name, value in json.loads(text).items()}
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its metadata {_SQNR!r} is malformed: {text[:80]!r}") from error


def _print(table: rich.table.Table, values: Any, options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps(values))
    else:
        # Wide enough for all columns if the output is not a terminal.
        width = None if sys.stdout.isatty() else 160
        rich.console.Console(width=width).print(table)


if __name__ == "__main__":
    sys.exit(main())
