"""A matrix product that normalises its operands' rows: for gradients and the feature form.

cuBLAS lacks four of its features. It has full float32 precision for any `allow_tf32`. It scales operands by row without
a normalised copy. It adds to a result, and it splits a long dimension into separate parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from jasper_fast.kernels.configs import TILES_32_BIT, Tile, choose, tuned
from jasper_fast.kernels.registry import TYPES, Form, behind_a_flag, unaligned, with_ones


@triton.jit
def round_to_tf32(x):
    """Round float32 to the 11 bits of TF32, to nearest. Tensor cores ignore the others, which shrinks every value."""
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def product_kernel(
    A,  # (M, K)
    X,  # (K, N)
    ROW,  # (M,) fp32 or None: scales the rows of A
    INNER_A,  # (K,) fp32 or None: scales the columns of A
    INNER_X,  # (K,) fp32 or None: scales the rows of X
    OUT,  # (splits, M, N) fp32
    FLAG,  # () int32: 0 skips the work; None never does
    M,
    N,
    K,
    depth,
    stride_am,
    stride_ak,
    stride_xk,
    stride_xn,
    stride_oz,
    stride_om,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write OUT[z] (+)= (ROW A INNER_A) (INNER_X X) over the z-th ``depth`` of K, in bf16 if PRECISION is "bf16"."""
    if FLAG is not None:  # noqa: SIM102, decided when compiling
        if tl.load(FLAG) == 0:
            return
    # Concurrent blocks share rows and columns in the L2 cache.
    pid, split = tl.program_id(0), tl.program_id(1)
    across = tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP * across)
    height = min(tl.cdiv(M, BLOCK_M) - group * GROUP, GROUP)
    m0 = (group * GROUP + pid % (GROUP * across) % height).to(tl.int64) * BLOCK_M
    n0 = ((pid % (GROUP * across)) // height).to(tl.int64) * BLOCK_N
    # Scalars carry the 64-bit part of every address. 32-bit offsets inside a tile take half the registers.
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    rows, columns = (M - m0).to(tl.int32), (N - n0).to(tl.int32)
    begin = split.to(tl.int64) * depth
    left = tl.minimum(depth, K - begin).to(tl.int32)
    a_tile = A + m0 * stride_am + begin * stride_ak
    x_tile = X + n0 * stride_xn + begin * stride_xk
    a_offsets = m[:, None] * stride_am + k[None, :] * stride_ak
    x_offsets = k[:, None] * stride_xk + n[None, :] * stride_xn
    if ROW is not None:
        row = tl.load(ROW + m0 + m, mask=m < rows, other=0.0)
    out = OUT + split.to(tl.int64) * stride_oz + m0 * stride_om + n0
    offsets = m[:, None] * stride_om + n[None, :]
    wanted = (m[:, None] < rows) & (n[None, :] < columns)
    acc = tl.load(out + offsets, mask=wanted, other=0.0) if ACCUMULATE else tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, left, BLOCK_K):
        inside = start + k < left
        a = tl.load(a_tile + a_offsets, mask=(m[:, None] < rows) & inside[None, :], other=0.0)
        x = tl.load(x_tile + x_offsets, mask=inside[:, None] & (n[None, :] < columns), other=0.0)
        if ROW is not None:
            a = a.to(tl.float32) * row[:, None]
        if INNER_A is not None:
            a = a.to(tl.float32) * tl.load(INNER_A + begin + start + k, mask=inside, other=0.0)[None, :]
        if INNER_X is not None:
            x = x.to(tl.float32) * tl.load(INNER_X + begin + start + k, mask=inside, other=0.0)[:, None]
        if PRECISION == "bf16":
            acc = tl.dot(a.to(tl.bfloat16), x.to(tl.bfloat16), acc)
        elif PRECISION == "tf32":
            a, x = round_to_tf32(a.to(tl.float32)), round_to_tf32(x.to(tl.float32))
            acc = tl.dot(a, x, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(a.to(tl.float32), x.to(tl.float32), acc, input_precision=PRECISION)
        a_tile += BLOCK_K * stride_ak
        x_tile += BLOCK_K * stride_xk
    tl.store(out + offsets, acc, mask=wanted)


GROUP = 8
# Scaling A goes through registers, so a step has half the usual depth.
TILES_BF16 = (Tile(128, 128, 32, 8, 4), Tile(64, 64, 32, 4, 4))


def exact(*dtypes: torch.dtype) -> str:
    """Return the precision at which products of these dtypes keep float32's accuracy.

    TF32 keeps 11 bits and bfloat16 8. Three products of the parts give 22 and 16. A bfloat16 value times a float32
    factor has 8 bits of information, for which 16 are enough. The 11 bits of float16 need more.
    """
    if INTERPRETED:
        return "ieee"
    return "bf16x3" if all(dtype == torch.bfloat16 for dtype in dtypes) else "tf32x3"


INTERPRETED = triton.knobs.runtime.interpret


def product(
    a: Tensor,
    x: Tensor,
    out: Tensor,
    *,
    row: Tensor | None = None,
    inner_a: Tensor | None = None,
    inner_x: Tensor | None = None,
    accumulate: bool = False,
    precision: str,
    flag: Tensor | None = None,
    depth: int | None = None,
    tile: Tile | None = None,
) -> None:
    """Compute out (+)= (row a inner_a) (inner_x x).

    Args:
        a: (M, K) left factor, any strides.
        x: (K, N) right factor, any strides.
        out: (M, N) float32 result with contiguous rows, or (splits, M, N), one result for each ``depth`` of K.
        row: (M,) float32 scales of the rows of a. None scales nothing.
        inner_a: (K,) float32 scales of the columns of a. None scales nothing.
        inner_x: (K,) float32 scales of the rows of x. None scales nothing.
        accumulate: add to out.
        precision: "bf16" or "tf32" (operands rounded to it), or for float32 operands "ieee", "tf32x3" or "bf16x3".
        flag: () int32 switch. 0 leaves out unchanged. None always computes.
        depth: number of rows of x in each split. None makes one split.
        tile: tile of the launch. None chooses one by shape.
    """
    (m, k), n = a.shape, x.shape[1]
    depth = depth or k
    parts = out if out.dim() == 3 else out[None]
    assert len(parts) == triton.cdiv(k, depth)
    candidates = TILES_BF16 if precision == "bf16" else TILES_32_BIT

    def run(tile: Tile, add: bool = accumulate) -> None:
        product_kernel[(triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n), len(parts))](
            a,
            x,
            row,
            inner_a,
            inner_x,
            parts,
            flag,
            m,
            n,
            k,
            depth,
            *a.stride(),
            *x.stride(),
            *parts.stride()[:2],
            ACCUMULATE=add,
            PRECISION=precision,
            GROUP=GROUP,
            **tile.launch,
        )

    if tile is None:
        size = tuple(triton.next_power_of_2(i) for i in (m, n, depth, len(parts)))
        key = ("product", size, a.dtype, x.dtype, precision, out.device)
        # Only a launch that does not accumulate can be repeated for measurement, and one behind a flag may do nothing.
        usual = choose(candidates, m, n * len(parts))
        tile = usual if accumulate or flag is not None else tuned(key, candidates, usual, run, out)
    run(tile)


def multiply(a: Tensor, x: Tensor, into: Tensor | None = None) -> Tensor:
    """Multiply float32 matrices with full precision.

    Args:
        a: (M, K) left factor, any strides.
        x: (K, N) right factor, any strides.
        into: (M, N) result to add to, rows contiguous. None makes a new one.

    Returns:
        (M, N) float32 result.
    """
    out = torch.empty(len(a), x.shape[1], dtype=torch.float32, device=a.device) if into is None else into
    if out.numel():
        product(a, x, out, accumulate=into is not None, precision=exact(a.dtype, x.dtype))
    return out


def forms() -> Iterator[Form]:
    """Yield the forms of this module's kernels. See `registry`."""
    # Products of pair_losses.py: name, dtypes of A and X, scales, precision. Mixed: the teacher has another dtype.
    uses: list[tuple[str, str, str, tuple[str, ...], str]] = []
    mixed: list[tuple[str, str, str, tuple[str, ...], str]] = []
    for x in TYPES.values():
        precision = {"bf16": "bf16", "fp16": "tf32", "fp32": "tf32x3"}[x]
        uses.append((f"row block {x}", "bf16" if x == "bf16" else "fp32", x, ("INNER_A",), precision))
        precision = "bf16x3" if x == "bf16" else "tf32x3"
        uses.append((f"features {x}", x, x, ("INNER_A", "INNER_X"), precision))
        uses.append((f"feature gradient {x}", x, "fp32", ("ROW",), precision))
    # Products of `multiply`: gradients of the relative similarity losses, exact and binned.
    uses += [(name, "fp32", "fp32", (), "tf32x3") for name in ("plain", "row block plain")]
    for a, x, precision in (("fp32", "bf16", "tf32x3"), ("bf16", "fp32", "tf32x3"), ("bf16", "fp16", "tf32")):
        mixed.append((f"row block {a}/{x}", a, x, ("INNER_A",), precision))
    for a, x in itertools.permutations(TYPES.values(), 2):
        mixed.append((f"features {a}/{x}", a, x, ("INNER_A", "INNER_X"), "tf32x3"))
    layouts = {
        "": ({"stride_am": "i32:16", "stride_xk": "i32:16"}, {"stride_ak": 1, "stride_xn": 1}),
        " transposed": ({"stride_ak": "i32:16", "stride_xk": "i32:16"}, {"stride_am": 1, "stride_xn": 1}),
        " strided": (dict.fromkeys(("stride_am", "stride_ak", "stride_xk", "stride_xn"), "i32"), {}),
    }
    across = ({"stride_am": "i32:16", "stride_xn": "i32:16"}, {"stride_ak": 1, "stride_xk": 1})  # the scores, S S'
    chosen = list(itertools.product(uses, layouts.items()))
    chosen += [(use, (" across", across)) for use in uses if use[0] == "plain"]
    chosen += [(use, (" transposed", layouts[" transposed"])) for use in mixed]
    for (name, a, x, scales, precision), (layout, (strides, ones)) in chosen:
        for tile in TILES_BF16 if precision == "bf16" else TILES_32_BIT:
            types = {"A": f"*{a}:16", "X": f"*{x}:16", "OUT": "*fp32:16"}
            types |= {"M": "i32", "N": "i32:16", "K": "i32:16", "depth": "i32:16", **strides}
            types |= {"stride_oz": "i64", "stride_om": "i32:16", **dict.fromkeys(scales, "*fp32:16")}
            adds = name.startswith("row block")
            constants = {"FLAG": None, "ACCUMULATE": adds, "PRECISION": precision, "GROUP": GROUP}
            constants |= {scale: None for scale in ("ROW", "INNER_A", "INNER_X") if scale not in scales}
            form = Form(
                f"{name}{layout}, {tile}",
                product_kernel,
                types,
                {**constants, **ones, **tile.constants},
                tile.warps,
                tile.stages,
                tensor_cores=True,
                stack=dict.fromkeys((80, 90, 100), 96),
                spills="strided" in layout,  # Such loads keep an address for every element.
                quick=(name, layout) in (("row block bf16", ""), ("features fp32", " transposed")) and tile.m == 128,
            )
            yield form
            if adds and scales and not layout and tile.m == 64:
                yield behind_a_flag(form)
            if ones and (name, a, x, scales, precision) in uses:
                yield unaligned(form, "depth")
            if not layout and tile.m == 64:
                yield with_ones(form, "M", "N", "K", "depth", "stride_am", "stride_xk", "stride_oz", "stride_om")
