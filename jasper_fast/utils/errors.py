"""Errors that a user can fix. A command prints only their message and exits with status 2."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

from jasper_fast.utils.output import drop_buffers, open_standard_streams, output_status, tolerant_output

# Errors of the system that only the user can fix.
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
    """Error with one message: what happened, what was given and expected, and the fix."""


class ConfigError(JasperError):
    """Error with all problems of a configuration.

    Args:
        problems: lines, one per problem, each with its key.
        where: place of the problems: a file, a recipe or "the command line".
        others: problems of other places, by place. None means that there are none.
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
    """List of problems from several checks, to raise together.

    ``with problems: check()`` adds the error of a check and continues after the block.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> bool:
        if isinstance(error, ConfigError):
            self.extend(error.problems)
        elif isinstance(error, JasperError):
            self.append(str(error))
        return isinstance(error, JasperError)

    def raise_all(self) -> None:
        """Raise the collected problems, if there are any.

        Raises:
            JasperError: there is one problem.
            ConfigError: there are several problems.
        """
        if len(self) == 1:
            raise JasperError(self[0])
        if self:
            raise ConfigError(self)


def run_cli(main: Callable[[list[str]], int | None], resumes: bool = False) -> None:
    """Run a command and end the process. A JasperError becomes one message and exit status 2.

    Failed output does not stop the command (:mod:`jasper_fast.utils.output`). Afterwards the exit status is 141 for a
    closed pipe, or 1 for another error. It stays 0 for a command that resumes, because its results are files. Progress
    bars of `datasets` are hidden, unless the environment has HF_DATASETS_DISABLE_PROGRESS_BARS=0.

    Args:
        main: function of the command, which takes the arguments and returns an exit status or None.
        resumes: True if the same command resumes after an interruption.
    """
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # read by `datasets`, whose bars name only files
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
        if error.errno not in FIXES:  # probably a bug, e.g. a missing file
            raise
        print(f"error: {error.filename or 'the system'}: {error.strerror}. Fix: {FIXES[error.errno]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted. Run the same command to resume." if resumes else "interrupted", file=sys.stderr)
        return 130
