"""Errors that a user can fix. The command line prints their message alone and exits with status 2."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

from jasper_fast.output import drop_buffers, open_standard_streams, output_status, tolerant_output

# What the system refuses whoever asks, so that the user has to act.
FIXES = {
    errno.EACCES: "change its permissions, or run as a user who has them",
    errno.EPERM: "change its permissions, or run as a user who has them",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ELOOP: "remove the link that leads to itself",
    errno.EIO: "check the disk",
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or ask for a larger quota",
    errno.EROFS: "choose a place that can be written",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


class JasperError(Exception):
    """One message with what was given, what was expected, and how to fix it."""


class ConfigError(JasperError):
    """Every problem of a configuration at once.

    Args:
        problems: one line per problem, each with its key.
        where: their place: a file, a recipe, "the command line".
        others: problems of other places, by place.
    """

    def __init__(
        self,
        problems: Sequence[str],
        where: str = "the configuration",
        others: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        places = {where: problems, **(others or {})}
        self.problems = [problem for listed in places.values() for problem in listed]
        super().__init__("\n".join(_listed(listed, place) for place, listed in places.items() if listed))


def _listed(problems: Sequence[str], where: str) -> str:
    count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''} in {where}:"
    return "\n  - ".join([count, *problems])


class Problems(list[str]):
    """Problems of several checks, to raise together: ``with problems: check()`` collects an error and continues."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> bool:
        if isinstance(error, ConfigError):
            self.extend(error.problems)
        elif isinstance(error, JasperError):
            self.append(str(error))
        return isinstance(error, JasperError)

    def tell(self) -> None:
        """Raise the collected problems, if there are any.

        Raises:
            JasperError: the one problem.
            ConfigError: all of several.
        """
        if len(self) == 1:
            raise JasperError(self[0])
        if self:
            raise ConfigError(self)


def run_cli(main: Callable[[list[str]], int | None], resumes: bool = False) -> None:
    """Run a command's ``main(argv)`` and end the process: a JasperError becomes one message and exit status 2.

    Output never ends the work (:mod:`jasper_fast.output`). If it fails, a command whose product is its output exits
    with 141 (a closed pipe) or 1. A command that resumes writes files and exits as if nothing had failed.

    Args:
        resumes: whether the same command resumes after an interruption.
    """
    open_standard_streams()
    with tolerant_output() as out:
        status = _status(main, resumes)
        out.flush()
        if not status and not resumes:
            status = output_status(out)
    drop_buffers()
    sys.exit(status)


def _status(main: Callable[[list[str]], int | None], resumes: bool) -> int | str:
    try:
        return main(sys.argv[1:]) or 0
    except SystemExit as leaving:  # argparse: --help, or a wrong argument
        return leaving.code or 0
    except JasperError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in FIXES:  # a bug of ours may have others, e.g. a missing file
            raise
        print(f"error: {error.filename or 'the system'}: {error.strerror}. Fix: {FIXES[error.errno]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted. Run the same command to resume." if resumes else "interrupted", file=sys.stderr)
        return 130
