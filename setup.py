"""Compiles the CPU kernels where there is a C++ compiler; everything else is in pyproject.toml."""

import pathlib

from setuptools import Extension, setup

SOURCES = pathlib.Path("jaxquant/kernels/cpu")
FLAGS = ["-O3", "-g0", "-std=c++17", "-Wall", "-Wextra"]


def kernels():
    """The extension. If it cannot be compiled, the package is installed without it."""
    try:
        import jaxlib
    except ImportError:
        return []
    headers = pathlib.Path(jaxlib.__file__).parent / "include"
    return [
        Extension(
            "jaxquant.kernels._cpu",
            sorted(map(str, SOURCES.glob("*.cc"))),
            depends=sorted(map(str, SOURCES.glob("*.h"))),
            # -isystem: no warnings from XLA's headers.
            extra_compile_args=[*FLAGS, "-isystem", str(headers)],
            language="c++",
            optional=True,
        )
    ]


setup(ext_modules=kernels())
