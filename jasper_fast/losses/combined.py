"""The losses of Jasper and Stella (arXiv 2412.19048), and the neighbourhood loss, on batches of embeddings.

Each takes (B, D) student and (B, E) teacher vectors in float16, bfloat16 or float32 (computed in float32, autocast or
not) or float64, with any strides. Rows are normalised inside. NaN and inf go through to the loss and its gradient. A
zero row gets no gradient. Wrong arguments raise from their metadata alone, without waiting for a device.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from jasper_fast import binned, ops, reference, rows
from jasper_fast.gather import gather_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SIMILARITY_METHODS = ("auto", "tile", "feature", "reference")
RELATIVE_METHODS = ("auto", "exact", "binned", "reference")
TIES = ("exclude", "label")
REDUCTIONS = ("sum", "mean")


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cos over the rows. The paper sums; the published code takes this mean.

    Args:
        student: (B, D) vectors.
        teacher: (B, D) vectors; gets a gradient if it requires one.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: not two matrices of equal shape on one device.
    """
    _check_pair(student, teacher)
    _check_equal_width(student, teacher)
    with _full_precision(teacher):
        dtype = _compute_dtype([student], teacher)
        return _cosine(_unit(student, dtype), _unit(teacher, dtype))


def similarity_loss(student: Tensor, teacher: Tensor, *, method: str = "auto") -> Tensor:
    """Mean squared difference of the students' and the teacher's (B, B) cosine matrices.

    Args:
        student: (B, D) vectors.
        teacher: (B, E) vectors; gets a gradient if it requires one.
        method: "tile" (row strips of the B x B difference, O(B^2 D) work in bounded memory), "feature" (D x D products,
            O(B D^2) work), "reference" (plain autograd, O(B^2) memory), or "auto": the feature form on a CPU where
            `cost.feature_form_is_cheaper` and the loss is not so small that it cancels, else the tile form.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: not two matrices with equally many rows on one device, or an unknown method.
    """
    _check_pair(student, teacher)
    _check_choice("method", method, SIMILARITY_METHODS)
    with _full_precision(teacher):
        if method == "reference":
            dtype = _compute_dtype([student], teacher)
            return reference.similarity_loss(student.to(dtype), teacher.to(dtype))
        return _similarity([student], teacher, method)[0]


def relative_similarity_loss(
    student: Tensor, teacher: Tensor, *, margin: float = 0.015, ties: str = "exclude", method: str = "auto"
) -> Tensor:
    """Of any two pairs of rows, the one the teacher finds more alike must be so for the student, by a margin.

    Args:
        student: (B, D) vectors.
        teacher: (B, E) vectors; never gets a gradient.
        margin: in cosine units, finite.
        ties: "exclude" leaves out pairs of pairs with equal teacher scores (the paper), "label" lets their index decide
            (the published code). "binned" does not tell them apart: its ties count half either way.
        method: "exact" counts all C(C(B, 2), 2) terms in O(P log P) time and O(P) memory for P = C(B, 2), B <= 65536;
            "binned" counts scores in bins, in O(B D) memory and with an error that docs/binned.md shows; "reference"
            writes all terms down, O(P^2); "auto" is "exact" until `binned.preferred` finds its memory too much.

    Raises:
        TypeError: not floating-point tensors, or a margin that is not a number.
        ValueError: not two matrices with equally many rows on one device, B too large, a margin that is not finite, or
            an unknown choice.
    """
    _check_pair(student, teacher)
    margin = _number("margin", margin)
    _check_choice("ties", ties, TIES)
    _check_choice("method", method, RELATIVE_METHODS)
    if method != "reference":
        _check_rows(teacher)
    with _full_precision(teacher):
        dtype = _compute_dtype([student], teacher)
        if method == "reference":
            return reference.relative_similarity_loss(student.to(dtype), teacher.to(dtype), margin=margin, ties=ties)
        unit, inverse = rows.unit_rows(student.detach(), dtype)
        target, _ = rows.unit_rows(teacher.detach(), dtype)
        losses, gradients = _counted([unit], target, margin, ties, method, _wants_gradient([student]))
        return _attach(losses, [student], [rows.tangent(g, unit, inverse) if len(g) else g for g in gradients], [0])[0]


def neighbourhood_loss(student: Tensor, teacher: Tensor, *, temperature: float = 0.05) -> Tensor:
    """Mean over rows of KL(softmax(t_i . t_j / temperature) || softmax(s_i . s_j / temperature)), j != i.

    Unlike the other losses it weighs a row's nearest rows most, so it is worth having on batches that hold neighbours.
    One pass over row strips, in bounded memory. One row has no neighbours: the loss is 0.

    Args:
        student: (B, D) vectors.
        teacher: (B, E) vectors; never gets a gradient.
        temperature: in cosine units, finite and > 0.

    Raises:
        TypeError: not floating-point tensors, or a temperature that is not a number.
        ValueError: not two matrices with equally many rows on one device, or a temperature out of range.
    """
    _check_pair(student, teacher)
    temperature = _temperature(temperature)
    with _full_precision(teacher):
        return _neighbourhood([student], teacher.detach(), temperature)[0]


class JasperLossOutput(NamedTuple):
    """The weighted sum and its parts before weighting, scalars. A part whose weight is 0 is not computed: it is 0."""

    loss: Tensor
    cosine: Tensor
    similarity: Tensor
    relative_similarity: Tensor


class NeighbourhoodLossOutput(NamedTuple):
    """The same of a `JasperLoss` whose ``neighbourhood`` is above 0."""

    loss: Tensor
    cosine: Tensor
    similarity: Tensor
    relative_similarity: Tensor
    neighbourhood: Tensor


AnyOutput = JasperLossOutput | NeighbourhoodLossOutput


class JasperLoss(nn.Module):
    """10 cosine + 200 similarity + 20 relative similarity, over one or several heads.

    Args:
        weights: of cosine, similarity and relative similarity; finite, >= 0.
        margin: see `relative_similarity_loss`.
        ties: see `relative_similarity_loss`.
        reduction: over heads, "sum" (the paper's stage 3) or "mean" (its stage 4).
        group: process group whose ranks' batches make one batch. Every rank gets the global loss, and its own rows'
            gradient times the number of ranks, which averaging over ranks (DDP, FSDP) turns into the global gradient.
        rows: of a group, how many rows each rank has; None: all as many as this one.
        neighbourhood: weight of `neighbourhood_loss`; finite, >= 0. Above 0 the output has a fifth part of that name.
        temperature: see `neighbourhood_loss`; one for all heads, or one for each, by width.

    Raises:
        TypeError: an argument that is not a number where one is expected.
        ValueError: an argument out of range.
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
            if _number(name, weight) < 0:
                raise ValueError(f"{name}: expected a weight >= 0, got {weight}")
        _check_choice("ties", ties, TIES)
        _check_choice("reduction", reduction, REDUCTIONS)
        if rows is not None and group is None:
            raise ValueError(f"rows: they are those of a group's ranks; give group as well, or leave out rows={rows!r}")
        self.weights = (float(weights[0]), float(weights[1]), float(weights[2]))
        self.margin = _number("margin", margin)
        self.ties = ties
        self.reduction = reduction
        self.group = group
        self.rows = rows
        self.neighbourhood = float(neighbourhood)
        self.temperature: float | dict[int, float] = (
            {width: _temperature(value) for width, value in temperature.items()}
            if isinstance(temperature, Mapping)
            else _temperature(temperature)
        )

    def extra_repr(self) -> str:
        return (
            f"weights={self.weights}, margin={self.margin}, ties={self.ties!r}, reduction={self.reduction!r}, "
            f"neighbourhood={self.neighbourhood}, temperature={self.temperature}"
        )

    def forward(self, student: Tensor | Mapping[int, Tensor], teacher: Tensor) -> AnyOutput:
        """The losses of a batch.

        Args:
            student: (B, D) vectors, or one (B, width) tensor for each head, by width. A head of another width than the
                teacher's has no cosine term.
            teacher: (B, E) vectors. Gets gradients from the cosine and similarity terms if it requires them, unless it
                is itself one of the heads.

        Raises:
            TypeError: not floating-point tensors.
            ValueError: no heads, a head whose width is not its key, unequal numbers of rows, or several devices.
        """
        heads = _heads(student, teacher)
        if any(head is teacher for head in heads):
            teacher = teacher.detach()
        cosine_weight, similarity_weight, relative_weight = self.weights
        with _full_precision(teacher):
            dtype = _compute_dtype(heads, teacher)
            # The fused losses take vectors of any length; the others, and other ranks, are given unit rows.
            every = self.group is not None or bool(relative_weight)
            paired = [bool(cosine_weight) and head.shape[1] == teacher.shape[1] for head in heads]
            units = [_unit(head, dtype) if every or pair else head for head, pair in zip(heads, paired, strict=True)]
            target = _unit(teacher, dtype) if every or any(paired) else teacher
            if self.group is not None:
                *units, target = gather_rows([*units, target], self.group, self.rows)
                heads, teacher = units, target
            zero = teacher.new_zeros((), dtype=dtype)
            cosine = similarity = relative = neighbourhood = zero
            if cosine_weight:
                cosine = sum((_cosine(u, target) for u, pair in zip(units, paired, strict=True) if pair), start=zero)
            if similarity_weight:
                similarity = _similarity(heads, teacher, "auto").sum()
            if relative_weight:
                relative = _relative_similarity(units, target.detach(), self.margin, self.ties).sum()
            if self.neighbourhood:
                neighbourhood = self._neighbourhood(heads, teacher.detach())
            parts = (cosine, similarity, relative, neighbourhood)
            if self.reduction == "mean":
                parts = (
                    cosine / len(units),
                    similarity / len(units),
                    relative / len(units),
                    neighbourhood / len(units),
                )
            weighted = [w * part for w, part in zip((*self.weights, self.neighbourhood), parts, strict=True) if w]
            total = sum(weighted, start=zero)
            return NeighbourhoodLossOutput(total, *parts) if self.neighbourhood else JasperLossOutput(total, *parts[:3])

    def _neighbourhood(self, heads: list[Tensor], teacher: Tensor) -> Tensor:
        """The sum over heads, those of one temperature in one pass."""
        if isinstance(self.temperature, float):
            return _neighbourhood(heads, teacher, self.temperature).sum()
        groups: dict[float, list[Tensor]] = {}
        for head in heads:
            if head.shape[1] not in self.temperature:
                raise ValueError(f"temperature: none for the head of width {head.shape[1]}, got {self.temperature}")
            groups.setdefault(self.temperature[head.shape[1]], []).append(head)
        losses = [_neighbourhood(group, teacher, temperature) for temperature, group in groups.items()]
        return torch.cat(losses).sum()

    def value_and_grad(
        self, student: Tensor | Mapping[int, Tensor], teacher: Tensor
    ) -> tuple[AnyOutput, dict[int, Tensor]]:
        """The losses and the gradient of their weighted sum with respect to the student's vectors themselves.

        For gradient caching: encode a batch far beyond memory in pieces without a graph, take this of all vectors, then
        encode each piece again with a graph and hand its part of the gradient to ``backward``.

        Args:
            student: as in `forward`; whether it requires a gradient makes no difference.
            teacher: as in `forward`; gets no gradient.

        Returns:
            The output, without a graph; by width, gradients in the shapes and dtypes of the heads.
        """
        given = student if isinstance(student, Mapping) else {student.shape[-1]: student}
        _heads(student, teacher)
        leaves = {width: head.detach().requires_grad_() for width, head in given.items()}
        with torch.enable_grad():
            output = self(leaves, teacher.detach())
        heads = list(leaves.values())
        if not output.loss.requires_grad:  # every weight is 0, or no head has the one loss that is weighted
            return output, {width: torch.zeros_like(head) for width, head in given.items()}
        gradients = torch.autograd.grad(output.loss, heads, allow_unused=True, materialize_grads=True)
        detached = type(output)(*(part.detach() for part in output))
        return detached, dict(zip(leaves, gradients, strict=True))


# Vectors in, of any length or, where a name says so, of unit length; losses out.


def _cosine(unit: Tensor, target: Tensor) -> Tensor:
    return (1.0 - (unit * target).sum(dim=1)).mean()


def _similarity(students: list[Tensor], teacher: Tensor, method: str) -> Tensor:
    wanted, teacher_wanted = _wants_gradient(students), _wants_gradient([teacher])
    losses, gradients, teacher_gradients = ops.similarity(
        [student.detach() for student in students], teacher.detach(), method, wanted, teacher_wanted
    )
    heads = list(range(len(students)))
    return _attach(losses, [*students, *[teacher] * len(students)], [*gradients, *teacher_gradients], heads + heads)


def _relative_similarity(units: list[Tensor], target: Tensor, margin: float, ties: str) -> Tensor:
    _check_rows(target)  # again: a group's ranks come together only here
    wanted = _wants_gradient(units)
    losses, gradients = _counted([unit.detach() for unit in units], target, margin, ties, "auto", wanted)
    return _attach(losses, units, gradients, list(range(len(units))))


def _counted(
    units: list[Tensor], target: Tensor, margin: float, ties: str, method: str, wanted: bool
) -> tuple[Tensor, list[Tensor]]:
    """Relative similarity of unit rows, and its gradient with respect to them where it is wanted."""
    if method == "binned" or (method == "auto" and binned.preferred(target.shape[0], len(units))):
        return binned.relative_similarity(units, target, margin, wanted)
    return ops.relative_similarity(units, target, margin, ties == "exclude", wanted)


def _neighbourhood(students: list[Tensor], teacher: Tensor, temperature: float) -> Tensor:
    losses, gradients = ops.neighbourhood(
        [student.detach() for student in students], teacher, temperature, _wants_gradient(students)
    )
    return _attach(losses, students, gradients, list(range(len(students))))


def _wants_gradient(tensors: list[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _attach(losses: Tensor, inputs: list[Tensor], gradients: list[Tensor], owners: list[int]) -> Tensor:
    """Losses (H,) whose derivative with respect to inputs[i] is gradients[i], through losses[owners[i]]."""
    known = [i for i, tensor in enumerate(inputs) if tensor.requires_grad]
    if not known or not torch.is_grad_enabled():
        return losses
    chosen = [owners[i] for i in known]
    return _Attach.apply(losses, chosen, *[inputs[i] for i in known], *[gradients[i] for i in known])


class _Attach(torch.autograd.Function):
    """Forward computed the gradients already; backward scales them by what comes in."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, owners: list[int], *inputs_and_gradients: Tensor) -> Tensor:
        ctx.owners = owners
        ctx.dtypes = [tensor.dtype for tensor in inputs_and_gradients[: len(owners)]]
        ctx.save_for_backward(*inputs_and_gradients[len(owners) :])
        return losses.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        scaled = [
            (incoming[owner] * gradient).to(dtype)
            for owner, gradient, dtype in zip(ctx.owners, gradients, ctx.dtypes, strict=True)
        ]
        return None, None, *scaled, *[None] * len(scaled)


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, dtype: torch.dtype) -> Tensor:
        unit, inverse = rows.unit_rows(embeddings, dtype)
        ctx.save_for_backward(unit, inverse)
        ctx.input_dtype = embeddings.dtype
        return unit

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None]:
        return rows.tangent(incoming, *ctx.saved_tensors).to(ctx.input_dtype), None


def _unit(embeddings: Tensor, dtype: torch.dtype) -> Tensor:
    return _Unit.apply(embeddings, dtype)


# Arguments.


def _full_precision(tensor: Tensor) -> torch.autocast:
    return torch.autocast(device_type=tensor.device.type, enabled=False)


def _compute_dtype(students: list[Tensor], teacher: Tensor) -> torch.dtype:
    double = any(tensor.dtype == torch.float64 for tensor in (*students, teacher))
    return torch.float64 if double else torch.float32


def _heads(student: Tensor | Mapping[int, Tensor], teacher: Tensor) -> list[Tensor]:
    if not isinstance(student, Mapping):
        _check_pair(student, teacher)
        return [student]
    if not student:
        raise ValueError("student: expected at least one head, got an empty mapping")
    for width, head in student.items():
        _check_pair(head, teacher, f"student[{width!r}]")
        if head.shape[1] != width:
            raise ValueError(
                f"student[{width!r}]: expected vectors of that width, got shape {tuple(head.shape)}; make its key "
                f"{head.shape[1]}"
            )
    return list(student.values())


def _check_pair(student: Tensor, teacher: Tensor, name: str = "student") -> None:
    for label, tensor in ((name, student), ("teacher", teacher)):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{label}: expected a tensor of shape (B, D), got {type(tensor).__name__}; use torch.as_tensor"
            )
        if tensor.layout != torch.strided or tensor.is_nested:
            raise TypeError(f"{label}: expected a dense tensor, got a sparse or nested one; convert with .to_dense()")
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise TypeError(
                f"{label}: expected float16, bfloat16, float32 or float64, got {tensor.dtype}; convert with .float()"
            )
        if tensor.dim() != 2 or 0 in tensor.shape:
            raise ValueError(
                f"{label}: expected shape (B, D) with B, D >= 1, got {tuple(tensor.shape)}; a single vector is v[None]"
            )
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"{name} has {student.shape[0]} rows and teacher {teacher.shape[0]}: expected one to one")
    if student.device != teacher.device:
        raise ValueError(f"{name} is on {student.device} and teacher on {teacher.device}: move one with .to(device)")


def _check_equal_width(student: Tensor, teacher: Tensor) -> None:
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"cosine loss: expected equal widths, got {student.shape[1]} and {teacher.shape[1]}; "
            "similarity_loss and relative_similarity_loss compare vectors of different widths"
        )


def _check_rows(vectors: Tensor) -> None:
    count = vectors.shape[0]
    if count * (count - 1) // 2 > ops.MAX_PAIRS:
        raise ValueError(f"relative similarity: expected at most 65536 rows, got {count}; split the batch")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):  # numpy's are real, too
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return float(value)


def _temperature(value: Any) -> float:
    if _number("temperature", value) <= 0:
        raise ValueError(f"temperature: expected a number > 0, got {value}")
    return float(value)
