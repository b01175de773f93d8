"""FlatIPIndex: growing, saving, loading, and errors of damaged files."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from jasper_fast.mips import FlatIPIndex, SignIndex, funnel, growing, storage, topk
from jasper_fast.mips.ids import RowIds
from jasper_fast.mips.segment import Segment
from jasper_fast.ops import native
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.fingerprint import file_sha256
from tests.helpers.processes import fork_server

DTYPES = ("bfloat16", "float32", "int8")
needs_extension = pytest.mark.skipif(native.extension_path() is None, reason="the compiled extension is not built")


def saved(index: FlatIPIndex) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(index, buffer)
    buffer.seek(0)
    return buffer


def in_another_process(index: FlatIPIndex) -> FlatIPIndex:
    with fork_server().Pool(1) as pool:
        return pool.apply(copy.copy, (index,))


def filled(dtype: str, rows: int = 333, dim: int = 24) -> FlatIPIndex:
    index = FlatIPIndex(dim, dtype=dtype)
    index.add(torch.randn(rows, dim))
    return index


def used(name: str, tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Return a tensor of planes without the places of rows that the last bin lacks."""
    if name.startswith("coarse_"):
        return tensor.flatten()[:rows]
    if name == "coarse":
        return tensor.view(len(tensor), -1, 64, 4).transpose(1, 2).flatten(0, 1)[:rows]
    return tensor


def stored(index: FlatIPIndex) -> torch.Tensor:
    return torch.stack([index.reconstruct(i) for i in range(len(index))])


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_those_of_the_stored_vectors(dtype):
    index, queries = filled(dtype), torch.randn(12, 24)
    true = queries.double() @ stored(index).double().T
    for precision in ("certified", "exact"):
        scores, ids = index.search(queries, 10, precision=precision)
        assert torch.equal(ids, true.argsort(dim=1, descending=True)[:, :10])
        assert torch.allclose(scores.double(), true.gather(1, ids), rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_added_in_any_portions_give_the_same_index(dtype, monkeypatch):
    monkeypatch.setattr(growing, "SEGMENT_BYTES", 0)  # segments of 4096 rows
    rows, queries = torch.randn(9000, 8), torch.randn(5, 8)
    whole, parts = FlatIPIndex(8, dtype=dtype), FlatIPIndex(8, dtype=dtype)
    whole.add(rows)
    at = 0
    for count in (1, 62, 2, 4000, 0, 4097, 838):
        parts.add(rows[at : at + count].numpy())
        at += count
        if at:
            expected = FlatIPIndex(8, dtype=dtype)
            expected.add(rows[:at])
            assert torch.equal(parts.search(queries, 1)[1], expected.search(queries, 1)[1])
    assert len(parts) == len(whole) == 9000
    for (_, a), (_, b) in zip(parts.segments(), whole.segments(), strict=True):
        assert torch.equal(a.rows, b.rows) and torch.equal(a.norms, b.norms)
        if a.planes is not None:
            for name, tensor in a.planes.tensors().items():
                assert torch.equal(used(name, tensor, len(a)), used(name, b.planes.tensors()[name], len(a))), name
    assert all(map(torch.equal, parts.search(queries, 50), whole.search(queries, 50)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_saved_index_is_the_same_and_can_grow(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(growing, "SEGMENT_BYTES", 0)
    index, queries = filled(dtype, 5000), torch.randn(7, 24)
    index.save(tmp_path / "index")
    loaded = FlatIPIndex.load(tmp_path / "index")
    assert len(loaded) == 5000 and loaded.dtype == dtype and loaded.dim == 24
    more = torch.randn(10, 24)
    for one in (index, loaded):
        assert len(one.search(queries, 5000)[0][0]) == 5000
        one.add(more)
    assert all(map(torch.equal, index.search(queries, 30), loaded.search(queries, 30)))
    loaded.save(tmp_path / "index")  # in place of the files it is mapped from
    assert all(map(torch.equal, index.search(queries, 30), FlatIPIndex.load(tmp_path / "index").search(queries, 30)))
    assert torch.equal(index.reconstruct(5009), loaded.reconstruct(5009))


def old_files(segment: Segment) -> dict[str, torch.Tensor]:
    """Return the tensors of a float32 segment as versions before the planes stored them."""
    scales = segment.rows.abs().amax(dim=1) / 127
    codes = (segment.rows / scales[:, None]).round().to(torch.int8)
    residuals = torch.ones(len(segment.norms), dtype=torch.float64)
    return {"codes": codes, "code_scales": scales, "residuals": residuals}


def files_with_8_bits(segment: Segment) -> dict[str, torch.Tensor]:
    """Return the planes of a float32 segment as versions with 8-bit codes stored them."""
    rows, width = segment.rows.shape
    bins = len(segment.norms)
    return {
        "plane_coarse": torch.zeros(bins, -(-width // 8) * 256, dtype=torch.uint8),
        "plane_fine": torch.zeros(rows, -(-width // 2), dtype=torch.uint8),
        "plane_coarse_scales": torch.zeros(bins, 64),
        "plane_coarse_errors": torch.zeros(bins, 64),
        "plane_fine_scales": torch.zeros(rows),
        "plane_residuals": torch.zeros(bins, 2, dtype=torch.float64),
    }


@pytest.mark.parametrize("old", [old_files, files_with_8_bits, None], ids=["int8 codes", "8 bits", "GPU"])
def test_an_index_stored_without_planes_gets_them_when_loaded(old, tmp_path):
    index, queries = filled("float32"), torch.randn(2, 24)
    ((_, segment),) = index.segments()
    copied = None if old else segment.rows.bfloat16()
    bare = Segment(segment.rows, segment.scales, segment.norms, scan_copy=copied)
    storage.save(tmp_path / "index", 24, "float32", [bare], RowIds())
    if old:
        (file,) = (tmp_path / "index").glob("piece-*")
        save_file(load_file(file) | old(segment), file)
        manifest = tmp_path / "index" / storage.MANIFEST
        content = json.loads(manifest.read_text())
        content["files"][0]["sha256"] = file_sha256(file)
        manifest.write_text(json.dumps(content))
    loaded = FlatIPIndex.load(tmp_path / "index")
    ((_, found),) = loaded.segments()
    assert (found.planes is None) == (segment.planes is None)
    if segment.planes is not None:
        for name, tensor in segment.planes.tensors().items():
            assert torch.equal(used(name, found.planes.tensors()[name], 333), used(name, tensor, 333)), name
    assert all(map(torch.equal, loaded.search(queries, 9), index.search(queries, 9)))


@needs_extension
def test_planes_are_stored_and_checked(tmp_path):
    index = filled("float32")
    index.save(tmp_path / "index")
    ((_, segment),) = FlatIPIndex.load(tmp_path / "index").segments()
    ((_, original),) = index.segments()
    for name, tensor in original.planes.tensors().items():
        assert torch.equal(segment.planes.tensors()[name], tensor), name
    (file,) = (tmp_path / "index").glob("piece-*")
    tensors = load_file(file)
    save_file(tensors | {"code_fine": tensors["code_fine"][:-1].clone()}, file)
    with pytest.raises(JasperError, match="damaged, code_fine should be torch.uint8 of shape"):
        FlatIPIndex.load(tmp_path / "index", verify=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_index_built_on_a_gpu_is_loaded_anywhere(dtype, tmp_path):
    rows, queries = torch.randn(20_000, 24), torch.randn(5, 24)
    index = FlatIPIndex(24, dtype=dtype, device="cuda")
    index.add(rows)
    index.save(tmp_path / "index")
    expected = index.search(queries, 9)
    for device in ("cpu", "cuda"):
        loaded = FlatIPIndex.load(tmp_path / "index", device=device)
        scores, ids = loaded.search(queries, 9)
        assert torch.equal(ids, expected[1])
        torch.testing.assert_close(scores, expected[0])
        loaded.add(rows[:100])
        assert len(loaded) == 20_100


def test_numpy_in_numpy_out():
    scores, ids = filled("float32").search(np.zeros((2, 24), dtype=np.float32), 3)
    assert isinstance(scores, np.ndarray) and ids.tolist() == [[0, 1, 2]] * 2


def test_damaged_files_are_reported(tmp_path):
    folder = tmp_path / "index"
    index = filled("int8")
    index.save(folder)
    file = folder / "piece-00000.safetensors"
    content, manifest = file.read_bytes(), (folder / "manifest.json").read_text()

    def expect(message: str, **options) -> None:
        with pytest.raises(JasperError, match=message):
            FlatIPIndex.load(folder, **options)
        file.write_bytes(content)
        (folder / "manifest.json").write_text(manifest)

    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    expect("its checksum differs")
    file.write_bytes(content[: len(content) // 2])
    expect("its checksum differs")
    file.write_bytes(content[: len(content) // 2])
    expect("damaged or truncated", verify=False)
    file.unlink()
    expect("is missing")
    tensors = load_file(file)
    save_file(tensors | {"scales": tensors["scales"][:-1].contiguous()}, file)
    expect("scales should be torch.float32", verify=False)
    (folder / "manifest.json").write_text(manifest[:40])
    expect("not readable")
    (folder / "manifest.json").write_text(manifest.replace('"version": 1', '"version": 3'))
    expect("this jasper_fast reads 1 and 2")
    (folder / "manifest.json").write_text(manifest.replace("FlatIPIndex", "Other"))
    expect("not that of an index")
    (folder / "manifest.json").write_text(json.dumps(json.loads(manifest) | {"rows": 5}))
    expect("the files hold 333 rows, but the manifest says 5")
    (folder / "manifest.json").write_text(json.dumps(json.loads(manifest) | {"dtype": "int4"}))
    expect("damaged")
    assert len(FlatIPIndex.load(folder)) == 333
    with pytest.raises(JasperError, match="no index here"):
        FlatIPIndex.load(tmp_path / "nothing")


def test_save_overwrites_only_an_index(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(JasperError, match="is not an index"):
        filled("int8").save(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_a_full_disk_leaves_the_old_index(tmp_path):
    """A limit on file size makes a write fail as on a full disk."""
    filled("float32").save(tmp_path / "index")
    program = (
        "import resource, signal, torch\n"
        "from jasper_fast.mips import FlatIPIndex\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "index = FlatIPIndex(24); index.add(torch.randn(5000, 24))\n"
        f"index.save({str(tmp_path / 'index')!r})\n"
    )
    root = Path(__file__).parents[2]
    ended = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert ended.returncode != 0 and "could not write" in ended.stderr and "JasperError" in ended.stderr
    assert len(FlatIPIndex.load(tmp_path / "index")) == 333
    assert [p.name for p in tmp_path.iterdir()] == ["index"]


def test_wrong_arguments_are_reported():
    index = filled("bfloat16")
    with pytest.raises(ValueError, match="x has width 3, the index 24"):
        index.add(torch.randn(2, 3))
    bad = torch.randn(5000, 24)
    bad[4711, 3] = torch.nan
    with pytest.raises(ValueError, match="x: row 4711 holds NaN, infinity"):
        index.add(bad)
    bad[4711, 3] = 3.4e38  # rounds to infinity in bfloat16
    with pytest.raises(ValueError, match="x: row 4711 .* too large for bfloat16"):
        index.add(bad)
    assert len(index) == 333  # all rows are added, or none
    with pytest.raises(ValueError, match="q has width 3, the index 24"):
        index.search(torch.randn(1, 3), 1)
    with pytest.raises(ValueError, match="k must be at least 1; got 0"):
        index.search(torch.randn(1, 24), 0)
    with pytest.raises(ValueError, match="dtype must be one of 'bfloat16', 'float32', 'int8', got 'fp8'"):
        FlatIPIndex(4, dtype="fp8")
    with pytest.raises(ValueError, match="dim must be a whole number of at least 1, got 0"):
        FlatIPIndex(0)
    for wrong in (-1, 333):
        with pytest.raises(IndexError, match=f"id {wrong} is not in an index of 333 rows"):
            index.reconstruct(wrong)


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_rows_that_are_not_there_are_filled(rows):
    index = FlatIPIndex(4, dtype="float32")
    stored = torch.randn(rows, 4)
    if rows:
        index.add(stored)
    queries = torch.randn(3, 4)
    scores, ids = index.search(queries, 9)
    assert scores.shape == ids.shape == (3, 9) and scores.dtype == torch.float32 and ids.dtype == torch.int64
    assert (ids[:, rows:] == -1).all() and (scores[:, rows:] == -torch.inf).all()
    assert torch.equal(ids[:, :rows], (queries @ stored.T).argsort(dim=1, descending=True))
    found = topk(queries.numpy(), stored.numpy(), 9)
    assert (found[1] == ids.numpy()).all() and (found[0] == scores.numpy()).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_devices_share_the_segments(dtype, monkeypatch, tmp_path):
    """Two shards, here on one CPU, hold every other segment, and their results are merged."""
    monkeypatch.setattr("jasper_fast.mips.growing.SEGMENT_BYTES", 1)  # segments of 4096 rows
    corpus, queries = torch.randn(10_000, 8), torch.randn(6, 8)
    corpus[5000:5010] = corpus[0]  # equal rows in different shards
    alone, shared = FlatIPIndex(8, dtype=dtype), FlatIPIndex(8, dtype=dtype, device=["cpu", "cpu"])
    for index in (alone, shared):
        index.add(corpus)
    assert len(shared._full) == 2
    mask = torch.rand(10_000) < 0.5
    shared.save(tmp_path / "index")
    loaded = FlatIPIndex.load(tmp_path / "index", device=["cpu", "cpu", "cpu"])
    for index in (shared, loaded):
        for arguments in ({}, {"valid": mask}, {"valid": torch.tensor([0, 5003, 9999])}, {"precision": "exact"}):
            for asked in (torch.cat((queries, corpus[:1])), queries[:1]):
                expected, got = alone.search(asked, 20, **arguments), index.search(asked, 20, **arguments)
                assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    with pytest.raises(ValueError, match="at least one device"):
        FlatIPIndex(8, device=[])


def rows(count: int = 3, width: int = 8) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, width)).astype(np.float32)


def masked(array: np.ndarray, *places: tuple[int, ...]) -> np.ma.MaskedArray:
    mask = np.zeros(array.shape, bool)
    for place in places:
        mask[place] = True
    return np.ma.masked_array(array, mask)


@pytest.mark.parametrize(
    "take",
    [
        lambda index: pickle.loads(pickle.dumps(index)),
        lambda index: pickle.loads(pickle.dumps(index, protocol=2)),
        copy.copy,
        copy.deepcopy,
        lambda index: torch.load(saved(index), weights_only=False),
        in_another_process,
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_copy_holds_the_rows_alone_and_grows_by_itself(take, dtype, tmp_path):
    index, more, queries = FlatIPIndex(24, dtype=dtype), torch.randn(70, 24), torch.randn(5, 24)
    for _ in range(10):  # in small portions
        index.add(torch.randn(13, 24))
    before = index.search(queries, 5)
    other = take(index)
    assert len(pickle.dumps(index)) < 130 * 24 * 10 + 10_000 and len(pickle.dumps(other)) < 130 * 24 * 10 + 10_000
    assert all(map(torch.equal, before, other.search(queries, 5))) and repr(other) == repr(index)
    other.add(more)
    assert (len(index), len(other)) == (130, 200)
    assert all(map(torch.equal, before, index.search(queries, 5)))  # the rows of the copy are not the original's
    index.add(more)
    assert all(map(torch.equal, index.search(queries, 200), other.search(queries, 200)))
    other.save(tmp_path / "index")
    assert all(map(torch.equal, index.search(queries, 9), FlatIPIndex.load(tmp_path / "index").search(queries, 9)))


def test_an_empty_index_and_a_loaded_one_are_pickled(tmp_path):
    empty = pickle.loads(pickle.dumps(FlatIPIndex(4)))
    empty.add(torch.ones(1, 4))
    assert len(empty) == 1
    index, queries = filled("float32", 5000), torch.randn(3, 24)
    index.save(tmp_path / "index")
    shutil.copytree(tmp_path / "index", tmp_path / "other")
    loaded = pickle.loads(pickle.dumps(FlatIPIndex.load(tmp_path / "other")))
    shutil.rmtree(tmp_path / "other")  # the pickle holds the rows, not the place of their file
    assert all(map(torch.equal, index.search(queries, 9), loaded.search(queries, 9)))


ACCEPTED = {
    "no entry is masked": lambda x: masked(x),
    "matrix": np.matrix,
    "record array's base": lambda x: np.rec.array(x),
    "read-only": lambda x: np.broadcast_to(x, x.shape),
    "column-major": np.asfortranarray,
    "reversed": lambda x: x[::-1].copy()[::-1],
    "big-endian": lambda x: x.astype(">f4"),
    "needs a gradient": lambda x: torch.tensor(x).requires_grad_(),
    "parameter": lambda x: torch.nn.Parameter(torch.tensor(x)),
    "negative bit": lambda x: torch.complex(torch.tensor(x), -torch.tensor(x)).conj().imag,
    "expanded": lambda x: torch.tensor(x)[None].expand(2, *x.shape)[1],
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_other_forms_of_the_same_rows_give_the_same_result(kind):
    corpus, queries = rows(5), rows(3)
    form = ACCEPTED[kind]
    expected = topk(queries, corpus, 2)
    index = FlatIPIndex(8, dtype="float32")
    index.add(form(corpus))
    for found in (topk(form(queries), corpus, 2), topk(queries, form(corpus), 2), index.search(form(queries), 2)):
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(np.asarray(ours), theirs)


REFUSED = {
    "masked entries": (lambda x: masked(x, (0, 1), (2, 3)), ValueError, "2 masked entries; fill them"),
    "a masked row": (lambda x: masked(x, (1,)), ValueError, "8 masked entries; fill them"),
    "list": (lambda x: x.tolist(), TypeError, "got list: convert it with numpy.asarray"),
    "objects": (lambda x: x.astype(object), TypeError, "must hold floats, got object"),
    "structured": (lambda x: np.zeros(x.shape, [("a", "f4")]), TypeError, "must hold floats, got"),
    "complex": (lambda x: x.astype(complex), TypeError, "must hold floats, got complex128"),
    "complex tensor": (lambda x: torch.tensor(x).to(torch.complex64), TypeError, "got complex64"),
    "integers": (lambda x: x.astype(int), TypeError, "must hold floats, got int64"),
    "bool": (lambda x: x > 0, TypeError, "got bool"),
    "dates": (lambda x: np.zeros(x.shape, "M8[s]"), TypeError, "must hold floats, got datetime64"),
    "text": (lambda x: np.full(x.shape, "1.0"), TypeError, "must hold floats"),
    "long double": (lambda x: x.astype(np.longdouble), TypeError, "convert them with .astype"),
    "sparse": (lambda x: torch.tensor(x).to_sparse(), TypeError, "dense tensor, got sparse_coo"),
    "sparse rows": (lambda x: torch.tensor(x).to_sparse_csr(), TypeError, "dense tensor, got sparse_csr"),
    "nested": (lambda x: torch.nested.nested_tensor(list(torch.tensor(x))), TypeError, "got a nested one"),
    "jagged": (
        lambda x: torch.nested.nested_tensor(list(torch.tensor(x)), layout=torch.jagged), TypeError, "a nested one"
    ),
    "quantised": (lambda x: torch.quantize_per_tensor(torch.tensor(x), 0.1, 0, torch.qint8), TypeError, "got qint8"),
    "float8": (lambda x: torch.tensor(x).to(torch.float8_e4m3fn), TypeError, "got float8_e4m3fn"),
    "meta": (lambda x: torch.tensor(x).to("meta"), TypeError, "on the device meta and has no values"),
    "one row": (lambda x: x[0], ValueError, "must have the shape"),
    "none": (lambda x: None, TypeError, "got NoneType"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # torch's own, of prototypes
@pytest.mark.parametrize("kind", REFUSED)
def test_inputs_without_rows_of_floats_are_rejected(kind):
    form, error, message = REFUSED[kind]
    good, bad = rows(3), form(rows(3))
    index, signs = FlatIPIndex(8), SignIndex(8)
    index.add(good)
    signs.add(good)
    for use in (
        lambda: topk(bad, good, 2),
        lambda: topk(good, bad, 2),
        lambda: index.add(bad),
        lambda: index.search(bad, 2),
        lambda: signs.add(bad),
        lambda: signs.search(bad, 2),
        lambda: funnel(good, bad, signs, index, 1, shortlist=2),
    ):
        with pytest.raises(error, match=message):
            use()
    assert len(index) == len(signs) == 3


@pytest.mark.parametrize(
    ("valid", "error", "message"),
    [
        (masked(np.array([True, False, True]), (1,)), ValueError, "valid: 1 masked entries"),
        (masked(np.array([0, 2]), (1,)), ValueError, "valid: 1 masked entries"),
        (torch.tensor([True, False, True]).to_sparse(), TypeError, "valid must be a dense tensor"),
        (torch.ones(3, dtype=torch.bool, device="meta"), TypeError, "valid is on the device meta"),
        (np.array([True, False, True], object), TypeError, "valid must be bool, or row numbers, got object"),
        ("abc", TypeError, "valid must be bool, or row numbers"),
    ],
)
def test_errors_of_valid_are_plain(valid, error, message):
    with pytest.raises(error, match=message):
        topk(rows(2), rows(3), 2, valid=valid)
    found = topk(rows(2), rows(3), 3, valid=masked(np.array([True, False, True])))[1]  # nothing is masked
    assert sorted(found[0].tolist()) == [-1, 0, 2]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", ["masked entries", "a masked row", "sparse", "sparse rows", "nested", "list", "objects"]
)
def test_losses_refuse_them_too(kind):
    from jasper_fast.losses import cosine_loss, similarity_loss

    bad, good = REFUSED[kind][0](rows(4)), torch.tensor(rows(4))
    for loss in (cosine_loss, similarity_loss):
        for pair in ((bad, good), (good, bad)):
            with pytest.raises(TypeError, match="expected a (dense )?tensor"):
                loss(*pair)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own", [False, True])
def test_search_after_removals_is_that_of_the_rows_that_are_left(dtype, own, monkeypatch, tmp_path):
    monkeypatch.setattr(growing, "SEGMENT_BYTES", 0)  # segments of 4096 rows
    rows, queries = torch.randn(9000, 8), torch.randn(7, 8)
    rows[17] = 100.0  # a removed row must not widen or decide anything
    rows[4200] = rows[300]  # equal scores: the row added first wins
    index, ids = FlatIPIndex(8, dtype=dtype), (torch.randperm(10**6)[:9000] if own else torch.arange(9000))
    index.add(rows, ids if own else None)
    gone = torch.cat([torch.tensor([17]), torch.arange(4096, 4100), torch.arange(8192, 9000)])  # the last segment too
    index.remove(ids[gone].numpy())
    left = torch.ones(9000, dtype=torch.bool)
    left[gone] = False
    plain = FlatIPIndex(8, dtype=dtype)
    plain.add(rows[left])
    index.save(tmp_path / "index")
    for one in (index, FlatIPIndex.load(tmp_path / "index"), pickle.loads(pickle.dumps(index))):
        assert torch.equal(one.ids, ids[left]) and len(one) == len(plain)
        for k, precision, few in ((9, "certified", 2), (9, "certified", 7), (9, "exact", 7), (8500, "certified", 1)):
            scores, found = one.search(queries[:few], k, precision=precision)
            expected, numbers = plain.search(queries[:few], k, precision=precision)
            assert torch.equal(scores, expected)
            assert torch.equal(found, torch.where(numbers < 0, -1, ids[left][numbers]))
        assert torch.equal(one.reconstruct(int(ids[300])), plain.reconstruct(299))
        chosen = one.search(queries, 3, valid=ids[[300, 2]])[1]
        assert set(chosen.flatten().tolist()) == {*ids[[300, 2]].tolist(), -1}
        with pytest.raises(IndexError, match="not in an index of"):
            one.reconstruct(int(ids[17]))
        one.add(torch.full((1, 8), 50.0), [10**7] if own else None)
        assert one.ids[-1] == (10**7 if own else 9000)  # the number of a removed row is not used again
        assert one.search(torch.ones(1, 8), 1)[1].item() == one.ids[-1]


def test_all_rows_can_be_removed():
    index = filled("float32", 70)
    index.remove(range(70))
    scores, ids = index.search(torch.randn(2, 24), 3)
    assert len(index) == 0 and (ids == -1).all() and (scores == -torch.inf).all()
    index.add(torch.eye(24)[:2])
    assert index.ids.tolist() == [70, 71] and index.search(torch.eye(24)[1:2], 1)[1].item() == 71
    index.remove([70], renumber=True)
    assert index.ids.tolist() == [0]


def test_memory_of_removed_rows_is_not_read():
    index = filled("float32", 200)
    ((_, before),) = index.segments()
    index.remove([3, 199])
    before.rows[3], before.rows[199] = torch.nan, torch.nan
    parts = [before.norms]
    if before.planes is not None:
        parts += [part for part in before.planes.tensors().values() if part.is_floating_point()]
    for part in parts:
        part.fill_(torch.nan)
    assert index.search(torch.randn(5, 24), 198)[0].isfinite().all()


BAD_IDS = {
    "unknown": (lambda index: index.remove([5, 99]), ValueError, "99 is not in this index of 3 rows"),
    "removed twice": (lambda index: index.remove([5, 5]), ValueError, "5 is given twice"),
    "known": (lambda index: index.add(torch.eye(4)[:2], [9, 5]), ValueError, "5 appears twice. Fix: remove"),
    "repeated": (lambda index: index.add(torch.eye(4)[:2], [9, 9]), ValueError, "9 appears twice"),
    "negative": (lambda index: index.add(torch.eye(4)[:1], [-1]), ValueError, "-1 is negative"),
    "none": (lambda index: index.add(torch.eye(4)[:1]), ValueError, "made with ids. Fix: give ids="),
    "too few": (lambda index: index.add(torch.eye(4)[:2], [9]), ValueError, r"one per row \(2\), got 1"),
    "text": (lambda index: index.add(torch.eye(4)[:1], ["a"]), TypeError, "expected integers"),
    "floats": (lambda index: index.remove([5.0]), TypeError, "expected integers"),
    "valid": (lambda index: index.search(torch.eye(4), 1, valid=[4]), ValueError, "4 is not in this index"),
    "renumber": (lambda index: index.remove([5], renumber=True), ValueError, "leave out renumber=True"),
}


@pytest.mark.parametrize("case", BAD_IDS)
def test_wrong_ids_are_errors_and_change_nothing(case):
    call, kind, message = BAD_IDS[case]
    index = FlatIPIndex(4)
    index.add(torch.eye(4)[:3], ids=[5, 6, 7])
    with pytest.raises(kind, match=message):
        call(index)
    assert index.ids.tolist() == [5, 6, 7] and index.search(torch.eye(4)[:3], 1)[1].flatten().tolist() == [5, 6, 7]


def test_ids_on_disk_are_checked(tmp_path):
    index = FlatIPIndex(4)
    index.add(torch.eye(4), ids=[5, 6, 7, 2**62])
    index.save(tmp_path / "index")
    file = tmp_path / "index" / storage.IDS
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(JasperError, match="ids.safetensors: damaged"):
        FlatIPIndex.load(tmp_path / "index")
    file.unlink()
    with pytest.raises(JasperError, match="ids.safetensors: the file is missing"):
        FlatIPIndex.load(tmp_path / "index")


def test_a_funnel_returns_the_ids_of_its_indexes():
    rows, ids = torch.randn(100, 16), torch.arange(100) * 7
    narrow, wide, signs = FlatIPIndex(8, dtype="int8"), FlatIPIndex(16, dtype="float32"), SignIndex(8)
    narrow.add(rows[:, :8], ids)
    wide.add(rows, ids)
    signs.add(rows[:, :8])
    for first in (narrow, signs):
        found = funnel(rows[:5, :8], rows[:5], first, wide, k=2, shortlist=100)[1]
        assert torch.equal(found, wide.search(rows[:5], 2)[1])
    narrow.remove([0])
    wide.remove([7])
    with pytest.raises(ValueError, match="same ids"):
        funnel(rows[:5, :8], rows[:5], narrow, wide, k=2, shortlist=10)


def test_exports_have_the_ids(tmp_path):
    from jasper_fast.mips.exports import to_faiss, to_parquet

    pytest.importorskip("faiss")
    table = pytest.importorskip("pyarrow.parquet")
    index = FlatIPIndex(4, dtype="float32")
    index.add(torch.eye(4), ids=[9, 8, 7, 6])
    index.remove([8])
    assert to_faiss(index).search(np.eye(4, dtype=np.float32)[2:3], 1)[1].item() == 7
    to_parquet(index, tmp_path / "export")
    assert table.read_table(tmp_path / "export" / "vectors.parquet")["id"].to_pylist() == [9, 7, 6]


def test_the_default_dtype_changes_scores_as_documented():
    """Rounding to 8 significant bits moves a unit row by at most 2⁻⁸ of its length."""
    rows = torch.nn.functional.normalize(torch.randn(200, 32, dtype=torch.float64), dim=1)
    index = FlatIPIndex(32)
    index.add(rows.float())
    assert index.dtype == "bfloat16" and isinstance(index.reconstruct(3), torch.Tensor)
    stored = torch.stack([index.reconstruct(row) for row in range(200)]).double()
    difference = (stored @ rows.T - rows @ rows.T).abs().max()
    assert 0 < difference <= 0.004
