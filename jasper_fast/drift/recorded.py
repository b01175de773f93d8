"""A golden file as one side of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jasper_fast.drift.side import Facts, Prompts, Side
from jasper_fast.exporting.golden import Text, read_golden
from jasper_fast.utils.errors import JasperError

PYTORCH_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # other .bin files belong to OpenVINO


class GoldenSide(Side):
    """Embeddings of a golden file. It has only those of the texts in the file, with prompts.

    Args:
        name: path of the file.

    Raises:
        JasperError: the file is missing or damaged.
    """

    live = False

    def __init__(self, name: str) -> None:
        golden = read_golden(name)
        facts = {key: golden.facts.get(key) for key in ("prompts", "modules", "pooling", "max_tokens", "model")}
        stored = {key: golden.facts.get(key) or {} for key in ("versions", "weights")}
        super().__init__(name, "golden file", Facts(**facts, **stored))  # type: ignore[arg-type]
        self.texts, self.width = golden.texts, int(golden.facts["width"])
        self._rows = dict(zip(golden.texts, golden.embeddings, strict=True))
        self._folder = golden.path.parent

    def embed(self, texts: Sequence[Text], prompts: Prompts | None = None, *, together: bool = True) -> np.ndarray:
        """Return the stored embeddings.

        Raises:
            JasperError: a text is not in the file.
        """
        missing = [text for text in texts if text not in self._rows]
        if missing:
            raise JasperError(
                f"{self.name}: the golden file lacks {len(missing)} of {len(texts)} texts, the first of role "
                f"{missing[0].role}: {missing[0].text[:40]!r}. Fix: leave --texts out, and compare two golden files "
                "only if the same version wrote them"
            )
        return np.stack([self._rows[text] for text in texts])

    def model_source(self) -> Path | None:
        """Return the folder of the file, if it holds the weights that sentence-transformers loads."""
        return self._folder if holds_weights(self._folder) else None


def holds_weights(folder: Path) -> bool:
    """Return True for a sentence-transformers folder with weights for PyTorch, and not only a tokenizer and graphs."""
    has_weights = any(file for glob in PYTORCH_WEIGHTS for file in folder.rglob(glob))
    return (folder / "modules.json").is_file() and has_weights
