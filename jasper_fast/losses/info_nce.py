"""The InfoNCE loss: each query's document, to be recognized among all documents. It is not in the paper."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from jasper_fast.losses.arguments import (
    check_indices,
    check_number,
    check_pair_of_widths,
    check_range,
    check_rows,
    check_temperature,
)
from jasper_fast.losses.autograd import attach_gradients, full_precision, needs_gradient
from jasper_fast.ops.dispatch import fake_gradient, fake_loss, uses_triton
from jasper_fast.ops.fingerprints import row_fingerprints
from jasper_fast.ops.row_blocks import UnitRows, normalize_all, row_blocks


def info_nce_loss(
    queries: Tensor,
    documents: Tensor,
    positives: Tensor,
    *,
    temperature: float = 0.05,
    teacher_queries: Tensor | None = None,
    teacher_documents: Tensor | None = None,
    margin: float = 0.0,
) -> Tensor:
    """Return the mean cross-entropy of each query's positive among the documents, with cosines / temperature as logits.

    All documents are negatives but those that may be right answers too:

    - A document with the same row as the positive, because it is a duplicate. The teacher's rows decide if they are
      given, else the documents.
    - With a teacher, a document whose cosine with the query is above the positive's minus the margin.

    It takes one pass over blocks of queries, in bounded memory. A block has a few buffers of 16 MiB, or of 16 rows of
    M numbers if these are larger. No Q x M matrix is stored.

    Args:
        queries: embeddings (Q, D). Rows are normalized inside.
        documents: embeddings (M, D). Rows are normalized inside.
        positives: row of each query's positive in documents (Q,), int64.
        temperature: divisor of the cosines, finite and > 0.
        teacher_queries: a teacher's embeddings (Q, E) of the queries, never with a gradient. None: no teacher.
        teacher_documents: the teacher's embeddings (M, E) of the documents, given with those of the queries.
        margin: finite number. A larger one leaves out more documents.

    Returns:
        A scalar in float32, or in float64 if any embeddings are. It is 0 for a query without negatives. Gradients flow
        to queries and documents.

    Raises:
        IndexError: a positive is not a row of documents. On CUDA the loss is NaN instead, because a check would wait.
        TypeError: a tensor of another dtype, or no number as temperature or margin.
        ValueError: shapes or devices that do not match, one teacher tensor alone, or a number out of range.

    Example:
        >>> import torch
        >>> documents = torch.eye(3)
        >>> right = info_nce_loss(documents, documents, torch.tensor([0, 1, 2]))
        >>> wrong = info_nce_loss(documents, documents, torch.tensor([1, 2, 0]))
        >>> bool(right < 1e-3), bool(wrong > 1)
        (True, True)
    """
    check_pair_of_widths("queries", queries, "documents", documents)
    check_indices("positives", positives, "(Q,)")
    check_rows("positives", positives, "queries", queries)
    if (teacher_queries is None) != (teacher_documents is None):
        lacking = "teacher_queries" if teacher_queries is None else "teacher_documents"
        raise ValueError(f"{lacking}: expected embeddings, got None. Fix: give both teacher tensors, or none")
    if teacher_queries is not None and teacher_documents is not None:
        check_pair_of_widths("teacher_queries", teacher_queries, "teacher_documents", teacher_documents)
        check_rows("teacher_queries", teacher_queries, "queries", queries)
        check_rows("teacher_documents", teacher_documents, "documents", documents)
        teacher_queries, teacher_documents = teacher_queries.detach(), teacher_documents.detach()
    temperature = check_temperature(temperature)
    margin = check_number("margin", margin)
    with full_precision(documents):
        losses, *gradients = info_nce_op(
            queries.detach(),
            documents.detach(),
            positives,
            temperature,
            teacher_queries,
            teacher_documents,
            margin,
            needs_gradient([queries]),
            needs_gradient([documents]),
        )
        return attach_gradients(losses, [queries, documents], gradients, [0, 0])[0]


# The operator.


@torch.library.custom_op("jasper_fast::info_nce", mutates_args=())
def info_nce_op(
    queries: Tensor,
    documents: Tensor,
    positives: Tensor,
    temperature: float,
    teacher_queries: Tensor | None,
    teacher_documents: Tensor | None,
    margin: float,
    query_gradient: bool,
    document_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the loss (1,) and its gradients with respect to queries and documents. An unwanted one is empty."""
    teacher = [tensor for tensor in (teacher_queries, teacher_documents) if tensor is not None]
    numbers = row_fingerprints(teacher[1] if teacher else documents)
    arguments = (queries, documents, positives, numbers, temperature, teacher, margin)
    if uses_triton([queries, *teacher, documents]):
        from jasper_fast.kernels import info_nce

        with torch.cuda.device_of(documents):  # kernels are launched on the current device
            return info_nce.info_nce(*arguments, query_gradient, document_gradient)
    return _info_nce_torch(*arguments, query_gradient, document_gradient)


@info_nce_op.register_fake
def _(
    queries: Tensor,
    documents: Tensor,
    positives: Tensor,
    temperature: float,
    teacher_queries: Tensor | None,
    teacher_documents: Tensor | None,
    margin: float,
    query_gradient: bool,
    document_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    teachers = [tensor for tensor in (teacher_queries, teacher_documents) if tensor is not None]
    loss = fake_loss([queries, documents, *teachers])
    return loss, fake_gradient(queries, query_gradient), fake_gradient(documents, document_gradient)


# Plain torch.


def _info_nce_torch(
    queries: Tensor,
    documents: Tensor,
    positives: Tensor,
    numbers: Tensor,
    temperature: float,
    teacher: list[Tensor],
    margin: float,
    query_gradient: bool,
    document_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_range("positives", positives, 0, len(documents))
    (query, *teacher_units), document = normalize_all([queries, *teacher], documents)
    spoilt = _spoilt(query, document, *teacher_units)
    left = torch.empty_like(query.rows) if query_gradient else None
    right = torch.zeros_like(document.rows) if document_gradient else None
    total = torch.zeros(1, dtype=torch.float64, device=documents.device)
    for begin, end in row_blocks(len(queries), len(documents)):
        place = positives[begin:end, None]  # (h, 1)
        logits = (query.rows[begin:end] @ document.rows.T).div_(temperature)  # (h, M)
        positive = logits.gather(1, place)
        left_out = numbers[place] == numbers
        if teacher:
            scores = teacher_units[0].rows[begin:end] @ teacher_units[1].rows.T
            left_out |= scores > scores.gather(1, place) - margin
        # Of the negatives alone, so that the loss of a well recognized positive keeps its digits.
        log_sums = logits.masked_fill_(left_out, -torch.inf).logsumexp(dim=1, keepdim=True) + spoilt[begin:end]
        above = log_sums - positive
        total += F.softplus(above).sum(dtype=torch.float64)
        wrong = above.sigmoid()  # the probability of all negatives
        change = logits.sub_(torch.where(log_sums == -torch.inf, 0.0, log_sums)).exp_().mul_(wrong)
        change.scatter_(1, place, -wrong)
        if left is not None:
            torch.mm(change, document.rows, out=left[begin:end])
        if right is not None:
            right.addmm_(change.T, query.rows[begin:end])
    for part in (left, right):
        if part is not None:
            part.mul_(1.0 / (len(queries) * temperature))
    return (total / len(queries)).to(query.rows.dtype), query.backward(left), document.backward(right)


def _spoilt(*units: UnitRows) -> Tensor:
    """Return (Q, 1): NaN where the query, its teacher's row or any document's is NaN, else 0. Masks would drop NaN.

    Args:
        units: queries, documents, and the teacher's queries and documents if there are any.
    """
    of_queries = torch.cat([unit.rows.sum(dim=1, keepdim=True) for unit in units[::2]], dim=1)
    of_documents = torch.stack([unit.rows.sum() for unit in units[1::2]])
    return 0.0 * (of_queries.sum(dim=1, keepdim=True) + of_documents.sum())
