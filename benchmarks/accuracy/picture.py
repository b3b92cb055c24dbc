"""`python -m benchmarks.accuracy.picture docs/accuracy.svg a.json b.json`: KL against bits."""

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

# So many that no two methods share both color and marker.
_MARKERS = "os^Dv<>"
_PEERS = ("Keras", "Qwix", "llama.cpp")


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

    figure, axes = plt.subplots(figsize=(9.5, 5.5), layout="constrained")
    weights_only = [r for r in results if "A" not in r["bits"]]
    points: dict[str, dict[float, list[float]]] = {}
    for r in weights_only:
        of_bits = points.setdefault(r["name"], {})
        of_bits.setdefault(round(r["bits_per_weight"], 2), []).append(r["divergence"])
    # In the order in which the lines end, so that the legend is read beside them.
    names = sorted(points, key=lambda name: -float(np.mean(points[name][max(points[name])])))
    for place, name in enumerate(names):
        bits = sorted(points[name])
        style: dict[str, Any] = {"marker": _MARKERS[place % len(_MARKERS)], "alpha": 0.8}
        if name == "nearest":
            style |= {"color": "black", "linewidth": 2}
        if name.startswith(_PEERS):
            style |= {"markerfacecolor": "none", "linestyle": "none"}
        axes.plot(bits, [np.mean(points[name][b]) for b in bits], label=name, **style)
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight, with scales and zero points")
    axes.set_ylabel("mean KL divergence of the next token (nats)")
    axes.grid(which="both", alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
