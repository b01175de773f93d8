"""Golden files: texts and their embeddings, written with an export, to compare later versions and servers with.

``golden.json`` is in the folder of the export. ``python -m jasper_fast.compare golden.json MODEL`` reads it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from jasper_fast._version import __version__
from jasper_fast.exporting.parity import PROBES
from jasper_fast.models.folder import FACTS_FILE, read_json
from jasper_fast.utils.atomic import write_atomic
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.fingerprint import file_sha256, sha256
from jasper_fast.utils.names import first_line

GOLDEN_FILE, FORMAT = "golden.json", 1
ROLES = ("query", "document")
DIGITS = 6  # significant digits of a coordinate
WEIGHTS = ("*.safetensors", "*.bin", "*.onnx", "*.gguf")
PACKAGES = ("sentence-transformers", "transformers", "tokenizers", "torch", "onnxruntime")
TYPES: dict[str, type | tuple[type, ...]] = {
    **{"model": str, "width": int, "prompts": dict, "normalized": bool, "versions": dict, "weights": dict},
    **{"texts": list, "embeddings": list, "checksum": str},
}
Encode = Callable[[list[str], str], np.ndarray]

SHORT_TEXTS = {
    "query": (
        "how do I reverse a list?",
        "ports of the northern coast",
        "Straße, ночь, 水, नमस्ते, 🙂",
        "seven",
        "what did the council decide about the new bridge",
        "ERROR 1045 (28000): access denied",
    ),
    "document": (
        "list.reverse() reverses a list in place.",
        "def area(r):\n    return 3.14159 * r ** 2",
        "今天天气很好，我们去海边散步。",
        "كتبت الرسالة في الصباح الباكر.",
        "https://example.org/a?b=1&c=%20d#part",
    ),
}
WORD_COUNTS = (30, 60, 110, 170, 240, 360, 480, 1600)  # lengths of the long documents, in words
_SUBJECTS = ("The harbour master", "A judge", "Our biology teacher", "The orchestra", "A mountain guide", "The bakery")
_VERBS = ("described", "sold", "measured", "forgot", "repaired", "painted", "questioned")
_OBJECTS = (
    "eleven copper pipes",
    "the tax on imported wheat",
    "a cell under the microscope",
    "the slow movement in D minor",
    "the glacier and its lakes",
)
_ENDS = ("before noon", "without any help", "for the third time")


@dataclass(frozen=True)
class Text:
    """A text and the role in which it is embedded, "query" or "document"."""

    role: str
    text: str


@dataclass(frozen=True)
class Golden:
    """Content of a golden file.

    Args:
        path: the file.
        facts: all fields but texts and embeddings: model, width, prompts, pooling, normalized, max_tokens, versions
            and weights.
        texts: n texts with roles.
        embeddings: (n, width) float64.
    """

    path: Path
    facts: Mapping[str, Any]
    texts: tuple[Text, ...]
    embeddings: np.ndarray


def golden_texts(roles: Sequence[str] = ROLES) -> list[Text]:
    """Return texts of mixed length: words, sentences, other scripts, code, and up to 1,600 words.

    The parts of long texts differ in content, so that truncation changes their embeddings.

    Args:
        roles: roles to include. A model of one role gets all texts in it.
    """
    texts = [Text(role, text) for role, group in SHORT_TEXTS.items() for text in group]
    texts += [Text("document", text) for text in PROBES.values()]
    texts += [Text("document", _long_text(count, start)) for start, count in enumerate(WORD_COUNTS)]
    if len(roles) == 1:
        texts = [Text(roles[0], text) for text in dict.fromkeys(text.text for text in texts)]
    return texts


def write_golden(folder: Path, encode: Encode, facts: Mapping[str, Any], roles: Sequence[str] = ROLES) -> Path:
    """Write ``golden.json`` into a folder.

    Args:
        folder: folder of an export.
        encode: function from texts and their role to rows (n, D) float32. It applies the prompts.
        facts: result of :func:`golden_facts`.
        roles: roles that the model encodes.

    Returns:
        The path of the file.

    Raises:
        JasperError: an embedding is not finite, the widths differ, or the file cannot be written.
    """
    texts = golden_texts(roles)
    embeddings = by_role(texts, encode)
    if not np.isfinite(embeddings).all():
        raise JasperError(
            f"{folder}: an embedding is not finite (got NaN or infinity, expected numbers). Nothing was published. "
            "Fix: check the weights of the model"
        )
    rows = [[float(f"{value:.{DIGITS}g}") for value in row] for row in embeddings.tolist()]
    pairs = [{"role": text.role, "text": text.text} for text in texts]
    content = {
        "format": FORMAT,
        **facts,
        "versions": installed_versions(),
        "width": embeddings.shape[1],
        "normalized": bool(np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-3)),
        "checksum": _checksum(pairs, rows),
    }
    head = json.dumps(content, ensure_ascii=False, indent=1).removesuffix("\n}")
    lists = (("texts", pairs), ("embeddings", rows))
    parts = [f' "{key}": [\n  {_lines(values)}\n ]' for key, values in lists]
    path = folder / GOLDEN_FILE
    write_atomic(path, ",\n".join([head, *parts]) + "\n}\n")
    return path


def by_role(texts: Sequence[Text], encode: Encode) -> np.ndarray:
    """Embed texts, those of a role together, (n, D) float64 in the order of the texts.

    Args:
        texts: n texts with roles.
        encode: function from texts and their role to rows (n, D).

    Raises:
        JasperError: embeddings of the roles differ in width.
    """
    parts: dict[str, np.ndarray] = {}
    for role in dict.fromkeys(text.role for text in texts):
        parts[role] = np.asarray(encode([text.text for text in texts if text.role == role], role), dtype=np.float64)
    widths = {role: rows.shape[1] for role, rows in parts.items()}
    if len(set(widths.values())) > 1:
        raise JasperError(f"queries and documents differ in width (got {widths}). Fix: give a model with one width")
    rows = {role: iter(part) for role, part in parts.items()}
    return np.stack([next(rows[text.role]) for text in texts])


def golden_facts(folder: Path, name: str | None = None) -> dict[str, Any]:
    """Read the facts of a golden file from a flat sentence-transformers folder.

    Args:
        folder: folder of an export. Missing files leave their facts out.
        name: name of the model. None: the one in ``training.json``, or that of the folder.

    Returns:
        model, prompts, modules, pooling, max_tokens and weights. ``weights`` has the SHA-256 of each file.
    """
    modules = _optional(folder / "modules.json", [])
    settings = _optional(folder / "config_sentence_transformers.json", {})
    pooling = next((module["path"] for module in modules if module["type"].endswith("Pooling")), None)
    files = sorted({file for glob in WEIGHTS for file in folder.rglob(glob)})
    return {
        "model": name or _optional(folder / FACTS_FILE, {}).get("name") or folder.resolve().name,
        "prompts": {role: (settings.get("prompts") or {}).get(role) or "" for role in ROLES},
        "modules": [module["type"].rpartition(".")[2] for module in modules],
        "pooling": None if pooling is None else pooling_mode(_optional(folder / pooling / "config.json", {})),
        "max_tokens": _optional(folder / "sentence_bert_config.json", {}).get("max_seq_length"),
        "weights": {file.relative_to(folder).as_posix(): file_sha256(file) for file in files},
    }


def pooling_mode(config: Mapping[str, Any]) -> str | None:
    """Return the pooling mode of a configuration of sentence-transformers 6, or of an older one, e.g. "mean"."""
    if "pooling_mode" in config:
        mode = config["pooling_mode"]
        return mode if isinstance(mode, str) else "+".join(mode)
    names = [
        key.removeprefix("pooling_mode_") for key, value in config.items() if key.startswith("pooling_mode_") and value
    ]
    return "+".join(name.removesuffix("_tokens").removesuffix("_token") for name in names) or None


def read_golden(path: str | Path) -> Golden:
    """Read a golden file and check it.

    Args:
        path: the file.

    Raises:
        JasperError: the file is missing or no golden file, is of a newer format, or its numbers were edited.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JasperError(
            f"{path}: not a golden file ({first_line(error)}). Fix: give {GOLDEN_FILE} of an export"
        ) from None
    if not isinstance(content, dict) or "format" not in content:
        raise JasperError(
            f"{path}: not a golden file (the field `format` is missing). Fix: give {GOLDEN_FILE} of an export"
        )
    if content["format"] != FORMAT:
        raise JasperError(
            f"{path}: unknown format (got {content['format']!r}, expected {FORMAT}). Fix: use the version of "
            "jasper_fast that wrote it, or export the model again"
        )
    _check_fields(path, content)
    texts = tuple(Text(pair["role"], pair["text"]) for pair in content["texts"])
    facts = {key: value for key, value in content.items() if key not in ("texts", "embeddings", "checksum", "format")}
    return Golden(path, facts, texts, np.array(content["embeddings"], dtype=np.float64))


def _check_fields(path: Path, content: Mapping[str, Any]) -> None:
    """Check types, shapes, finite numbers and the checksum of a golden file."""
    for key, kind in TYPES.items():
        if not isinstance(content.get(key), kind):
            raise _damaged(
                path, f"the field `{key}` is {type(content.get(key)).__name__}", getattr(kind, "__name__", "")
            )
    width, texts, rows = content["width"], content["texts"], content["embeddings"]
    for pair in texts:
        if not isinstance(pair, dict) or pair.get("role") not in ROLES or not isinstance(pair.get("text"), str):
            raise _damaged(path, f"a text is {str(pair)[:60]}", "a role and a text")
    if not texts or len(rows) != len(texts):
        raise _damaged(path, f"{len(texts)} texts and {len(rows)} embeddings", "as many of both, at least one")
    for number, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != width:
            got = len(row) if isinstance(row, list) else type(row).__name__
            raise _damaged(path, f"embedding {number} has a width of {got}", str(width))
        if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in row):
            raise _damaged(path, f"embedding {number} has a value that is not a finite number", "numbers")
    if content["checksum"] != _checksum(texts, rows):
        raise _damaged(path, "texts or numbers were edited", "those that the export wrote")


def _damaged(path: Path, got: str, expected: str) -> JasperError:
    return JasperError(f"{path}: damaged golden file (got: {got}, expected {expected}). Fix: export the model again")


def _checksum(texts: Sequence[Mapping[str, str]], rows: Sequence[Sequence[float]]) -> str:
    return sha256(json.dumps([[[text["role"], text["text"]] for text in texts], rows]))


def _lines(values: Sequence[Any]) -> str:
    """Return one line of JSON for each value."""
    return ",\n  ".join(json.dumps(value, ensure_ascii=False) for value in values)


def _long_text(words: int, start: int) -> str:
    """Return sentences with other contents at every place, cut after a number of words."""
    parts = list(product(_ENDS, _OBJECTS, _VERBS, _SUBJECTS))
    sentences = (
        f"{s} {v} {o} {e}." for e, o, v, s in (parts[(37 * start + 101 * n) % len(parts)] for n in range(words))
    )
    return " ".join(" ".join(sentences).split()[:words])


def _optional(path: Path, default: Any) -> Any:
    return read_json(path) if path.is_file() else default


def installed_versions() -> dict[str, str]:
    """Return the versions of the installed packages that embeddings depend on, by name."""
    versions = {"jasper_fast": __version__}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
