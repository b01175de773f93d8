"""The losses of Jasper and Stella (arXiv 2412.19048), the neighbourhood loss and ranking losses, on embeddings.

Each takes (B, D) student and (B, E) teacher embeddings in float16, bfloat16, float32 or float64, with any strides.
`listwise_loss` and `info_nce_loss` take queries and documents instead. All but float64 are computed in float32, also
under autocast. Rows are normalized inside. NaN and inf go through to the loss
and its gradient. A zero row gets no gradient. Wrong arguments raise from their metadata alone, without waiting for a
device.

Each loss has its file. `combined` sums those in the table, `jasper_fast.config.losses`. `reference` has the slow forms.
"""

from __future__ import annotations

from jasper_fast.losses.combined import (
    REDUCTIONS,
    AnyOutput,
    CombinedLoss,
    JasperLoss,
    JasperLossOutput,
    LossOutput,
    NeighbourhoodLossOutput,
)
from jasper_fast.losses.cosine import cosine_loss
from jasper_fast.losses.info_nce import info_nce_loss
from jasper_fast.losses.listwise import listwise_loss
from jasper_fast.losses.neighbourhood import neighbourhood_loss
from jasper_fast.losses.relative_similarity import RELATIVE_METHODS, TIES, relative_similarity_loss
from jasper_fast.losses.similarity import SIMILARITY_METHODS, similarity_loss

__all__ = [
    "REDUCTIONS",
    "RELATIVE_METHODS",
    "SIMILARITY_METHODS",
    "TIES",
    "AnyOutput",
    "CombinedLoss",
    "JasperLoss",
    "JasperLossOutput",
    "LossOutput",
    "NeighbourhoodLossOutput",
    "cosine_loss",
    "info_nce_loss",
    "listwise_loss",
    "neighbourhood_loss",
    "relative_similarity_loss",
    "similarity_loss",
]
