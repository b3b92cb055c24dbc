"""The command line interface."""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import rich.console
import rich.table

from . import checkpoints, demo, inspection, methods, tree
from .calibration import Statistics
from .core import SCHEMES, Scheme
from .tree.internal import (
    check_target,
    leaves_with_paths,
    match_rules,
    progress_bar,
    read_tree,
    sqnr_metadata,
)
from .version import __version__

Commands = Any  # `argparse` does not export the type of `add_subparsers(...)`.
_EXAMPLES = """examples:
  jaxquant demo
  jaxquant generate "The history of science is" --scheme W8A8
  jaxquant quantize model.safetensors small.safetensors --scheme W4A16
  jaxquant quantize model.safetensors small.safetensors --scheme W8A8 \\
      --rule '*lm_head*=W8A16' --rule 're:.*gate.*=none'
  jaxquant inspect small.safetensors --plot small.png
"""
_AS_STORED = "as-stored"
# The last two need no statistics.
_METHODS = {
    "importance": methods.Importance(),
    "gptq": methods.GPTQ(importance=True),
    "awq": [methods.AWQ(), methods.Importance()],
    "autoround": methods.AutoRound(start=methods.GPTQ(importance=True)),
    "sinq": [methods.SINQ(), methods.Nearest()],
    "hqq": methods.HQQ(),
}


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
    _add_generate(commands)
    _add_quantize(commands)
    _add_inspect(commands)
    return parser


def _add_demo(commands: Commands) -> None:
    text = "Quantize a sentence encoder and a language model with several schemes and compare them."
    parser = _add(commands, "demo", _demo, text)
    parser.add_argument("--encoder", type=Path, metavar="DIR", help="folder of a BERT encoder")
    parser.add_argument("--sentences", type=int, default=600, metavar="N", help="default: 600")
    parser.add_argument("--model", type=Path, metavar="PATH", help="language model, as in generate")
    parser.add_argument(
        "--windows", type=int, default=4, metavar="N",
        help="windows of 256 tokens that the language model reads; default: 4",
    )  # fmt: skip
    parser.add_argument(
        "--only", action="append", choices=list({**demo.SCHEMES, **demo.VARIANTS}), metavar="NAME",
        help="show only this row of the tables; repeatable; default: all",
    )  # fmt: skip


def _add_generate(commands: Commands) -> None:
    text = (
        "Continue a text with a language model: SmolLM2-135M-Instruct, or one of the Llama family."
    )
    parser = _add(commands, "generate", _generate, text)
    parser.add_argument("prompt", metavar="TEXT")
    parser.add_argument(
        "--model", type=Path, metavar="PATH", help="GGUF file, or folder of Hugging Face"
    )
    parser.add_argument(
        "--scheme", type=_requantization, default=_AS_STORED, metavar="NAME",
        help=f"one of {_AS_STORED} (default), none, {', '.join(SCHEMES)}",
    )  # fmt: skip
    parser.add_argument(
        "--kv", choices=list(demo.STORES), default="bfloat16",
        help="how keys and values are stored; default: bfloat16",
    )  # fmt: skip
    parser.add_argument("--chat", action="store_true", help="answer TEXT, instead of continuing it")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T",
        help="sample from the distribution at this temperature; default: the most probable token",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the samples")


def _add_quantize(commands: Commands) -> None:
    text = (
        "Quantize the matrices of a checkpoint (Hugging Face folder, safetensors or GGUF file), "
        "tensor by tensor; norms and biases stay in float. Run it again to go on after a stop."
    )
    parser = _add(commands, "quantize", _quantize, text)
    parser.add_argument("source", metavar="IN", type=Path, help="checkpoint: a folder or a file")
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
    text = "how codes are chosen; sinq and hqq need no statistics; default: rounding to nearest"
    parser.add_argument("--method", choices=list(_METHODS), help=text)
    text = "of the activations, by the names of tensors, as jq.Statistics.save writes them"
    parser.add_argument("--statistics", type=Path, metavar="FILE", help=text)
    parser.add_argument(
        "--requantize", action="store_true",
        help="dequantize tensors that are stored quantized, such as those of most GGUF files",
    )  # fmt: skip


def _add_inspect(commands: Commands) -> None:
    text = "Show the tensors of a checkpoint and how they are quantized."
    parser = _add(commands, "inspect", _inspect, text)
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.add_argument(
        "--plot", type=Path, metavar="PNG", help="write a picture of the SQNR and code histograms"
    )
    text = "write a page with totals, charts and a table, for a browser"
    parser.add_argument("--html", type=Path, metavar="HTML", help=text)
    text = "first compare each tensor with its checksum"
    parser.add_argument("--verify", action="store_true", help=text)


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


def _requantization(name: str) -> Scheme | str | None:
    """What to quantize a model to: a scheme, None for float32, or `_AS_STORED`."""
    return _AS_STORED if name == _AS_STORED else _scheme(name)


def _rule(text: str) -> tuple[str, Scheme | None]:
    pattern, equals, name = text.rpartition("=")
    if not (pattern and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form PATTERN=NAME")
    return pattern, _scheme(name)


def _demo(options: argparse.Namespace) -> None:
    _use_compilation_cache()
    found: dict[str, list[Any]] = {}
    missing = []
    for name, compare in (("encoder", _compare_encoder), ("language", _compare_language)):
        try:
            found[name] = compare(options)
        except demo.NotInstalledError as error:
            found[name] = []
            missing.append(str(error))
    if missing and not any(found.values()):
        raise FileNotFoundError(f"No model is installed. {' '.join(missing)}")
    if options.json:
        rows = {name: [dataclasses.asdict(r) for r in table] for name, table in found.items()}
        print(json.dumps(rows | {"missing": missing}))
        return
    if found["encoder"]:
        _console().print(demo.table(found["encoder"]))
    if found["language"]:
        _console().print(demo.language_table(found["language"]))
    for text in missing:
        print(f"A table was left out. {text}", file=sys.stderr)


def _chosen(rows: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    return {name: row for name, row in rows.items() if name in (options.only or rows)}


def _compare_encoder(options: argparse.Namespace) -> list[demo.Result]:
    schemes = _chosen(demo.SCHEMES, options)
    if not schemes:
        return []
    folder = options.encoder or demo.packaged_encoder()
    params, config = demo.load_encoder(folder)
    tokens = demo.tokenize(demo.documentation_sentences(options.sentences), folder)
    with progress_bar(True, None, "Comparing") as progress:
        return demo.compare(params, config, tokens, schemes, progress=progress)


def _compare_language(options: argparse.Namespace) -> list[demo.LanguageResult]:
    variants = _chosen(demo.VARIANTS, options)
    if not variants:
        return []
    path = options.model or demo.packaged_llama()
    with progress_bar(True, None, "Reading") as progress:
        model = demo.load_llama(path, progress=progress)
        vocabulary = demo.read_vocabulary(model.checkpoint)
        tokens = demo.windows(vocabulary.encode(demo.held_out_text()), options.windows)
        return demo.compare_language(model, tokens, variants, progress=progress)


def _generate(options: argparse.Namespace) -> None:
    # Before a model is read, which takes seconds.
    demo.check_sampling(options.max_tokens, options.temperature, options.seed)
    _use_compilation_cache()
    with progress_bar(not options.json, None, "Reading") as progress:
        stream = iter(_read_and_continue(options, progress))
        # This compiles a program unless it is in the cache.
        progress(0, None, "Running the prompt")
        first = list(itertools.islice(stream, 1))
    pieces, times = [], []
    for piece in itertools.chain(first, stream):
        times.append(time.perf_counter())
        pieces.append(piece)
        if not options.json:
            print(piece, end="", flush=True)
    # The first steps include compilation.
    steps = [b - a for a, b in itertools.pairwise(times)]
    speed = 1 / statistics.median(steps) if steps else None
    if options.json:
        values = {"text": "".join(pieces), "tokens": len(pieces), "tokens_per_second": speed}
        print(json.dumps(values))
    else:
        rate = "" if speed is None else f", {speed:.1f} tokens per second"
        print(f"\n{len(pieces)} tokens{rate}", file=sys.stderr)


def _read_and_continue(options: argparse.Namespace, progress: tree.Progress) -> Iterable[str]:
    """Reads the model; returns the pieces of text that follow the prompt."""
    model = demo.load_llama(options.model or demo.packaged_llama(), progress=progress)
    vocabulary = demo.read_vocabulary(model.checkpoint)
    encode = vocabulary.encode_chat if options.chat else vocabulary.encode
    ids = encode(options.prompt)
    if options.scheme != _AS_STORED:
        params = demo.requantize(model.params, options.scheme, progress)
        model = dataclasses.replace(model, params=params)
    tokens = demo.generate(
        model,
        ids,
        options.max_tokens,
        store=demo.STORES[options.kv],
        temperature=options.temperature,
        seed=options.seed,
    )
    return vocabulary.pieces(tokens)


def _use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX has one already."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(caches) / "jaxquant"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


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
    _check_result(options.target, options.source)
    checkpoint = checkpoints.open(options.source)
    how = {
        "method": options.method and _METHODS[options.method],
        "statistics": options.statistics and Statistics.load(options.statistics),
        "progress": not options.json,
    }
    if checkpoint.is_tree:
        # It may have any structure, which the result keeps.
        params, _ = read_tree(options.source)
        if options.requantize:
            params = _dequantized(params, rules)
        quantized = tree.quantize(params, rules, **how)
        report = tree.report(params, quantized, rules)
        tree.save(options.target, quantized, sqnr_metadata(report))
    else:
        report = checkpoints.write_quantized(
            options.target,
            checkpoint,
            rules,
            requantize=options.requantize,
            metadata=sqnr_metadata,
            **how,
        )
    _print(report.table(), report.to_json(), options)


def _check_result(path: Path, source: Path) -> None:
    """Raises if a result cannot be written, or would replace the source."""
    check_target(path)
    if path.exists() and path.samefile(source):
        raise ValueError(f"{source} and {path} are the same file; name another for the result")


def _dequantized(params: Any, rules: list[tree.Rule]) -> Any:
    """The tree with the leaves in float that rules quantize."""
    paths, leaves, treedef = leaves_with_paths(params)
    chosen = match_rules(tuple(rules), paths, leaves)
    planned = (rule is not None and rule.plan() is not None for rule in chosen)
    pairs = zip(leaves, planned, strict=True)
    return treedef.unflatten([tree.dequantize(x) if is_so else x for x, is_so in pairs])


def _inspect(options: argparse.Namespace) -> None:
    for path in filter(None, (options.plot, options.html)):
        _check_result(path, options.file)
    if options.verify:
        print(inspection.verify(options.file), file=sys.stderr)
    contents = inspection.read(options.file)
    if options.plot:
        contents.plot(options.plot)
    if options.html:
        inspection.write_page(options.html, contents)
    _print(contents.report.table(), contents.report.to_json(), options)


def _print(table: rich.table.Table, values: Any, options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps(values))
    else:
        _console().print(table)


def _console() -> rich.console.Console:
    # Wide enough for all columns if the output is not a terminal.
    return rich.console.Console(width=None if sys.stdout.isatty() else 160)


if __name__ == "__main__":
    sys.exit(main())
