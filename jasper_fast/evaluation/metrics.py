"""Metrics of one evaluation set, from 0 to 1 (Spearman from -1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jasper_fast.data.eval_sets import ClassificationSet, EvalSet, RetrievalSet
from jasper_fast.evaluation.quantized import quantize_groups
from jasper_fast.mips import topk
from jasper_fast.models.quantization import CANDIDATES
from jasper_fast.utils.errors import JasperError

DEPTH = 100  # ranked documents per query, for recall@100
MAX_DEPTH = 1000  # ranked documents per query if several tie with the last: the depth of BEIR and mteb

Ranking = tuple[list[float], list[int]]  # scores and positions of a query's documents, best first


def score_embeddings(evalset: EvalSet, vectors: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Compute the metrics of one evaluation set.

    Args:
        evalset: evaluation set.
        vectors: (n, D) float32 unit rows for each group of ``evalset.groups()``.

    Returns:
        {metric: score} for every name in ``evalset.metrics``.

    Raises:
        JasperError: An embedding contains NaN or infinity.
    """
    for group, array in vectors.items():
        if bad := int((~np.isfinite(array).all(axis=1)).sum()):
            raise JasperError(
                f"{evalset.name}: {bad} of {len(array)} embeddings in group {group!r} contain NaN or infinity. "
                "Fix: check the model, or evaluate it in float32"
            )
    if isinstance(evalset, RetrievalSet):
        depth = DEPTH + bool(evalset.self_matches)
        return _retrieval(evalset, _rankings(vectors["queries"], vectors["documents"], depth))
    if isinstance(evalset, ClassificationSet):
        return {"accuracy": _accuracy(evalset, vectors["train"], vectors["test"])}
    return {"Spearman": _spearman(vectors["left"], vectors["right"], evalset.scores)}


def score_codes(
    evalset: EvalSet, vectors: Mapping[str, np.ndarray], precision: str, ranges: np.ndarray | None = None
) -> dict[str, float]:
    """Compute the metrics of one evaluation set with quantized embeddings on both sides of every comparison.

    "ubinary+rescore" retrieves ``CANDIDATES`` documents by bits. It reranks them by the inner product of the query's
    float32 embedding and the documents' int8 codes. Only retrieval sets have this score.

    Args:
        evalset: evaluation set.
        vectors: (n, D) float32 unit rows for each group of ``evalset.groups()``.
        precision: one of ``PRECISIONS``.
        ranges: (2, D) ranges of int8 codes. None computes them from the set's largest group.

    Returns:
        {metric: score}, empty if the precision does not apply to the set.

    Raises:
        JasperError: An embedding contains NaN or infinity.
    """
    if precision == "float32":
        return score_embeddings(evalset, vectors)
    plain = quantize_groups(vectors, precision.removesuffix("+rescore"), ranges)
    if not precision.endswith("+rescore"):
        if not isinstance(evalset, RetrievalSet):
            plain = {name: v / np.linalg.norm(v, axis=1, keepdims=True).clip(1) for name, v in plain.items()}
        return score_embeddings(evalset, plain)
    if not isinstance(evalset, RetrievalSet):
        return {}
    fine = quantize_groups(vectors, "int8", ranges)["documents"]
    candidates = top_documents(plain["queries"], plain["documents"], CANDIDATES)
    scores = np.einsum("qd,qkd->qk", vectors["queries"], fine[candidates])
    return _retrieval(evalset, list(zip(scores.tolist(), candidates.tolist(), strict=True)))


def top_documents(queries: np.ndarray, documents: np.ndarray, k: int) -> np.ndarray:
    """Return the indices of the k documents with the highest inner product for each query.

    The lower index wins a tie.

    Args:
        queries: (Q, D) float32.
        documents: (N, D) float32.
        k: number of documents. A larger number than N means N.

    Returns:
        (Q, k) int64, best first.
    """
    return topk(queries, documents, min(k, len(documents)))[1]


def _rankings(queries: np.ndarray, documents: np.ndarray, depth: int) -> list[Ranking]:
    """Rank ``depth + 1`` documents per query, or ``MAX_DEPTH`` documents if the last two of them tie."""
    scores, positions = topk(queries, documents, min(depth + 1, len(documents)))
    rankings = list(zip(scores.tolist(), positions.tolist(), strict=True))
    if len(documents) > depth + 1:
        tied = np.flatnonzero(scores[:, depth] == scores[:, depth - 1])
        deeper = topk(queries[tied], documents, min(MAX_DEPTH, len(documents))) if len(tied) else ((), ())
        for query, deeper_scores, deeper_positions in zip(tied, *deeper, strict=True):
            rankings[query] = deeper_scores.tolist(), deeper_positions.tolist()
    return rankings


def ndcg_by_query(evalset: RetrievalSet, vectors: Mapping[str, np.ndarray]) -> np.ndarray:
    """Compute the nDCG@10 of each query, (q,) float64. Their mean is the nDCG@10 of ``score_embeddings``.

    Args:
        evalset: retrieval set.
        vectors: (n, D) float32 unit rows of the groups "queries" and "documents", without NaN.
    """
    rankings = _rankings(vectors["queries"], vectors["documents"], DEPTH + bool(evalset.self_matches))
    return np.array([scores["ndcg_cut_10"] for scores in _by_query(evalset, rankings)])


def _retrieval(evalset: RetrievalSet, rankings: Sequence[Ranking]) -> dict[str, float]:
    scores = _by_query(evalset, rankings)
    return {
        "nDCG@10": float(np.mean([s["ndcg_cut_10"] for s in scores])),
        "recall@100": float(np.mean([s["recall_100"] for s in scores])),
    }


def _by_query(evalset: RetrievalSet, rankings: Sequence[Ranking]) -> list[dict[str, float]]:
    """Score each query's ranking with pytrec_eval, as BEIR and mteb do, without the query's own document.

    Documents missing from the corpus stay in the ideal ranking. Queries without a relevant document score 0.
    """
    import pytrec_eval

    def name(document: int) -> str:  # trec_eval breaks ties by name, the last name first
        return evalset.ids[document] if evalset.ids else f"{2 * 10**9 - document}"

    self_matches = evalset.self_matches or [-1] * len(rankings)
    run = {
        str(q): {name(d): score for score, d in zip(scores, documents, strict=True) if d != self_matches[q]}
        for q, (scores, documents) in enumerate(rankings)
    }
    judged = {str(q): {name(d): grade for d, grade in grades.items()} for q, grades in enumerate(evalset.relevant)}
    scores = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10", "recall.100"}).evaluate(run)
    # pytrec_eval leaves out queries without a relevant document.
    return [scores.get(str(q), {"ndcg_cut_10": 0.0, "recall_100": 0.0}) for q in range(len(rankings))]


def _spearman(left: np.ndarray, right: np.ndarray, gold: list[float]) -> float:
    from scipy.stats import spearmanr

    cosines = np.einsum("nd,nd->n", left, right, dtype=np.float64)
    if np.ptp(cosines) == 0:
        return 0.0  # a collapsed model has no order, for which scipy returns NaN
    return float(spearmanr(cosines, gold).statistic)


def _accuracy(evalset: ClassificationSet, train: np.ndarray, test: np.ndarray) -> float:
    from sklearn.linear_model import LogisticRegression

    classifier = LogisticRegression(max_iter=1000).fit(train, evalset.train_labels)
    return float(classifier.score(test, evalset.test_labels))
