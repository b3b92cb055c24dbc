"""Pictures of allocations. Needs matplotlib, which is optional."""

from collections.abc import Mapping, Sequence

import numpy as np


def plot_allocation(
    names: Sequence[str],
    options: Sequence[str],
    bits: Sequence[float],
    scores: Sequence[float],
    curve: tuple[Sequence[float], Sequence[float]],
    uniform: Mapping[str, tuple[float, float]],
    chosen: tuple[float, float],
    path: str,
) -> None:
    """Draws bits and predicted loss per parameter, and the loss against bits per weight.

    Args:
        names: of the parameters.
        options, bits, scores: option, bits per weight and predicted loss of each.
        curve: bits per weight and loss of the best choices.
        uniform: by name of an option, those of one option for all.
        chosen: those of the choice.
        path: of the picture.
    """
    try:
        # An optional package, and a slow one to import.
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError(
            f"Pictures need matplotlib: pip install 'jaxquant[plot]' ({error})."
        ) from error
    figure = Figure(figsize=(14, max(4, 1.2 + 0.2 * len(names))), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[3, 2, 3])
    colors = {name: f"C{i % 10}" for i, name in enumerate(dict.fromkeys(options))}
    places = np.arange(len(names))
    left.barh(places, bits, color=[colors[o] for o in options])
    left.set_yticks(places, names, fontsize=7, parse_math=False)
    handles = [Patch(color=color, label=name) for name, color in colors.items()]
    figure.legend(handles=handles, fontsize=7, loc="outside lower left", ncols=4)
    middle.barh(places, scores, color=[colors[o] for o in options])
    middle.set_yticks([])
    for axes, title in ((left, "Bits per weight"), (middle, "Predicted loss")):
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_title(title)
        axes.grid(axis="x", alpha=0.3)
    _draw_curve(right, curve, uniform, chosen)
    figure.savefig(path, dpi=120)


def _draw_curve(axes, curve, uniform, chosen):
    axes.plot(*curve, color="black", linewidth=1, label="best choice")
    for name, point in uniform.items():
        axes.plot(*point, "o", label=f"{name} for all")
    axes.plot(*chosen, "*", color="black", markersize=12, label="chosen")
    if min(curve[1]) > 0:
        axes.set_yscale("log")
    axes.set_xlabel("bits per weight")
    axes.set_title("Predicted loss")
    axes.grid(alpha=0.3)
    # Loss falls with bits.
    axes.legend(fontsize=8, loc="upper right")
