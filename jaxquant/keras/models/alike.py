"""Builds and names the layers of a copy as those of the original."""

import contextlib
from typing import Any

import keras

from .. import compat
from .composite import original_class
from .state import matched


def why_not_alike(unit: Any, copy: Any, pairs: list[tuple[Any, Any]]) -> str | None:
    """Why a copy does not have the layers of the original, or None."""
    name = original_class(type(unit)).__name__
    count, wanted = len(compat.sublayers(copy)), len(compat.sublayers(unit))
    if count != wanted:
        why = f"{name} makes {count} layers from its config; got one with {wanted}"
        return f"{why}. Write its get_config"
    kinds = [[original_class(type(x)).__name__ for x in pair] for pair in pairs]
    if len(pairs) == wanted and all(old == new for old, new in kinds):
        return None
    return f"{name} makes layers of other classes from its config. Write its get_config"


def build_like(old: Any, new: Any) -> None:
    """Builds a layer, which the code that created it did not build, at the path of another."""
    if not old.built or new.built:
        return
    if all(inner.built for inner in compat.children(new)):
        new.built = True  # Keras' own `build_from_config` of a model does not set it.
    if compat.children(new):
        return
    with contextlib.ExitStack() as scopes:
        for name in (old.path or old.name).split("/")[:-1]:
            scopes.enter_context(keras.name_scope(name))
        new.build_from_config(old.get_build_config())


def name_like(old: Any, new: Any) -> None:
    """Names a layer and its variables as another: Keras counts those without a name."""
    if new.built:
        pairs = matched(compat.own_variables(old), compat.own_variables(new))
        compat.rename(new, old.name, old.path, [(v, w.path) for w, v in pairs])
