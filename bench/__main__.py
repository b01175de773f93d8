"""``python -m bench NAME [arguments]`` runs ``main(argv)`` of ``bench/NAME.py``."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path

from jasper_fast.errors import run_cli


def names() -> list[str]:
    """The benchmarks there are: the modules of this folder that are neither private nor pytest files."""
    found = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return sorted(name for name in found if not name.startswith(("_", "test_", "bench_", "conftest")))


def main(argv: list[str]) -> int:
    """Run one benchmark; without a name, or with a wrong one, list them and return 2 (0 for --help)."""
    if not argv or argv[0] not in names():
        wanted_help = bool(argv) and argv[0] in ("-h", "--help")
        if argv and not wanted_help:
            print(f"error: no benchmark called {argv[0]!r}", file=sys.stderr)
        listing = "\n".join(f"  python -m bench {name}" for name in names()) or "  (none yet)"
        print(f"usage: python -m bench NAME [arguments]\n\nbenchmarks:\n{listing}", file=sys.stderr)
        return 0 if wanted_help else 2
    return importlib.import_module(f"bench.{argv[0]}").main(argv[1:]) or 0


if __name__ == "__main__":
    run_cli(main)
