"""The picture of the accuracy suite: divergence against bits per weight."""

import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np


def plot(results: Sequence[Any], path: pathlib.Path) -> None:
    """Draws mean divergence (log) against bits per weight, a line per method."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name in dict.fromkeys(r["name"] for r in results):
        points = {}
        for r in results:
            if r["name"] == name:
                points.setdefault(r["bits_per_weight"], []).append(r["divergence"])
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
