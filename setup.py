"""Compiles the CPU kernels where there is a C++ compiler; everything else is in pyproject.toml."""

import concurrent.futures
import itertools
import pathlib

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = pathlib.Path("jaxquant/kernels/cpu")
# GCC copies whole kernels for each condition that stays the same in a loop. Where it does so for
# small loops alone, it takes two thirds of the time, and the kernels are as fast.
FLAGS = ["-O3", "-g0", "-std=c++17", "-Wall", "-Wextra", "--param=max-unswitch-insns=20"]


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


class BuildSideBySide(build_ext):
    """Compiles the sources of an extension at once, since each takes many seconds."""

    def build_extension(self, ext):
        def compiled(source):
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                extra_postargs=ext.extra_compile_args,
                depends=ext.depends,
            )

        with concurrent.futures.ThreadPoolExecutor() as pool:
            objects = pool.map(compiled, ext.sources)
            ext.extra_objects = list(itertools.chain.from_iterable(objects))
        ext.sources = []
        super().build_extension(ext)


setup(ext_modules=kernels(), cmdclass={"build_ext": BuildSideBySide})
