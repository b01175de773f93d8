"""The losses as a plug-in for the trainer of sentence-transformers. Teacher embeddings go into the ``label`` column."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from jasper_fast import losses

ADD_LABELS = "put one teacher embedding per text, a list of floats, into the dataset's label column"


class JasperLoss(nn.Module):
    """`jasper_fast.losses.JasperLoss` on a SentenceTransformer's embeddings.

    Args:
        model: the student, a SentenceTransformer. If its width differs from the teacher's, there is no cosine term.
        **options: arguments of `jasper_fast.losses.JasperLoss`, by name.

    Raises:
        TypeError: ``model`` is not a module, or `jasper_fast.losses.JasperLoss` raises it for the options.
        ValueError: `jasper_fast.losses.JasperLoss` raises it for the options.

    Example:
        A stand-in takes the place of the SentenceTransformer here. With a real one, pass ``JasperLoss(model)`` as
        ``loss`` to a SentenceTransformerTrainer whose dataset has the columns ``text`` and ``label``.

        >>> import torch
        >>> class Student(torch.nn.Embedding):
        ...     def forward(self, features):
        ...         return {"sentence_embedding": super().forward(features["input_ids"]).mean(dim=1)}
        >>> loss = JasperLoss(Student(100, 8), weights=(10.0, 200.0, 20.0))
        >>> texts = [{"input_ids": torch.tensor([[5, 7], [1, 2], [3, 9]])}]
        >>> loss(texts, labels=torch.randn(3, 16)).shape
        torch.Size([])
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a SentenceTransformer, got {type(model).__name__}. Fix: load it first")
        self.model = model
        self.loss = losses.JasperLoss(**options)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None) -> Tensor:
        """Return the weighted loss of one batch. Several text columns make one batch, one column below another.

        Args:
            sentence_features: tokenized texts, one entry for each text column.
            labels: teacher embeddings (B, E) that all columns share, or (B, columns, E), one for each text.

        Raises:
            ValueError: there is not one teacher embedding for each text.
            TypeError: the model's output has no sentence embeddings.
        """
        columns = [_embeddings(self.model(features)) for features in sentence_features]
        if not columns:
            raise ValueError("expected at least one column of texts, got none. Fix: add a column of texts")
        embeddings = torch.cat(columns)  # (columns * B, D)
        teacher = _teacher_rows(labels, len(columns[0]), len(columns))
        return self.loss(embeddings, teacher.to(embeddings.device)).loss

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings for the trainer's model card."""
        loss = self.loss
        return {
            "weights": loss.weights,
            "margin": loss.margin,
            "ties": loss.ties,
            "neighbourhood": loss.neighbourhood,
            "temperature": loss.temperature,
        }


def _embeddings(output: Any) -> Tensor:
    if not isinstance(output, Mapping) or not isinstance(output.get("sentence_embedding"), Tensor):
        got = sorted(output) if isinstance(output, Mapping) else type(output).__name__
        raise TypeError(f"model: expected an output with sentence_embedding, got {got}. Fix: add a Pooling module")
    return output["sentence_embedding"]


def _teacher_rows(labels: Any, texts: int, columns: int) -> Tensor:
    """Check the label column and return (columns * texts, E), in the order of the embeddings."""
    expected = f"label: expected teacher embeddings of shape ({texts}, E)"
    if columns > 1:
        expected += f" or ({texts}, {columns}, E)"
    if labels is None:
        raise ValueError(f"{expected}, got none. Fix: {ADD_LABELS}")
    if not isinstance(labels, Tensor):
        raise ValueError(f"{expected} as a tensor, got {type(labels).__name__}. Fix: {ADD_LABELS}")
    if labels.dim() not in (2, 3) or not labels.is_floating_point():
        numbers = "" if labels.is_floating_point() else f" of {str(labels.dtype).removeprefix('torch.')}"
        raise ValueError(f"{expected}, got {tuple(labels.shape)}{numbers}. Fix: {ADD_LABELS}")
    if len(labels) != texts or labels.dim() == 3 and labels.shape[1] != columns:
        raise ValueError(f"{expected}, got {tuple(labels.shape)}. Fix: give one embedding per text")
    if labels.dim() == 2:
        return labels.repeat(columns, 1)
    return labels.transpose(0, 1).flatten(0, 1)
