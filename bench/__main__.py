"""``python -m bench NAME [arguments]`` runs ``main(argv)`` of ``bench/NAME.py``; without a name, the suite.

python -m bench --device cuda       losses, mips and train on a GPU
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path

from jasper_fast.errors import run_cli

SUITE = ("losses", "mips", "train")  # each takes --device, prints tables and writes JSON under bench/results


def names() -> list[str]:
    """The benchmarks there are: the modules of this folder that are neither private nor pytest files."""
    found = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return sorted(name for name in found if not name.startswith(("_", "test_", "bench_", "conftest")))


def main(argv: list[str]) -> int:
    """Run one benchmark, or without a name the suite, arguments passed on; with a wrong name list them and return 2."""
    wanted_help = bool(argv) and argv[0] in ("-h", "--help")
    if wanted_help or (argv and not argv[0].startswith("-") and argv[0] not in names()):
        if not wanted_help:
            print(f"error: no benchmark called {argv[0]!r}", file=sys.stderr)
        listing = "\n".join(f"  python -m bench {name}" for name in names())
        print(
            f"usage: python -m bench [NAME] [arguments]\n\nwithout NAME: {', '.join(SUITE)} in turn (--device cuda: "
            f"on a GPU)\nbenchmarks:\n{listing}",
            file=sys.stderr,
        )
        return 0 if wanted_help else 2
    chosen, rest = ([argv[0]], argv[1:]) if argv and argv[0] in names() else (SUITE, argv)
    return max(importlib.import_module(f"bench.{name}").main(rest) or 0 for name in chosen)


if __name__ == "__main__":
    run_cli(main)
