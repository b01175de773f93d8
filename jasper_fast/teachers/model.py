"""Run a teacher: any Sentence Transformers or Hugging Face encoder, with its prompts, pooling and length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from jasper_fast.config.data import DataConfig
from jasper_fast.config.models import TeacherConfig
from jasper_fast.models.embedder import model_widths
from jasper_fast.models.graph import find_graph, settings_name
from jasper_fast.models.hub import CANNOT_LOAD, model_prompts, model_revision, resolve_model, routes_by_role
from jasper_fast.models.probes import Batching, explain_text_failures
from jasper_fast.models.sentence_transformer import (
    check_embeds,
    encode_role,
    limit_length,
    load_stock,
    model_batching,
    token_lengths,
)
from jasper_fast.teachers.base import Precision, Progress
from jasper_fast.teachers.onnx_model import describe_graph, graph_note, load_graph_teacher
from jasper_fast.teachers.parts import POOLINGS, set_dense, set_pooling
from jasper_fast.utils.device import autocast, used_precision
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.names import first_line

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class Teacher:
    """A loaded teacher.

    Args:
        config: teacher with ``model``.
        model: sentence-transformers model in evaluation mode.
        precision: precision of the forward pass.

    Attributes:
        fingerprint: everything that determines the embeddings, as plain JSON values.
        name: model as in the configuration, or the name of its folder.
        revision: commit on the hub, or hash of a folder.
        max_length: tokens after which texts are truncated.
        width: coordinates of an embedding.
        note: message about texts that the model truncates earlier than the configuration, or about its batches. None if
            there is none.
        batching: "equal lengths" for a model whose batches must not be padded, else "padded".

    Raises:
        JasperError: ``truncate_dim`` exceeds the width, a prompt does not fit the pooling, or the embeddings depend on
            other texts of a batch.
    """

    reusable = True

    def __init__(self, config: TeacherConfig, model: SentenceTransformer, precision: Precision) -> None:
        self.config, self.model = config, model
        self.fingerprint = describe_teacher(config)
        self.name: str = self.fingerprint["model"]
        _check_prompts(model, self.fingerprint["prompts"], self.name)
        self.revision: str = self.fingerprint["revision"]
        self.max_length = limit_length(model, config.max_length)
        self.note = _truncation(self.max_length, config)
        full = model_widths(model)[0]
        if config.truncate_dim is not None and config.truncate_dim > full:
            raise JasperError(
                f"{self.name}: truncate_dim exceeds the teacher's width (got {config.truncate_dim}, expected at most "
                f"{full}). Fix: lower truncate_dim"
            )
        self.width = config.truncate_dim or full
        self.fingerprint["width"] = self.width
        prompts = self.fingerprint["prompts"]
        prefixes = {role: "" if "{text}" in prompt else prompt for role, prompt in prompts.items()}
        self.batching = model_batching(model, self.name, prefixes)
        self.autocast = autocast(model.device, precision)
        self.precision = used_precision(model.device, precision)

    @staticmethod
    def describe(config: TeacherConfig) -> dict[str, Any]:
        """See `describe_teacher`."""
        return describe_teacher(config)

    @classmethod
    def open(cls, config: TeacherConfig, rows: int, scratch: Path, precision: Precision, data: DataConfig) -> Teacher:
        """See `load_teacher`, which needs neither the texts nor a folder."""
        return load_teacher(config, precision=precision)

    def check(self, *args: object) -> None:
        """Do nothing: a loaded model can encode any text."""

    def embed(
        self, rows: dict[str, list[Any]], start: int, wanted: np.ndarray, vectors: np.ndarray, progress: Progress
    ) -> None:
        """Write the embeddings of the wanted rows; see `base.OpenTeacher`. Each role has its own prompt."""
        roles = np.array(rows["role"])
        for role in sorted(set(roles[wanted].tolist())):
            chosen = np.flatnonzero(wanted & (roles == role))
            texts = [rows["text"][i] for i in chosen]
            vectors[chosen] = self.encode(texts, role, rows=(chosen + start).tolist(), progress=progress)

    @torch.inference_mode()
    def encode(
        self,
        texts: Sequence[str],
        role: str = "document",
        *,
        rows: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Encode texts to L2-normalised embeddings.

        Args:
            texts: B texts.
            role: "query" or "document", which selects the prompt.
            rows: row numbers of the texts, for error messages. None numbers them from 0.
            progress: function called after each batch with its numbers of texts and tokens.

        Returns:
            (B, width) float32, in the order of the texts.

        Raises:
            ValueError: another role.
            JasperError: an embedding is not finite or is zero (the message names the text's row), or out of memory.
        """
        prompt = self._prompt(role)
        # The model adds a prefix itself, because some leave it out of the mean. "" suppresses its default prompt.
        inputs, prefix = ([apply_prompt(prompt, text) for text in texts], "") if "{text}" in prompt else (texts, prompt)
        lengths = token_lengths(self.model, inputs, role, prefix)
        vectors = np.empty((len(texts), self.width), np.float32)
        for batch in token_batches(lengths, self.config.batch_tokens, self.batching):
            batch_texts = [inputs[i] for i in batch]
            try:
                with self.autocast, explain_text_failures(batch_texts):
                    encoded = encode_role(self.model, batch_texts, role, prefix, batch_size=len(batch))
            except torch.OutOfMemoryError as error:
                raise self._out_of_memory(error, len(batch), int(lengths[batch].max())) from error
            vectors[batch] = encoded[:, : self.width].float().cpu().numpy()
            if progress is not None:
                progress(len(batch), int(lengths[batch].sum()))
        return normalised(vectors, self.name, rows, texts)

    def _prompt(self, role: str) -> str:
        if role not in ("query", "document"):
            raise ValueError(f"role: expected 'query' or 'document', got {role!r}")
        return self.fingerprint["prompts"][role]

    def _out_of_memory(self, error: Exception, texts: int, tokens: int) -> JasperError:
        batch = f"batch_tokens (now {self.config.batch_tokens}; the cache stays valid) or " if texts > 1 else ""
        return JasperError(
            f"{self.name}: out of memory ({first_line(error).split('. ')[0]}) with a batch of {texts} texts of up to "
            f"{tokens} tokens. Fix: lower this teacher's {batch}max_length (now {self.max_length}; its embeddings are "
            "computed again)"
        )


def _truncation(limit: int, config: TeacherConfig) -> str | None:
    if limit >= config.max_length:
        return None
    written = f" (max_length is {config.max_length})" if "max_length" in config.model_fields_set else ""
    return f"truncates texts at {limit} tokens, the limit of its model or tokenizer{written}"


def load_teacher(config: TeacherConfig, *, precision: Precision = "fp32") -> Teacher:
    """Load a teacher, whose embeddings equal those of stock sentence-transformers.

    Args:
        config: teacher with ``model``. A model with ``modules.json`` keeps its pooling, dense layers and normalisation.
            Any other encoder gets mean pooling. ``pooling`` overrides both.
        precision: precision of the forward pass. "auto" is bf16 autocast on devices with fast bf16.

    Raises:
        JasperError: the model is missing, damaged or incomplete, needs custom code that is not allowed, or does not fit
            the other settings.
        ValueError: the teacher has no ``model``.
    """
    if config.model is None:
        raise ValueError(
            "load_teacher: the teacher has no `model`. Fix: open precomputed embeddings with PrecomputedEmbeddings"
        )
    pooling = None if config.pooling == "auto" else POOLINGS[config.pooling]
    if (graph := find_graph(config.model)) is not None:
        teacher = Teacher(config, load_graph_teacher(config, graph, pooling), "fp32")
        teacher.note = "; ".join(filter(None, [teacher.note, graph_note(teacher.model)])) or None
        return teacher
    where = resolve_model(config.model)
    revision = model_revision(config.model, config.revision)
    check_embeds(where, config.model, config.revision)
    try:
        model = load_stock(
            config.model,
            where,
            device=local_device(),
            revision=None if revision.startswith("sha256:") else revision,
            trust_remote_code=config.trust_remote_code,
            dtype=torch.float32,
        )
    except CANNOT_LOAD as error:
        raise _cannot_load(config.model, error) from error
    if pooling is not None:
        set_pooling(model, pooling, config.model)
    if config.dense is not None:
        set_dense(model, where, config.dense, revision)
    return Teacher(config, model.eval(), precision)


def _cannot_load(name: str, error: BaseException) -> JasperError:
    reason = f"{name}: cannot be loaded as a teacher ({first_line(error)})"
    if "trust_remote_code" in str(error):
        reason += ". Fix: if you trust the authors of its custom code, set trust_remote_code: true for this teacher"
    return JasperError(reason)


def describe_teacher(config: TeacherConfig) -> dict[str, Any]:
    """Return everything that determines a teacher's embeddings, without loading its model.

    Teachers with equal descriptions give equal embeddings.

    Raises:
        JasperError: the model does not exist, or its settings are damaged.
        ValueError: the teacher has no ``model``.
    """
    if config.model is None:
        raise ValueError("describe_teacher: the teacher has no `model`. Fix: call describe_precomputed")
    return {
        **_named(config, config.model),
        "prompts": prompts_of(config),
        "pooling": config.pooling,
        "max_length": config.max_length,
        "truncate_dim": config.truncate_dim,
        **({"dense": config.dense} if config.dense else {}),
        **({"routes": "by role"} if routes_by_role(settings_name(config.model), config.revision) else {}),
    }


def _named(config: TeacherConfig, name: str) -> dict[str, str]:
    """Return a model's name and revision. The content of a folder determines the embeddings, not its path."""
    if (graph := find_graph(name)) is not None:
        return describe_graph(name, graph)
    folder = Path(name).expanduser()
    known = folder.resolve().name if folder.is_dir() else name
    return {"model": known, "revision": model_revision(name, config.revision)}


def prompts_of(config: TeacherConfig) -> dict[str, str]:
    """Return a teacher's prompts by role, without a ``{text}`` at the end.

    Roles without a prompt in the configuration use the model's prompt.
    """
    prompts = config.prompts.model_dump()
    if config.model is not None and None in prompts.values():
        defaults = model_prompts(settings_name(config.model), config.revision)
        prompts = {role: prompt if prompt is not None else defaults[role] for role, prompt in prompts.items()}
    return {role: plain_prefix(prompt) for role, prompt in prompts.items()}


def plain_prefix(prompt: str) -> str:
    """Strip a ``{text}`` at the end of a prompt, which means the same as a prefix."""
    prefix = prompt.removesuffix("{text}")
    return prompt if "{text}" in prefix else prefix


def check_custom_code(config: TeacherConfig) -> None:
    """Reject a teacher with custom code if ``trust_remote_code`` is false, without loading its weights.

    Raises:
        JasperError: the teacher needs custom code that is not allowed.
    """
    from transformers import AutoConfig

    if config.model is None or config.trust_remote_code or find_graph(config.model) is not None:
        return
    try:
        AutoConfig.from_pretrained(resolve_model(config.model), revision=config.revision, trust_remote_code=False)
    except CANNOT_LOAD as error:  # loading reports all other errors
        if "trust_remote_code" in str(error):
            raise JasperError(
                f"{config.model}: needs custom code, which does not run by default. Fix: read that code, then set "
                "trust_remote_code: true and `revision` for this teacher"
            ) from error


def local_device() -> str:
    """Return this process's GPU (``LOCAL_RANK`` under torchrun), or the CPU if there is no GPU."""
    import os

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def apply_prompt(prompt: str, text: str) -> str:
    """Put the text in the place of ``{text}``, or after a prompt without it."""
    return prompt.replace("{text}", text) if "{text}" in prompt else prompt + text


def token_batches(lengths: np.ndarray, budget: int, batching: Batching = "padded") -> list[np.ndarray]:
    """Group texts of similar lengths into batches of at most ``budget`` tokens, padding included.

    Args:
        lengths: (B,) int64, tokens of each text.
        budget: maximum tokens of a batch. A longer text gets its own batch.
        batching: "equal lengths" for batches without padding, else "padded".

    Returns:
        Positions of the texts of each batch, (n,) int64 each, longest texts first.
    """
    order = np.argsort(-lengths, kind="stable")
    batches = []
    start = 0
    while start < len(order):
        longest = int(lengths[order[start]])
        size = max(1, budget // max(1, longest))
        if batching == "equal lengths":
            size = min(size, int((lengths[order[start:]] == longest).sum()))
        batches.append(order[start : start + size])
        start += size
    return batches


def normalised(vectors: np.ndarray, name: str, rows: Sequence[int] | None, texts: Sequence[str]) -> np.ndarray:
    """Normalise rows to unit length, (B, D).

    Args:
        vectors: (B, D) float.
        name: teacher, for messages.
        rows: row numbers for messages. None numbers them from 0.
        texts: encoded texts for messages.

    Raises:
        JasperError: a row is not finite or is zero.
    """
    norms = np.linalg.norm(vectors.astype(np.float32, copy=False), axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(norms[:, 0]) | (norms[:, 0] == 0))
    if len(bad):
        first = int(bad[0])
        row = rows[first] if rows is not None else first
        kind = "zero" if norms[first, 0] == 0 else "not finite"
        raise JasperError(
            f"{name}: the embedding of text row {row} ({str(texts[first])[:60]!r}) is {kind} ({len(bad)} rows in this "
            "part). Fix: correct or remove the text, or run the teacher with `--precision fp32` if it overflows in bf16"
        )
    return vectors / norms


def _check_prompts(model: SentenceTransformer, prompts: Mapping[str, str], name: str) -> None:
    """Reject ``{text}`` inside a prompt if the pooling leaves prompts out, since it masks only a prefix."""
    from sentence_transformers.sentence_transformer.modules import Pooling

    prompt_excluded = any(isinstance(module, Pooling) and not module.include_prompt for module in model.modules())
    for role, prompt in prompts.items():
        if prompt_excluded and "{text}" in prompt:
            raise JasperError(
                f"{name}: its pooling leaves the prompt out, which works only for a prompt before the text (got "
                f"{prompt!r} for {role}). Fix: end the prompt with {{text}}"
            )
