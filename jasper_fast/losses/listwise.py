"""The listwise loss: a KL divergence over the candidate documents of each query. It is not in the paper."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from jasper_fast.losses.arguments import (
    check_device,
    check_indices,
    check_matrix,
    check_pair_of_widths,
    check_range,
    check_rows,
    check_temperature,
)
from jasper_fast.losses.autograd import attach_gradients, full_precision, needs_gradient
from jasper_fast.ops.dispatch import fake_gradient, fake_loss, uses_triton
from jasper_fast.ops.row_blocks import UnitRows, normalize_all, row_blocks


def listwise_loss(
    queries: Tensor,
    documents: Tensor,
    candidates: Tensor,
    scores: Tensor,
    *,
    temperature: float = 0.05,
    teacher_temperature: float = 0.05,
) -> Tensor:
    """Return the mean over queries of KL(softmax(scores / teacher_temperature) || softmax(q . d / temperature)).

    Both distributions are over a query's candidates. The scores are a teacher's, a cross-encoder's, or grades. Work and
    memory grow with the candidates, not with the documents. A document that is given twice counts twice.

    Args:
        queries: embeddings (Q, D). Rows are normalized inside.
        documents: embeddings (M, D). Rows are normalized inside.
        candidates: rows of documents (Q, K), int64. -1 means no candidate. A query with fewer than two adds 0.
        scores: one floating-point score (Q, K) for each candidate, never with a gradient. -inf gives a candidate no
            probability. Scores of missing candidates are not read.
        temperature: divisor of the cosines, finite and > 0.
        teacher_temperature: divisor of the scores, finite and > 0.

    Returns:
        A scalar in float32, or in float64 if any embeddings are. Gradients flow to queries and documents.

    Raises:
        IndexError: a candidate is not a row of documents. On CUDA the loss is NaN instead, because a check would wait.
        TypeError: a tensor of another dtype, or no number as a temperature.
        ValueError: shapes or devices that do not match, or a temperature out of range.

    Example:
        >>> import torch
        >>> documents = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> candidates, scores = torch.tensor([[0, 1, 2]]), torch.tensor([[1.0, 0.99, 0.0]])
        >>> right = listwise_loss(documents[:1], documents, candidates, scores)
        >>> wrong = listwise_loss(documents[2:], documents, candidates, scores)
        >>> bool(right < 0.5), bool(wrong > 1)
        (True, True)
    """
    check_pair_of_widths("queries", queries, "documents", documents)
    check_indices("candidates", candidates, "(Q, K)")
    check_matrix("scores", scores)
    check_rows("candidates", candidates, "queries", queries)
    if scores.shape != candidates.shape:
        raise ValueError(
            f"scores: expected the candidates' shape {tuple(candidates.shape)}, got {tuple(scores.shape)}. Fix: give "
            "each candidate one score"
        )
    check_device("scores", scores, "candidates", candidates)
    temperature = check_temperature(temperature)
    teacher_temperature = check_temperature(teacher_temperature, "teacher_temperature")
    with full_precision(documents):
        losses, *gradients = listwise_op(
            queries.detach(),
            documents.detach(),
            candidates,
            scores.detach(),
            temperature,
            teacher_temperature,
            needs_gradient([queries]),
            needs_gradient([documents]),
        )
        return attach_gradients(losses, [queries, documents], gradients, [0, 0])[0]


# The operator.


@torch.library.custom_op("jasper_fast::listwise", mutates_args=())
def listwise_op(
    queries: Tensor,
    documents: Tensor,
    candidates: Tensor,
    scores: Tensor,
    temperature: float,
    teacher_temperature: float,
    query_gradient: bool,
    document_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the loss (1,) and its gradients with respect to queries and documents. An unwanted one is empty."""
    arguments = (queries, documents, candidates, scores, temperature, teacher_temperature)
    if uses_triton([queries, documents]):
        with torch.cuda.device_of(documents):  # kernels are launched on the current device
            return _listwise_triton(*arguments, query_gradient, document_gradient)
    return _listwise_torch(*arguments, query_gradient, document_gradient)


@listwise_op.register_fake
def _(
    queries: Tensor,
    documents: Tensor,
    candidates: Tensor,
    scores: Tensor,
    temperature: float,
    teacher_temperature: float,
    query_gradient: bool,
    document_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = fake_loss([queries, documents])
    return loss, fake_gradient(queries, query_gradient), fake_gradient(documents, document_gradient)


def divergence(
    cosines: Tensor, counted: Tensor, scores: Tensor, temperature: float, teacher_temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the mean divergence (1,) and its gradient with respect to the cosines (Q, K), which have its dtype.

    Args:
        cosines: float32 or float64 (Q, K). Those that do not count may have any value.
        counted: bool (Q, K), False for a missing candidate and for the only one of a query.
        scores: scores (Q, K) of the teacher.
        temperature: divisor of the cosines.
        teacher_temperature: divisor of the scores.
    """
    dtype = torch.promote_types(cosines.dtype, scores.dtype)
    # Logits of a query without candidates are 0, because a softmax over -inf is NaN. They do not count.
    outside = torch.where(counted.any(dim=1, keepdim=True), -torch.inf, 0.0)
    given = torch.where(counted, scores.to(dtype), outside)
    given = (given - given.amax(dim=1, keepdim=True)) / teacher_temperature  # so no score overflows
    teacher_log = given.to(cosines.dtype).log_softmax(dim=1)
    student_log = torch.where(counted, cosines / temperature, outside).log_softmax(dim=1)
    probability = teacher_log.exp()
    # 0 log 0 is 0. NaN differs from 0, so it counts.
    terms = torch.where(counted & (probability != 0.0), probability * (teacher_log - student_log), 0.0)
    weights = torch.where(counted, student_log.exp_().sub_(probability), 0.0)
    total = terms.sum(dim=1).sum(dtype=torch.float64) / len(cosines)
    return total.to(cosines.dtype)[None], weights.mul_(1.0 / (len(cosines) * temperature))


def counted_candidates(candidates: Tensor) -> Tensor:
    """Return True for each candidate of a query with at least two. (Q, K) -> (Q, K) bool."""
    present = candidates != -1
    return present & (present.sum(dim=1, keepdim=True) > 1)


# Triton.


def _listwise_triton(
    queries: Tensor,
    documents: Tensor,
    candidates: Tensor,
    scores: Tensor,
    temperature: float,
    teacher_temperature: float,
    query_gradient: bool,
    document_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from jasper_fast.kernels.gather import gathered_cosines, gathered_gradients
    from jasper_fast.kernels.strips import Rows

    query, document, candidates = Rows.of(queries), Rows.of(documents), candidates.contiguous()
    cosines = gathered_cosines(query, document, candidates)
    counted = counted_candidates(candidates)
    loss, weights = divergence(cosines, counted, scores, temperature, teacher_temperature)
    return loss, *gathered_gradients(query, document, candidates, weights, query_gradient, document_gradient)


# Plain torch.


def _listwise_torch(
    queries: Tensor,
    documents: Tensor,
    candidates: Tensor,
    scores: Tensor,
    temperature: float,
    teacher_temperature: float,
    query_gradient: bool,
    document_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_range("candidates", candidates, -1, len(documents))
    (query,), document = normalize_all([queries], documents)
    counted = counted_candidates(candidates)
    cosines = _candidate_cosines(query, document, candidates.clamp(min=0))
    losses, weights = divergence(cosines, counted, scores, temperature, teacher_temperature)
    entries = counted.flatten().nonzero()[:, 0]  # a document that does not count may be NaN
    weight, row = weights.flatten()[entries], candidates.flatten()[entries]
    of_query = entries // candidates.shape[1]
    left = right = None
    if query_gradient:
        left = _weighted_sums(document.rows, row, weight, of_query, len(queries))
    if document_gradient:
        order = row.argsort(stable=True)
        right = _weighted_sums(query.rows, of_query[order], weight[order], row[order], len(documents))
    return losses, query.backward(left), document.backward(right)


def _candidate_cosines(query: UnitRows, document: UnitRows, candidates: Tensor) -> Tensor:
    """Return cosines (Q, K) of queries and their candidates, whose rows are copied for a block of queries at a time."""
    cosines = query.rows.new_empty(candidates.shape)
    for begin, end in row_blocks(len(candidates), candidates.shape[1] * query.rows.shape[1]):
        rows = document.rows[candidates[begin:end]]  # (h, K, D)
        torch.bmm(rows, query.rows[begin:end, :, None], out=cosines[begin:end, :, None])
    return cosines


def _weighted_sums(rows: Tensor, chosen: Tensor, weights: Tensor, groups: Tensor, count: int) -> Tensor:
    """Return the sum of weighted chosen rows of each of ``count`` groups, whose numbers ascend: (count, D)."""
    starts = torch.searchsorted(groups, torch.arange(count, device=groups.device))
    return F.embedding_bag(chosen, rows, starts, mode="sum", per_sample_weights=weights)
