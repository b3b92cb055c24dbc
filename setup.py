"""Compiles the CPU kernels where there is a C++ compiler; all else is in pyproject.toml."""

import pathlib

from setuptools import Extension, setup


def kernels():
    """The extension, which the install does without if it cannot be compiled."""
    try:
        import jaxlib
    except ImportError:
        return []
    headers = pathlib.Path(jaxlib.__file__).parent / "include"
    return [
        Extension(
            "jaxquant.kernels._cpu",
            ["jaxquant/kernels/cpu.cc"],
            include_dirs=[str(headers)],
            extra_compile_args=["-O3", "-std=c++17", "-w"],
            language="c++",
            optional=True,
        )
    ]


setup(ext_modules=kernels())
