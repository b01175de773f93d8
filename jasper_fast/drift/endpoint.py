"""A served endpoint as one side of a comparison: OpenAI-style ``/v1/embeddings``, or ``/embed`` of TEI."""

from __future__ import annotations

import base64
import json
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib import error as url_errors
from urllib import request as url_request
from urllib.parse import urlsplit

import numpy as np

from jasper_fast.drift.side import NO_PROMPTS, Facts, Prompts, Side, checked_rows
from jasper_fast.exporting.golden import Text
from jasper_fast.utils.errors import JasperError

BATCH = 32  # texts of a request, the default limit of TEI
LOOPBACK = ("localhost", "127.0.0.1", "::1")  # reached without a proxy
LONGEST_ANSWER = 1 << 30  # bytes
SHOWN = 200  # characters of an answer in a message
STATUS_FIXES = {
    401: "give the key with --key-variable NAME, an environment variable",
    403: "give the key with --key-variable NAME, an environment variable",
    404: "check the address, e.g. http://localhost:8000/v1/embeddings, and the name in --model",
    413: "raise the largest input of the server, or let it truncate (TEI: --auto-truncate)",
    422: "check --model, or let the server truncate long texts (TEI: --auto-truncate)",
    429: "wait until the server has less to do",
    503: "wait until the server has loaded its model",
}
OTHER_FIX = "check the log of the server, --model and --dimensions, or give shorter texts with --texts"


@dataclass(frozen=True)
class EndpointOptions:
    """Options of requests.

    Args:
        model: name of the model in OpenAI-style requests. None: the only one that the server lists.
        dimensions: field ``dimensions`` of OpenAI-style requests. None leaves it out.
        timeout: seconds until a request fails, from its start to the last byte.
        key: value for the header Authorization, as a bearer token. None sends none.
    """

    model: str | None = None
    dimensions: int | None = None
    timeout: float = 60.0
    key: str | None = None


def is_address(name: str) -> bool:
    """Return True if an argument is the address of an endpoint."""
    return name.startswith(("http://", "https://"))


class EndpointSide(Side):
    """Embeddings of an endpoint. It gets the texts as they are, unless prompts are given.

    Args:
        name: address that ends in ``/embeddings`` (OpenAI-style) or ``/embed`` (TEI).
        options: options of requests.

    Raises:
        JasperError: the address is another one, or the server gives no embedding of a first text.
    """

    def __init__(self, name: str, options: EndpointOptions) -> None:
        try:
            path = urlsplit(name).path.rstrip("/")
        except ValueError as error:
            raise JasperError(f"{name}: the address is malformed ({error}). Fix: check it") from None
        if not path.endswith(("/embeddings", "/embed")):
            raise JasperError(
                f"{name}: unknown kind of endpoint (expected an address that ends in /v1/embeddings or /embed). Fix: "
                "give the full address"
            )
        self.tei = path.endswith("/embed")
        self.prompts: Prompts = NO_PROMPTS  # put before texts by the client
        self.options = options
        super().__init__(name, "TEI endpoint" if self.tei else "OpenAI-style endpoint", Facts())
        self._model = None if self.tei else options.model or self._listed_model()
        self._request(["seven"])  # fails early, and waits for a model that is loaded at the first request

    def embed(self, texts: Sequence[Text], prompts: Prompts | None = None, *, together: bool = True) -> np.ndarray:
        """Embed texts in requests of 32, or one at a time."""
        used = self.prompts if prompts is None else prompts
        inputs = [used[text.role] + text.text for text in texts]
        size = BATCH if together else 1
        rows = [row for start in range(0, len(inputs), size) for row in self._request(inputs[start : start + size])]
        return checked_rows(rows, len(texts), self.name)

    def _request(self, inputs: list[str]) -> list[Any]:
        if self.tei:
            answer = self._post(self.name, {"inputs": inputs, "truncate": True})
            rows = answer
        else:
            more = {"model": self._model, "dimensions": self.options.dimensions}
            fields = {key: value for key, value in more.items() if value is not None}
            answer = self._post(self.name, {"input": inputs, "encoding_format": "float", **fields})
            rows = _openai_rows(answer)
        if not isinstance(rows, list) or len(rows) != len(inputs):
            got = len(rows) if isinstance(rows, list) else json.dumps(answer)[:SHOWN]
            raise JasperError(
                f"{self.name}: the answer has no embedding for each text (got {got}, expected {len(inputs)} "
                "embeddings). Fix: check that the address is that of an embedding model"
            )
        return rows

    def _listed_model(self) -> str | None:
        """Return the name of the only model that an OpenAI-style server lists. None if it lists none, or several."""
        try:
            listed = self._post(self.name.rstrip("/").removesuffix("/embeddings") + "/models", None)
            names = [model["id"] for model in listed["data"]]
        except (JasperError, KeyError, TypeError):
            return None
        if len(names) > 1:
            raise JasperError(
                f"{self.name}: the server has several models ({', '.join(map(str, names[:8]))}). Fix: choose one with "
                "--model NAME"
            )
        return names[0] if names else None

    def _post(self, address: str, content: Mapping[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.options.key is not None:
            headers["Authorization"] = f"Bearer {self.options.key}"
        data = None if content is None else json.dumps(content).encode()
        body = exchange(url_request.Request(address, data, headers), self.options.timeout, self.name)
        try:
            return json.loads(body)
        except ValueError:
            raise JasperError(
                f"{self.name}: the answer is not JSON (got {body[:SHOWN].decode(errors='replace')!r}). Fix: check that "
                "the address is that of an embedding server"
            ) from None


def exchange(request: url_request.Request, timeout: float, name: str) -> bytes:
    """Send a request and return the body of the answer, within a time that no server can extend.

    Args:
        request: the request.
        timeout: seconds for the whole exchange.
        name: address for messages.

    Raises:
        JasperError: no connection, an error status, no complete answer in time, or one beyond 1 GiB.
    """
    results: queue.Queue[bytes | BaseException] = queue.Queue()

    def work() -> None:
        try:
            results.put(_read(request, timeout))
        except BaseException as error:  # raised in the waiting thread
            results.put(error)

    # A socket's timeout starts again with every byte, so a thread that is left behind bounds the whole exchange.
    threading.Thread(target=work, daemon=True).start()
    try:
        result = results.get(timeout=timeout)
    except queue.Empty:
        result = TimeoutError()
    if isinstance(result, bytes):
        return result
    raise _explained(result, timeout, name) from None


def _read(request: url_request.Request, timeout: float) -> bytes:
    local = urlsplit(request.full_url).hostname in LOOPBACK
    opener = url_request.build_opener(*([url_request.ProxyHandler({})] if local else []))
    end, body = time.monotonic() + timeout, bytearray()
    with opener.open(request, timeout=timeout) as answer:
        while part := answer.read1(1 << 20):
            body += part
            if len(body) > LONGEST_ANSWER or time.monotonic() > end:
                raise TimeoutError if len(body) <= LONGEST_ANSWER else ValueError("the answer is longer than 1 GiB")
    return bytes(body)


def _explained(error: BaseException, timeout: float, name: str) -> JasperError:
    if isinstance(error, url_errors.HTTPError):
        said = _body(error)
        fix = STATUS_FIXES.get(error.code, OTHER_FIX)
        return JasperError(f"{name}: HTTP {error.code} {error.reason}{said}. Fix: {fix}")
    reason = error.reason if isinstance(error, url_errors.URLError) else error
    if isinstance(reason, TimeoutError):
        return JasperError(
            f"{name}: no complete answer in {timeout:g} s. Fix: check the server, or raise --timeout SECONDS"
        )
    return JasperError(
        f"{name}: no answer ({reason or type(error).__name__}). Fix: start the server, and check host and port"
    )


def _body(error: url_errors.HTTPError) -> str:
    """Return the start of an error's body for a message. The body may come slowly, so only a thread reads it."""
    results: queue.Queue[bytes] = queue.Queue()

    def work() -> None:
        try:
            results.put(error.read(SHOWN))
        except Exception:  # an unreadable body only leaves its text out of the message
            results.put(b"")

    threading.Thread(target=work, daemon=True).start()
    try:
        text = " ".join(results.get(timeout=2).decode(errors="replace").split())
    except queue.Empty:
        text = ""
    return f" ({text})" if text else ""


def _openai_rows(answer: Any) -> list[Any] | None:
    """Return the embeddings of an OpenAI-style answer in the order of the texts, or None if it has none."""
    data = answer.get("data") if isinstance(answer, Mapping) else None
    if not isinstance(data, list) or not all(isinstance(item, Mapping) and "embedding" in item for item in data):
        return None
    if all(isinstance(item.get("index"), int) for item in data):
        data = sorted(data, key=lambda item: item["index"])
    return [_decoded(item["embedding"]) for item in data]


def _decoded(embedding: Any) -> Any:
    """Return an embedding as numbers. Some servers encode it as base64 whatever the request says."""
    if not isinstance(embedding, str):
        return embedding
    try:
        return np.frombuffer(base64.b64decode(embedding, validate=True), dtype="<f4").tolist()
    except ValueError:
        return embedding  # `checked_rows` refuses it
