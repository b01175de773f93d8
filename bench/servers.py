"""Serve an exported folder with infinity, an OpenAI-style server that is not ours, and compare its embeddings.

    python -m venv infinity && infinity/bin/pip install "infinity-emb[server,torch]"
    INFINITY_EMB=infinity/bin/infinity_emb python -m bench servers exported --dimensions 64

infinity needs sentence-transformers 3, so it must have another environment. It listens on loopback only. It stops after
the comparison. infinity-emb 0.0.78 cuts embeddings to ``dimensions`` and does not normalise them again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from jasper_fast.exporting.llama_server import free_port, is_up, post
from jasper_fast.exporting.parity import PROBES
from jasper_fast.models.embedder import load_model, normalise
from jasper_fast.utils.command_line import positive_int
from jasper_fast.utils.errors import JasperError, run_cli

PATH_VARIABLE = "INFINITY_EMB"  # environment variable with the path of the executable
EXECUTABLE = "infinity_emb"
NAME = "exported"  # name of the model on the server
START_SECONDS = 300
OFFLINE = {"HF_HUB_OFFLINE": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0", "DO_NOT_TRACK": "1"}


def serve_and_compare(folder: Path, dimensions: int) -> float | None:
    """Ask the server for embeddings with and without ``dimensions``, and compare them with sentence-transformers.

    Args:
        folder: exported sentence-transformers folder.
        dimensions: width to ask for. The expected rows are the first coordinates of the full ones.

    Returns:
        The smallest cosine of a text over both requests. None, with a printed line, if the server is not installed.

    Raises:
        JasperError: the server cannot open the folder, or it returns another width.
    """
    executable = os.environ.get(PATH_VARIABLE) or shutil.which(EXECUTABLE)
    if executable is None or not os.access(executable, os.X_OK):
        print(f"skipped: {EXECUTABLE} is not installed. Fix: see bench/servers.py, or set {PATH_VARIABLE} to its path")
        return None
    texts = list(PROBES.values())
    expected = normalise(load_model(str(folder), device="cpu").encode(texts, prompt=""))
    with _served(executable, folder) as address:
        full = _ask(address, texts, {}, expected.shape[1])
        narrow = _ask(address, texts, {"dimensions": dimensions}, dimensions)
    shortest = float(np.linalg.norm(narrow, axis=1).min())
    if shortest < 0.999:
        print(f"note: {EXECUTABLE} does not normalise after `dimensions` (lengths from {shortest:.2f}): use the cosine")
    both = [normalise(full) * expected, normalise(narrow) * normalise(expected[:, :dimensions])]
    return float(min(products.sum(axis=1).min() for products in both))


@contextmanager
def _served(executable: str, folder: Path) -> Iterator[str]:
    """Run the server, and yield its address when the model is loaded."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [executable, "v2", "--model-id", str(folder.resolve()), "--served-model-name", NAME]
    command += ["--host", "127.0.0.1", "--port", str(port), "--url-prefix", "/v1", "--engine", "torch"]
    command += ["--device", "cpu", "--dtype", "float32", "--no-bettertransformer", "--no-model-warmup"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, env={**os.environ, **OFFLINE}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            end = time.monotonic() + START_SECONDS
            while not is_up(f"{address}/health"):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    last = log.read().decode(errors="replace").strip().rpartition("\n")[2]
                    raise JasperError(f"{folder}: {EXECUTABLE} cannot serve the folder ({last}). Fix: see its log")
                time.sleep(0.1)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _ask(address: str, texts: Sequence[str], options: dict[str, int], width: int) -> np.ndarray:
    """Embed n texts, (n, width) float32 rows as the server gives them."""
    answer = post(f"{address}/v1/embeddings", {"model": NAME, "input": list(texts), **options})
    rows = np.array([item["embedding"] for item in sorted(answer["data"], key=lambda item: item["index"])], np.float32)
    if rows.shape != (len(texts), width):
        raise JasperError(
            f"{address}: embeddings of shape {rows.shape} (expected {(len(texts), width)}). Fix: choose a server that "
            "supports `dimensions`"
        )
    return rows


def main(argv: list[str]) -> int:
    """Run the command line. Return 1 if an embedding has a cosine below 0.9999."""
    parser = argparse.ArgumentParser("python -m bench servers", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="exported folder")
    parser.add_argument("--dimensions", type=positive_int, required=True, metavar="N", help="width to ask for")
    arguments = parser.parse_args(argv)
    cosine = serve_and_compare(arguments.folder, arguments.dimensions)
    if cosine is None:
        return 0
    print(f"{EXECUTABLE}: cosine at least {cosine:.6f} at full width and at {arguments.dimensions} dimensions")
    return int(cosine < 0.9999)


if __name__ == "__main__":
    run_cli(main)
