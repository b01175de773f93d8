"""Command line of the benchmarks: ``python -m bench NAME [arguments]`` runs a benchmark or a page generator.

    python -m bench --device cuda                 on a GPU, about six minutes
    python -m bench --device cuda --budget 400    leave out cases that would start after 400 seconds

Without a name, it runs losses, mips and train.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import time

from jasper_fast.utils.errors import run_cli

BENCHMARKS = {  # name: module, each with main(argv)
    "ablation": "bench.quality.ablation",
    "adapt": "bench.adapt",
    "binned": "bench.losses.binned",
    "compile_matrix": "bench.kernels.compile_matrix",
    "config_page": "bench.pages.config",
    "deploy": "bench.deploy",
    "distil": "bench.quality.peers",
    "fit": "bench.fit",
    "gpu": "bench.pages.gpu",
    "gpu_kernels": "bench.gpu.kernels",
    "graph": "bench.mips.graph",
    "label_free": "bench.label_free",
    "losses": "bench.losses.cpu",
    "migrate": "bench.migrate",
    "mips": "bench.mips.cpu",
    "prose": "bench.pages.prose",
    "ranking": "bench.losses.ranking",
    "readme": "bench.pages.readme",
    "search": "bench.mips.search",
    "servers": "bench.servers",
    "similarity_forms": "bench.losses.forms",
    "teachers": "bench.teachers",
    "train": "bench.train.cpu",
}
SUITE = ("losses", "mips", "train")  # benchmarks with --device and --budget that write JSON to bench/results


def names() -> list[str]:
    """List the benchmarks."""
    return sorted(BENCHMARKS)


def suite(arguments: list[str]) -> int:
    """Run the suite in separate processes, because a GPU error makes the GPU unusable for the rest of a process.

    With ``--budget``, the remaining seconds are divided evenly. A benchmark is stopped a minute after its part.

    Returns:
        The largest exit status, 0 if all succeeded.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--budget", type=float)
    options, rest = parser.parse_known_args(arguments)
    begin, worst = time.monotonic(), 0
    for n, name in enumerate(SUITE):
        command, most = [sys.executable, "-u", "-m", "bench", name, *rest], None
        if options.budget is not None:
            seconds = max(0.0, options.budget - (time.monotonic() - begin)) / (len(SUITE) - n)
            command, most = [*command, "--budget", f"{seconds:.0f}"], seconds + 60
        try:
            status = subprocess.run(command, timeout=most).returncode
        except subprocess.TimeoutExpired:
            status = 1
        if status:
            print(f"python -m bench {name}: failed with status {status}. Its results so far are kept.", file=sys.stderr)
        worst = max(worst, abs(status))
    return worst


def main(argv: list[str]) -> int:
    """Run one benchmark, or the suite without a name. An unknown name lists the benchmarks and returns 2."""
    if argv and not argv[0].startswith("-"):
        argv = [argv[0].replace("-", "_"), *argv[1:]]  # config-page is config_page
    wanted_help = bool(argv) and argv[0] in ("-h", "--help")
    if wanted_help or (argv and not argv[0].startswith("-") and argv[0] not in names()):
        if not wanted_help:
            print(f"error: no benchmark called {argv[0]!r}", file=sys.stderr)
        listing = "\n".join(f"  python -m bench {name}" for name in names())
        print(
            f"usage: python -m bench [NAME] [arguments]\n\nwithout NAME: {', '.join(SUITE)}, one after the other "
            f"(--device cuda: on a GPU)\nbenchmarks:\n{listing}",
            file=sys.stderr,
        )
        return 0 if wanted_help else 2
    if argv and argv[0] in names():
        return importlib.import_module(BENCHMARKS[argv[0]]).main(argv[1:]) or 0
    return suite(argv)


if __name__ == "__main__":
    run_cli(main)
