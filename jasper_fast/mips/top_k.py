"""The one search loop, over pieces of a corpus and groups of queries, and ``topk`` on plain arrays."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from jasper_fast.mips.device import low_plane, queries_at_once, rows_at_once, search_device, serves
from jasper_fast.mips.inputs import FLOATS, QUERIES, as_tensor, check_rows, row_mask
from jasper_fast.mips.pieces import Piece, bin_norms, not_finite
from jasper_fast.mips.scan import (
    FEW,
    LARGEST,
    TILE_QUERIES,
    TILE_ROWS,
    Queries,
    candidates_for,
    multiply_in_bf16,
    native,
    search_few,
    search_plain,
    search_tiles,
)
from jasper_fast.mips.state import State
from jasper_fast.mips.stream import chunks

Precision = Literal["certified", "exact", "fast"]
PRECISIONS = ("certified", "exact", "fast")
SCRATCH = 256 << 20  # bytes


@overload
def topk(
    queries: Tensor, corpus: Any, k: int, *, precision: Precision = ..., valid: Any = ..., scratch: int = ...
) -> tuple[Tensor, Tensor]: ...


@overload
def topk(
    queries: np.ndarray, corpus: Any, k: int, *, precision: Precision = ..., valid: Any = ..., scratch: int = ...
) -> tuple[np.ndarray, np.ndarray]: ...


def topk(
    queries: Any,
    corpus: Any,
    k: int,
    *,
    precision: Precision = "certified",
    valid: Any = None,
    scratch: int = SCRATCH,
) -> tuple[Any, Any]:
    """The k rows of highest inner product for every query, best first, ties by the lower index.

    Args:
        queries: (Q, D) float tensor or array; its device does the work, and its kind is the results' kind.
        corpus: (N, D) float32, bfloat16 or float16 tensor or array, memory-mapped arrays included. A corpus on another
            device, in float16 or not contiguous is copied in pieces of at most a third of ``scratch``, to a GPU while
            the piece before is searched.
        k: how many, at least 1.
        precision: "certified" and "exact" rank as fp64 dot products of the given rows do, the first from faster
            low-precision scores whose error bounds are proven (queries for which a bound fails are redone), the second
            by computing everything in fp64; "fast" ranks by the low-precision scores.
        valid: rows that may be returned: bool, (N,) or (Q, N), or row numbers, (n,) integers.
        scratch: bytes that the search may use beside its inputs and results.

    Returns:
        scores (Q, k) float32 and indices (Q, k) int64; with fewer than k (valid) rows the rest is −inf and −1.

    Raises:
        ValueError: wrong shapes, k below 1, an unknown precision, or a row with NaN or infinity.
        TypeError: a dtype that is not named above.
    """
    asked, rows = as_tensor(queries, "queries"), as_tensor(corpus, "corpus")
    check_rows(asked, "queries", QUERIES)
    check_rows(rows, "corpus", FLOATS)
    if rows.shape[1] != asked.shape[1]:
        raise ValueError(f"queries have width {asked.shape[1]} and the corpus {rows.shape[1]}; they must be equal")
    device = asked.device
    whole = device.type == "cuda" or rows.dtype != torch.float16  # on a CPU float16 is widened
    direct = rows.device == device and whole and rows.is_contiguous()
    share = 8 if device.type == "cuda" else 3  # a GPU has two of them, beside what it computes with
    step = len(rows) if direct else max(64, scratch // (share * 4 * rows.shape[1]) // 64 * 64)

    def pieces() -> Iterable[tuple[int, Piece]]:
        for start, part in chunks(rows, step, device):
            yield start, Piece((part if whole else part.float()).contiguous())

    # A direct piece is kept, so that its norms are computed once for all groups of queries.
    fixed = list(pieces()) if direct and len(rows) else None
    scores, ids = search(
        (lambda: fixed) if fixed is not None else pieces, len(rows), asked, k, precision, valid, scratch
    )
    return (scores, ids) if isinstance(queries, Tensor) else (scores.numpy(), ids.numpy())


def search(
    pieces: Callable[[], Iterable[tuple[int, Piece]]],
    total: int,
    queries: Tensor,
    k: int,
    precision: Precision,
    valid: Any,
    scratch: int,
    shards: Sequence[torch.device] = (torch.device("cpu"),),
) -> tuple[Tensor, Tensor]:
    """``topk`` over pieces that can be gone through more than once; see there.

    Args:
        pieces: gives (id of the first row, piece) in order, on the queries' device, their finiteness unchecked where
            their norms are None.
        total: rows in all pieces.
        shards: if more than one, the devices among which pieces are dealt out in turn, and which search at once; the
            queries are on the first.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}")
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        raise TypeError(f"k must be a whole number, got {k!r}")
    if k < 1:
        raise ValueError(f"k must be at least 1; got {k}")
    k, missing = min(int(k), total), max(0, int(k) - total)
    mask = row_mask(valid, len(queries), total, queries.device)
    asked = Queries.of(queries)
    if not math.isfinite(asked.largest_norm()):  # which is asked for anyway, and waits for the device
        bad = (~queries.isfinite().all(dim=1)).nonzero()
        if len(bad):
            raise ValueError(f"queries: row {int(bad[0])} holds NaN or infinity")
    if total == 0:
        return _padded(queries.new_empty(len(queries), 0), queries.new_empty(len(queries), 0), missing)
    if len(shards) == 1:
        state = _complete(pieces, asked, mask, k, precision, scratch)
    else:

        def one(number: int) -> State:
            def own() -> list[tuple[int, Piece]]:
                return list(pieces())[number :: len(shards)]

            return _complete(own, asked.to(shards[number]), mask.to(shards[number]), k, precision, scratch)

        with ThreadPoolExecutor(len(shards)) as pool:
            state, *others = pool.map(one, range(len(shards)))
        for other in others:
            scores, ids = other.sorted()
            state.merge_table(scores.to(queries.device), ids.to(queries.device))
    scores, ids = state.sorted()
    return _padded(torch.ldexp(scores, asked.exponents[:, None].double()), ids, missing)


def _padded(scores: Tensor, ids: Tensor, missing: int) -> tuple[Tensor, Tensor]:
    """Results with so many more columns, for rows that are not there."""
    if not missing:
        return scores.float(), ids
    pad = torch.nn.functional.pad
    return pad(scores.float(), (0, missing), value=-torch.inf), pad(ids.long(), (0, missing), value=-1)


def _complete(
    pieces: Callable[[], Iterable[tuple[int, Piece]]],
    queries: Queries,
    mask: Tensor,
    k: int,
    precision: Precision,
    scratch: int,
) -> State:
    """One scan, and another of the queries that need it."""
    state = State(len(queries), k, mask.device)
    if not len(queries):
        return state
    _scan(pieces, queries, mask, state, precision, scratch)
    if not bool((state.missed | state.broken).any()):
        return state
    missed = state.missed.nonzero()[:, 0]
    if len(missed):  # too many near-ties for the room there was: the same proof, without that limit
        _again(pieces, queries, mask, state, missed, precision, scratch)
    broken = state.broken.nonzero()[:, 0]
    if len(broken):
        warnings.warn(
            f"{len(broken)} of {len(queries)} queries were redone in fp64: a score lay outside its proven error bound. "
            "Matrix products here are less exact than they claim to be.",
            RuntimeWarning,
            stacklevel=4,
        )
        _again(pieces, queries, mask, state, broken, "exact", scratch)
    return state


def _again(
    pieces: Callable[[], Iterable[tuple[int, Piece]]],
    queries: Queries,
    mask: Tensor,
    state: State,
    redo: Tensor,
    precision: Precision,
    scratch: int,
) -> None:
    """Some queries from the start, without the GPU kernels."""
    again = State(len(redo), state.k, redo.device)
    _scan(pieces, queries.take(redo), mask[redo] if mask.dim() == 2 else mask, again, precision, scratch, False)
    for name in ("best", "counts", "cutoffs"):
        getattr(state, name)[redo] = getattr(again, name)
    state.broken[redo] = again.broken


def _scan(
    pieces: Callable[[], Iterable[tuple[int, Piece]]],
    queries: Queries,
    mask: Tensor,
    state: State,
    precision: Precision,
    scratch: int,
    kernels: bool = True,
) -> None:
    for first_id, piece in pieces():
        own = mask[..., first_id : first_id + len(piece)].contiguous() if mask.numel() else mask
        scanned = piece.rows if piece.plane is None else piece.plane.codes
        few = native(piece) and precision != "exact" and len(queries) <= FEW[scanned.dtype]
        if piece.norms is None and not few:
            _check(piece, bin_norms(piece), first_id)
        if few:
            _few(piece, first_id, queries, own, state, precision)
            continue
        if precision != "exact" and kernels and serves(piece, state.k) and _in_range(piece, queries):
            _device(piece, first_id, queries, own, state, precision, scratch)
            continue
        _library(piece, first_id, queries, own, state, precision, scratch)


def _library(
    piece: Piece, first_id: int, queries: Queries, mask: Tensor, state: State, precision: Precision, scratch: int
) -> None:
    """By products of the library, on any device."""
    use, rows, size = _plan(piece, queries, state.k, precision, scratch)
    for start in range(0, len(queries), size):
        part = slice(start, start + size)
        shown = mask[part].contiguous() if mask.dim() == 2 else mask
        if use == "tiles":
            search_tiles(
                piece, first_id, queries.take(part), shown, state.part(part), precision == "certified", rows,
                multiply_in_bf16(),
            )  # fmt: skip
        else:
            search_plain(piece, first_id, queries.take(part), shown, state.part(part), use, rows)


def _device(
    piece: Piece, first_id: int, queries: Queries, mask: Tensor, state: State, precision: Precision, scratch: int
) -> None:
    """By the GPU kernels, in slices and groups that fit the scratch memory."""
    rows = rows_at_once(piece, len(queries), state.k, scratch)
    for begin in range(0, len(piece), rows):
        part = piece.slice(begin, begin + rows) if rows < len(piece) else piece
        shown = mask[..., begin : begin + rows].contiguous() if mask.numel() else mask
        if not serves(part, state.k):  # the end is too short for them
            _library(part, first_id + begin, queries, shown, state, precision, scratch)
            continue
        plane = low_plane(part, len(queries))
        size = queries_at_once(part, len(queries), state.k, scratch)
        for start in range(0, len(queries), size):
            group = slice(start, start + size)
            with torch.cuda.device_of(plane):  # on which kernels are launched
                search_device(
                    part, plane, first_id + begin, queries.take(group), shown[group] if shown.dim() == 2 else shown,
                    state.part(group), precision == "certified",
                )  # fmt: skip


def _few(piece: Piece, first_id: int, queries: Queries, mask: Tensor, state: State, precision: Precision) -> None:
    unchecked = piece.norms is None
    before = (state.best.clone(), state.counts.clone(), state.cutoffs.clone()) if unchecked else None
    if unchecked or _in_range(piece, queries):
        search_few(piece, first_id, queries, mask, state, precision == "certified")
        if before is None:
            return
        norms, piece.norms = piece.norms, None
        assert norms is not None
        _check(piece, norms, first_id)
        if _in_range(piece, queries):
            return
        for name, value in zip(("best", "counts", "cutoffs"), before, strict=True):
            getattr(state, name).copy_(value)  # scores may have overflowed: this piece again, in fp64
        state.broken.fill_(False)
    search_plain(piece, first_id, queries, mask, state, "exact", _rows_for(SCRATCH, piece, len(queries), 8))


def _check(piece: Piece, norms: Tensor, first_id: int) -> None:
    """Sets the piece's norms; a row that is not finite is named."""
    bad = not_finite(piece, norms)
    if bad is not None:
        raise ValueError(f"corpus: row {first_id + bad} holds NaN or infinity")
    piece.norms, piece.longest = norms, None
    piece.derived.clear()


def _in_range(piece: Piece, queries: Queries) -> bool:
    """Whether no fp32 score or partial sum of this piece can overflow."""
    return piece.largest_norm() * queries.largest_norm() < LARGEST


def _plan(piece: Piece, queries: Queries, k: int, precision: Precision, scratch: int) -> tuple[str, int, int]:
    """("tiles", "certified", "exact" or "fast"; corpus rows and queries of one product) within ``scratch`` bytes."""
    if precision == "exact" or not _in_range(piece, queries):
        size = min(len(queries), 64)
        return "exact", _rows_for(scratch, piece, size, 8), size
    if native(piece):
        size = min(len(queries), TILE_QUERIES)
        while size > 1 and size * candidates_for(k) * 8 > scratch // 2:  # candidates
            size //= 2
        return "tiles", min(TILE_ROWS, _rows_for(scratch // 2, piece, size, 4)), size
    size = min(len(queries), 256)
    return precision, _rows_for(scratch, piece, size, 8), size


def _rows_for(scratch: int, piece: Piece, size: int, bytes_each: int) -> int:
    """Corpus rows per product, a multiple of 64: their float copy, the scores, and what is made of the scores."""
    each = bytes_each * piece.rows.shape[1] + 5 * 8 * size
    return max(64, min(1 << 16, scratch // each // 64 * 64))
