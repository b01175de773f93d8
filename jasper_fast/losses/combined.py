"""The weighted sum of the losses in `jasper_fast.config.losses`, over one or several heads."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from jasper_fast.config.losses import LOSSES, titles
from jasper_fast.distributed.gather import gather_rows
from jasper_fast.losses.arguments import (
    LossOptions,
    check_choice,
    check_heads,
    check_number,
    check_temperature,
)
from jasper_fast.losses.autograd import compute_dtype, full_precision, normalize
from jasper_fast.losses.relative_similarity import TIES

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

REDUCTIONS = ("sum", "mean")
PAPER = ("cosine", "similarity", "relative_similarity")  # the losses of `JasperLoss`' ``weights``

Compute = Callable[[list[Tensor], Tensor, LossOptions], Tensor]


@dataclass
class LossOutput:
    """The weighted sum, and its parts by name before weighting. All are scalars."""

    loss: Tensor
    parts: dict[str, Tensor]

    def _asdict(self) -> dict[str, Tensor]:
        """Return the loss and its parts in one mapping."""
        return {"loss": self.loss, **self.parts}


class JasperLossOutput(NamedTuple):
    """The weighted sum and its parts before weighting, scalars. A part of weight 0 is not computed: it is 0."""

    loss: Tensor
    cosine: Tensor
    similarity: Tensor
    relative_similarity: Tensor


class NeighbourhoodLossOutput(NamedTuple):
    """The output of a `JasperLoss` whose ``neighbourhood`` is above 0."""

    loss: Tensor
    cosine: Tensor
    similarity: Tensor
    relative_similarity: Tensor
    neighbourhood: Tensor


AnyOutput = JasperLossOutput | NeighbourhoodLossOutput | LossOutput


def compute_of(name: str) -> Compute:
    """Return the function ``compute`` of a loss: unit rows or embeddings of H heads, teacher, options -> (H,)."""
    return importlib.import_module(f"jasper_fast.losses.{name}").compute


class CombinedLoss(nn.Module):
    """The weighted sum of all losses that have a weight, over one or several heads.

    Args:
        weights: weights by name. A missing one means 0.
        options: options of the losses.
        reduction: "sum" or "mean" over heads.
        group: see `JasperLoss`.
        rows: see `JasperLoss`.

    Raises:
        TypeError: a weight is not a number.
        ValueError: no loss has the name of a weight, or a weight is negative or not finite.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        options: LossOptions = LossOptions(),  # noqa: B008 - it cannot change
        reduction: str = "sum",
        group: ProcessGroup | None = None,
        rows: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if unknown := sorted(set(weights) - {loss.name for loss in LOSSES}):
            raise ValueError(f"weights: no loss is called {unknown[0]!r} (expected {titles(LOSSES)})")
        for name, weight in weights.items():
            if check_number(f"weights[{name!r}]", weight) < 0:
                raise ValueError(f"weights[{name!r}]: expected a number >= 0, got {weight}")
        # The paper's losses are parts of every output, the others only where they have a weight.
        self.weights = {loss.name: w for loss in LOSSES if (w := weights.get(loss.name, 0.0)) or loss.weight}
        self.computes = {name: compute_of(name) for name, weight in self.weights.items() if weight}
        self.options, self.reduction = options, reduction
        self.group, self.rows = group, rows

    def forward(self, student: Tensor | Mapping[int, Tensor], teacher: Tensor) -> LossOutput:
        """Compute the losses of a batch, as `JasperLoss` does."""
        return _combine(
            student, teacher, self.weights, self.computes, self.options, self.reduction, self.group, self.rows
        )


class JasperLoss(nn.Module):
    """10 cosine + 200 similarity + 20 relative similarity, over one or several heads.

    Args:
        weights: weights of cosine, similarity and relative similarity, finite and >= 0.
        margin: see `relative_similarity_loss`.
        ties: see `relative_similarity_loss`.
        reduction: "sum" over heads (the paper's stage 3) or "mean" (its stage 4).
        group: process group whose ranks' batches make one batch. Every rank gets the global loss, and its own rows'
            gradient times the number of ranks. Averaging over ranks (DDP, FSDP) turns that into the global gradient.
            None means this process alone.
        rows: number of rows of each rank of the group. None means that all have as many as this one.
        neighbourhood: weight of `neighbourhood_loss`, finite and >= 0. Above 0, the output has a fifth part of that
            name.
        temperature: see `neighbourhood_loss`. One number for all heads, or one for each, by width.

    Raises:
        TypeError: a number was expected.
        ValueError: an argument is out of range.

    Example:
        >>> import torch
        >>> teacher = torch.randn(8, 16)
        >>> heads = {16: torch.randn(8, 16, requires_grad=True), 4: torch.randn(8, 4, requires_grad=True)}
        >>> output = JasperLoss(weights=(10.0, 200.0, 20.0))(heads, teacher)
        >>> output.loss.backward()
        >>> heads[4].grad.shape, output._fields
        (torch.Size([8, 4]), ('loss', 'cosine', 'similarity', 'relative_similarity'))
    """

    def __init__(
        self,
        weights: tuple[float, float, float] = (10.0, 200.0, 20.0),
        margin: float = 0.015,
        ties: str = "exclude",
        reduction: str = "sum",
        group: ProcessGroup | None = None,
        *,
        neighbourhood: float = 0.0,
        temperature: float | Mapping[int, float] = 0.05,
        rows: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if not hasattr(weights, "__len__") or len(weights) != 3:
            raise ValueError(f"weights: expected three (cosine, similarity, relative similarity), got {weights!r}")
        for name, weight in (*((f"weights[{i}]", w) for i, w in enumerate(weights)), ("neighbourhood", neighbourhood)):
            if check_number(name, weight) < 0:
                raise ValueError(f"{name}: expected a weight >= 0, got {weight}")
        check_choice("ties", ties, TIES)
        check_choice("reduction", reduction, REDUCTIONS)
        if rows is not None and group is None:
            raise ValueError(
                f"rows: got numbers of rows without the group whose ranks have them. Fix: give group as well, or leave "
                f"out rows={rows!r}"
            )
        self.weights = (float(weights[0]), float(weights[1]), float(weights[2]))
        self.margin = check_number("margin", margin)
        self.ties = ties
        self.reduction = reduction
        self.group = group
        self.rows = rows
        self.neighbourhood = float(neighbourhood)
        self.temperature: float | dict[int, float] = (
            {width: check_temperature(value) for width, value in temperature.items()}
            if isinstance(temperature, Mapping)
            else check_temperature(temperature)
        )
        self._computes = {name: compute_of(name) for name in (*PAPER, "neighbourhood")}

    def extra_repr(self) -> str:
        """Return the settings that ``repr`` shows."""
        return (
            f"weights={self.weights}, margin={self.margin}, ties={self.ties!r}, reduction={self.reduction!r}, "
            f"neighbourhood={self.neighbourhood}, temperature={self.temperature}"
        )

    def forward(
        self, student: Tensor | Mapping[int, Tensor], teacher: Tensor
    ) -> JasperLossOutput | NeighbourhoodLossOutput:
        """Compute the losses of a batch.

        Args:
            student: embeddings (B, D), or one (B, width) tensor for each head, by width. A head of another width than
                the teacher's has no cosine term.
            teacher: embeddings (B, E). They get gradients from the cosine and similarity terms if they require them,
                unless the tensor is one of the heads.

        Raises:
            TypeError: a floating-point tensor was expected.
            ValueError: no heads, a head whose width is not its key, unequal numbers of rows, or several devices.
        """
        weights = dict(zip(PAPER, self.weights, strict=True))
        if self.neighbourhood:
            weights["neighbourhood"] = self.neighbourhood
        options = LossOptions(self.margin, self.ties, self.temperature)
        output = _combine(student, teacher, weights, self._computes, options, self.reduction, self.group, self.rows)
        kind = NeighbourhoodLossOutput if self.neighbourhood else JasperLossOutput
        return kind(output.loss, *output.parts.values())

    def value_and_grad(
        self, student: Tensor | Mapping[int, Tensor], teacher: Tensor
    ) -> tuple[JasperLossOutput | NeighbourhoodLossOutput, dict[int, Tensor]]:
        """Compute the losses and the gradient of their weighted sum with respect to the student's embeddings.

        Use it for gradient caching. Encode a batch far beyond memory in pieces without a graph, and call this on all
        embeddings. Then encode each piece again with a graph, and pass its part of the gradient to ``backward``.

        Args:
            student: see `forward`. It makes no difference if it requires a gradient.
            teacher: see `forward`. It gets no gradient.

        Returns:
            The output, without a graph. By width, gradients in the shapes and dtypes of the heads.

        Example:
            >>> import torch
            >>> output, gradients = JasperLoss().value_and_grad(torch.randn(8, 4), torch.randn(8, 16))
            >>> gradients[4].shape
            torch.Size([8, 4])
        """
        student_heads = student if isinstance(student, Mapping) else {student.shape[-1]: student}
        check_heads(student, teacher)
        leaves = {width: head.detach().requires_grad_() for width, head in student_heads.items()}
        with torch.enable_grad():
            output = self(leaves, teacher.detach())
        heads = list(leaves.values())
        if not output.loss.requires_grad:  # every weight is 0, or no head has the one loss that is weighted
            return output, {width: torch.zeros_like(head) for width, head in student_heads.items()}
        gradients = torch.autograd.grad(output.loss, heads, allow_unused=True, materialize_grads=True)
        detached = type(output)(*(part.detach() for part in output))
        return detached, dict(zip(leaves, gradients, strict=True))


def _combine(
    student: Tensor | Mapping[int, Tensor],
    teacher: Tensor,
    weights: Mapping[str, float],
    computes: Mapping[str, Compute],
    options: LossOptions,
    reduction: str,
    group: ProcessGroup | None,
    rows: Sequence[int] | None,
) -> LossOutput:
    """Compute all parts of ``weights``, in the table's order. Those of weight 0 are 0."""
    heads = check_heads(student, teacher)
    if any(head is teacher for head in heads):
        teacher = teacher.detach()
    active = [loss for loss in LOSSES if weights.get(loss.name)]
    equal = [head.shape[1] == teacher.shape[1] for head in heads]
    # Fused losses take embeddings of any length. The others, and other ranks, get unit rows.
    normalized = [
        group is not None or any(loss.unit_rows and (same or not loss.equal_widths) for loss in active)
        for same in equal
    ]
    with full_precision(teacher):
        dtype = compute_dtype(heads, teacher)
        units = [normalize(head, dtype) if unit else head for head, unit in zip(heads, normalized, strict=True)]
        target = normalize(teacher, dtype) if any(normalized) else teacher
        if group is not None:
            *units, target = gather_rows([*units, target], group, rows)
            heads, teacher = units, target
        zero = teacher.new_zeros((), dtype=dtype)
        parts = dict.fromkeys(weights, zero)
        for loss in active:
            vectors = units if loss.unit_rows else heads
            chosen = [v for v, same in zip(vectors, equal, strict=True) if same or not loss.equal_widths]
            if chosen:
                against = target if loss.unit_rows else teacher
                parts[loss.name] = computes[loss.name](chosen, against, options).sum()
        if reduction == "mean":
            parts = {name: part / len(heads) for name, part in parts.items()}
        total = sum((weights[loss.name] * parts[loss.name] for loss in active), start=zero)
        return LossOutput(total, parts)
