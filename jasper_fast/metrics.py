"""Scores of vectors on one evaluation set, as shares from 0 to 1 (Spearman from -1)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jasper_fast.codes import CANDIDATES, coded
from jasper_fast.errors import JasperError
from jasper_fast.evalsets import ClassificationSet, EvalSet, RetrievalSet
from jasper_fast.mips import topk

DEPTH = 100  # documents kept per query: what recall@100 needs


def score_vectors(evalset: EvalSet, vectors: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The metrics of one set.

    Args:
        evalset: the set.
        vectors: per group of ``evalset.groups()``, (n, D) float32, rows of length one.

    Returns:
        a score for every name in ``evalset.metrics``.

    Raises:
        JasperError: a vector holds NaN or infinity.
    """
    for group, array in vectors.items():
        if bad := int((~np.isfinite(array).all(axis=1)).sum()):
            raise JasperError(f"{evalset.name}: {bad} of {len(array)} vectors of its {group} hold NaN or infinity")
    if isinstance(evalset, RetrievalSet):
        depth = DEPTH + bool(evalset.itself)
        return _retrieval(evalset, top_documents(vectors["queries"], vectors["documents"], depth))
    if isinstance(evalset, ClassificationSet):
        return {"accuracy": _accuracy(evalset, vectors["train"], vectors["test"])}
    return {"Spearman": _spearman(vectors["left"], vectors["right"], evalset.scores)}


def score_codes(
    evalset: EvalSet, vectors: Mapping[str, np.ndarray], precision: str, ranges: np.ndarray | None = None
) -> dict[str, float]:
    """The metrics of one set with vectors stored as codes, both sides of every comparison.

    "ubinary+rescore" lets bits find ``CANDIDATES`` documents and puts them in order by the query's float32 vector
    against the documents' int8 codes; sets without search have no such score.

    Args:
        evalset, vectors: as in ``score_vectors``.
        precision: one of ``codes.PRECISIONS``.
        ranges: see ``codes.coded``.
    """
    if precision == "float32":
        return score_vectors(evalset, vectors)
    plain = coded(vectors, precision.removesuffix("+rescore"), ranges)
    if not precision.endswith("+rescore"):
        if not isinstance(evalset, RetrievalSet):
            plain = {name: v / np.linalg.norm(v, axis=1, keepdims=True).clip(1) for name, v in plain.items()}
        return score_vectors(evalset, plain)
    if not isinstance(evalset, RetrievalSet):
        return {}
    fine = coded(vectors, "int8", ranges)["documents"]
    found = top_documents(plain["queries"], plain["documents"], CANDIDATES)
    scores = np.einsum("qd,qkd->qk", vectors["queries"], fine[found])
    return _retrieval(evalset, np.take_along_axis(found, np.argsort(-scores, axis=1, kind="stable"), axis=1))


def top_documents(queries: np.ndarray, documents: np.ndarray, k: int) -> np.ndarray:
    """The k documents of highest inner product per query, ties by the lower index.

    Args:
        queries: (Q, D) float32.
        documents: (N, D) float32.
        k: how many; at most N.

    Returns:
        (Q, k) int64, best first.
    """
    return topk(queries, documents, min(k, len(documents)))[1]


def _retrieval(evalset: RetrievalSet, best: np.ndarray) -> dict[str, float]:
    """Scores of the documents found, (Q, DEPTH or more) best first; a query's own document does not count."""
    import pytrec_eval

    # trec_eval orders by score alone and breaks ties by name: ranks as scores keep our order
    itself = evalset.itself or [-1] * len(best)
    run = {
        str(q): {str(d): float(-rank) for rank, d in enumerate(row) if d != itself[q]}
        for q, row in enumerate(best.tolist())
    }
    judged = {str(q): {str(d): grade for d, grade in grades.items()} for q, grades in enumerate(evalset.relevant)}
    scores = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10", "recall.100"}).evaluate(run).values()
    return {
        "nDCG@10": float(np.mean([s["ndcg_cut_10"] for s in scores])),
        "recall@100": float(np.mean([s["recall_100"] for s in scores])),
    }


def _spearman(left: np.ndarray, right: np.ndarray, gold: list[float]) -> float:
    from scipy.stats import spearmanr

    cosines = np.einsum("nd,nd->n", left, right, dtype=np.float64)
    if np.ptp(cosines) == 0:
        return 0.0  # a collapsed model says nothing about the order; scipy would give NaN
    return float(spearmanr(cosines, gold).statistic)


def _accuracy(evalset: ClassificationSet, train: np.ndarray, test: np.ndarray) -> float:
    from sklearn.linear_model import LogisticRegression

    classifier = LogisticRegression(max_iter=1000).fit(train, evalset.train_labels)
    return float(classifier.score(test, evalset.test_labels))
