"""Argument types and checks that several commands use."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.names import CONFIG_FILES

MAX_NUMBER = 10**9  # limit for numbers of texts, tokens and widths, which all libraries accept


class StoreOnce(argparse.Action):
    """Action of an option that needs a value and may be given only once."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Store the value.

        Raises:
            argparse.ArgumentError: the option is given twice, or its value is empty.
        """
        if getattr(namespace, self.dest) != self.default:
            raise argparse.ArgumentError(self, "given twice. Fix: give it once")
        if not str(values).strip():
            raise argparse.ArgumentError(self, f"needs a value (got {values!r})")
        setattr(namespace, self.dest, values)


def positive_int(text: str) -> int:
    """Parse a whole number from 1 to a billion, as an argparse type."""
    number = int(text) if text.isascii() and text.isdecimal() and len(text) <= 10 else 0
    if not 1 <= number <= MAX_NUMBER:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to {MAX_NUMBER:,}, got {text!r}")
    return number


def column_names(text: str) -> list[str]:
    """Parse names separated by commas, as an argparse type."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"expected column names separated by commas, e.g. title,text (got {text!r})")
    return names


def check_model_argument(name: str, command: str) -> None:
    """Reject an argument that cannot be a model: an empty name, or a configuration file.

    Args:
        name: argument of the command.
        command: name of the command in the message.

    Raises:
        JasperError: the name is empty or a configuration. The message has the command that trains a model from it.
    """
    if not name.strip():
        raise JasperError(f"{command}: the model's name is empty. Fix: give a run folder, a path or a name")
    if name.endswith(CONFIG_FILES) and not Path(name).is_dir():
        raise JasperError(
            f"{command}: {name} is a configuration, and a model is expected. "
            f"Fix: run `jasper-fast train --config {name}`, then give its folder, runs/NAME"
        )


def text_argument(text: str, what: str) -> str:
    """Decode a text of the command line. Bytes outside the terminal's encoding are read as UTF-8.

    Args:
        text: argument of the command.
        what: name of the argument in the message.

    Raises:
        JasperError: the text is empty, or its bytes are not UTF-8 either.
    """
    if not text.strip():
        raise JasperError(f"{what} is empty. Fix: give words")
    try:
        return text.encode("utf-8", "surrogateescape").decode()
    except UnicodeError:
        raise JasperError(f"{what} is not text in this terminal's encoding (got {text!r}). Fix: use UTF-8") from None


def check_command(argv: Sequence[str], commands: Sequence[str], program: str, default: str | None = None) -> None:
    """Reject an unknown command of a program.

    Args:
        argv: all arguments. The first one is the command.
        commands: known commands.
        program: start of the command line, e.g. ``jasper-fast search``.
        default: most common command, which may have been left out. None means that there is no such command.

    Raises:
        JasperError: the command is unknown. The message proposes a command line.
    """
    import difflib
    import shlex

    if not argv or argv[0].startswith("-") or argv[0] in commands:
        return
    near = difflib.get_close_matches(argv[0], commands, n=1)
    problem = f"{argv[0]!r} is not a command (known: {', '.join(commands)})"
    if not near and default is None:
        raise JasperError(f"{problem}. Fix: choose one of them")
    proposal = [near[0], *argv[1:]] if near else [default or "", *argv]
    raise JasperError(f"{problem}; did you mean `{program} {shlex.join(proposal)}`?")
