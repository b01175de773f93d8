"""A sentence-transformers model as one side of a comparison, with the prompts and routes of stock encoding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jasper_fast.drift.side import Facts, Prompts, Side, checked_rows
from jasper_fast.drift.variants import Variants
from jasper_fast.exporting.golden import Text, by_role, golden_facts, installed_versions
from jasper_fast.models.embedder import flat_model, load_model
from jasper_fast.models.hub import resolve_model
from jasper_fast.models.sentence_transformer import encode_role

BATCH = 32


class StockSide(Side):
    """Embeddings of a sentence-transformers model, with the prompt and the route of each role.

    Args:
        name: folder of a model or of a run, hub name, or ``package:import_name/folder``.
        width: head to use of a model with several widths. None is the widest one.
        trust_remote_code: permission to run the model's custom code.

    Raises:
        JasperError: the model cannot be loaded.
    """

    def __init__(self, name: str, width: int | None = None, *, trust_remote_code: bool = False) -> None:
        loaded = load_model(name, trust_remote_code=trust_remote_code)
        heads = Variants(loaded).widths
        self.model = flat_model(loaded, width) if width in heads else loaded
        self.variants = Variants(loaded, width)
        folder = Path(resolve_model(name))
        weights = golden_facts(folder)["weights"] if folder.is_dir() else {}
        parts = self.variants
        settings = (parts.prompts, parts.modules, parts.pooling, parts.max_tokens)
        facts = Facts(*settings, versions=installed_versions(), weights=weights, int8=False)
        super().__init__(name, "sentence-transformers model", facts)

    def embed(self, texts: Sequence[Text], prompts: Prompts | None = None, *, together: bool = True) -> np.ndarray:
        """Embed texts in padded batches of 32, or one at a time."""
        used = self.variants.prompts if prompts is None else prompts
        size = BATCH if together else 1

        def encode(group: list[str], role: str) -> np.ndarray:
            return encode_role(self.model, group, role, used[role], batch_size=size).float().cpu().numpy()

        return checked_rows(by_role(texts, encode), len(texts), self.name)
