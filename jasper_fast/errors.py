"""Errors that a user can mend. The command line prints their message alone and exits with status 2."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence


class JasperError(Exception):
    """What was given, what was expected, and the mend, in one message."""


class ConfigError(JasperError):
    """Every problem of a configuration at once.

    Args:
        problems: one line per problem, each naming the key.
        where: what was being read (a file, a recipe, "the command line").
    """

    def __init__(self, problems: Sequence[str], where: str = "the configuration") -> None:
        self.problems = list(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''} in {where}:"
        super().__init__("\n  - ".join([count, *self.problems]))


def run_cli(main: Callable[[list[str]], int | None]) -> None:
    """Run a command's ``main(argv)``: mendable errors become one message on stderr and exit status 2."""
    try:
        sys.exit(main(sys.argv[1:]) or 0)
    except JasperError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
