"""`python -m benchmarks --suite cpu`: prints tables and writes the results as JSON."""

import argparse
import json
import math
import pathlib
from collections.abc import Callable

from . import (
    accuracy,
    cpu,
    end_to_end,
    experts,
    gpu,
    llm,
    machine,
    quantize,
    random_products,
    tpu,
    tpu_compiler,
    tpu_models,
    training,
)
from .shapes import ROWS, WEIGHTS

SUITES = {
    "accuracy": accuracy.suite,
    "cpu": cpu.suite,
    "end-to-end": end_to_end.suite,
    "experts": experts.suite,
    "gpu": gpu.suite,
    "llm": llm.suite,
    "quantize": quantize.suite,
    "random": random_products.suite,
    "tpu-compile": tpu.suite,
    "tpu-models": tpu_models.suite,
    "training": training.suite,
}
_SUITES_HELP = """accuracy: methods on a language model at equal bits; cpu: matrix multiplication,
 by shape and rows; end-to-end: a sentence encoder and a text-generating decoder; experts:
 rows by the experts of a mixture; gpu: matrix multiplication on a GPU; llm: a language model,
 against llama.cpp; quantize: time and memory of quantizing weights; random: products of random
 sizes and schemes, and what explain says of them; tpu-compile: estimates by the TPU compiler;
 tpu-models: the same of a whole language model; training: losses, speed and memory of training with
 quantization"""
# To be called before JAX initializes its devices.
PREPARATIONS = {
    "gpu": gpu.prepare,
    **dict.fromkeys(("tpu-compile", "tpu-models"), tpu_compiler.prepare),
}


def above_zero(kind: Callable[[str], float]) -> Callable[[str], float]:
    """An argparse type: numbers of this kind above 0."""

    def read(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            raise argparse.ArgumentTypeError(f"expected {kind.__name__} above 0; got {text!r}")
        return number

    return read


def main() -> None:
    """Runs one suite."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, required=True, help=_SUITES_HELP)
    parser.add_argument("--json", type=pathlib.Path, help="file for the results")
    products = parser.add_argument_group("options of cpu, gpu and tpu-compile")
    products.add_argument("--shapes", nargs="+", choices=WEIGHTS, help="of the weights")
    products.add_argument(
        "--rows", nargs="+", type=above_zero(int), help=f"of activations; on cpu {ROWS}"
    )
    products.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of activations of cpu; float32",
    )
    products.add_argument(
        "--full", action="store_true", help="gpu and tpu-compile: all shapes and rows, for hours"
    )
    chips = parser.add_argument_group("options of tpu-compile and tpu-models")
    chips.add_argument("--chips", nargs="+", choices=tpu_compiler.CHIPS, help="generations")
    other = parser.add_argument_group(
        "options of end-to-end, llm, quantize, tpu-compile and tpu-models"
    )
    other.add_argument(
        "--only",
        nargs="+",
        metavar="WORD",
        help="contenders whose name has one of these words; all",
    )
    weights = parser.add_argument_group("options of quantize")
    weights.add_argument(
        "--gibibytes", type=above_zero(float), default=1, help="of float32 weights; 1"
    )
    weights.add_argument(
        "--side", type=above_zero(int), default=4096, help="of the square matrices; 4096"
    )
    drawn = parser.add_argument_group("options of random")
    drawn.add_argument("--count", type=above_zero(int), default=200, help="of products; 200")
    drawn.add_argument("--seed", type=int, default=0, help="0")
    trained = parser.add_argument_group("options of training")
    trained.add_argument("--parts", nargs="+", choices=training.PARTS, help="of the suite; all")
    trained.add_argument("--seeds", type=above_zero(int), default=3, help="3")
    trained.add_argument(
        "--steps", type=above_zero(int), default=500, help="of training from the start; 500"
    )
    accurate = parser.add_argument_group("options of accuracy; also --seeds and --only")
    accurate.add_argument("--bits", nargs="+", choices=accuracy.CONFIGS, help="all")
    accurate.add_argument(
        "--windows", type=above_zero(int), default=48, help="of 256 tokens to calibrate on; 48"
    )
    accurate.add_argument(
        "--texts", type=int, choices=(1, 2), default=2, help="to test on, one after another; 2"
    )
    accurate.add_argument(
        "--channel-scales", action="store_true", help="scale channels at random, too"
    )
    accurate.add_argument("--picture", type=pathlib.Path, help="file for a picture")
    arguments = parser.parse_args()
    PREPARATIONS.get(arguments.suite, lambda: None)()
    about = machine.description()
    print(", ".join(f"{k}: {v}" for k, v in about.items()))
    results = {"machine": about, **SUITES[arguments.suite](arguments)}
    path = arguments.json or pathlib.Path(f"benchmark-{arguments.suite}.json")
    path.write_text(json.dumps(results, indent=1))
    print(f"Wrote {path}.")


if __name__ == "__main__":
    main()
