"""The migration benchmark scores mapped questions in another model's index, and its choices know no judgements."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench.adapt import Embeddings
from bench.migrate import BITS, FLOATS, INT8, main, summary, table, write_index
from bench.pages.readme import ROOT
from jasper_fast.models.embedder import normalise
from jasper_fast.utils.errors import JasperError
from tests.helpers.beir import write_beir

RESULTS = ROOT / "bench" / "results" / "migrate.json"


@pytest.fixture(scope="module")
def unit_rows() -> np.ndarray:
    rows = np.random.default_rng(0).standard_normal((60, 32)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize(("form", "least"), [(FLOATS, 0.999999), (INT8, 0.999), (BITS, 0.7)])
def test_indexes_of_every_form_are_read_as_such(unit_rows, tmp_path, form, least):
    index = write_index(unit_rows, form, tmp_path)
    assert (index.rows, index.width, index.codes) == (60, 32, None if form == FLOATS else form)
    read = index.read(np.arange(60))
    cosines = (read * unit_rows).sum(axis=1) / np.linalg.norm(read, axis=1)
    assert cosines.mean() > least
    assert (read != unit_rows).any() == (form != FLOATS)


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_texts) -> tuple[Path, list[str]]:
    """A set, and stored embeddings of two models. Questions are near their document. The second space is turned."""
    folder = tmp_path_factory.mktemp("migrate")
    write_beir(folder / "set", tiny_texts, queries=40)
    models, work = [str(folder / name) for name in ("first", "turned")], folder / "work"
    work.mkdir()
    numbered = [*enumerate(tiny_texts)]
    texts = [(i, f"title {i} {text}", "document") for i, text in numbered]
    texts += [(i, f"title {i}", "query") for i, _ in numbered]
    texts += [(i, text[: len(text) // 2].strip(), "query") for i, text in numbered[:40]]
    generator = np.random.default_rng(5)
    vectors = generator.standard_normal((200, 32))[[i for i, _, _ in texts]]
    vectors[200:] += 0.6 * generator.standard_normal((len(texts) - 200, 32))
    turn = np.linalg.qr(generator.standard_normal((32, 32)))[0]
    _, written, roles = zip(*texts, strict=True)
    for model, rows in zip(models, (vectors, vectors @ turn), strict=True):
        np.savez(Embeddings(model, work).file, texts=written, roles=roles, w32=normalise(rows))
    words = ["--model", models[0], "--into-model", models[1], "--sets", str(folder / "set"), "--folder", str(work)]
    return folder, words


@pytest.fixture(scope="module")
def results(world) -> dict:
    folder, words = world
    assert main([*words, "--pairs", "100", "50", "--draws", "2", "--json", str(folder / "results.json")]) == 0
    return json.loads((folder / "results.json").read_text())


def test_a_turned_space_costs_nothing_in_both_directions(results):
    rows = results["rows"]
    assert {(row["new"], row["old"]) for row in rows} == {("first", "turned"), ("turned", "first")}
    floats = [row for row in rows if row["form"] == FLOATS]
    assert {(row["pairs"], row["draw"]) for row in floats} == {(50, 0), (50, 1), (100, 0), (100, 1)}
    assert all(row["usable"] and row["own"] > 0.5 for row in rows)
    for row in floats:
        assert row["kept"] == pytest.approx(1, abs=1e-3) and row["map"] != "none"
    assert {(row["form"], row["pairs"]) for row in rows if row["form"] != FLOATS} == {(INT8, 100), (BITS, 100)}
    assert all(row["ndcg"] == pytest.approx(row["kept"] * row["own"]) for row in rows)


def test_judgements_change_no_choice(results, world):
    folder, words = world
    qrels = folder / "set" / "qrels" / "test.tsv"
    before = qrels.read_text()
    try:
        lines = [f"q{i}\td{i if i % 2 else 199 - i}\t1\n" for i in range(40)]
        qrels.write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
        main([*words, "--pairs", "50", "100", "--draws", "2", "--json", str(folder / "other.json")])
    finally:
        qrels.write_text(before)
    other = json.loads((folder / "other.json").read_text())
    chosen = [[(row["map"], row["predicted"], row["own_row"]) for row in one["rows"]] for one in (results, other)]
    assert chosen[0] == chosen[1]
    assert [row["ndcg"] for row in other["rows"]] != [row["ndcg"] for row in results["rows"]]


def test_a_model_that_finds_nothing_is_an_error(world):
    folder, words = world
    write_beir(folder / "wrong", [f"document {i}" for i in range(20)], queries=1)
    (folder / "wrong" / "queries.jsonl").write_text(json.dumps({"_id": "q0", "text": "a question"}) + "\n")
    work = folder / "other"
    work.mkdir()
    texts = [(f"title {i} document {i}", "document") for i in range(20)]
    texts += [*((f"title {i}", "query") for i in range(20)), ("a question", "query")]
    rows = normalise(np.eye(32, dtype=np.float32)[[*range(20), *range(20), 0]] * 2.0)
    rows[-1] = -rows[:1]  # the right document comes last
    written, roles = zip(*texts, strict=True)
    for model in ("first", "turned"):
        np.savez(Embeddings(str(folder / model), work).file, texts=written, roles=roles, w32=rows)
    options = [*words[:4], "--sets", str(folder / "wrong"), "--folder", str(work), "--pairs", "20"]
    with pytest.raises(JasperError, match="wrong: first finds no relevant document"):
        main(options)


def test_the_table_has_means_and_deviations():
    row = {"new": "a", "old": "b", "set": "s", "form": FLOATS, "pairs": 50, "kept": 0.9, "predicted": None}
    codes = [row | {"form": form, "kept": kept} for form, kept in ((INT8, 0.8), (BITS, 0.6))]
    lines = table(summary([row, row | {"kept": 0.96}, *codes])).splitlines()
    assert lines[0] == "| new model → old index | set | 50 pairs | int8 index | bits index | predicted |"
    assert lines[2] == "| a → b | s | **93.0 ± 4.2** | 80.0 | 60.0 | – |"
    turned = [one | {"new": "b", "old": "a"} for one in (row, *codes)]
    assert table(summary([row, *codes, *turned])).splitlines()[3].startswith("| b → a | s | **90.0** |")


def test_the_committed_summary_is_that_of_its_rows():
    committed = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert committed["summary"] == summary(committed["rows"])


def test_questions_of_another_model_keep_nearly_all_from_1000_pairs():
    """The page claims this of the questions of MiniLM in an index of bge-small."""
    means = json.loads(RESULTS.read_text(encoding="utf-8"))["summary"]
    case = {"new": "all-MiniLM-L6-v2", "old": "bge-small-en", "form": FLOATS, "pairs": 1000}
    kept = {row["set"]: row["kept"][0] for row in means if case.items() <= row.items()}
    assert kept.keys() >= {"cranfield", "cisi"} and min(kept.values()) >= 95
