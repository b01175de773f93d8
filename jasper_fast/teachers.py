"""Running a teacher: any Sentence Transformers or Hugging Face encoder, with its own prompts, pooling and length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from jasper_fast.config import TeacherConfig
from jasper_fast.encode import autocast, used_precision
from jasper_fast.errors import JasperError
from jasper_fast.models import CANNOT_LOAD, first_line, model_revision, own_prompts, resolve_model, routes_by_role
from jasper_fast.probes import Batching
from jasper_fast.stock import encode_role, limit_length, load_stock, model_batching, token_lengths

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Precision = Literal["auto", "fp32", "bf16"]
Progress = Callable[[int, int], object]  # texts and tokens that were just encoded

POOLINGS = {"mean": "mean", "cls": "cls", "last": "lasttoken"}  # our names, and sentence-transformers' own


class Teacher:
    """A loaded teacher. ``fingerprint`` says what decides its vectors, as plain JSON values."""

    def __init__(self, config: TeacherConfig, model: SentenceTransformer, precision: Precision) -> None:
        self.config, self.model = config, model
        self.fingerprint = describe_teacher(config)
        self.name: str = self.fingerprint["model"]
        _check_prompts(model, self.fingerprint["prompts"], self.name)
        self.revision: str = self.fingerprint["revision"]
        self.max_length = limit_length(model, config.max_length)
        full = int(model.get_embedding_dimension() or 0)
        if config.truncate_dim is not None and config.truncate_dim > full:
            raise JasperError(
                f"{self.name}: truncate_dim {config.truncate_dim} is more than the teacher's width {full}"
            )
        self.width = config.truncate_dim or full
        self.fingerprint["width"] = self.width
        prompts = self.fingerprint["prompts"]
        prefixes = {role: "" if "{text}" in prompt else prompt for role, prompt in prompts.items()}
        self.batching = model_batching(model, self.name, prefixes)
        self.autocast = autocast(model.device, precision)
        self.precision = used_precision(model.device, precision)

    @torch.inference_mode()
    def encode(
        self,
        texts: Sequence[str],
        role: str = "document",
        *,
        rows: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """L2-normalised vectors in the order of the texts. (B, width) float32

        Args:
            texts: (B,) texts.
            role: ``query`` or ``document``: which prompt they get.
            rows: the texts' row numbers, for messages; default their positions.
            progress: called after each batch with its texts and tokens.

        Raises:
            JasperError: a vector that is not finite or is zero, naming the text's row; or memory does not suffice.
        """
        prompt = self._prompt(role)
        # A prefix is left to the model, since some keep theirs out of the mean; "" keeps it from adding its default.
        given, prefix = ([apply_prompt(prompt, text) for text in texts], "") if "{text}" in prompt else (texts, prompt)
        lengths = token_lengths(self.model, given, role, prefix)
        vectors = np.empty((len(texts), self.width), np.float32)
        for batch in token_batches(lengths, self.config.batch_tokens, self.batching):
            chosen = [given[i] for i in batch]
            try:
                with self.autocast:
                    found = encode_role(self.model, chosen, role, prefix, batch_size=len(batch))
            except torch.OutOfMemoryError as error:
                raise self._out_of_memory(error, len(batch), int(lengths[batch].max())) from error
            vectors[batch] = found[:, : self.width].float().cpu().numpy()
            if progress is not None:
                progress(len(batch), int(lengths[batch].sum()))
        return normalised(vectors, self.name, rows, texts)

    def _prompt(self, role: str) -> str:
        if role not in ("query", "document"):
            raise ValueError(f"role: expected 'query' or 'document', got {role!r}")
        return self.fingerprint["prompts"][role]

    def _out_of_memory(self, error: Exception, texts: int, tokens: int) -> JasperError:
        smaller = f"batch_tokens (now {self.config.batch_tokens}; what is cached stays), or " if texts > 1 else ""
        return JasperError(
            f"{self.name}: out of memory ({first_line(error).split('. ')[0]}) with a batch of {texts} texts of up to "
            f"{tokens} tokens. Lower for this teacher {smaller}max_length (now {self.max_length}; all its vectors are "
            "made anew)"
        )


def load_teacher(
    config: TeacherConfig, *, device: str | torch.device | None = None, precision: Precision = "fp32"
) -> Teacher:
    """Load a teacher onto the GPU where there is one; its embeddings are those of stock sentence-transformers.

    Args:
        config: a teacher with ``model``; a folder or name with ``modules.json`` keeps its own pooling, dense layers and
            normalisation, any other encoder gets mean pooling, and ``pooling`` overrides both.
        device: default this process's GPU, else the CPU.
        precision: of the forward pass; ``auto`` is bf16 autocast where the device is fast at it.

    Raises:
        JasperError: the model is missing, damaged, incomplete, or needs custom code that was not allowed.
    """
    if config.model is None:
        raise ValueError("load_teacher needs a teacher with `model`; ready vectors are opened by the cache")
    where = resolve_model(config.model)
    revision = model_revision(config.model, config.revision)
    try:
        model = load_stock(
            config.model,
            where,
            device=str(device) if device is not None else own_device(),
            revision=None if revision.startswith("sha256:") else revision,
            trust_remote_code=config.trust_remote_code,
            dtype=torch.float32,
        )
    except CANNOT_LOAD as error:
        hint = (
            "; it comes with code of its own: set trust_remote_code: true for it if you trust its authors"
            if "trust_remote_code" in str(error)
            else ""
        )
        raise JasperError(f"{config.model}: cannot be loaded as a teacher ({first_line(error)}){hint}") from error
    if config.pooling != "auto":
        _set_pooling(model, POOLINGS[config.pooling], config.model)
    if config.dense is not None:
        _set_dense(model, where, config.dense, revision)
    return Teacher(config, model.eval(), precision)


def describe_teacher(config: TeacherConfig) -> dict[str, Any]:
    """What decides a teacher's vectors, without loading it: two teachers that agree in this give the same ones."""
    if config.model is None:
        raise ValueError("describe_teacher needs a teacher with `model`")
    folder = Path(config.model).expanduser()
    return {
        "model": folder.resolve().name
        if folder.is_dir()
        else config.model,  # a folder's content decides, not its place
        "revision": model_revision(config.model, config.revision),
        "prompts": prompts_of(config),
        "pooling": config.pooling,
        "max_length": config.max_length,
        "truncate_dim": config.truncate_dim,
        **({"dense": config.dense} if config.dense else {}),
        **({"routes": "by role"} if routes_by_role(config.model, config.revision) else {}),
    }


def prompts_of(config: TeacherConfig) -> dict[str, str]:
    """A teacher's prompts by role: the configuration's, else the model's own, without a ``{text}`` at the end."""
    given = config.prompts.model_dump()
    if config.model is not None and None in given.values():
        own = own_prompts(config.model, config.revision)
        given = {role: prompt if prompt is not None else own[role] for role, prompt in given.items()}
    return {role: plain_prefix(prompt) for role, prompt in given.items()}


def plain_prefix(prompt: str) -> str:
    """The prompt without a ``{text}`` at its end: both forms say that the text follows."""
    prefix = prompt.removesuffix("{text}")
    return prompt if "{text}" in prefix else prefix


def check_own_code(config: TeacherConfig) -> None:
    """Refuse a teacher that brings code of its own where that is not allowed, without loading it.

    Raises:
        JasperError: it does.
    """
    from transformers import AutoConfig

    if config.model is None or config.trust_remote_code:
        return
    try:
        AutoConfig.from_pretrained(resolve_model(config.model), revision=config.revision, trust_remote_code=False)
    except CANNOT_LOAD as error:  # anything else is told by who loads it
        if "trust_remote_code" in str(error):
            raise JasperError(
                f"{config.model} comes with code of its own, which is not run unless asked for: read it, then set "
                "trust_remote_code: true for this teacher, and its `revision`"
            ) from error


def own_device() -> str:
    """This process's GPU (``LOCAL_RANK`` under torchrun), else the CPU."""
    import os

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def apply_prompt(prompt: str, text: str) -> str:
    """The prompt with the text in the place of ``{text}``, or before the text."""
    return prompt.replace("{text}", text) if "{text}" in prompt else prompt + text


def token_batches(lengths: np.ndarray, budget: int, batching: Batching = "padded") -> list[np.ndarray]:
    """Group positions in batches of like lengths, longest first, of at most ``budget`` tokens, padding included.

    Args:
        lengths: (B,) tokens of each text. A text longer than the budget makes a batch alone.
        budget: tokens.
        batching: "equal lengths" for batches that need no padding.
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


def normalised(vectors: np.ndarray, name: str, rows: Sequence[int] | None, texts: Sequence[str] | None) -> np.ndarray:
    """Unit rows; the first that has no direction is an error that names it. Without ``texts``: of a file."""
    norms = np.linalg.norm(vectors.astype(np.float32, copy=False), axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(norms[:, 0]) | (norms[:, 0] == 0))
    if len(bad):
        first = int(bad[0])
        row = rows[first] if rows is not None else first
        kind = "zero" if norms[first, 0] == 0 else "not finite"
        shown = f" ({str(texts[first])[:60]!r})" if texts is not None else ""
        mend = (
            "Mend or leave out the text, or run the teacher with `--precision fp32` if it overflows in bf16"
            if texts is not None
            else "Mend the file: every training text needs a vector of finite numbers that are not all 0"
        )
        raise JasperError(
            f"{name}: the vector of text row {row}{shown} is {kind}; {len(bad)} such in this part. {mend}"
        )
    return vectors / norms


def _check_prompts(model: SentenceTransformer, prompts: Mapping[str, str], name: str) -> None:
    """Reject text inside a prompt of a model that leaves prompts out of its mean: it could not tell them apart."""
    from sentence_transformers.sentence_transformer.modules import Pooling

    leaves_out = any(isinstance(module, Pooling) and not module.include_prompt for module in model.modules())
    for role, prompt in prompts.items():
        if leaves_out and "{text}" in prompt:
            raise JasperError(
                f"{name}: its pooling leaves the prompt out, which needs a prompt before the text (got {prompt!r} for "
                f"{role}). Fix: end the prompt with {{text}}"
            )


def _set_pooling(model: SentenceTransformer, mode: str, name: str) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling

    for position, module in enumerate(model):
        if isinstance(module, Pooling):
            pooling = Pooling(module.embedding_dimension, mode, include_prompt=module.include_prompt)
            if pooling.pooling_output_dimension != module.pooling_output_dimension:
                raise JasperError(
                    f"{name}: its pooling joins several vectors; `pooling: {mode}` would not fit the next layer"
                )
            model[position] = pooling
            return
    raise JasperError(f"{name}: has no pooling layer to change; set `pooling: auto` for it")


def _set_dense(model: SentenceTransformer, where: str, folder: str, revision: str) -> None:
    """Put another of the model's Dense heads, such as Stella's ``2_Dense_8192``, in the place of its own."""
    from sentence_transformers.sentence_transformer.modules import Dense

    places = [position for position, module in enumerate(model) if isinstance(module, Dense)]
    if len(places) != 1:
        raise JasperError(f"{where}: `dense: {folder}` needs a model with one Dense module; it has {len(places)}")
    hub_revision = None if revision.startswith("sha256:") else revision
    try:
        head = Dense.load(where, subfolder=folder, revision=hub_revision)
    except CANNOT_LOAD as error:
        raise JasperError(f"{where}: holds no Dense head in a folder {folder!r}; look at the model's files") from error
    if head.in_features != model[places[0]].in_features:
        raise JasperError(
            f"{where}: the head {folder!r} takes {head.in_features} coordinates where its own takes "
            f"{model[places[0]].in_features}"
        )
    model[places[0]] = head.to(model.device)
