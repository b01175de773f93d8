"""Exact inner-product search: ``topk`` for arrays and ``FlatIPIndex`` for a corpus that is searched repeatedly.

Results are ordered by the fp64 dot products of the stored vectors. Ties go to the lower index. ``certified`` derives
this order from low-precision scores with proven error bounds (docs/mips.md). ``exact`` computes every product in fp64.
``fast`` ranks by the low-precision scores.
"""

from jasper_fast.mips.binary import SignIndex
from jasper_fast.mips.funnel import funnel, funnel_recall
from jasper_fast.mips.index import FlatIPIndex
from jasper_fast.mips.top_k import topk

__all__ = ["FlatIPIndex", "SignIndex", "funnel", "funnel_recall", "topk"]
