"""A local server whose answers a test decides, in the forms of OpenAI-style servers and of TEI."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np


@contextmanager
def server(answer: Callable[[str, Any], Any]) -> Iterator[str]:
    """Serve answers on a free port, and yield the address without a path.

    ``answer`` gets the path and the request as JSON (None for GET). It returns a JSON value, (status, text), or a
    function that writes to the handler itself.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
            result = answer(self.path, content)
            if callable(result):
                result(self)
                return
            status, body = result if isinstance(result, tuple) else (200, json.dumps(result))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_POST  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_address[1]}"
    finally:
        running.shutdown()
        running.server_close()


def openai(encode: Callable[[list[str]], np.ndarray]) -> Callable[[str, Any], Any]:
    """Return answers of an OpenAI-style server. Its embeddings come in reverse order, with their index."""

    def answer(path: str, content: Any) -> Any:
        if content is None:
            return {"data": [{"id": "tiny"}]} if path == "/v1/models" else (404, "not found")
        rows = encode(content["input"])[:, : content.get("dimensions")]
        data = [{"index": i, "embedding": row.tolist()} for i, row in enumerate(rows)]
        return {"object": "list", "model": content["model"], "data": data[::-1]}

    return answer


def tei(encode: Callable[[list[str]], np.ndarray]) -> Callable[[str, Any], Any]:
    """Return answers of a TEI server."""
    return lambda path, content: encode(content["inputs"]).tolist()
