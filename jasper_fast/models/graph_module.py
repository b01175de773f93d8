"""An ONNX graph as the first module of a sentence-transformers model."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from sentence_transformers.base.modules import InputModule
from torch import Tensor

from jasper_fast.models.graph import TextGraph
from jasper_fast.utils.errors import JasperError

NO_LIMIT = 2**20  # tokens of a graph whose settings state no limit


class GraphModule(InputModule):
    """The states of all tokens, or the pooled embedding, from a graph that onnxruntime runs on the CPU.

    Args:
        graph: the graph.
        output: name of its output, (n, tokens, D) states or (n, D) embeddings.

    Attributes:
        max_seq_length: tokens after which a text is cut.
        pools: True if the output has one embedding for each text.
    """

    def __init__(self, graph: TextGraph, output: str) -> None:
        super().__init__()
        self.graph, self.output = graph, output
        self.tokenizer = graph.tokenizer
        self.max_seq_length = graph.limit or NO_LIMIT
        self.config = SimpleNamespace(max_position_embeddings=graph.limit)
        self.pools = len(graph.outputs[output]) == 2
        self._width = int(self._states(graph.tokenize(["a"], self.max_seq_length)).shape[-1])

    @property
    def model(self) -> GraphModule:
        """The encoder, for checks of its limits: this module."""
        return self

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **options: Any) -> dict[str, Any]:
        """Tokenize n texts with a prompt before each, as (n, tokens) int64 tensors."""
        texts = [(prompt or "") + text for text in inputs]
        return {key: torch.from_numpy(value) for key, value in self.graph.tokenize(texts, self.max_seq_length).items()}

    def forward(self, features: dict[str, Any], **options: Any) -> dict[str, Any]:
        """Add ``token_embeddings`` (n, tokens, D), or ``sentence_embedding`` (n, D), in float32."""
        key = "sentence_embedding" if self.pools else "token_embeddings"
        arrays = {name: value.cpu().numpy() for name, value in features.items() if isinstance(value, Tensor)}
        return {**features, key: torch.from_numpy(self._states(arrays)).to(features["attention_mask"].device)}

    def get_embedding_dimension(self) -> int:
        """Return D."""
        return self._width

    def save(self, output_path: str, *args: Any, **options: Any) -> NoReturn:
        """Refuse to save: stock sentence-transformers could not load the model.

        Raises:
            JasperError: always.
        """
        raise JasperError(
            f"{self.graph.name}: an ONNX graph cannot be saved as a sentence-transformers model. Fix: use the model in "
            "PyTorch form"
        )

    def _states(self, arrays: dict[str, Any]) -> Any:
        return self.graph.run(arrays, self.output)
