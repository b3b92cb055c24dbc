"""Compiles the CPU kernels where there is a C++ compiler; everything else is in pyproject.toml.

They are a plain shared library, which does not use Python: one wheel per platform is for all
versions of Python.
"""

import concurrent.futures
import itertools
import pathlib
import platform
import zlib

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = pathlib.Path("jaxquant/kernels/cpu")
# GCC copies whole kernels for each condition that stays the same in a loop. Where it does so for
# small loops alone, it takes two thirds of the time, and the kernels are as fast.
FLAGS = ["-O3", "-g0", "-std=c++17", "-Wall", "-Wextra", "--param=max-unswitch-insns=20"]
# Loops with square roots are vectorized only if these need not set errno.
FLAGS += ["-fno-math-errno"]


def kernels():
    """The shared library. If it cannot be compiled, the package is installed without it."""
    try:
        import jaxlib.version
    except ImportError:
        return []
    headers = pathlib.Path(jaxlib.__file__).parent / "include"
    version = jaxlib.version.__version_info__
    sources = sorted(map(str, SOURCES.glob("*.cc")))
    # As `_is_of_sources` of jaxquant/kernels/cpu/library.py computes it.
    files = sorted(SOURCES.glob("*.cc")) + sorted(SOURCES.glob("*.h"))
    checksum = zlib.crc32(b"".join(file.read_bytes() for file in files))
    return [
        Extension(
            "jaxquant.kernels._cpu",
            sources,
            depends=[*sources, *sorted(map(str, SOURCES.glob("*.h")))],
            define_macros=[
                ("JAXQUANT_JAXLIB", ", ".join(map(str, version))),
                ("JAXQUANT_SOURCES", f"{checksum}u"),
            ],
            # -isystem: no warnings from XLA's headers.
            extra_compile_args=[*FLAGS, "-isystem", str(headers)],
            language="c++",
            optional=True,
        )
    ]


class BuildLibrary(build_ext):
    """Compiles the sources of a library at once, since each takes many seconds."""

    def get_ext_filename(self, fullname):
        """The name of the library, the same for all versions of Python."""
        return f"{fullname.replace('.', '/')}.so"

    def knows_amx(self):
        """Whether the assembler knows AMX, as that of binutils does from version 2.36 on."""
        if platform.machine() not in ("x86_64", "AMD64"):
            return False
        source = pathlib.Path(self.build_temp, "amx.cc")
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text('void f() { asm volatile("tdpbf16ps %tmm2, %tmm1, %tmm0"); }\n')
        try:
            self.compiler.compile([str(source)], output_dir=self.build_temp)
        except CompileError:
            return False
        return True

    def build_extension(self, ext):
        if self.knows_amx():
            ext.define_macros.append(("JAXQUANT_AMX", "1"))

        def compiled(source):
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=ext.define_macros,
                extra_postargs=ext.extra_compile_args,
                depends=ext.depends,
            )

        with concurrent.futures.ThreadPoolExecutor() as pool:
            objects = pool.map(compiled, ext.sources)
            ext.extra_objects = list(itertools.chain.from_iterable(objects))
        ext.sources = []
        super().build_extension(ext)


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and every Python 3."""

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=kernels(),
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
