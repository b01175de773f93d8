"""``python -m bench NAME [arguments]`` runs ``main(argv)`` of ``bench/NAME.py``; without a name, the suite.

python -m bench --device cuda                 losses, mips and train on a GPU: about six minutes
python -m bench --device cuda --budget 400    leaving out what would begin after so many seconds
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import subprocess
import sys
import time
from pathlib import Path

from jasper_fast.errors import run_cli

SUITE = ("losses", "mips", "train")  # each takes --device, prints tables and writes JSON under bench/results


def names() -> list[str]:
    """The benchmarks there are: the modules of this folder that are neither private nor pytest files."""
    found = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return sorted(name for name in found if not name.startswith(("_", "test_", "bench_", "conftest")))


def suite(arguments: list[str]) -> int:
    """Each in a process of its own: a GPU that failed is of no use to the process that saw it, but to the next one.

    With ``--budget`` each gets its share of the seconds that are left, and is ended a minute after it.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--budget", type=float)
    options, rest = parser.parse_known_args(arguments)
    begin, worst = time.monotonic(), 0
    for n, name in enumerate(SUITE):
        command, most = [sys.executable, "-u", "-m", "bench", name, *rest], None
        if options.budget is not None:
            share = max(0.0, options.budget - (time.monotonic() - begin)) / (len(SUITE) - n)
            command, most = [*command, "--budget", f"{share:.0f}"], share + 60
        try:
            status = subprocess.run(command, timeout=most).returncode
        except subprocess.TimeoutExpired:
            status = 1
        if status:
            print(f"python -m bench {name}: ended with {status}; what it wrote before is kept", file=sys.stderr)
        worst = max(worst, abs(status))
    return worst


def main(argv: list[str]) -> int:
    """Run one benchmark, or without a name the suite, arguments passed on; with a wrong name list them and return 2."""
    if argv and not argv[0].startswith("-"):
        argv = [argv[0].replace("-", "_"), *argv[1:]]  # config-page is config_page.py
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
    if argv and argv[0] in names():
        return importlib.import_module(f"bench.{argv[0]}").main(argv[1:]) or 0
    return suite(argv)


if __name__ == "__main__":
    run_cli(main)
