"""Output that does not fail: a missing terminal, a closed pipe or a full disk does not stop a command."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

PIPE_CLOSED = 128 + 13  # a shell's status for a command that SIGPIPE ended


class TolerantStream:
    """Text stream that never raises an error.

    Characters outside the encoding become backslash escapes. After a failed write, e.g. to a closed pipe or a full
    disk, the stream drops all text, and ``error`` is the reason.

    Args:
        stream: text stream to write to.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.error: OSError | ValueError | None = None

    def write(self, text: str) -> int:
        """Write ``text``, with escapes for characters outside the encoding."""
        with self._caught():
            self._write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the buffer of the stream."""
        with self._caught():
            if self.error is None:
                self.stream.flush()

    @contextmanager
    def _caught(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            self.error = error.with_traceback(None)  # frames of the traceback would keep files open
        except RuntimeError as error:  # a signal handler printed during another print
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
    """Make both standard streams tolerant inside the block, and yield standard output.

    No print or progress bar in the block can raise an error.
    """
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
    """Open the null device for closed standard streams, so that no other file gets their descriptors.

    Bytes of standard input that are invalid in its encoding become surrogate escapes, as in arguments.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - until the process ends
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")


def output_status(out: TolerantStream) -> int:
    """Return the exit status for a failed standard output, and print the reason on standard error.

    Returns:
        141 for a closed pipe, as for a command that SIGPIPE ended. 1 for another error, and 0 for none.
    """
    if out.error is None:
        return 0
    if isinstance(out.error, BrokenPipeError):
        return PIPE_CLOSED
    print(f"error: standard output: {out.error}. Fix: write it to another place", file=sys.stderr)
    return 1


def drop_buffers() -> None:
    """Send the buffers of failed streams to the null device, so that Python does not fail on them at its exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):  # closed, or not a real file
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def output_failed() -> bool:
    """Return True if standard output has failed. This works inside :func:`tolerant_output` only."""
    return getattr(sys.stdout, "error", None) is not None


def shows_unicode() -> bool:
    """Return True if the encoding of standard output has all Unicode characters."""
    return codecs.lookup(getattr(sys.stdout, "encoding", None) or "utf-8").name.startswith("utf")


def _tolerant(stream: Any) -> TolerantStream:
    if isinstance(stream, TolerantStream):
        return stream
    return TolerantStream(stream if stream is not None else open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
