"""Arguments that several commands share, with one clear message for each wrong one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jasper_fast.config_overrides import CONFIG_FILES
from jasper_fast.errors import JasperError

LARGEST = 10**9  # of texts, tokens and widths: far beyond any use, and within what libraries take


class Once(argparse.Action):
    """An option with a value that may be given once."""

    def __call__(
        self, parser: argparse.ArgumentParser, given: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Store the value.

        Raises:
            argparse.ArgumentError: the option is there already, or its value is empty.
        """
        if getattr(given, self.dest) != self.default:
            raise argparse.ArgumentError(self, "given twice. Fix: give it once")
        if not str(values).strip():
            raise argparse.ArgumentError(self, f"needs a value (got {values!r})")
        setattr(given, self.dest, values)


def whole_number(text: str) -> int:
    """Read a whole number from 1 to a billion; an argparse type."""
    number = int(text) if text.isascii() and text.isdecimal() and len(text) <= 10 else 0
    if not 1 <= number <= LARGEST:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to {LARGEST:,}, got {text!r}")
    return number


def column_names(text: str) -> list[str]:
    """Read names with commas between them; an argparse type."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(
            f"expected names of columns with commas between, e.g. title,text; got {text!r}"
        )
    return names


def check_model_argument(name: str, command: str) -> None:
    """Reject what cannot be a model: an empty name, or a configuration file.

    Raises:
        JasperError: with the command that makes a model of the file.
    """
    if not name.strip():
        raise JasperError(f"{command}: the model's name is empty. Fix: give a run folder, a path or a name")
    if name.endswith(CONFIG_FILES) and not Path(name).is_dir():
        raise JasperError(
            f"{command}: {name} is a configuration, and a model is needed here. "
            f"Fix: run `python -m jasper_fast.train --config {name}`, then give its folder, runs/NAME"
        )


def text_argument(text: str, what: str) -> str:
    """Return text of the command line; bytes that the terminal's encoding lacks are read as UTF-8.

    Raises:
        JasperError: the text is empty, or the bytes are not UTF-8 either.
    """
    if not text.strip():
        raise JasperError(f"{what} is empty. Fix: give words")
    try:
        return text.encode("utf-8", "surrogateescape").decode()
    except UnicodeError:
        raise JasperError(f"{what} is not text in this terminal's encoding (got {text!r}). Fix: use UTF-8") from None


def check_command(argv: Sequence[str], commands: Sequence[str], otherwise: str, usual: str) -> None:
    """Reject a first argument that is no command of ``otherwise``.

    Args:
        argv: all arguments.
        commands: the known ones.
        otherwise: the program, e.g. ``python -m jasper_fast.search``.
        usual: the command that was probably left out.

    Raises:
        JasperError: with the command line that was probably meant.
    """
    import difflib
    import shlex

    if not argv or argv[0].startswith("-") or argv[0] in commands:
        return
    near = difflib.get_close_matches(argv[0], commands, n=1)
    meant = [near[0], *argv[1:]] if near else [usual, *argv]
    raise JasperError(
        f"{argv[0]!r} is not a command (known: {', '.join(commands)}); did you mean `{otherwise} {shlex.join(meant)}`?"
    )
