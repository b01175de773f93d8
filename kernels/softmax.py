"""An online softmax in powers of two, one for each lane of a block, so that a row's loop reduces nothing."""

from __future__ import annotations

import triton
import triton.language as tl

LOG_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def add_logits(top, total, logits):
    """Return each lane's largest logit so far, and its sum of exp2(logit - largest). -inf adds nothing."""
    higher = tl.maximum(top, logits)
    # A lane without logits so far has no largest one. Nothing is subtracted, and exp2(-inf) is 0.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, total * tl.exp2(top - base) + tl.exp2(logits - base)


@triton.jit
def log_sum(top, total):
    """Return log2 of the sum of exp2 over all lanes' logits, -inf without logits."""
    highest = tl.max(top, axis=0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    return base + tl.log2(tl.sum(total * tl.exp2(top - base), axis=0))
