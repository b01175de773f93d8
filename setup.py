"""Build of the compiled extension. Everything else is in pyproject.toml.

The extension uses PyTorch's stable ABI, so one binary works with every Python >= 3.11 and torch >= 2.11. It is
optional: without torch or a C++ compiler the package is built without it and uses slower code.
``python -m jasper_fast.env`` reports this. JASPER_FAST_REQUIRE_EXTENSION=1 makes a missing extension an error.
"""

import os
import sys
from glob import glob
from multiprocessing.pool import ThreadPool

from setuptools import setup

TORCH_2_11 = "0x020b000000000000"  # oldest torch that the binary must work with
REQUIRED = os.environ.get("JASPER_FAST_REQUIRE_EXTENSION") == "1"


def extension_arguments() -> dict[str, object]:
    """Return the arguments of setup() that build jasper_fast._C, or none if torch is missing."""
    sources = sorted(glob("csrc/*.cpp"))
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        if REQUIRED:
            raise
        print(
            f"warning: building jasper_fast WITHOUT its compiled extension ({error}). "
            "Fix: pip install torch setuptools wheel, then repeat this command with --no-build-isolation.",
            file=sys.stderr,
        )
        return {}
    if not sources:
        return {}

    class ParallelBuild(BuildExtension):
        """Compile a source on each core. setuptools compiles one after the other."""

        def build_extensions(self) -> None:
            compile_one_by_one = self.compiler.compile

            def compile_all(sources: list[str], *args: object, **options: object) -> list[str]:
                with ThreadPool(os.cpu_count()) as pool:
                    objects = pool.map(lambda source: compile_one_by_one([source], *args, **options), sources, 1)
                return [name for names in objects for name in names]

            self.compiler.compile = compile_all
            super().build_extensions()

    extension = CppExtension(
        "jasper_fast._C",
        sources,
        depends=sorted(glob("csrc/*.h") + glob("csrc/*.inl")),
        py_limited_api=True,
        optional=not REQUIRED,
        # No -march: instruction sets are chosen at run time. -g0 overrides the -g in Python's build flags.
        extra_compile_args=["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TORCH_2_11}"],
    )
    return {
        "ext_modules": [extension],
        # Ninja raises an error on a failed compile, which setuptools' `optional` does not catch.
        "cmdclass": {"build_ext": ParallelBuild.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**extension_arguments())
