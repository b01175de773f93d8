"""Output that cannot fail: no terminal, closed pipe or full disk ends the work that it reports."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

PIPE_CLOSED = 128 + 13  # a shell's status for a command that SIGPIPE ended


class TolerantStream:
    """A text stream that shows what it can and drops the rest.

    Characters beyond the encoding become backslash escapes. After a failed write (a closed pipe, a full disk) the
    stream is silent, and ``error`` holds the reason.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.error: OSError | ValueError | None = None

    def write(self, text: str) -> int:
        """Write ``text``, with escapes for what the stream cannot show."""
        with self._caught():
            self._write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Pass on what is buffered."""
        with self._caught():
            if self.error is None:
                self.stream.flush()

    @contextmanager
    def _caught(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: somebody closed the stream
            self.error = error.with_traceback(None)  # whose frames would keep open files open
        except RuntimeError as error:  # a signal handler prints while a print is under way
            if "reentrant" not in str(error):
                raise

    def _write(self, text: str) -> None:
        if self.error is not None:
            return
        with suppress(UnicodeEncodeError):
            self.stream.write(text)
            return
        encoding = getattr(self.stream, "encoding", None) or "ascii"
        self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def tolerant_output() -> Iterator[TolerantStream]:
    """Let nothing that the block prints, progress bars included, end it with an error; yield its standard output."""
    before = sys.stdout, sys.stderr
    out, err = (_tolerant(stream) for stream in before)
    sys.stdout, sys.stderr = out, err
    try:
        yield out
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before


def open_standard_streams() -> None:
    """Open the null device in place of closed standard streams, so that no file of ours gets their descriptors.

    Bytes that standard input's encoding lacks are kept as surrogate escapes, as in arguments.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - until the process ends
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")


def output_status(out: TolerantStream) -> int:
    """Return the exit status that a failed standard output deserves, and say on standard error what failed.

    Returns:
        141 if the reader closed the pipe, as for a command that SIGPIPE ends, 1 for another reason, 0 for no failure.
    """
    if out.error is None:
        return 0
    if isinstance(out.error, BrokenPipeError):
        return PIPE_CLOSED
    print(f"error: standard output: {out.error}. Fix: write it to another place", file=sys.stderr)
    return 1


def drop_buffers() -> None:
    """Send what failed streams still hold to the null device, so that Python does not fail on it when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):  # closed, or not a real file
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def output_failed() -> bool:
    """Report a standard output that takes nothing any more; only known inside :func:`tolerant_output`."""
    return getattr(sys.stdout, "error", None) is not None


def shows_unicode() -> bool:
    """Check that standard output can show any character."""
    return codecs.lookup(getattr(sys.stdout, "encoding", None) or "utf-8").name.startswith("utf")


def _tolerant(stream: Any) -> TolerantStream:
    if isinstance(stream, TolerantStream):
        return stream
    return TolerantStream(stream if stream is not None else open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
