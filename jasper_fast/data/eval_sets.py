"""Evaluation sets: retrieval, similarity, classification."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True)
class RetrievalSet:
    """Queries, a corpus, and the relevant documents of each query.

    Args:
        name: the name of the set in score reports.
        queries: the texts of the queries.
        documents: the texts of the corpus. A judged document that is absent from the corpus has a position after the
            last one.
        relevant: the positions and grades (above 0) of the relevant documents, for each query. A query without relevant
            documents scores 0.
        kind: "beir", "pairs" or "docstrings".
        parts: the titles and bodies of the documents, used only to exclude them from training.
        self_matches: for each query, the position of the document with the same id and the same text, or -1. This
            document does not count as a result. BEIR compares only the ids, but many sets simply number queries and
            documents from 1. An empty list means that no query has such a document.
        transductive: whether training may use the documents, because the corpus is known in advance.
        ids: the ids of the documents, including absent ones. Equal scores are ranked by id, as in BEIR and mteb. If the
            list is empty, they are ranked by position.
        unmatched: the number of judgements with an absent document, and the number with an absent query.
    """

    name: str
    queries: list[str]
    documents: list[str]
    relevant: list[dict[int, int]]
    kind: str = "beir"
    parts: list[str] = field(default_factory=list)
    self_matches: list[int] = field(default_factory=list)
    transductive: bool = False
    ids: list[str] = field(default_factory=list)
    unmatched: tuple[int, int] = (0, 0)
    metrics: ClassVar[tuple[str, ...]] = ("nDCG@10", "recall@100")

    def groups(self) -> dict[str, tuple[list[str], str]]:
        """Return the texts to encode and their role, by group."""
        return {"queries": (self.queries, "query"), "documents": (self.documents, "document")}

    def sizes(self) -> dict[str, int]:
        """Return the number of queries and documents."""
        return {"queries": len(self.queries), "documents": len(self.documents)}

    def texts(self) -> Iterator[str]:
        """Yield every text of the set: queries, documents, and the titles and bodies of the documents."""
        yield from self.queries
        yield from self.documents
        yield from self.parts

    def held_out_texts(self) -> Iterator[str]:
        """Yield the texts to exclude from training."""
        yield from self.queries if self.transductive else self.texts()

    def notes(self) -> str:
        """Describe unmatched judgements and queries without a relevant document. Return "" if there are none."""
        documents, queries = self.unmatched
        counts = (
            format_count(documents, "judgement of an absent document", "judgements of absent documents"),
            format_count(queries, "judgement of an absent query", "judgements of absent queries"),
            format_count(self.relevant.count({}), "query", "queries", " without a relevant document (scored 0)"),
        )
        return ", ".join(count for count in counts if count)


@dataclass(frozen=True)
class SimilaritySet:
    """Pairs of sentences with human similarity scores.

    Args:
        name: the name of the set in score reports.
        left: the first sentence of each pair.
        right: the second sentence of each pair.
        scores: the finite score of each pair, on any scale.
        kind: "sts".
    """

    name: str
    left: list[str]
    right: list[str]
    scores: list[float]
    kind: str = "sts"
    metrics: ClassVar[tuple[str, ...]] = ("Spearman",)

    def groups(self) -> dict[str, tuple[list[str], str]]:
        """Return the texts to encode and their role, by group. Similarity is symmetric, so both are documents."""
        return {"left": (self.left, "document"), "right": (self.right, "document")}

    def sizes(self) -> dict[str, int]:
        """Return the number of pairs."""
        return {"pairs": len(self.scores)}

    def texts(self) -> Iterator[str]:
        """Yield every sentence of the set."""
        yield from self.left
        yield from self.right

    held_out_texts = texts  # training excludes every text


@dataclass(frozen=True)
class ClassificationSet:
    """Labelled texts, split into a part to fit a linear classifier and a part to test it.

    Args:
        name: the name of the set in score reports.
        train_texts: the texts to fit the classifier on.
        train_labels: the label of each training text.
        test_texts: the texts to test the classifier on.
        test_labels: the label of each test text.
        kind: "classification".
    """

    name: str
    train_texts: list[str]
    train_labels: list[str]
    test_texts: list[str]
    test_labels: list[str]
    kind: str = "classification"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    def groups(self) -> dict[str, tuple[list[str], str]]:
        """Return the texts to encode and their role, by group."""
        return {"train": (self.train_texts, "document"), "test": (self.test_texts, "document")}

    def sizes(self) -> dict[str, int]:
        """Return the number of texts in both parts."""
        return {"training texts": len(self.train_texts), "test texts": len(self.test_texts)}

    def texts(self) -> Iterator[str]:
        """Yield every text of both parts."""
        yield from self.train_texts
        yield from self.test_texts

    held_out_texts = texts  # training excludes every text


EvalSet = RetrievalSet | SimilaritySet | ClassificationSet


def format_count(count: int, one: str, several: str, rest: str = "") -> str:
    """Return a count with its noun, or an empty string for zero."""
    return f"{count:,} {one if count == 1 else several}{rest}" if count else ""
