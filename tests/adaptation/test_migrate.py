"""Migration: the questions of a new model search the index of an old one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jasper_fast.adaptation.migrate import migrate
from jasper_fast.models.embedder import load_model, model_encoder, normalise
from jasper_fast.search import main as search
from jasper_fast.text_index import TextIndex, add, build
from jasper_fast.utils.errors import JasperError

SentenceTransformer = pytest.importorskip("sentence_transformers").SentenceTransformer
OLD_WIDTH = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("migration")


@pytest.fixture(scope="module")
def documents(folder, tiny_texts) -> Path:
    """Documents with ids, a title, and one that repeats the first."""
    file = folder / "docs.jsonl"
    rows = [{"id": f"d{n}", "title": title(text), "text": text} for n, text in enumerate(tiny_texts)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def title(text: str) -> str:
    return " ".join(text.split()[2:6])


@pytest.fixture(scope="module")
def new(tiny_bert, tiny_texts) -> np.ndarray:
    """Embeddings of the documents by the new model, (200, 32)."""
    texts = [f"{title(text)}\n{text}" for text in tiny_texts]
    return next(iter(model_encoder(load_model(str(tiny_bert)))(texts, "document").values()))


@pytest.fixture(scope="module")
def old(new) -> np.ndarray:
    """The old index's rows: the new embeddings turned into a wider space, with noise, (200, 40) float32 unit rows."""
    generator = np.random.default_rng(3)
    turn = np.linalg.qr(generator.standard_normal((OLD_WIDTH, 32)))[0].T
    return normalise(new @ turn + 0.002 * generator.standard_normal((len(new), OLD_WIDTH)))


@pytest.fixture
def run(folder, documents, tiny_bert, tmp_path):
    """Return a function that migrates and returns what results.json says of it."""

    def migrated(index, **options) -> dict:
        out = migrate(
            documents, index, str(tiny_bert), tmp_path / "out", columns=["title", "text"], cache=folder / "cache",
            progress=False, **options,
        )  # fmt: skip
        return json.loads((out / "results.json").read_text())["migration"]

    return migrated


def test_questions_of_the_new_model_search_the_old_index(run, old, tiny_texts, tmp_path, capsys):
    ids = [f"d{n}" for n in range(200)]
    pq.write_table(pa.table({"id": ids[::-1], "embedding": list(old[::-1])}), tmp_path / "old.parquet")
    before = (tmp_path / "old.parquet").read_bytes()
    found = run(tmp_path / "old.parquet", id_column="id")
    assert (tmp_path / "old.parquet").read_bytes() == before
    assert found["matched_by"] == "id" and (found["pairs"], found["fitted"]) == (200, 160)
    model = SentenceTransformer(str(tmp_path / "out" / "questions"), device="cpu")
    asked = model.encode_query([f"{title(text)}\n{text}" for text in tiny_texts])
    assert asked.shape == (200, OLD_WIDTH)
    np.testing.assert_allclose(np.linalg.norm(asked, axis=1), 1, atol=1e-5)
    assert (np.einsum("qd,qd->q", asked, old) > 0.98).all()
    best = next(row for row in found["maps"] if row["name"] == found["best"])
    assert best["overlap"] > 0.7 > 3 * found["chance"]
    assert best["kept"] == pytest.approx(1, abs=0.05) and found["held_out"]["questions"] == 40
    printed = capsys.readouterr().out
    assert printed.index("\nProcrustes ") < printed.index("of the new model's own nDCG@10") < printed.index("model: ")
    table = printed[printed.index("\nmap ") + 1 : printed.index("\nchance ")].splitlines()
    assert "|" not in printed and len({len(line) for line in table}) == 1 and len(table[0]) <= 100
    report = (tmp_path / "out" / "report.md").read_text()
    assert "200 pairs of a document and a row, matched by id" in report and "| Procrustes |" in report


def test_the_card_says_what_was_mapped_into_which_index(run, old, tmp_path):
    ids = [f"d{n}" for n in range(200)]
    pq.write_table(pa.table({"id": ids, "embedding": list(old)}), tmp_path / "old.parquet")
    found = run(tmp_path / "old.parquet", id_column="id")
    card = (tmp_path / "out" / "questions" / "README.md").read_text()
    assert "mapped into the existing index old.parquet" in card and "of 200 rows of width 40. It stays as it is" in card
    assert f"Map from the model's embeddings to those of the index: {found['best']}" in card
    assert "| map | same ten rows | own row among ten | titles nDCG@10 | kept |" in card
    for wrong in ("eacher", "symmetric", "encode_document([", "adapted to documents"):
        assert wrong not in card


def test_a_text_index_is_asked_with_the_migrated_model(run, tiny_bert, tiny_texts, tmp_path, capsys):
    texts = [f"{title(text)}\n{text}" for text in tiny_texts]
    other = tmp_path / "other"
    model = SentenceTransformer(str(tiny_bert), device="cpu")
    turn = np.linalg.qr(np.random.default_rng(5).standard_normal((32, 32)))[0]
    turned = add_dense(model, turn)
    turned.save_pretrained(str(other))
    build(str(other), texts, tmp_path / "index")
    found = run(tmp_path / "index")
    assert found["matched_by"] == "text" and found["best"] != "none"
    questions = str(tmp_path / "out" / "questions")
    assert TextIndex(tmp_path / "index", questions).ask([texts[7]], 1)[0][0].text == texts[7]
    assert search(["ask", str(tmp_path / "index"), texts[3], "--model", questions, "-k", "1"]) == 0
    capsys.readouterr()
    with pytest.raises(JasperError, match="not the model that"):  # its documents would mix two models
        add(tmp_path / "index", ["a new document"], model=questions)
    with pytest.raises(JasperError, match="adapt --into"):
        TextIndex(tmp_path / "index", str(tiny_bert))


def add_dense(model, matrix: np.ndarray):
    import torch
    from sentence_transformers.sentence_transformer.modules import Dense

    dense = Dense(
        len(matrix), matrix.shape[1], bias=False, activation_function=torch.nn.Identity(),
        init_weight=torch.tensor(matrix.T, dtype=torch.float32),
    )  # fmt: skip
    return SentenceTransformer(modules=[*model, dense], device="cpu")


def test_rows_in_another_order_are_refused_before_anything_is_written(run, old, tmp_path, capsys):
    np.save(tmp_path / "old.npy", np.random.default_rng(0).permutation(old))
    with pytest.raises(JasperError, match="row order"):
        run(tmp_path / "old.npy")
    assert not (tmp_path / "out").exists()
    np.save(tmp_path / "old.npy", old)
    assert run(tmp_path / "old.npy")["matched_by"] == "position"
    assert "the order of the rows fits the documents" in capsys.readouterr().out


def test_a_map_no_better_than_chance_is_refused_with_its_figures(run, old, tmp_path, capsys):
    ids = np.random.default_rng(0).permutation([f"d{n}" for n in range(200)])
    noise = np.random.default_rng(1).standard_normal((200, 16)).astype(np.float32)
    pq.write_table(pa.table({"id": ids, "embedding": list(noise)}), tmp_path / "old.parquet")
    with pytest.raises(JasperError, match=r"\(chance: 5\.0%\), and the own row of"):
        run(tmp_path / "old.parquet", id_column="id")
    assert "\nProcrustes " in capsys.readouterr().out and not (tmp_path / "out").exists()
    run(tmp_path / "old.parquet", id_column="id", force=True)
    assert "WARNING: the best map finds" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(JasperError, match="exists, a migration. Fix: add --replace"):
        run(tmp_path / "old.parquet", id_column="id")
    pq.write_table(pa.table({"id": [f"d{n}" for n in range(200)], "embedding": list(old)}), tmp_path / "old.parquet")
    assert run(tmp_path / "old.parquet", id_column="id", replace=True)["index"]["width"] == OLD_WIDTH


def test_unusable_rows_and_missing_ids_are_left_out_and_counted(run, old, tmp_path, capsys):
    rows, ids = old.copy() * 3, [f"d{n}" for n in range(200)]
    rows[5], rows[6, 0] = 0, np.nan
    ids[9] = "unknown"
    pq.write_table(pa.table({"id": ids[:150], "embedding": list(rows[:150])}), tmp_path / "old.parquet")
    found = run(tmp_path / "old.parquet", id_column="id")
    printed = capsys.readouterr().out
    assert found["pairs"] == 147 and found["counts"]["without a row"] == 51
    assert "51 documents have no row, 1 rows have no document" in printed
    assert "2 drawn rows are zero, NaN or infinite" in printed and "2 of 150 rows are zero" in printed
    assert "all rows have a length near 3" in printed


def test_a_model_with_two_encoders_is_refused_first(tiny_bert, documents, tmp_path):
    from sentence_transformers.base.modules import Router

    modules = [list(SentenceTransformer(str(tiny_bert), device="cpu")) for _ in range(2)]
    router = Router.for_query_document(*modules)
    SentenceTransformer(modules=[router], device="cpu").save_pretrained(str(tmp_path / "two"))
    with pytest.raises(JasperError, match="different modules .* Fix: give the model of its questions"):
        migrate(documents, tmp_path / "no-index", str(tmp_path / "two"), tmp_path / "out", cache=tmp_path / "cache")


def test_too_few_pairs_and_other_folders_are_refused(run, old, tmp_path):
    pq.write_table(pa.table({"id": [f"d{n}" for n in range(12)], "vector": list(old[:12])}), tmp_path / "few.parquet")
    with pytest.raises(JasperError, match=r"too few pairs .*got 12, expected at least 20"):
        run(tmp_path / "few.parquet", id_column="id")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(JasperError, match="exists and is no migration"):
        run(tmp_path / "few.parquet", replace=True)
    assert (tmp_path / "out" / "mine.txt").read_text() == "x"
