"""The version of the package, from what the installer wrote."""

import importlib.metadata


def installed_version(package: str) -> str:
    """The version of an installed package, or "0+unknown" of a source tree that is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


__version__ = installed_version("jaxquant")
