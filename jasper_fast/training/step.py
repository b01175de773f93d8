"""The gradient of one training step, of a batch of any size in the memory of one micro-batch.

The graph is cut at the pooled states (ALGORITHMS of gradient caching): the encoder gives them, the heads and the loss
give their gradient, and the encoder takes that gradient back, micro-batch by micro-batch. With ``gradient_caching``
the first pass keeps no graph and each micro-batch is encoded once more, with one, just before its turn.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from jasper_fast.batches import Batch
from jasper_fast.config import StageConfig
from jasper_fast.encode import EVAL_MICRO_BATCH, autocast
from jasper_fast.errors import JasperError
from jasper_fast.losses import AnyOutput
from jasper_fast.model import Student
from jasper_fast.sharding import is_sharded, own_part
from jasper_fast.stages import StageLoss
from jasper_fast.vision_loss import VisionLoss


class Shares:
    """Seconds of a step by what they went to.

    Args:
        device: with ``wait``, its queue is emptied at every boundary, so that a GPU's seconds are its own.
    """

    def __init__(self, device: torch.device, wait: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._wait = wait and device.type == "cuda"

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the block's seconds to ``name``."""
        started = self._now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - started

    def of(self, seconds: float) -> dict[str, float]:
        """Shares of so many seconds; none where a GPU's queue makes the host's clock meaningless."""
        if self._device.type == "cuda" and not self._wait:
            return {}
        return {f"share_{part}": min(1.0, took / seconds) for part, took in self.seconds.items()}

    def _now(self) -> float:
        if self._wait:
            torch.cuda.synchronize()
        return time.perf_counter()


def take_gradients(
    student: Student,
    batch: Batch,
    stage: StageConfig,
    loss_of: StageLoss | VisionLoss,
    device: torch.device,
    precision: Literal["auto", "fp32", "bf16"],
    keep: Tensor | None = None,
    shares: Shares | None = None,
) -> tuple[AnyOutput, dict[int, Tensor]]:
    """Add the batch's gradient to whatever trains.

    Args:
        keep: the pooled vectors' dropout factors, (B, H); None: no dropout.
        shares: where to note the seconds of encoder and loss.

    Returns:
        the losses of the whole batch, and the vectors by width, (B, width).
    """
    shares = shares or Shares(device)
    passes: list[Any] = list(batch.texts.token_ids) if batch.texts is not None else []
    trains = bool(passes) and any(p.requires_grad for n, p in student.named_parameters() if not n.startswith("heads."))
    # A sharded layer takes one backward pass for each forward pass, one after the other.
    again = trains and (stage.gradient_caching or is_sharded(student)) and len(passes) > 1
    randoms: list[list[Tensor]] = []

    with shares.part("encoder"):
        states = _first_pass(student, batch, device, precision, again or not trains, stage.activation_offload, randoms)
    leaf = states.detach().requires_grad_(trains)  # (B, H)
    with shares.part("loss"):
        vectors = student.project(leaf, stage.heads, keep)
        told = [] if batch.told is None else [batch.told.to(device)]
        output = loss_of(vectors, batch.teacher.to(device), *told)
        output.loss.backward()
    if not trains:
        return output, vectors
    assert batch.texts is not None and leaf.grad is not None
    with shares.part("encoder"):
        if not again:
            states.backward(leaf.grad)
            return output, vectors
        parts = leaf.grad[batch.texts.order.to(device)].split([len(ids) for ids in passes])
        for ids, random, part in zip(passes, randoms, parts, strict=True):
            kept = _offload(stage.activation_offload, student, device)
            with _replay(random, device), autocast(device, precision), kept:
                pooled = student.pool(ids, device)
            pooled.backward(part)
    return output, vectors


def saved_bytes(
    student: Student,
    token_ids: list[list[int]] | Tensor,
    device: torch.device,
    precision: Literal["auto", "fp32", "bf16"],
) -> int:
    """Bytes that the graph of one encoder pass holds, weights not counted, each piece of memory once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in student.parameters()}
    held: dict[int, int] = {}
    alive = []  # so that no address is used twice

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    random = _random_state(device)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast(device, precision):
        student.pool(token_ids, device)
    _set_random_state(random, device)
    return sum(held.values())


def graph_bytes_per_token(
    student: Student, token_ids: list[int], device: torch.device, precision: Literal["auto", "fp32", "bf16"]
) -> float:
    """Bytes that the graph holds for each token of a text, by what a second such text adds.

    Autocast's copies of weights are in every graph once, however many texts it is of.
    """
    one, two = (saved_bytes(student, [token_ids] * texts, device, precision) for texts in (1, 2))
    return (two - one) / len(token_ids)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device's memory, or the host's, did not suffice."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


@contextmanager
def memory_advice(
    student: Student,
    batch: Batch | None,
    stage: StageConfig,
    device: torch.device,
    precision: Literal["auto", "fp32", "bf16"],
) -> Iterator[None]:
    """Say what would fit where memory does not suffice for the block.

    Args:
        batch: that is trained on; None: texts are pooled without a graph.

    Raises:
        JasperError: in the place of the error of the allocator.
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
    precision: Literal["auto", "fp32", "bf16"],
) -> JasperError:
    """What would fit, from the bytes that a text's graph is measured to hold; see :func:`memory_advice`."""
    sentences = str(error).split(". ")
    said = next((sentence for sentence in sentences if "memory" in sentence), str(error) or type(error).__name__)
    if batch is None:
        return JasperError(
            f"stage {stage.name!r}: out of memory ({said}) while {EVAL_MICRO_BATCH} texts at a time are pooled without "
            f"a graph; set a smaller max_length for the stage (now {stage.max_length or student.max_length} tokens), "
            "or precision: bf16"
        )
    if batch.texts is None:
        return JasperError(f"stage {stage.name!r}: out of memory ({said}); lower batch_size")
    if stage.vision is not None:
        return JasperError(
            f"stage {stage.name!r}: out of memory ({said}). Set for the stage, in this order as needed: "
            f"gradient_caching: true; a smaller micro_batch (now {stage.micro_batch} pictures); "
            "gradient_checkpointing: true"
        )
    student.zero_grad(set_to_none=True)
    held = sum(len(ids) * max(map(len, ids)) for ids in batch.texts.token_ids)  # tokens, padding included
    most = max(len(ids) * max(map(len, ids)) for ids in batch.texts.token_ids)
    text: Any = batch.texts.token_ids[0][0]
    advice = []
    if not stage.gradient_caching and len(batch.texts.token_ids) > 1:
        advice.append(f"gradient_caching: true (the graph of {most} tokens at a time instead of {held})")
    if not stage.gradient_checkpointing and student.encoder.supports_gradient_checkpointing:
        advice.append("gradient_checkpointing: true")
    measured = ""
    if is_sharded(student):  # the others are not here to measure with, and micro_tokens is not for them
        advice.append("a smaller micro_batch; more GPUs")
    else:
        measured, tokens = _measured(student, text, most, device, precision)
        advice.append(tokens)
    return JasperError(
        f"stage {stage.name!r}: out of memory ({said}){measured}. Set for the stage, in this order as needed: "
        + "; ".join(advice)
        + f" (now micro_batch {stage.micro_batch}, micro_tokens {stage.micro_tokens})"
    )


def _measured(
    student: Student, text: list[int], most: int, device: torch.device, precision: Literal["auto", "fp32", "bf16"]
) -> tuple[str, str]:
    """What the graph of a text takes, and what to set for it to fit; ``most``: the tokens of a pass that did not."""
    try:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        per_token = graph_bytes_per_token(student, text, device, precision)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return "; not even two texts fit", "parallel.mode: fsdp on several GPUs"
    room = most // 2
    if device.type == "cuda":
        room = int(0.8 * torch.cuda.mem_get_info(device)[0] / per_token)
    return f"; a graph of {per_token / 1e3:.0f} kB per token was measured", f"micro_tokens: {max(len(text), room)}"


def dropout_factors(
    share: float, seed: tuple[int, int, int], rows: slice, total: int, width: int, device: torch.device
) -> Tensor | None:
    """What to multiply pooled vectors by: 0 for a ``share`` of them, 1 / (1 - share) for the rest, None for no dropout.

    A function of the step and a text's place in the batch alone: it is the same after a resume and whichever rank, or
    micro-batch, the text falls to.

    Args:
        seed: the run's seed, the stage, its step.
        rows: which of the batch's ``total`` texts are wanted.
        width: of the pooled vectors.
    """
    if not share:
        return None
    generator = torch.Generator(device).manual_seed((seed[0] * 1000 + seed[1]) * 10_000_000 + seed[2])
    kept = torch.empty(total, width, dtype=torch.bool, device=device).bernoulli_(1.0 - share, generator=generator)
    return kept[rows] / (1.0 - share)


def _first_pass(
    student: Student,
    batch: Batch,
    device: torch.device,
    precision: Literal["auto", "fp32", "bf16"],
    without_graph: bool,
    offload: bool,
    randoms: list[list[Tensor]],
) -> Tensor:
    """Pooled states of the batch, (B, H); ``randoms`` receives the random state before each micro-batch."""
    if batch.texts is None:
        assert batch.pooled is not None
        return batch.pooled.to(device)
    with torch.no_grad() if without_graph else _offload(offload, student, device):
        return batch.texts.pool(student, device, precision, lambda: randoms.append(_random_state(device)))


def _offload(on: bool, student: Student, device: torch.device) -> AbstractContextManager[Any]:
    """Keep the graph's activations in the host's memory where asked to. On a CPU they are there already."""
    if not on or device.type == "cpu":
        return nullcontext()
    offload = Offload(student.parameters())
    return torch.autograd.graph.saved_tensors_hooks(offload.pack, Offload.unpack)


class Offload:
    """Hooks that keep what a graph saves in the host's memory: weights stay where they are, the rest is copied once.

    What a sharded layer puts together for its pass is none of the weights, and is copied.

    Args:
        weights: tensors that stay.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._stay = {own_part(weight).untyped_storage().data_ptr() for weight in weights}
        # An entry lives as long as a graph needs it, and an address belongs to one storage as long as its entry lives.
        self._copies: WeakValueDictionary[tuple[int, int], _Copy] = WeakValueDictionary()

    @torch.no_grad()
    def pack(self, tensor: Tensor) -> Tensor | tuple[Any, ...]:
        """What the graph keeps in the tensor's place."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._stay:
            return tensor
        if storage.nbytes() > tensor.nbytes:  # a part of something larger, of which the rest may not be needed
            tensor = tensor.clone()
            storage = tensor.untyped_storage()
        source = StorageWeakRef(storage)
        key = (source.cdata, tensor._version)
        copy = self._copies.get(key)
        if copy is None:
            copy = self._copies[key] = _Copy(storage, source)
        return copy, tensor.device, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset()

    @staticmethod
    def unpack(packed: Tensor | tuple[Any, ...]) -> Tensor:
        """The tensor again, where it was."""
        if isinstance(packed, Tensor):
            return packed
        copy, device, dtype, *layout = packed
        storage = copy.content.to(device, non_blocking=True).untyped_storage()
        size, stride, offset = layout
        return torch.empty(0, dtype=dtype, device=device).set_(storage, offset, size, stride)


class _Copy:
    """A storage's bytes in the host's memory, and a weak reference to it, which keeps its address from being reused."""

    def __init__(self, storage: torch.UntypedStorage, source: StorageWeakRef) -> None:
        self.source = source
        there = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # (bytes,)
        self.content = torch.empty(there.shape, dtype=torch.uint8, pin_memory=there.is_cuda)
        self.content.copy_(there, non_blocking=there.is_cuda)


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


@contextmanager
def _replay(state: list[Tensor], device: torch.device) -> Iterator[None]:
    """Draw the same random numbers as after ``state``; afterwards go on as if nothing had been drawn."""
    now = _random_state(device)
    _set_random_state(state, device)
    try:
        yield
    finally:
        _set_random_state(now, device)


def _set_random_state(state: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
