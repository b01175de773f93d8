"""Cost model of one H200: predicted times of the losses, the search and a training step, before any GPU has run them.

A prediction is a sum of products at cuBLAS's rates, bytes at the speed of memory or of the L2 cache, and launches. The
constants come from published measurements of H100 and H200, and from counts of the compiled code's instructions. The
acceptance run measures the constants too, so a wrong prediction can be traced to its constant.

`loss_case`, `search_case` and `train_case` return predicted figures in the layout of the benchmarks' results. So the
targets of a benchmark judge a prediction as they judge a measurement.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Product = Callable[[int, int, int], float]

MEMORY, L2 = 4.3e12, 7.8e12  # bytes a second that are read
BF16, HALF_DEPTH = 816e12, 272  # FLOP/s of a deep product, and the depth at which a product has half of it
FLOAT32 = 50e12  # FLOP/s of a product in full float32
# Launches of the host in relative similarity and for a chunked search, and those in the graph of a search.
LAUNCHES, IN_GRAPH = 70, 42
LAUNCH, REPLAYED, WAIT = 6e-6, 2e-6, 2e-5  # seconds: a launch by the host, one in a CUDA graph, a wait of the host
TRAPEZOID = 1.1  # time of a product by strips of its triangle, relative to the triangle's FLOP
SPLIT = 3  # products of bfloat16 halves that make one of about 16 bits
DIGIT_BITS, LEAF_BITS = 2, 7  # of the radix sort in the exact relative similarity
# Seconds per pair: a pass of that sort, its leaves, and sorts, gathers and searches by torch.
PASS, LEAVES, SORTED = 16.4e-12, 66e-12, 376e-12
ADDITIONS, LOOKUPS = 76e9, 270e9  # a second: integer additions in the cache, and reads of small tables
EAGER_BYTES = 40  # moved per pair by the eager similarity, which keeps its matrices in float32
RERANK, RERANKED = 0.1e-3, 0.5e-9  # seconds from a scan's candidates to its results, and for each result
CHUNK_BYTES = 16 << 20  # scores of a chunk in the search, which stay in the cache
PEAK, PARAMETERS = 989e12, 1.31e9  # FLOP/s to which MFU refers; parameters without embeddings
ENCODER = 0.62  # of PEAK, in the products of an encoder
# Executed FLOP, relative to parameters times tokens. Useful are 6.
EXECUTED = {"cached, checkpointed": 10, "checkpointed": 8, "neither": 6}


def bf16(m: int, n: int, k: int) -> float:
    """Return the seconds of an (m, k) by (k, n) product of 16-bit floats."""
    return 2 * m * n * k / BF16 * (1 + HALF_DEPTH / k)


def float32(m: int, n: int, k: int) -> float:
    """Return the seconds of an (m, k) by (k, n) product in full float32."""
    return 2 * m * n * k / FLOAT32


def loss_case(loss: str, rows: int, widths: list[int], teacher: int, dtype: str = "bfloat16") -> dict[str, Any]:
    """Predict the seconds of forward and backward of a loss by method, in the layout of bench/losses/cuda.py.

    Args:
        loss: name of the loss.
        rows: batch size.
        widths: widths of the students.
        teacher: width of the teacher.
        dtype: dtype of the embeddings.
    """
    seconds: dict[str, float] = {}
    product = float32 if dtype == "float32" else bf16
    if loss == "similarity":
        seconds = {
            "jasper_fast": similarity(rows, widths, teacher, product),
            "eager": _eager(rows, widths, teacher, product),
        }
    elif loss == "relative_similarity":
        seconds = {"jasper_fast": exact(rows, widths[0]), "binned": binned(rows, widths[0])}
    elif loss == "neighbourhood":
        each = [5 * product(rows, rows, width) + 12 * rows**2 / MEMORY + 20 * LAUNCH for width in widths]
        seconds = {"jasper_fast": sum(each)}
    elif loss == "jasper_loss":
        seconds = {
            "jasper_fast": similarity(rows, widths, teacher, product) + sum(exact(rows, width) for width in widths)
        }
    return {"methods": {method: {"both_s": each} for method, each in seconds.items()}}


def similarity(rows: int, widths: list[int], teacher: int, product: Product) -> float:
    """Return the seconds of the similarity loss: by features where rows are many, else by strips of pairs."""
    by_feature = sum(
        5 * SPLIT * bf16(rows, width, teacher) + 40 * rows * (width + teacher) / MEMORY for width in widths
    )
    # Half of T T' once, and for every student half of S S' and the gradient's product. Strips are float32.
    by_pair = TRAPEZOID * product(rows, rows, teacher) / 2
    for width in widths:
        by_pair += TRAPEZOID * product(rows, rows, width) / 2 + product(rows, rows, width)
        by_pair += (10 * rows**2 + 8 * rows * width) / MEMORY
    return min(by_feature, by_pair)


def _eager(rows: int, widths: list[int], teacher: int, product: Product) -> float:
    products = product(rows, rows, teacher) + sum(3 * product(rows, rows, width) for width in widths)
    return products + len(widths) * EAGER_BYTES * rows**2 / MEMORY + 20 * rows * (sum(widths) + teacher) / MEMORY


def exact(rows: int, width: int) -> float:
    """Return the seconds of the exact relative similarity: half of two Gram products, the gradient's, and counts."""
    pairs = rows * (rows - 1) // 2
    passes = math.ceil(max(0, pairs.bit_length() - LEAF_BITS) / DIGIT_BITS)
    return max(2 * float32(rows, rows, width) + pairs * (passes * PASS + LEAVES + SORTED), LAUNCHES * LAUNCH)


def binned(rows: int, width: int) -> float:
    """Return the seconds of the binned relative similarity: scores twice, one product, additions and look-ups."""
    pairs = rows**2 / 2
    products = TRAPEZOID * 3 * bf16(rows, rows, width) + bf16(rows, rows, width)
    return max(products + 3 * pairs / ADDITIONS + 8 * pairs / LOOKUPS + 24 * pairs / L2, LAUNCHES * LAUNCH)


def search_case(size: int, rows: int, width: int, k: int) -> dict[str, Any]:
    """Predict a search of bfloat16 rows in the layout of bench/mips/cuda.py.

    Args:
        size: number of queries.
        rows: number of rows.
        width: width of both.
        k: number of rows to find.
    """
    from jasper_fast.kernels.mips_chunks import chunked
    from jasper_fast.mips.cuda import plan

    sampled = 1 / plan(rows, k, size).step
    read = 2 * rows * width / MEMORY
    bare = max(bf16(size, rows, width), read)
    if chunked(size):
        scores = 2 * size * rows
        device = (1 + sampled) * (bare + 2 * scores / L2) + RERANK + RERANKED * size * k
        ours = max(device, LAUNCH * (2 * scores / CHUNK_BYTES + LAUNCHES)) + 2 * WAIT
    else:
        ours = (1 + sampled) * bare + IN_GRAPH * REPLAYED + 2 * LAUNCH + WAIT
    search = "certified, bfloat16"
    return {
        "seconds": {"bare bf16 product": bare, search: ours},
        "times_bare_product": ours / bare,
        "share_of_bandwidth": {search: read / ours},
    }


def train_case(name: str, share: float = 0.0) -> dict[str, Any]:
    """Predict the MFU of a configuration of bench/train/cuda.py, and the fraction of its step that is the loss.

    Args:
        name: configuration.
        share: predicted fraction of the loss.
    """
    if name not in EXECUTED:
        return {}
    return {"mfu": ENCODER * 6 / EXECUTED[name]} | ({"shares": {"loss": share}} if share else {})
