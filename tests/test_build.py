"""The build of the extension: sources compile at the same time, and a failure is no error."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[1] / "setup.py"
PROJECT = '[project]\nname = "jasper_fast"\nversion = "0"\n[tool.setuptools]\npackages = ["jasper_fast"]\n'
# Each compilation waits for the other one to begin. If they take turns, the first one waits in vain.
COMPILER = """#!/bin/sh
case "$*" in
  *"-c csrc/"*)
    touch "begun-$$"
    for _ in $(seq 200); do
      [ "$(ls begun-* | wc -l)" -ge 2 ] && exec c++ "$@"
      sleep 0.1
    done
    exit 1;;
esac
exec c++ "$@"
"""


def build(folder: Path, sources: dict[str, str], compiler: str = "c++") -> list[str]:
    """Build an extension of a few lines, and return the files that it left in the package."""
    (folder / "csrc").mkdir()
    (folder / "jasper_fast").mkdir()
    (folder / "pyproject.toml").write_text(PROJECT)
    shutil.copy(SETUP, folder)
    for name, text in sources.items():
        (folder / "csrc" / name).write_text(text)
    environment = {name: value for name, value in os.environ.items() if name != "JASPER_FAST_REQUIRE_EXTENSION"}
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=folder,
        env={**environment, "CC": compiler, "CXX": compiler},
        check=True,
        capture_output=True,
        timeout=300,
    )
    return [file.name for file in (folder / "jasper_fast").iterdir()]


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core compiles one source at a time")
def test_sources_compile_at_the_same_time(tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    folder = tmp_path / "project"
    folder.mkdir()
    built = build(folder, {"a.cpp": "int a() { return 1; }", "b.cpp": "int b() { return 2; }"}, str(compiler))
    assert built == ["_C.abi3.so"]


def test_a_source_that_does_not_compile_leaves_the_extension_out(tmp_path: Path) -> None:
    assert build(tmp_path, {"a.cpp": "int a() { return 1; }", "b.cpp": "no C++"}) == []
