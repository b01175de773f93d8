"""Old indexes of all formats give the same rows; codes are recognized; documents find their rows."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jasper_fast.adaptation.migration.codes import find_codes
from jasper_fast.adaptation.migration.old_index import L2, lengths_note
from jasper_fast.adaptation.migration.opening import open_old_index
from jasper_fast.adaptation.migration.pairs import draw_pairs
from jasper_fast.config.data import SourceConfig
from jasper_fast.mips import FlatIPIndex
from jasper_fast.utils.errors import JasperError

SOME = np.array([3, 590, 7])


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """Unit rows with a common part, (600, 32) float32."""
    vectors = np.random.default_rng(0).standard_normal((600, 32)) + 0.5
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_files_of_embeddings(rows, tmp_path):
    np.save(tmp_path / "old.npy", rows.astype(np.float16))
    (tmp_path / "shards").mkdir()
    for number, part in enumerate(np.split(rows, [200, 500])):
        first = [0, 200, 500][number]
        table = pa.table({"id": range(first, first + len(part)), "text": ["t"] * len(part), "vector": list(part)})
        pq.write_table(table, tmp_path / "shards" / f"{number}.parquet")
    with open(tmp_path / "old.jsonl", "w") as file:
        file.writelines(json.dumps({"text": f"t{n}", "embedding": row.tolist()}) + "\n" for n, row in enumerate(rows))
    for name in ("old.npy", "shards", "old.jsonl"):
        index = open_old_index(str(tmp_path / name))
        assert (index.rows, index.width, index.codes) == (600, 32, None)
        np.testing.assert_allclose(index.read(SOME), rows[SOME], atol=1e-3)
    assert open_old_index(str(tmp_path / "shards")).ids[590] == "590"
    np.save(tmp_path / "shards" / "9.npy", rows[:, :16])
    with pytest.raises(JasperError, match=r"differ in width \(got \[16, 32\]"):
        open_old_index(str(tmp_path / "shards"))


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0), ("bfloat16", 4e-3), ("int8", 4e-3)])
def test_flat_ip_index(rows, tmp_path, dtype, error):
    index = FlatIPIndex(32, dtype=dtype)
    index.add(rows[:400], ids=np.arange(400) + 1000)
    index.add(rows[400:], ids=np.arange(200) + 9000)
    index.remove([1000])
    index.save(tmp_path / "index")
    old = open_old_index(str(tmp_path / "index"))
    np.testing.assert_allclose(old.read(SOME), rows[SOME + 1], atol=error)
    assert old.ids[0] == "1001" and old.rows == 599 and bool(old.notes) == (dtype != "float32")
    plain = FlatIPIndex(32)
    plain.add(rows)
    plain.save(tmp_path / "plain")
    assert open_old_index(str(tmp_path / "plain")).ids is None


@pytest.mark.parametrize(
    ("kind", "error", "note"),
    [
        ("Flat", 0, None),
        ("IDMap,Flat", 0, None),
        ("IVF4,Flat", 0, None),
        ("HNSW8", 0, None),
        ("SQ8", 0.01, "32 bytes a row in place of 128"),
        ("IVF4,SQfp16", 1e-3, "64 bytes a row in place of 128"),
        ("PQ8x4", 0.5, "4 bytes a row in place of 128"),
        ("PCA24,IVF4,Flat", 0.5, "keeps 24 of 32 dimensions"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_faiss_indexes(rows, tmp_path, kind, error, note):
    faiss = pytest.importorskip("faiss")
    index = faiss.index_factory(32, kind, faiss.METRIC_INNER_PRODUCT)
    index.train(rows)
    if "IDMap" in kind:
        index.add_with_ids(rows, np.arange(600) * 7 + 5)
    else:
        index.add(rows)
    faiss.write_index(index, str(tmp_path / "old.faiss"))
    old = open_old_index(str(tmp_path / "old.faiss"))
    assert (old.rows, old.width, old.metric) == (600, 32, "inner product")
    np.testing.assert_allclose(old.read(SOME), rows[SOME], atol=error)
    assert (old.ids[:2] == ["5", "12"]) if "IDMap" in kind else (old.ids is None)
    assert old.notes == [] if note is None else note in " ".join(old.notes)


def test_faiss_ids_inside_lists_l2_and_bits(rows, tmp_path):
    faiss = pytest.importorskip("faiss")
    index = faiss.index_factory(32, "IVF4,Flat")
    index.train(rows)
    index.add_with_ids(rows, np.arange(600)[::-1] * 3)
    faiss.write_index(index, str(tmp_path / "old.index"))
    old = open_old_index(str(tmp_path / "old.index"))
    assert old.metric == L2 and old.ids[:2] == ["0", "3"]
    np.testing.assert_array_equal(old.read(np.arange(600)), rows[::-1])
    binary = faiss.IndexBinaryFlat(32)
    binary.add(np.packbits(rows > 0, axis=1))
    faiss.write_index_binary(binary, str(tmp_path / "bits.index"))
    old = open_old_index(str(tmp_path / "bits.index"))
    assert old.codes == "bits"
    np.testing.assert_array_equal(old.read(SOME), np.where(rows[SOME] > 0, 1, -1))
    (tmp_path / "junk.faiss").write_bytes(b"IxFI junk")
    with pytest.raises(JasperError, match="FAISS cannot read it"):
        open_old_index(str(tmp_path / "junk.faiss"))


def test_codes_are_recognized_by_their_values(rows, tmp_path):
    step = float(np.abs(rows).max()) / 127
    int8 = np.round(rows / step).astype(np.int8)
    packed = np.packbits(rows > rows.mean(axis=0), axis=1)
    signs = np.where(rows > rows.mean(axis=0), 1, -1)
    for name, codes, kind, expected in [
        ("int8", int8, "int8", int8),
        ("uint8", (int8.astype(int) + 128).astype(np.uint8), "uint8", int8),
        ("packed", packed, "bits", signs),
        ("packed-int8", (packed.astype(int) - 128).astype(np.int8), "bits", signs),
        ("zeros-and-ones", (signs > 0).astype(np.uint8), "bits", signs),
        ("signs", signs.astype(np.int8), "bits", signs),
    ]:
        np.save(tmp_path / f"{name}.npy", codes)
        index = open_old_index(str(tmp_path / f"{name}.npy"))
        assert (index.codes, index.width) == (kind, 32), name
        np.testing.assert_array_equal(index.read(SOME), expected[SOME], err_msg=name)
        assert "If they are something else" in index.notes[0]
    pq.write_table(pa.table({"embedding": list(int8)}), tmp_path / "int8.parquet")
    assert open_old_index(str(tmp_path / "int8.parquet")).codes == "int8"
    assert find_codes(rows) is None and find_codes(np.full((3, 4), np.nan, np.float32)) is None


def test_lengths_of_rows_are_described():
    assert lengths_note(np.ones(10) + 1e-4, "inner product") is None
    assert "does not change a ranking" in lengths_note(np.full(10, 7.0), "inner product")
    assert "multiply the questions by 7" in lengths_note(np.full(10, 7.0), L2)
    assert "long rows rank higher" in lengths_note(np.linspace(1, 2, 10), "inner product")
    assert "Multiply the questions by 1.5" in lengths_note(np.linspace(1, 2, 10), L2)


@pytest.fixture
def source(tmp_path):
    """Eight documents: one blank, one that repeats another but for its case."""
    texts = ["One dog.", "two cats", "  ", "ONE dog.", "five", "six", "seven", "eight"]
    file = tmp_path / "docs.jsonl"
    file.write_text("".join(json.dumps({"id": n * 10, "text": text}) + "\n" for n, text in enumerate(texts)))
    return SourceConfig(path=str(file)), texts


def index_of(tmp_path, columns: dict, number: int):
    vectors = np.eye(number, 8, dtype=np.float32) + 0.5
    pq.write_table(pa.table({**columns, "vector": list(vectors)}), tmp_path / "old.parquet")
    return open_old_index(str(tmp_path / "old.parquet"))


def test_documents_find_their_rows_by_id(source, tmp_path):
    config, texts = source
    index = index_of(tmp_path, {"id": ["70", "50", "0", "20", "30", "99"]}, 6)
    pairs = draw_pairs(config.model_copy(update={"id_column": "id"}), index, 100, 0)
    assert pairs.key == "id" and pairs.texts == [texts[0], texts[5], texts[7]]
    assert pairs.rows.tolist() == [2, 1, 0]
    assert pairs.counts == {
        "documents": 8, "without a row": 3, "repeated": 1, "blank": 1, "rows": 6, "without a document": 1,
    }  # fmt: skip
    assert len(draw_pairs(config.model_copy(update={"id_column": "id"}), index, 2, 0).texts) == 2
    twice = index_of(tmp_path, {"id": ["70", "70"]}, 2)
    with pytest.raises(JasperError, match="rows 0 and 1 have the id '70'"):
        draw_pairs(config.model_copy(update={"id_column": "id"}), twice, 100, 0)
    with pytest.raises(JasperError, match="no row has the id of a document"):
        draw_pairs(config.model_copy(update={"id_column": "id"}), index_of(tmp_path, {"id": ["x"]}, 1), 100, 0)
    with pytest.raises(JasperError, match="its rows have no ids"):
        draw_pairs(config.model_copy(update={"id_column": "id"}), index_of(tmp_path, {}, 8), 100, 0)
    with pytest.raises(JasperError, match="no column 'name' for the ids"):
        draw_pairs(config.model_copy(update={"id_column": "name"}), index, 100, 0)


def test_documents_find_their_rows_by_text_and_by_position(source, tmp_path):
    config, texts = source
    index = index_of(tmp_path, {"text": ["eight", " six ", "other"], "id": ["a", "b", "c"]}, 3)
    pairs = draw_pairs(config, index, 100, 0)
    assert pairs.key == "text" and pairs.texts == ["six", "eight"] and pairs.rows.tolist() == [1, 0]
    with pytest.raises(JasperError, match="no row has the text of a document"):
        draw_pairs(config, index_of(tmp_path, {"text": ["other"]}, 1), 100, 0)
    pairs = draw_pairs(config, index_of(tmp_path, {}, 8), 100, 0)
    assert pairs.key == "position" and pairs.rows.tolist() == [0, 1, 4, 5, 6, 7]
    with pytest.raises(JasperError, match="got 7 rows and 8 documents"):
        draw_pairs(config, index_of(tmp_path, {}, 7), 100, 0)


def test_unknown_formats_are_refused(tmp_path):
    with pytest.raises(JasperError, match="no such file or folder"):
        open_old_index(str(tmp_path / "missing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(JasperError, match="no index in this folder"):
        open_old_index(str(tmp_path / "empty"))
