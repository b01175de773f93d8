"""Memory of a training step: bytes per token of the graph, and advice when a step does not fit."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from jasper_fast.config.stage import StageConfig
from jasper_fast.distributed.fsdp import is_sharded
from jasper_fast.models.micro_batches import EVAL_MICRO_BATCH
from jasper_fast.models.student import Student
from jasper_fast.training.data import Batch, Precision
from jasper_fast.training.rng import random_state, set_random_state
from jasper_fast.utils.device import autocast
from jasper_fast.utils.errors import JasperError


def saved_bytes(
    student: Student, token_ids: list[list[int]] | Tensor, device: torch.device, precision: Precision
) -> int:
    """Return the bytes that the graph of one encoder pass holds, without weights, each storage counted once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in student.parameters()}
    held: dict[int, int] = {}
    alive = []  # so that no address is used twice

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    state = random_state(device)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast(device, precision):
        student.pool(token_ids, device)
    set_random_state(state, device)
    return sum(held.values())


def graph_bytes_per_token(student: Student, token_ids: list[int], device: torch.device, precision: Precision) -> float:
    """Return the bytes of graph per token of a text, measured as what a second such text adds.

    Autocast's copies of the weights are in every graph once, so the difference leaves them out.
    """
    one, two = (saved_bytes(student, [token_ids] * texts, device, precision) for texts in (1, 2))
    return (two - one) / len(token_ids)


def measure_activations(
    student: Student, stage: StageConfig, batch: Batch, device: torch.device, precision: Precision
) -> dict[str, float] | None:
    """Measure the graph of one text, and what gradient checkpointing saves and costs if the stage uses it.

    A measurement that does not fit in memory is left out.

    Returns:
        the numbers by name. None: nothing is encoded, images are, or the student is sharded.
    """
    text = batch.longest_text
    if batch.texts is None or text is None or is_sharded(student):
        return None
    passes: Any = batch.texts.token_ids
    facts: dict[str, float] = {
        "passes": len(passes),
        "tokens_of_a_pass": max(len(ids) * max(map(len, ids)) for ids in passes),
    }

    def measure(fact: str) -> None:
        try:
            facts[fact] = graph_bytes_per_token(student, text, device, precision)
        except (RuntimeError, MemoryError) as error:  # what checkpointing spares may be what does not fit
            if not is_out_of_memory(error):
                raise

    measure("graph_bytes_per_token")
    if stage.gradient_checkpointing:
        student.set_gradient_checkpointing(False)
        measure("graph_bytes_per_token_without_checkpointing")
        facts["layers_computed_twice"] = student.set_gradient_checkpointing(stage.gradient_checkpointing)
    return facts


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that the memory of a device or of the host did not suffice."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


@contextmanager
def memory_advice(
    student: Student, batch: Batch | None, stage: StageConfig, device: torch.device, precision: Precision
) -> Iterator[None]:
    """Replace an out-of-memory error in the block by one that says which settings would fit.

    Args:
        student: the student that trains.
        batch: the batch of the step. None: texts are pooled without a graph.
        stage: its settings.
        device: its device.
        precision: its precision.

    Raises:
        JasperError: memory did not suffice.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the graph that did not fit
        raise out_of_memory(error, student, batch, stage, device, precision) from error


def out_of_memory(
    error: Exception,
    student: Student,
    batch: Batch | None,
    stage: StageConfig,
    device: torch.device,
    precision: Precision,
) -> JasperError:
    """Return the error with settings that would fit, from measured bytes per token. See :func:`memory_advice`."""
    sentences = str(error).split(". ")
    reason = next((sentence for sentence in sentences if "memory" in sentence), str(error) or type(error).__name__)
    failure = f"stage {stage.name!r}: out of memory ({reason})"
    if batch is None:
        return JasperError(
            f"{failure} while {EVAL_MICRO_BATCH} texts at a time are pooled without a graph. Fix: set a smaller "
            f"max_length for the stage (now {stage.max_length or student.max_length} tokens), or precision: bf16"
        )
    if batch.texts is None:
        return JasperError(f"{failure}. Fix: lower batch_size")
    text = batch.longest_text
    if text is None:
        return JasperError(
            f"{failure}. Fix: set for the stage, in this order as needed: gradient_caching: true; a smaller "
            f"micro_batch (now {stage.micro_batch} images); gradient_checkpointing: true"
        )
    student.zero_grad(set_to_none=True)
    passes: Any = batch.texts.token_ids
    padded = [len(ids) * max(map(len, ids)) for ids in passes]  # tokens of each pass, padding included
    advice = []
    if not stage.gradient_caching and len(passes) > 1:
        advice.append(f"gradient_caching: true (the graph of {max(padded)} tokens at a time instead of {sum(padded)})")
    if not stage.gradient_checkpointing and student.encoder.supports_gradient_checkpointing:
        advice.append("gradient_checkpointing: true")
    measured = ""
    if is_sharded(student):  # a measurement needs all ranks, and sharded students reject micro_tokens
        advice.append("a smaller micro_batch; more GPUs")
    else:
        measured, tokens = _measured(student, text, max(padded), device, precision)
        advice.append(tokens)
    return JasperError(
        f"{failure}{measured}. Fix: set for the stage, in this order as needed: "
        + "; ".join(advice)
        + f" (now micro_batch {stage.micro_batch}, micro_tokens {stage.micro_tokens})"
    )


def _measured(
    student: Student, text: list[int], largest: int, device: torch.device, precision: Precision
) -> tuple[str, str]:
    """Measure graph bytes per token and suggest a ``micro_tokens`` that fits.

    Args:
        student: the student that trains.
        text: token ids of the longest text.
        largest: tokens of the largest pass, which did not fit.
        device: the device of the step.
        precision: the precision of the step.

    Returns:
        the measurement and the suggestion.
    """
    try:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        per_token = graph_bytes_per_token(student, text, device, precision)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return "; not even two texts fit", "parallel.mode: fsdp on several GPUs"
    fitting = largest // 2
    if device.type == "cuda":
        fitting = int(0.8 * torch.cuda.mem_get_info(device)[0] / per_token)
    return f"; a graph of {per_token / 1e3:.0f} kB per token was measured", f"micro_tokens: {max(len(text), fitting)}"
