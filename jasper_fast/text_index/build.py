"""Encode texts and write their index."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

import jasper_fast.pictures
from jasper_fast.data.document_ids import DocumentId, check_ids
from jasper_fast.data.rows import check_text
from jasper_fast.mips import FlatIPIndex
from jasper_fast.models.embedder import EncodeWidths, load_model, model_encoder
from jasper_fast.models.hub import model_revision
from jasper_fast.models.lengths import fraction_longer, length_for_most, percent, positions_of
from jasper_fast.models.sentence_transformer import transformers_of
from jasper_fast.text_index.cached import EncodeRows, cached_encoder, rows_encoder
from jasper_fast.text_index.files import check_replace, model_location, text_table, weights, write
from jasper_fast.utils.atomic import publish_dir
from jasper_fast.utils.errors import JasperError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

ENCODE_CHUNK_TEXTS = 1024  # The model sorts these by length, and the progress moves with each chunk.
SAMPLE = 2000  # texts whose length is counted
Dtype = Literal["bfloat16", "float32", "int8"]


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
    cache: str | Path | None = None,
) -> int:
    """Encode texts and write their index as a folder, atomically.

    Args:
        model: run folder, path, name, or ``package:import_name/folder`` of the model.
        texts: documents. Repeated texts are indexed once if they have no ids. Blank texts are left out.
        out: folder to write.
        width: width of the embeddings. None takes the model's widest.
        dtype: storage dtype of the embeddings, as in ``FlatIPIndex``.
        max_length: maximum number of tokens per text. None keeps the model's limit. In an asymmetric model, questions
            keep the limit of their encoder.
        total: number of texts for the progress bar. None shows no total.
        pictures: treat the texts as paths of images. The model must have a vision tower. Words find the images.
        trust_remote_code: allow code that the model brings to run.
        replace: replace an index at ``out``. By default, an existing index is an error.
        ids: a different id for each document: all strings, or all whole numbers. None numbers the rows.
        cache: folder of embeddings that ``adapt`` computed. An index of the asymmetric form takes those of its teacher,
            which are rounded to float16, and a line says how many. None computes all.

    Returns:
        number of texts in the index.

    Raises:
        JasperError: no such model or width, no text, an unusable id, or a folder that cannot be written.
    """
    out = Path(out)
    check_replace(out, replace)
    if ids is not None:
        texts, ids = with_ids(texts, ids)
        total = len(texts)
    loaded = load_model(model, max_length, trust_remote_code=trust_remote_code)
    encode, width = _encoder(loaded, width)
    if pictures:
        encode = image_encoder(model, width, trust_remote_code)
    index = FlatIPIndex(width, dtype=dtype)
    parts: Iterable[list[str]] = chunks(texts, None if ids is not None else set())
    rows = rows_encoder(encode, width)
    if cache is not None and not pictures:
        parts = list(parts)
        rows, note = cached_encoder(model, loaded, rows, [text for part in parts for text in part], width, cache)
        if note:
            print(note, file=sys.stderr)
    indexed = encode_texts(model, parts, rows, index, total, " images" if pictures else " texts")
    if not indexed:
        raise JasperError("no texts to index. Fix: give a source with at least one text")
    settings = {
        **model_location(model, out),
        "revision": model_revision(weights(model)),
        "width": width,
        "max_length": max_length,
        "texts": len(indexed),
        "role": "document" if pictures else "query",  # the captions' role in training on images
    }
    with publish_dir(out, replace=replace) as folder:
        write(folder, index, text_table(indexed, ids), settings)
    if not pictures and (line := long_texts(loaded, indexed)):
        print(line, file=sys.stderr)
    return len(indexed)


def long_texts(model: SentenceTransformer, texts: list[str]) -> str | None:
    """Count the texts that a model does not read to their end, among at most 2,000 evenly spaced ones.

    Args:
        model: model with a tokenizer and a limit of tokens for documents. Others give None.
        texts: the documents.

    Returns:
        a line such as "13 % of 1,999 texts are longer than 256 tokens, and the rest of these is not read", or None.
    """
    reader = next(transformers_of(model, "document"), None)
    if reader is None or reader.tokenizer is None or reader.max_seq_length is None:
        return None
    limit = reader.max_seq_length
    sample = texts[:: -(-len(texts) // SAMPLE)]
    longer = fraction_longer(sample, reader.tokenizer, limit)
    if not longer:
        return None
    of = f"{len(texts):,} texts" if len(sample) == len(texts) else f"a sample of {len(sample):,} texts"
    length = length_for_most(sample, reader.tokenizer, limit, positions_of(reader))
    more = f". --max-length {length} reads more" if length is not None else ""
    return f"{percent(longer)} of {of} are longer than {limit:,} tokens, and the rest of these is not read{more}"


def image_encoder(model: str, width: int, trust_remote_code: bool) -> EncodeWidths:
    """Return an encoder of the images at the paths that it gets as texts."""
    embedder = jasper_fast.pictures.load(weights(model), trust_remote_code=trust_remote_code)

    def encode(texts: list[str], role: str) -> dict[int, np.ndarray]:
        return {width: embedder.encode(texts, width)}

    return encode


def encode_texts(
    model: str, chunks: Iterable[list[str]], encode: EncodeRows, index: FlatIPIndex, total: int | None, unit: str
) -> list[str]:
    """Add the texts' embeddings to the index, and return the texts."""
    from tqdm import tqdm

    indexed = list[str]()
    with tqdm(total=total, unit=unit, desc="encoding", disable=None) as bar:  # a log gets no bar
        for chunk in chunks:
            try:
                index.add(encode(chunk, len(indexed)))
            except ValueError as error:
                raise JasperError(f"{model}: its embeddings cannot be indexed: {error}") from error
            indexed += chunk
            bar.update(len(chunk))
    return indexed


def with_ids(
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


def _encoder(model: SentenceTransformer, width: int | None) -> tuple[EncodeWidths, int]:
    if width is not None:
        return model_encoder(model, [width]), width
    every = model_encoder(model)
    widest = max(every(["a"], "document"))
    return model_encoder(model, [widest]), widest


def chunks(texts: Iterable[str], seen: set[str] | None) -> Iterator[list[str]]:
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
