"""The losses as a plug-in for sentence-transformers' own trainer: teacher vectors go into the ``label`` column.

train_dataset = Dataset.from_dict({"text": texts, "label": teacher_vectors})  # vectors as lists or arrays
loss = jasper_fast.sentence_transformers.JasperLoss(model)
SentenceTransformerTrainer(model=model, args=args, train_dataset=train_dataset, loss=loss).train()
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from jasper_fast import losses


class JasperLoss(nn.Module):
    """`jasper_fast.losses.JasperLoss` on a SentenceTransformer's embeddings.

    Args:
        model: the student, a SentenceTransformer. Where its width is not the teacher's there is no cosine term.
        options: arguments of `jasper_fast.losses.JasperLoss`, by name.

    Raises:
        TypeError, ValueError: as `jasper_fast.losses.JasperLoss`.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model = model
        self.loss = losses.JasperLoss(**options)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """The weighted loss of one batch; several text columns count as one batch, one column under another.

        Args:
            sentence_features: tokenised texts, one entry for each text column.
            labels: (B, E) teacher vectors for every column, or (B, columns, E) for each its own.

        Raises:
            ValueError: labels that are not teacher vectors for these columns.
        """
        columns = [self.model(features)["sentence_embedding"] for features in sentence_features]
        embeddings = torch.cat(columns)  # (columns * B, D)
        return self.loss(embeddings, _teacher_rows(labels, len(columns)).to(embeddings.device)).loss

    def get_config_dict(self) -> dict[str, Any]:
        """What the trainer writes into a model card."""
        loss = self.loss
        return {
            "weights": loss.weights,
            "margin": loss.margin,
            "ties": loss.ties,
            "neighbourhood": loss.neighbourhood,
            "temperature": loss.temperature,
        }


def _teacher_rows(labels: Tensor, columns: int) -> Tensor:
    if labels.dim() == 2:
        return labels.repeat(columns, 1)
    if labels.dim() == 3 and labels.shape[1] == columns:
        return labels.transpose(0, 1).flatten(0, 1)
    raise ValueError(
        f"label: expected teacher vectors of shape (B, E) or (B, {columns}, E), got {tuple(labels.shape)}; "
        "put one teacher vector per text into the dataset's label column"
    )
