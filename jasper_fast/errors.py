"""Errors that a user can mend. The command line prints their message alone and exits with status 2."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import TracebackType


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


class Problems(list[str]):
    """What several checks refuse, to be told together: ``with problems: check()`` notes it and goes on."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> bool:
        if isinstance(error, ConfigError):
            self.extend(error.problems)
        elif isinstance(error, JasperError):
            self.append(str(error))
        return isinstance(error, JasperError)

    def tell(self) -> None:
        """Raise what was noted, if anything was.

        Raises:
            JasperError: the one problem.
            ConfigError: all of several.
        """
        if len(self) == 1:
            raise JasperError(self[0])
        if self:
            raise ConfigError(self)


def run_cli(main: Callable[[list[str]], int | None], goes_on: bool = False) -> None:
    """Run a command's ``main(argv)``: mendable errors become one message on stderr and exit status 2.

    Args:
        goes_on: whether the command, given again, goes on where it was interrupted.
    """
    try:
        sys.exit(main(sys.argv[1:]) or 0)
    except JasperError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on" if goes_on else "interrupted", file=sys.stderr)
        sys.exit(130)
