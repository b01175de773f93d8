"""An index of texts or images on disk, together with the model that embeds its questions."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

import jasper_fast.pictures
from jasper_fast.data.document_ids import DocumentId, check_ids
from jasper_fast.data.rows import check_text
from jasper_fast.mips import FlatIPIndex
from jasper_fast.models.embedder import EncodeWidths, load_model, model_encoder
from jasper_fast.models.hub import model_revision, resolve_model
from jasper_fast.utils.arrow_files import read_mapped, stream_bytes
from jasper_fast.utils.atomic import publish_dir
from jasper_fast.utils.errors import JasperError

if TYPE_CHECKING:
    import pyarrow as pa
    from sentence_transformers import SentenceTransformer


ENCODE_CHUNK_TEXTS = 4096  # The model sorts these by length.
Dtype = Literal["bfloat16", "float32", "int8"]
SETTINGS, TEXTS, VECTORS = "search.json", "texts.arrow", "vectors"
SETTING_TYPES: dict[str, Any] = {
    "model": str,
    "revision": str,
    "width": int,
    "max_length": (int, type(None)),
    "role": str,
}


@dataclass(frozen=True)
class Hit:
    """One result: the inner product with the question, the id, and the text.

    The id is the user's if the index has ids. Otherwise it is the row number in the index.
    """

    score: float
    id: DocumentId
    text: str


class TextIndex:
    """An index of texts on disk, opened with the model that built it.

    Args:
        path: folder that ``build`` wrote.
        model: current location of the model. None takes the location at the time of the build.
        verify: compare the files' checksums, and check that the model built the index.
        trust_remote_code: allow code that the model brings to run.

    Raises:
        JasperError: the folder has no index, the index is damaged, or another model built it.
    """

    def __init__(
        self, path: str | Path, model: str | None = None, verify: bool = True, *, trust_remote_code: bool = False
    ) -> None:
        path = Path(path)
        settings, table, self.vectors = _open(path, verify)
        name, self.width, self.role = model or settings["model"], settings["width"], settings["role"]
        self.texts = table.column("text")
        self.ids = table.column("id") if "id" in table.column_names else None
        if verify:
            _check_model(name, path, settings)
        loaded = load_model(name, settings["max_length"], trust_remote_code=trust_remote_code)
        self._encode = model_encoder(loaded, [self.width])

    def __len__(self) -> int:
        return len(self.texts)

    def encode(self, questions: Sequence[str]) -> np.ndarray:
        """Encode questions, (Q, width) float32.

        Args:
            questions: Q questions.

        Raises:
            JasperError: a question has a lone surrogate.
        """
        checked = [check_text(question, f"question {number}") for number, question in enumerate(questions, 1)]
        return self._encode(checked, self.role)[self.width]

    def ask(self, questions: Sequence[str], k: int = 10) -> list[list[Hit]]:
        """Return the k texts nearest to every question, nearest first.

        Args:
            questions: Q questions.
            k: number of texts to return for each.

        Raises:
            JasperError: a question has a lone surrogate.
        """
        if not questions:
            return []
        scores, ids = self.vectors.search(self.encode(questions), min(k, len(self)))
        return [
            [Hit(score, self._id(number), self.texts[number].as_py()) for score, number in zip(*pair, strict=True)]
            for pair in zip(scores.tolist(), ids.tolist(), strict=True)
        ]

    def _id(self, number: int) -> DocumentId:
        return number if self.ids is None else self.ids[number].as_py()


def check_replace(out: str | Path, replace: bool) -> None:
    """Check that an index may be written at a path.

    Args:
        out: folder to write.
        replace: allow an index at this path, which is then replaced.

    Raises:
        JasperError: the path holds something else, or an index and ``replace`` is False.
    """
    out = Path(out)
    if not out.exists():
        return
    if not (out / SETTINGS).is_file():
        raise JasperError(f"{out}: exists and is not a text index. Fix: choose another path, or remove it")
    if not replace:
        try:
            settings = _read_settings(out / SETTINGS)
            content = f"an index of {settings['texts']:,} documents, built with {settings['model']}"
        except (ValueError, KeyError, OSError):
            content = "a damaged index"
        raise JasperError(f"{out}: exists ({content}). Fix: add --replace, or choose another --out")


def build(
    model: str,
    texts: Iterable[str],
    out: str | Path,
    *,
    width: int | None = None,
    dtype: Dtype = "float32",
    max_length: int | None = None,
    total: int | None = None,
    pictures: bool = False,
    trust_remote_code: bool = False,
    replace: bool = False,
    ids: Iterable[DocumentId] | None = None,
) -> int:
    """Encode texts and write their index as a folder, atomically.

    Args:
        model: run folder, path, name, or ``package:import_name/folder`` of the model.
        texts: documents. Repeated texts are indexed once if they have no ids. Blank texts are left out.
        out: folder to write.
        width: width of the embeddings. None takes the model's widest.
        dtype: storage dtype of the embeddings, as in ``FlatIPIndex``.
        max_length: maximum number of tokens per text. None keeps the model's limit.
        total: number of texts for the progress bar. None shows no total.
        pictures: treat the texts as paths of images. The model must have a vision tower. Words find the images.
        trust_remote_code: allow code that the model brings to run.
        replace: replace an index at ``out``. By default, an existing index is an error.
        ids: a different id for each document: all strings, or all whole numbers. None numbers the rows.

    Returns:
        number of texts in the index.

    Raises:
        JasperError: no such model or width, no text, an unusable id, or a folder that cannot be written.
    """
    out = Path(out)
    check_replace(out, replace)
    if ids is not None:
        texts, ids = _with_ids(texts, ids)
    loaded = load_model(model, max_length, trust_remote_code=trust_remote_code)
    encode, width = _encoder(loaded, width)
    if pictures:
        encode = _image_encoder(model, width, trust_remote_code)
    index = FlatIPIndex(width, dtype=dtype)
    chunks = _chunks(texts, None if ids is not None else set())
    indexed = _encode_texts(model, chunks, encode, index, total, " images" if pictures else " texts")
    if not indexed:
        raise JasperError("no texts to index. Fix: give a source with at least one text")
    settings = {
        "model": str(Path(model).resolve()) if Path(model).exists() else model,
        "revision": model_revision(_weights(model)),
        "width": width,
        "max_length": max_length,
        "texts": len(indexed),
        "role": "document" if pictures else "query",  # the captions' role in training on images
    }
    with publish_dir(out, replace=replace) as folder:
        _write(folder, index, _table(indexed, ids), settings)
    return len(indexed)


def add(
    path: str | Path,
    texts: Iterable[str],
    *,
    ids: Iterable[DocumentId] | None = None,
    model: str | None = None,
    total: int | None = None,
    pictures: bool = False,
    trust_remote_code: bool = False,
) -> int:
    """Append documents to an index, with the model that built it, atomically.

    Args:
        path: folder that ``build`` wrote.
        texts: documents. Without ids, texts that are in the index already are left out.
        ids: new ids for the documents, of the type that the index has. None for an index without ids.
        model: current location of the model. None takes the location at the time of the build.
        total: number of texts for the progress bar. None shows no total.
        pictures: treat the texts as paths of images. This must be as in the build.
        trust_remote_code: allow code that the model brings to run.

    Returns:
        number of documents added.

    Raises:
        JasperError: no usable index, another model, an unusable id, or a folder that cannot be written.
    """
    import pyarrow as pa

    settings, table, index = _open(path := Path(path), verify=True)
    if pictures != (settings["role"] == "document"):
        fix = "texts. Fix: leave out --pictures" if pictures else "images. Fix: add --pictures"
        raise JasperError(f"{path}: an index of {fix}")
    if (ids is not None) != ("id" in table.column_names):
        fix = "without ids. Fix: leave out --id-column" if ids is not None else "with ids. Fix: set --id-column"
        raise JasperError(f"{path}: an index {fix}")
    if ids is not None:
        known = [(f"{path}, document {n}", value) for n, value in enumerate(table.column("id").to_pylist(), 1)]
        texts, ids = _with_ids(texts, ids, known)
    name, stamp = model or settings["model"], (path / TEXTS).stat()
    _check_model(name, path, settings)
    if pictures:
        encode = _image_encoder(name, index.dim, trust_remote_code)
    else:
        loaded = load_model(name, settings["max_length"], trust_remote_code=trust_remote_code)
        encode = model_encoder(loaded, [index.dim])
    chunks = _chunks(texts, None if ids is not None else set(table.column("text").to_pylist()))
    added = _encode_texts(name, chunks, encode, index, total, " images" if pictures else " texts")
    if not added:
        return 0
    table = pa.concat_tables([table, _table(added, ids)])
    with publish_dir(path, replace=True) as folder:
        _write(folder, index, table, {**settings, "texts": len(table)})
        if not (path / TEXTS).exists() or not os.path.samestat(stamp, (path / TEXTS).stat()):
            raise JasperError(f"{path}: changed while documents were added. Fix: run the same command again")
    return len(added)


def _image_encoder(model: str, width: int, trust_remote_code: bool) -> EncodeWidths:
    embedder = jasper_fast.pictures.load(_weights(model), trust_remote_code=trust_remote_code)

    def encode(texts: list[str], role: str) -> dict[int, np.ndarray]:
        return {width: embedder.encode(texts, width)}

    return encode


def _encode_texts(
    model: str, chunks: Iterable[list[str]], encode: EncodeWidths, index: FlatIPIndex, total: int | None, unit: str
) -> list[str]:
    """Add the texts' embeddings to the index, and return the texts."""
    from tqdm import tqdm

    indexed = list[str]()
    with tqdm(total=total, unit=unit, desc="encoding") as bar:
        for chunk in chunks:
            try:
                index.add(np.ascontiguousarray(encode(chunk, "document")[index.dim]))
            except ValueError as error:
                raise JasperError(f"{model}: its embeddings cannot be indexed: {error}") from error
            indexed += chunk
            bar.update(len(chunk))
    return indexed


def _with_ids(
    texts: Iterable[str], ids: Iterable[DocumentId], known: Iterable[tuple[str, Any]] = ()
) -> tuple[list[str], list[DocumentId]]:
    """Return the texts that are not blank and their ids, after a check of all ids.

    Args:
        texts: documents.
        ids: one id per text.
        known: positions and ids of the documents of the index.
    """
    texts, located = list(texts), [(f"id {number}", value) for number, value in enumerate(ids, 1)]
    if len(located) != len(texts):
        raise JasperError(f"ids: one per text is needed (got {len(located)}, expected {len(texts)}). Fix: match them")
    check_ids(chain(known, located))
    filled = [number for number, text in enumerate(texts) if text.strip()]
    return [texts[number] for number in filled], [located[number][1] for number in filled]


def _table(texts: list[str], ids: Sequence[DocumentId] | None) -> pa.Table:
    import pyarrow as pa

    columns = {"text": pa.array(texts, pa.large_string())}
    if ids is not None:
        columns["id"] = pa.array(ids, pa.large_string() if isinstance(ids[0], str) else pa.int64())
    return pa.table(columns)


def _write(folder: Path, index: FlatIPIndex, table: pa.Table, settings: dict[str, Any]) -> None:
    index.save(folder / VECTORS)
    (folder / TEXTS).write_bytes(stream_bytes(table))
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def _open(path: Path, verify: bool) -> tuple[dict[str, Any], pa.Table, FlatIPIndex]:
    """Return the settings, the texts and the embeddings of an index.

    Raises:
        JasperError: the folder has no index, or a damaged one.
    """
    import pyarrow as pa

    try:
        settings = _read_settings(path / SETTINGS)
        table = read_mapped(path / TEXTS)
        table.column("text")
    except FileNotFoundError as error:
        missing = f"no text index here ({Path(error.filename or SETTINGS).name} is missing)"
        raise JasperError(
            f"{path}: {missing if path.exists() else 'there is no such folder'}. Fix: make an index with "
            "`python -m jasper_fast.search build MODEL TEXTS --out DIR`"
        ) from None
    except (ValueError, KeyError, OSError, pa.ArrowException) as error:
        raise JasperError(f"{path}: damaged ({error}). Fix: build the index again") from error
    vectors = FlatIPIndex.load(path / VECTORS, verify=verify)
    if len(vectors) != len(table):
        raise JasperError(
            f"{path}: damaged ({len(table)} texts, {len(vectors)} embeddings). Fix: build the index again"
        )
    return settings, table, vectors


def _check_model(model: str, path: Path, settings: dict[str, Any]) -> None:
    if model_revision(_weights(model)) != settings["revision"]:
        raise JasperError(f"{model}: not the model that {path} was built with. Fix: build the index again")


def _read_settings(file: Path) -> dict[str, Any]:
    """Read an index's settings.

    Raises:
        OSError: the file cannot be read.
        ValueError: a setting is missing or of another type.
    """
    settings = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise ValueError(f"{file.name} has no settings")
    settings = {"role": "query", "max_length": None, **settings}  # missing in the first version
    for name, kinds in SETTING_TYPES.items():
        if not isinstance(settings.get(name), kinds):
            raise ValueError(f"{file.name}: {name} is {settings.get(name)!r}")
    if settings["role"] not in ("query", "document"):
        raise ValueError(f"{file.name}: role is {settings['role']!r}")
    return settings


def _encoder(model: SentenceTransformer, width: int | None) -> tuple[EncodeWidths, int]:
    if width is not None:
        return model_encoder(model, [width]), width
    every = model_encoder(model)
    widest = max(every(["a"], "document"))
    return model_encoder(model, [widest]), widest


def _weights(model: str) -> str:
    """Return a run folder's model, so that checkpoints are not part of its identity."""
    path = Path(resolve_model(model))
    return str(path / "model") if (path / "model" / "modules.json").is_file() else model


def _chunks(texts: Iterable[str], seen: set[str] | None) -> Iterator[list[str]]:
    """Yield the texts in chunks, without blank texts and those in ``seen``. None keeps repeated texts."""
    chunk: list[str] = []
    for number, text in enumerate(texts, 1):
        if (seen is not None and text in seen) or not text.strip():
            continue
        check_text(text, f"text {number}")
        if seen is not None:
            seen.add(text)
        chunk.append(text)
        if len(chunk) == ENCODE_CHUNK_TEXTS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
