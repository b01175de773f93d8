"""Only the compiled extension; everything else is declared in pyproject.toml.

The extension is built against PyTorch's stable ABI, so one binary serves every Python >= 3.11 and torch >= 2.11.
It is optional: where torch or a C++ compiler is missing the build goes on without it, the package falls back to
slower code, and ``python -m jasper_fast.env`` says so. JASPER_FAST_REQUIRE_EXTENSION=1 turns that into an error.
"""

import os
import sys
from glob import glob

from setuptools import setup

TORCH_2_11 = "0x020b000000000000"  # the oldest torch whose symbols the binary may use
REQUIRED = os.environ.get("JASPER_FAST_REQUIRE_EXTENSION") == "1"


def extension_arguments() -> dict[str, object]:
    """The setup() arguments that build jasper_fast._C, or none where torch is not there to build against."""
    sources = sorted(glob("csrc/*.cpp"))
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        if REQUIRED:
            raise
        print(
            f"warning: building jasper_fast WITHOUT its compiled extension ({error}). To have it: "
            "pip install torch setuptools wheel, then repeat this command with --no-build-isolation.",
            file=sys.stderr,
        )
        return {}
    if not sources:
        return {}
    extension = CppExtension(
        "jasper_fast._C",
        sources,
        depends=sorted(glob("csrc/*.h") + glob("csrc/*.inl")),
        py_limited_api=True,
        optional=not REQUIRED,
        # No -march: instruction sets are chosen at run time. -g0 undoes the -g that Python's own build flags carry.
        extra_compile_args=["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TORCH_2_11}"],
    )
    return {
        "ext_modules": [extension],
        # Ninja raises on a failed compile, which setuptools' `optional` would not catch.
        "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**extension_arguments())
