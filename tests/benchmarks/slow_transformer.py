"""Parts of a transformer written from their definitions, in NumPy, position by position."""

import math

import numpy as np


def normalize(x, scale):
    """Root mean square normalization: Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4."""
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * scale


def attend(x, weights, slopes):
    """Causal attention of one head per slope, by which distance counts; 0 where it does not.

    Vaswani et al. 2017, arXiv:1706.03762, section 3.2; Press et al. 2022, arXiv:2108.12409.
    """
    query, key, value = np.split(x @ weights["qkv"]["kernel"], 3, 1)
    mixed, size = np.zeros_like(x), x.shape[1] // len(slopes)
    for t in range(len(x)):
        for h, slope in enumerate(slopes):
            part = slice(h * size, (h + 1) * size)
            scores = key[: t + 1, part] @ query[t, part] / math.sqrt(size)
            share = np.exp(scores - slope * (t - np.arange(t + 1)))
            mixed[t, part] = share @ value[: t + 1, part] / share.sum()
    return mixed @ weights["out"]["kernel"]
