"""The losses as a plug-in for sentence-transformers' trainer: teacher vectors go into the ``label`` column.

train_dataset = Dataset.from_dict({"text": texts, "label": teacher_vectors})  # vectors as lists or arrays
loss = jasper_fast.sentence_transformers.JasperLoss(model)
SentenceTransformerTrainer(model=model, args=args, train_dataset=train_dataset, loss=loss).train()
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from jasper_fast import losses

ADD_LABELS = "put one teacher vector per text, a list of floats, into the dataset's label column"


class JasperLoss(nn.Module):
    """`jasper_fast.losses.JasperLoss` on a SentenceTransformer's embeddings.

    Args:
        model: the student, a SentenceTransformer. Where its width is not the teacher's there is no cosine term.
        options: arguments of `jasper_fast.losses.JasperLoss`, by name.

    Raises:
        TypeError: ``model`` is not a module, or as `jasper_fast.losses.JasperLoss`.
        ValueError: as there.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a SentenceTransformer, got {type(model).__name__}. Fix: load it first")
        self.model = model
        self.loss = losses.JasperLoss(**options)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None) -> Tensor:
        """Return the weighted loss of one batch; several text columns count as one batch, one column under another.

        Args:
            sentence_features: tokenised texts, one entry for each text column.
            labels: (B, E) teacher vectors for every column, or (B, columns, E) for each its own.

        Raises:
            ValueError: no teacher vectors, or others than one for each text.
            TypeError: a model that gives no sentence embeddings.
        """
        columns = [_embeddings(self.model(features)) for features in sentence_features]
        if not columns:
            raise ValueError("expected at least one column of texts, got none. Fix: add a column of texts")
        embeddings = torch.cat(columns)  # (columns * B, D)
        teacher = _teacher_rows(labels, len(columns[0]), len(columns))
        return self.loss(embeddings, teacher.to(embeddings.device)).loss

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings that the trainer writes into a model card."""
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
        given = sorted(output) if isinstance(output, Mapping) else type(output).__name__
        raise TypeError(f"model: expected an output with sentence_embedding, got {given}. Fix: add a Pooling module")
    return output["sentence_embedding"]


def _teacher_rows(labels: Any, texts: int, columns: int) -> Tensor:
    """Check the label column and return (columns * texts, E), in the order of the embeddings."""
    expected = f"label: expected teacher vectors of shape ({texts}, E)"
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
        raise ValueError(f"{expected}, got {tuple(labels.shape)}. Fix: give as many vectors as texts")
    if labels.dim() == 2:
        return labels.repeat(columns, 1)
    return labels.transpose(0, 1).flatten(0, 1)
