"""Exact inner-product search: ``topk`` on arrays, ``FlatIPIndex`` for corpora that are kept.

The order is that of the fp64 dot products of the stored vectors, ties by the lower index. ``certified`` finds it from
low-precision scores with error bounds (docs/mips.md); ``exact`` computes every product in fp64; ``fast`` trusts the
low-precision scores.
"""

from jasper_fast.mips.funnel import funnel, funnel_recall
from jasper_fast.mips.index import FlatIPIndex
from jasper_fast.mips.search import topk
from jasper_fast.mips.signs import SignIndex

__all__ = ["FlatIPIndex", "SignIndex", "funnel", "funnel_recall", "topk"]
