"""A GGUF file as one side of a comparison, run by llama.cpp's server with its own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jasper_fast.drift.recorded import holds_weights
from jasper_fast.drift.side import Facts, Prompts, Side, checked_rows
from jasper_fast.exporting.gguf import GgufModel
from jasper_fast.exporting.golden import Text, by_role, golden_facts, installed_versions

SUFFIX = ".gguf"


class GgufSide(Side):
    """Embeddings of a GGUF file. Prompts are those of its folder.

    Args:
        name: argument of the command.
        file: the file, of a BERT encoder.

    Raises:
        JasperError: a package or llama.cpp's server is missing, or the file cannot be opened.
    """

    def __init__(self, name: str, file: Path) -> None:
        self._folder, self._model = file.parent, GgufModel(file)
        known = golden_facts(file.parent)
        self.prompts: Prompts = known["prompts"]
        kind = f"GGUF file {file.name}{' with int8 weights' if self._model.int8 else ''}"
        facts = {key: known[key] for key in ("prompts", "modules", "pooling", "weights", "model")}
        super().__init__(
            name,
            kind,
            Facts(max_tokens=self._model.length, versions=installed_versions(), int8=self._model.int8, **facts),
        )

    def embed(self, texts: Sequence[Text], prompts: Prompts | None = None, *, together: bool = True) -> np.ndarray:
        """Embed texts. The server pads none, so ``together`` changes nothing."""
        used = self.prompts if prompts is None else prompts
        rows = by_role(texts, lambda group, role: self._model.embed([used[role] + text for text in group]))
        return checked_rows(rows, len(texts), self.name)

    def model_source(self) -> Path | None:
        """Return the folder of the file, if the PyTorch model is in it too."""
        return self._folder if holds_weights(self._folder) else None


def find_gguf(folder: Path) -> Path | None:
    """Return the only GGUF file of a folder. None: no such file, or several."""
    files = sorted(folder.glob(f"*{SUFFIX}"))
    return files[0] if len(files) == 1 else None
