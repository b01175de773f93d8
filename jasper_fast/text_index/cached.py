"""Embeddings of documents from the cache that `adapt` filled, for an index of the asymmetric form.

The documents of this form are encoded by the teacher, and the folder says with which settings. Embeddings are read from
a cache of the same model, prompt and length. Some of them are computed again and compared first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jasper_fast.data.text import text_digest
from jasper_fast.models.embedder import EncodeWidths, document_head
from jasper_fast.models.folder import FACTS_FILE, read_json
from jasper_fast.models.hub import prompt_of, resolve_model
from jasper_fast.models.sentence_transformer import transformers_of
from jasper_fast.teachers.cache import TeacherCache, storage_error
from jasper_fast.teachers.reuse import CacheReuse, digest_keys

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

EncodeRows = Callable[[Sequence[str], int], np.ndarray]  # texts, the row of the first → (n, width) float32 unit rows
DTYPE = "float16"  # of the embeddings that are used
PROBES = 8  # embeddings that are computed again
# Largest cosine distance to these, by the precision of the cached ones. Storing float16 costs about 1e-7.
MOST_DIFFERENT = {"fp32": 1e-5, "bf16": 1e-3}


def rows_encoder(encode: EncodeWidths, width: int) -> EncodeRows:
    """Return an encoder of documents that computes every embedding.

    Args:
        encode: function from texts and a role to embeddings by width.
        width: width of the embeddings.
    """
    return lambda texts, start: np.ascontiguousarray(encode(list(texts), "document")[width])


def cached_encoder(
    name: str, model: SentenceTransformer, encode: EncodeRows, texts: Sequence[str], width: int, cache: str | Path
) -> tuple[EncodeRows, str]:
    """Return an encoder that takes embeddings from a cache where it has them.

    Args:
        name: the model as given.
        model: the loaded model, with the length that documents are read up to.
        encode: encoder of the texts that the cache lacks.
        texts: all documents, in the order in which they are encoded.
        width: width of the embeddings.
        cache: folder of the cache. It need not exist.

    Returns:
        the encoder, and a line on what is used. The line is empty, and the encoder the given one, if the model has no
        teacher for documents or the cache has nothing of it.
    """
    used = _used_teacher(name, model)
    head = document_head(model, width)
    if used is None or head is None or not texts:
        return encode, ""
    identity = {**used["identity"], "dtype": DTYPE, "texts": "index"}
    keys = digest_keys([text_digest(text) for text in texts])
    lenders = CacheReuse(TeacherCache(cache, identity, len(texts)), keys)
    if not len(lenders):
        return encode, ""
    limit = max(MOST_DIFFERENT.get(precision, 0.0) for precision in lenders.precisions)

    def read(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        reused = lenders.read(start, stop, used["width"])
        return reused.available, head(reused.embeddings[reused.available])

    found = np.flatnonzero(lenders.found)
    probes = found[np.linspace(0, len(found) - 1, min(PROBES, len(found))).astype(np.int64)].tolist()
    computed = encode([texts[row] for row in probes], 0)
    differences = storage_error(computed, np.concatenate([read(row, row + 1)[1] for row in probes]))
    if not differences.max() <= limit:
        return encode, f"the cache {cache} has other embeddings than {name}, so none are taken from it"

    def encode_rest(chunk: Sequence[str], start: int) -> np.ndarray:
        available, cached = read(start, start + len(chunk))
        out = np.empty((len(chunk), width), np.float32)
        out[available] = cached
        if not available.all():
            out[~available] = encode([chunk[i] for i in np.flatnonzero(~available)], start)
        return out

    precision, worst = " and ".join(sorted(lenders.precisions)), differences.max()
    return encode_rest, (
        f"{len(lenders):,} of {len(texts):,} embeddings from the cache {cache}: computed in {precision}, stored as "
        f"{DTYPE}; {len(probes)} of them were computed again, with a cosine distance of at most {worst:.0e}"
    )


def _used_teacher(name: str, model: SentenceTransformer) -> Mapping[str, Any] | None:
    """Return what the folder says about the teacher of its documents, if the loaded model reads as that teacher did."""
    file = Path(resolve_model(name)).expanduser() / FACTS_FILE
    facts = read_json(file) if file.is_file() else {}
    used = (facts.get("adapted") or {}).get("documents_by")
    if not used:
        return None
    lengths = {module.max_seq_length for module in transformers_of(model, "document")}
    prompt = prompt_of(model.prompts, "document")
    agree = lengths == {used["max_length"]} and prompt == used["identity"]["prompts"]["document"]
    return used if agree else None
