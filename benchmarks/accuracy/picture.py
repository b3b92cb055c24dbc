"""`python -m benchmarks.accuracy.picture docs/accuracy.svg a.json b.json`: KL against bits."""

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np


def main() -> None:
    """Draws the results of one or more runs of the accuracy suite."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=pathlib.Path)
    parser.add_argument("results", type=pathlib.Path, nargs="+", help="JSON of the suite")
    arguments = parser.parse_args()
    found = [json.loads(path.read_text())["results"] for path in arguments.results]
    plot([row for results in found for row in results], arguments.picture)


def plot(results: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Draws mean divergence (log) against bits per weight, a line per method.

    Args:
        results: `Result`s of the suite as dicts. Rows with quantized activations are left out.
        path: of the picture.
    """
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    weights_only = [r for r in results if "A" not in r["bits"]]
    for name in dict.fromkeys(r["name"] for r in weights_only):
        points = {}
        for r in weights_only:
            if r["name"] == name:
                points.setdefault(round(r["bits_per_weight"], 2), []).append(r["divergence"])
        bits = sorted(points)
        style: dict[str, Any] = {"alpha": 0.8}
        if name == "nearest":
            style = {"color": "black", "linewidth": 2}
        axes.plot(bits, [np.mean(points[b]) for b in bits], marker="o", label=name, **style)
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight, with scales and zero points")
    axes.set_ylabel("mean KL divergence of the next token (nats)")
    axes.grid(which="both", alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
