"""A text index, opened to answer questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jasper_fast.data.document_ids import DocumentId
from jasper_fast.data.rows import check_text
from jasper_fast.models.embedder import load_model, model_encoder
from jasper_fast.text_index.files import check_model, find_model, is_migrated, open_index


@dataclass(frozen=True)
class Hit:
    """One result: the inner product with the question, the id, and the text.

    The id is the user's if the index has ids. Otherwise it is the row number in the index.
    """

    score: float
    id: DocumentId
    text: str


class TextIndex:
    """An index of texts on disk, opened with the model that built it.

    Args:
        path: folder that ``build`` wrote.
        model: current location of the model, or a model that was mapped into the index. None looks next to the index
            as at the build, and then at the place of the build.
        verify: compare the files' checksums, and check that the model built the index.
        trust_remote_code: allow code that the model brings to run.

    Raises:
        JasperError: the folder has no index, the index is damaged, or another model built it.
    """

    def __init__(
        self, path: str | Path, model: str | None = None, verify: bool = True, *, trust_remote_code: bool = False
    ) -> None:
        path = Path(path)
        settings, table, self.vectors = open_index(path, verify)
        name, self.width, self.role = model or find_model(settings, path), settings["width"], settings["role"]
        self.texts = table.column("text")
        self.ids = table.column("id") if "id" in table.column_names else None
        if verify:
            check_model(name, path, settings, migrated=True)
        length = None if is_migrated(name, settings) else settings["max_length"]
        loaded = load_model(name, length, trust_remote_code=trust_remote_code)
        self._encode = model_encoder(loaded, [self.width])

    def __len__(self) -> int:
        return len(self.texts)

    def encode(self, questions: Sequence[str]) -> np.ndarray:
        """Encode questions, (Q, width) float32.

        Args:
            questions: Q questions.

        Raises:
            JasperError: a question has a lone surrogate.
        """
        checked = [check_text(question, f"question {number}") for number, question in enumerate(questions, 1)]
        return self._encode(checked, self.role)[self.width]

    def ask(self, questions: Sequence[str], k: int = 10) -> list[list[Hit]]:
        """Return the k texts nearest to every question, nearest first.

        Args:
            questions: Q questions.
            k: number of texts to return for each.

        Raises:
            JasperError: a question has a lone surrogate.
        """
        if not questions:
            return []
        scores, ids = self.vectors.search(self.encode(questions), min(k, len(self)))
        return [
            [Hit(score, self._id(number), self.texts[number].as_py()) for score, number in zip(*pair, strict=True)]
            for pair in zip(scores.tolist(), ids.tolist(), strict=True)
        ]

    def _id(self, number: int) -> DocumentId:
        return number if self.ids is None else self.ids[number].as_py()
