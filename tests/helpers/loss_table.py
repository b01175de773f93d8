"""Table of losses for tests: the slow form of each in plain autograd, to compare with the fast form."""

from __future__ import annotations

from jasper_fast.losses import reference

SLOW = {
    "cosine": reference.cosine_loss,
    "similarity": reference.similarity_loss,
    "relative_similarity": reference.relative_similarity_loss,
    "neighbourhood": reference.neighbourhood_loss,
}
