"""Closed-form maps between two embedding spaces, and narrow projections of one.

Everything here works on arrays: it knows no models and no texts. A map W (h, d) leads from the student's space to the
teacher's. A projection P (d, w) leads from there to a narrow space.

`statistics` sums over pairs of embeddings. `maps` solves for W from these sums. `projections` finds P.
"""

from __future__ import annotations

from jasper_fast.fitting.maps import low_rank_map, procrustes_map, ridge_map, start_map
from jasper_fast.fitting.projections import learned_axes, mined_groups, principal_axes
from jasper_fast.fitting.statistics import PairStatistics

__all__ = [
    "PairStatistics",
    "learned_axes",
    "low_rank_map",
    "mined_groups",
    "principal_axes",
    "procrustes_map",
    "ridge_map",
    "start_map",
]
