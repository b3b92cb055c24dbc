"""Loads models of KerasHub and quantizes each layer as soon as its weights are read."""

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from ...core import check_flags
from ...tree import Progress, Report, ReportRow, Rules
from ...tree.internal import check_progress, progress_bar
from .. import compat
from ..configs import SchemeConfig
from ..layer import QuantizableMixin
from .checks import Keep, raise_problems
from .convert import converter
from .quantize import chosen_names, config_of, mismatches, path_of, quantize_layer, report_of

_CONFIG, _TASK = "config.json", "task.weights.h5"
# One file, or the index of several.
_WEIGHTS = ("model.weights.h5", "model.weights.json")


def load_preset(
    cls: Any,
    preset: str | os.PathLike[str],
    rules: Rules | str | keras.quantizers.QuantizationConfig,
    *,
    progress: Progress | bool | None = None,
    keep: Keep = (),
    **kwargs: Any,
) -> tuple[Any, Report]:
    """Loads a preset of KerasHub, and quantizes each layer when its weights are read.

    The same as `quantize(cls.from_preset(preset), rules)`, bit for bit, but the floating-point
    weights of one layer at most are in memory.

    Args:
        cls: a class of KerasHub, such as `keras_hub.models.GemmaCausalLM` or `GemmaBackbone`.
        preset: folder that `save_to_preset` wrote, or that a preset was downloaded to.
        rules: as for `quantize`, without methods that need activations.
        progress: True for a progress bar on standard error, or a function that is called after
            each weight with (number done, total, path).
        keep: names and classes of layers that are not quantized.
        kwargs: for `cls.from_preset`, such as dtype="bfloat16" or preprocessor=None.

    Returns:
        The quantized model, and a report with one row per weight.

    Raises:
        ValueError: cls is not a class of KerasHub; the folder does not hold a preset that KerasHub
            wrote; or as for `quantize`.
        OSError: a file is damaged.

    Example:
        >>> import keras_hub
        >>> sizes = {"num_layers": 1, "hidden_dim": 8, "intermediate_dim": 16}
        >>> heads = {"num_query_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
        >>> model = keras_hub.models.GemmaBackbone(vocabulary_size=32, **sizes, **heads)
        >>> model.save_to_preset("preset")
        >>> small, report = jk.load_preset(keras_hub.models.GemmaBackbone, "preset", jq.W8A16)
        >>> report.rows[0].scheme
        'int8 per channel'
    """
    if not hasattr(cls, "from_preset"):
        raise ValueError(
            "cls must be a class of KerasHub with `from_preset`, such as "
            f"keras_hub.models.GemmaBackbone; got {cls!r}."
        )
    check_progress(progress)
    check_flags(compile=kwargs.get("compile", True))
    folder, config = Path(preset), _without_methods(config_of(rules))
    weights = _weights_in(folder)
    is_task = hasattr(cls, "backbone_cls")
    is_compiled = is_task and kwargs.pop("compile", True)
    # Compiling would create variables with values.
    given = {**kwargs, "compile": False} if is_task else kwargs
    rewriter = converter(keep)
    with compat.without_values():
        model = cls.from_preset(os.fspath(folder), load_weights=False, **given)
        rewriter.in_place(model)
    paths = [v.path for v in model.weights]
    why_kept = {id(x): why for x, why in rewriter.walk(model)}
    # A classifier with another number of classes than the preset's has a new head.
    has_head = is_task and "num_classes" not in kwargs and (folder / _TASK).is_file()
    loading = _Loading(model, config, why_kept)
    with progress_bar(progress, loading.total, "Loading") as tell:
        loading.watch(tell)
        if has_head:
            model.load_task_weights(os.fspath(folder / _TASK))
        (model.backbone if is_task else model).load_weights(os.fspath(weights))
        compat.initialize(model.variables)
        loading.finish()
    if is_compiled:
        model.compile()
    return model, report_of(model, loading.rows, config, why_kept, paths)


def _weights_in(folder: Path) -> Path:
    """The file with the weights of the backbone, or the index of several."""
    weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if weights is None or not (folder / _CONFIG).is_file():
        raise ValueError(
            f"preset must be a folder with {_CONFIG} and {' or '.join(_WEIGHTS)}, as "
            f"save_to_preset writes it; got {str(folder)!r}. Download the preset first, such as by "
            "kagglehub.model_download, or quantize cls.from_preset(...)."
        )
    return weights


def _without_methods(config: SchemeConfig) -> SchemeConfig:
    methods = [x.pattern for x in getattr(config, "rules", ()) if x.method is not None]
    if methods:
        raise ValueError(
            "Rules of a preset must be without methods, which look at the activations of the whole "
            f"model; got some in {methods}. Load the model, then call jaxquant.keras.quantize."
        )
    return config


class _Loading:
    """Quantizes the layers of a model when their weights are read.

    Args:
        model: of quantizable layers, without values.
        config: the scheme of each weight.
        why_kept: by the id of a layer, why it stays in float, or None.

    Raises:
        ValueError: as for `quantize`.
    """

    def __init__(self, model: Any, config: SchemeConfig, why_kept: dict[int, str | None]):
        ours = [x for x in compat.sublayers(model) if isinstance(x, QuantizableMixin)]
        layers = [x for x in ours if why_kept[id(x)] is None]
        chosen = [(layer, chosen_names(layer, config)) for layer in layers]
        raise_problems(model, mismatches(config, layers, chosen))
        self.model, self.config = model, config
        self.chosen = [(layer, names) for layer, names in chosen if names]
        self.total = sum(len(names) for _, names in self.chosen)
        self.rows: list[ReportRow] = []
        self.failed: list[str] = []
        self.done = 0

    def watch(self, tell: Progress) -> None:
        """Wraps the method by which Keras loads a layer."""
        for layer, names in self.chosen:
            quantize = functools.partial(self._quantize, layer, names, tell)
            layer.__dict__["load_own_variables"] = _FollowedBy(layer.load_own_variables, quantize)

    def _quantize(self, layer: Any, names: list[str], tell: Progress) -> None:
        del layer.__dict__["load_own_variables"]
        try:
            self.rows += quantize_layer(layer, names, self.config, None)
        except (NotImplementedError, ValueError) as error:
            self.failed.append(f"{layer.path or layer.name}: {error}")
        for name in names:
            self.done += 1
            tell(self.done, self.total, path_of(layer, name))

    def finish(self) -> None:
        """Quantizes what no file held, such as a new head, and raises what has failed."""
        for layer, _ in self.chosen:
            load = layer.__dict__.get("load_own_variables")
            if load is not None:
                load.then()
        raise_problems(self.model, self.failed)


@dataclasses.dataclass(frozen=True)
class _FollowedBy:
    """Loads the variables of a layer, and does something then."""

    load: Callable[[Any], None]
    then: Callable[[], None]

    def __call__(self, store: Any) -> None:
        self.load(store)
        self.then()
