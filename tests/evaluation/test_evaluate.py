"""Evaluation sets are read whole or refused with file and row; scores are right; every text is encoded once."""

from __future__ import annotations

import json
import shutil
import sys
import zlib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from jasper_fast.config.data import EvalConfig
from jasper_fast.config.load import load_config
from jasper_fast.data.eval_loaders import load_eval, load_evals
from jasper_fast.data.eval_sets import ClassificationSet, RetrievalSet, SimilaritySet
from jasper_fast.evaluate import main
from jasper_fast.evaluation import metrics
from jasper_fast.evaluation.score import embed, evaluate_run, score_rows, scores_table, teacher_floors
from jasper_fast.models.embedder import flat_model, load_model, model_encoder, normalise
from jasper_fast.teachers.encoder import cached
from jasper_fast.utils.errors import JasperError
from tests.helpers.beir import write_beir, write_jsonl

ndcg_score = pytest.importorskip("sklearn.metrics").ndcg_score


WIDTHS = (24, 8)


def write_sts(path: Path, texts: list[str]) -> Path:
    rows = [f"{i % 5}.5\t{a}\t{b}\tsomewhere" for i, (a, b) in enumerate(zip(texts, texts[1:], strict=False))]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["score\tsentence1\tsentence2\tsource", *rows]) + "\n")
    return path


def hashed_encode(texts: list[str], role: str, width: int = 16) -> np.ndarray:
    """Return random unit rows that depend on text and role alone."""
    seeds = [zlib.crc32(f"{role}|{text}".encode()) for text in texts]
    return normalise(np.stack([np.random.default_rng(seed).standard_normal(width) for seed in seeds]))


@pytest.fixture(scope="session")
def routed(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose model is Transformer, Pooling, Router of Dense heads, Normalize, with a query prompt."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Router, Transformer
    from torch import nn

    transformer = Transformer(str(tiny_bert))
    heads = {str(w): [Dense(32, w, activation_function=nn.Identity())] for w in WIDTHS}
    mappings = {("query", None): "24", ("document", None): "24"}
    router = Router(heads, default_route="24", route_mappings=mappings)
    modules = [transformer, Pooling(32, "mean"), router, Normalize()]
    model = SentenceTransformer(modules=modules, prompts={"query": "find the story of: ", "document": ""})
    run = tmp_path_factory.mktemp("runs") / "small-run"
    model.save(str(run / "model"))
    return run


# --- reading sets


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_beir_folder_is_read(tmp_path: Path, tiny_texts: list[str], suffix: str) -> None:
    folder = write_beir(tmp_path / "stories", tiny_texts[:20], suffix=suffix)
    evalset = load_eval(EvalConfig(path=str(folder)))
    assert isinstance(evalset, RetrievalSet)
    assert (evalset.name, evalset.kind, len(evalset.queries), len(evalset.documents)) == ("stories", "beir", 6, 20)
    assert evalset.documents[3] == f"title 3 {tiny_texts[3]}"
    assert evalset.relevant[3] == {3: 1}
    assert {tiny_texts[19], "title 19", evalset.documents[19], evalset.queries[0]} <= set(evalset.texts())


def test_a_querys_own_document_is_no_answer(tmp_path: Path, tiny_texts: list[str]) -> None:
    """Queries can be documents of the corpus, as the arguments of ArguAna are."""
    folder = tmp_path / "arguments"
    corpus = [{"_id": f"a{i}", "title": "", "text": text} for i, text in enumerate(tiny_texts[:8])]
    corpus[3]["title"] = "Titled"
    write_jsonl(folder / "corpus.jsonl", corpus)
    queries = [{"_id": f"a{i}", "text": tiny_texts[i]} for i in range(6)]
    queries[3]["text"] = f"titled  {tiny_texts[3]}"  # the query contains the title
    queries[4]["text"] = "another text under the same id"
    write_jsonl(folder / "queries.jsonl", queries)
    (folder / "qrels").mkdir()
    judged = ["a0\ta7\t1", "a1\ta1\t1", "a2\ta7\t1", "a3\ta7\t1", "a4\ta7\t1"]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(judged) + "\n")
    evalset = load_eval(EvalConfig(path=str(folder)))
    assert isinstance(evalset, RetrievalSet)
    assert evalset.self_matches == [
        0,
        -1,
        2,
        3,
        -1,
    ]  # a1 is judged relevant; a4 has the id of a document but another text
    documents = np.eye(8, 16, dtype=np.float32)
    asked = normalise(documents[:5] + 0.9 * documents[7])  # nearest: the query's own document; next: the relevant one
    asked[1] = documents[1]
    scores = metrics.score_embeddings(evalset, {"queries": asked, "documents": documents})
    assert scores["recall@100"] == 1.0
    fourth = 1 / np.log2(3)  # ranked after the document that only shares the id
    assert scores["nDCG@10"] == pytest.approx((4 + fourth) / 5)


def test_limit_keeps_the_same_queries_and_the_whole_corpus(tmp_path: Path, tiny_texts: list[str]) -> None:
    folder = write_beir(tmp_path / "stories", tiny_texts[:20], queries=12)
    whole, once, again = (load_eval(EvalConfig(path=str(folder), limit=n)) for n in (None, 5, 5))
    assert isinstance(whole, RetrievalSet) and isinstance(once, RetrievalSet) and isinstance(again, RetrievalSet)
    assert len(once.queries) == 5 and len(once.documents) == 20
    assert once == again
    assert once.queries != whole.queries[:5], "the first rows of a file are seldom a fair sample"
    judged = dict(zip(whole.queries, whole.relevant, strict=True))
    assert all(judged[q] == r for q, r in zip(once.queries, once.relevant, strict=True))


def test_qrels_file_chooses_another_split(tmp_path: Path, tiny_texts: list[str]) -> None:
    folder = write_beir(tmp_path / "stories", tiny_texts[:20])
    (folder / "qrels" / "dev.tsv").write_text("q2\td5\t2\n")  # without a header
    evalset = load_eval(EvalConfig(path=str(folder / "qrels" / "dev.tsv"), name="other"))
    assert isinstance(evalset, RetrievalSet)
    assert (evalset.name, evalset.relevant) == ("other", [{5: 2}])


@pytest.mark.parametrize(
    ("file", "row", "line", "says"),
    [
        ("qrels/test.tsv", 4, "q2\td2\tgood", "not a grade (got 'good', expected a whole number"),
        ("qrels/test.tsv", 4, "q2\td2\t0.5", "not a grade (got '0.5', expected a whole number"),
        ("qrels/test.tsv", 4, "q2\td2\tnan", "not a grade (got 'nan', expected a whole number"),
        ("qrels/test.tsv", 4, "q2\td2\t99999999999", "expected a whole number up to 1,000,000"),
        ("qrels/test.tsv", 4, "q2 d2 1", "not a judgement (got 'q2 d2 1', expected 3 cells separated by tabs"),
        ("qrels/test.tsv", 4, "q2\td2", "not a judgement"),
        ("corpus.jsonl", 5, '{"_id": "d4", "title": "x", "text": null}', "`text` is not text (got None)"),
        ("corpus.jsonl", 5, '{"_id": "d0", "text": "again"}', "'d0' appears twice"),
        ("corpus.jsonl", 5, '{"text": "nameless"}', "`_id` is not text or a whole number (got None)"),
        ("queries.jsonl", 2, '{"_id": "q1", "text": 7}', "`text` is not text (got 7)"),
        ("queries.jsonl", 2, '{"_id": "q1", "te', "not JSON"),
        ("queries.jsonl", 2, '["q1"]', "not a JSON object (got list)"),
    ],
)
def test_malformed_beir_row_is_named(
    tmp_path: Path, tiny_texts: list[str], file: str, row: int, line: str, says: str
) -> None:
    folder = write_beir(tmp_path / "stories", tiny_texts[:20])
    lines = (folder / file).read_text().splitlines()
    lines[row - 1] = line
    (folder / file).write_text("\n".join(lines) + "\n")
    with pytest.raises(JasperError) as caught:
        load_eval(EvalConfig(path=str(folder)))
    assert says in str(caught.value)
    assert f"{folder / file}, line {row}" in str(caught.value)


def test_unusable_folders_are_refused(tmp_path: Path, tiny_texts: list[str]) -> None:
    def refusal(path: Path | str) -> str:
        with pytest.raises(JasperError) as caught:
            load_eval(EvalConfig(path=str(path)))
        return str(caught.value)

    assert "no such file or folder" in refusal(tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    assert "no evaluation files in this folder (expected corpus.jsonl" in refusal(tmp_path / "bare")
    (tmp_path / "notes.txt").write_text("x")
    assert "got .txt, expected a folder or a .tsv file" in refusal(tmp_path / "notes.txt")
    folder = write_beir(tmp_path / "stories", tiny_texts[:20])
    (folder / "queries.jsonl").unlink()
    assert "missing queries.jsonl;" in refusal(folder)
    (folder / "queries.jsonl").write_text("\n")
    assert "the file is empty" in refusal(folder)
    write_beir(folder, tiny_texts[:20])
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t0\n")
    assert "no query has a relevant document" in refusal(folder)
    write_beir(folder, tiny_texts[:20], suffix=".gz")
    (folder / "corpus.jsonl").unlink()
    packed = (folder / "corpus.jsonl.gz").read_bytes()
    (folder / "corpus.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    assert "cannot be read" in refusal(folder)


def test_similarity_file_and_folder(tmp_path: Path, tiny_texts: list[str]) -> None:
    file = write_sts(tmp_path / "pairs" / "dev.tsv", ['He said "yes', *tiny_texts[:8]])
    by_file, by_folder = load_eval(EvalConfig(path=str(file))), load_eval(EvalConfig(path=str(file.parent), limit=3))
    assert isinstance(by_file, SimilaritySet) and isinstance(by_folder, SimilaritySet)
    assert (by_file.name, by_folder.name) == ("pairs-dev", "pairs")
    assert by_file.left[0] == 'He said "yes', "quotes are text"
    assert by_file.scores[:2] == [0.5, 1.5] and len(by_file.scores) == 8 and len(by_folder.scores) == 3
    assert set(by_file.texts()) == {'He said "yes', *tiny_texts[:8]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("score\tsentence1\n1\ta\n", "line 1: no column 'sentence2'"),
        ("score\tsentence1\tsentence2\n1\ta\tb\n2\tc\n", "line 3: wrong number of cells (got 2, expected 3"),
        ("score\tsentence1\tsentence2\nhigh\ta\tb\n", "line 2: not a score (got 'high', expected a finite"),
        ("score\tsentence1\tsentence2\nnan\ta\tb\n", "line 2: not a score (got 'nan', expected a finite"),
        ("score\tsentence1\tsentence2\n1\ta\tb\n1\tc\td\n", "(got 1 in 2 pairs, expected at least 2)"),
        ("", "line 1: no column 'score' (got columns: none)"),
    ],
)
def test_malformed_similarity_file_is_named(tmp_path: Path, content: str, says: str) -> None:
    file = tmp_path / "pairs.tsv"
    file.write_text(content)
    with pytest.raises(JasperError) as caught:
        load_eval(EvalConfig(path=str(file)))
    assert says in str(caught.value) and str(file) in str(caught.value)


def test_classification_folder(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "kinds" / "train.jsonl.gz", [{"text": f"t{i}", "label": i % 2} for i in range(6)])
    write_jsonl(tmp_path / "kinds" / "test.jsonl.gz", [{"text": f"s{i}", "label": 1} for i in range(3)])
    evalset = load_eval(EvalConfig(path=str(tmp_path / "kinds")))
    assert isinstance(evalset, ClassificationSet)
    assert (evalset.train_labels, evalset.test_texts) == (["0", "1"] * 3, ["s0", "s1", "s2"])
    assert set(evalset.texts()) == {*(f"t{i}" for i in range(6)), "s0", "s1", "s2"}
    write_jsonl(tmp_path / "kinds" / "test.jsonl.gz", [{"text": "s0"}])
    with pytest.raises(JasperError, match=r"test.jsonl.gz, line 1: `label` is not text or a whole number \(got None\)"):
        load_eval(EvalConfig(path=str(tmp_path / "kinds")))


def test_docstrings_are_summary_to_body(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def split(held_out: int):
        asked.append(held_out)
        return [], [("Sort a list.", "Stable, in place."), ("Open a file.", "Closes itself.")][:held_out]

    module = ModuleType("jasper_fast.data.docstrings")
    module.split_docstrings = split  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jasper_fast.data.docstrings", module)
    evalset = load_eval(EvalConfig(path="docstrings", limit=2))
    assert isinstance(evalset, RetrievalSet) and asked == [2]
    assert (evalset.kind, evalset.queries, evalset.relevant) == (
        "docstrings",
        ["Sort a list.", "Open a file."],
        [{0: 1}, {1: 1}],
    )


def test_two_sets_of_one_name_are_refused(tmp_path: Path, tiny_texts: list[str]) -> None:
    paths = [str(write_sts(tmp_path / part / "pairs.tsv", tiny_texts[:4])) for part in ("a", "b")]
    with pytest.raises(JasperError, match="share the name 'pairs'. Fix: give each set a different `name`"):
        load_evals([EvalConfig(path=path) for path in paths])
    assert [s.name for s in load_evals([EvalConfig(path=p, name=p[-11]) for p in paths])] == ["a", "b"]


# --- scores


@pytest.mark.parametrize("k", [1, 7, 60, 100])
def test_top_documents_breaks_ties_by_lower_index(k: int) -> None:
    random = np.random.default_rng(k)
    queries = random.integers(-2, 3, (9, 4)).astype(np.float32)  # few distinct scores: ties everywhere
    documents = random.integers(-2, 3, (60, 4)).astype(np.float32)
    expected = np.argsort(-(queries @ documents.T), axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(metrics.top_documents(queries, documents, k), expected)


def test_retrieval_scores_against_scikit_learn_and_counting() -> None:
    random = np.random.default_rng(5)
    queries, documents = (normalise(random.standard_normal((n, 12))) for n in (30, 400))
    grades = random.integers(0, 4, (30, 400)) * (random.random((30, 400)) < 0.05)
    relevant = [{int(d): int(row[d]) for d in np.flatnonzero(row)} for row in grades]
    evalset = RetrievalSet("x", [f"q{i}" for i in range(30)], [f"d{i}" for i in range(400)], relevant)
    found = metrics.score_embeddings(evalset, {"queries": queries, "documents": documents})
    scores = queries @ documents.T
    assert found["nDCG@10"] == pytest.approx(ndcg_score(grades, scores, k=10), abs=1e-7)
    best = np.argsort(-scores, axis=1)[:, :100]
    recall = [(grades[i, best[i]] > 0).sum() / (grades[i] > 0).sum() for i in range(30)]
    assert found["recall@100"] == pytest.approx(np.mean(recall), abs=1e-7)
    assert 0.01 < found["nDCG@10"] < 0.5


def test_spearman_follows_ranks_and_a_collapsed_model_scores_zero() -> None:
    angles = np.array([0.9, 0.1, 0.5, 0.3])
    left = np.tile(np.array([[1.0, 0.0]], dtype=np.float32), (4, 1))
    right = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    evalset = SimilaritySet("x", list("abcd"), list("efgh"), [0.0, 5.0, 1.0, 0.5])  # one adjacent pair is swapped
    assert metrics.score_embeddings(evalset, {"left": left, "right": right})["Spearman"] == pytest.approx(0.8)
    assert metrics.score_embeddings(evalset, {"left": left, "right": left})["Spearman"] == 0.0


def test_accuracy_falls_if_labels_do_not_match_the_embeddings() -> None:
    random = np.random.default_rng(0)
    centres = np.eye(3, 8, dtype=np.float32)
    labels = random.integers(0, 3, 120)
    vectors = normalise(centres[labels] + 0.2 * random.standard_normal((120, 8)))
    names = [f"kind {label}" for label in labels]
    texts = [str(i) for i in range(120)]
    evalset = ClassificationSet("x", texts[:80], names[:80], texts[80:], names[80:])
    groups = {"train": vectors[:80], "test": vectors[80:]}
    assert metrics.score_embeddings(evalset, groups)["accuracy"] > 0.95
    shuffled = {"train": vectors[:80], "test": vectors[80:][random.permutation(40)]}
    assert metrics.score_embeddings(evalset, shuffled)["accuracy"] < 0.7


def test_nonfinite_embeddings_are_rejected() -> None:
    evalset = SimilaritySet("pairs", ["a", "b"], ["c", "d"], [0.0, 1.0])
    vectors = np.ones((2, 4), dtype=np.float32)
    broken = vectors.copy()
    broken[1, 2] = np.nan
    with pytest.raises(JasperError, match="pairs: 1 of 2 embeddings in group 'right' contain NaN or infinity"):
        metrics.score_embeddings(evalset, {"left": vectors, "right": broken})


# --- encoders and floors


def test_every_distinct_text_is_encoded_once_for_all_widths() -> None:
    seen: list[str] = []

    def encode(texts: list[str], role: str) -> dict[int, np.ndarray]:
        seen.extend(texts)
        return {w: hashed_encode(texts, role, w) for w in WIDTHS}

    evalset = SimilaritySet("x", ["a", "b", "a"], ["b", "c", "a"], [1.0, 2.0, 3.0])
    found = embed(evalset, encode)
    assert sorted(seen) == ["a", "b", "c"]
    for width in WIDTHS:
        np.testing.assert_array_equal(found[width]["left"], hashed_encode(["a", "b", "a"], "document", width))
        np.testing.assert_array_equal(found[width]["right"], hashed_encode(["b", "c", "a"], "document", width))


def test_floors_are_pca_and_the_first_coordinates() -> None:
    random = np.random.default_rng(3)
    mixing = random.standard_normal((16, 16)) * np.geomspace(1, 0.05, 16)[:, None]
    train = normalise(random.standard_normal((500, 16)) @ mixing + 0.5)
    new = normalise(random.standard_normal((40, 16)) @ mixing + 0.5)
    floors = teacher_floors(train, [16, 4, 8, 32])
    assert {name: sorted(f) for name, f in floors.items()} == {"teacher truncated": [4, 8], "teacher PCA": [4, 8]}
    np.testing.assert_allclose(floors["teacher truncated"][4](new), normalise(new[:, :4]), atol=1e-6)
    centre = train.astype(np.float64).mean(0)
    axes = np.linalg.svd(train - centre, full_matrices=False)[2][:4]
    expected = normalise((new - centre) @ axes.T)
    np.testing.assert_allclose(
        floors["teacher PCA"][4](new) @ floors["teacher PCA"][4](new).T, expected @ expected.T, atol=1e-4
    )
    assert "teacher PCA" not in teacher_floors(train[:3], [4]), "three vectors do not span four axes"


def test_every_head_equals_encode_with_its_task(routed: Path, tiny_texts: list[str]) -> None:
    model = load_model(str(routed))
    passes = []
    model[0].register_forward_hook(lambda module, given, out: passes.append(len(out["attention_mask"])))
    texts = tiny_texts[:40]
    for role, prompt in (("query", "find the story of: "), ("document", None)):
        encode = model_encoder(model)
        passes.clear()
        found = encode(texts, role)
        assert sum(passes) == len(texts), "the encoder must run once per text for all widths"
        assert list(found) == list(WIDTHS)
        for width in WIDTHS:
            expected = model.encode(texts, task=str(width), prompt=prompt)
            assert found[width].shape == (40, width) and found[width].dtype == np.float32
            np.testing.assert_allclose(found[width], expected, atol=1e-6)
    flat = flat_model(model, 8)
    np.testing.assert_allclose(flat.encode_query(texts), model_encoder(model, [8])(texts, "query")[8], atol=1e-6)


def test_a_missing_width_is_rejected(routed: Path, tiny_bert: Path, tiny_texts: list[str]) -> None:
    model, plain = load_model(str(routed)), load_model(str(tiny_bert))
    with pytest.raises(JasperError, match=r"no width 16 \(expected one of 8, 24\)"):
        model_encoder(model, [16])
    with pytest.raises(JasperError, match=r"no width 64 \(expected at most 32\)"):
        model_encoder(plain, [64])
    with pytest.raises(JasperError, match=r"no head of width 16 \(expected one of 8, 24\)"):
        flat_model(model, 16)
    with pytest.raises(JasperError, match=r"no width 64 \(expected at most 32\)"):
        flat_model(plain, 64)
    found = model_encoder(plain, [32, 5])(tiny_texts[:3], "document")
    np.testing.assert_allclose(found[5], normalise(plain.encode(tiny_texts[:3])[:, :5]), atol=1e-6)


@pytest.mark.parametrize("truncate_dim", [None, 16])
def test_a_model_without_heads_is_cut_to_its_first_coordinates(
    tiny_bert: Path, tiny_texts: list[str], truncate_dim: int | None
) -> None:
    plain = load_model(str(tiny_bert))
    plain.truncate_dim, plain.prompts = truncate_dim, {"query": "find: "}
    assert flat_model(plain, None) is plain and flat_model(plain, truncate_dim or 32) is plain
    narrow = flat_model(plain, 5)
    assert narrow.get_embedding_dimension() == 5
    expected = normalise(plain.encode_query(tiny_texts[:9])[:, :5])
    np.testing.assert_allclose(narrow.encode_query(tiny_texts[:9]), expected, atol=1e-6)


def test_cached_embeddings_belong_to_one_model_text_order_and_role(tmp_path: Path) -> None:
    calls = []

    def encode(texts: list[str], role: str) -> np.ndarray:
        calls.append((texts, role))
        return hashed_encode(texts, role)

    first = cached(encode, "model 1", tmp_path)(["a", "b"], "query")
    again = cached(encode, "model 1", tmp_path)(["a", "b"], "query")
    np.testing.assert_array_equal(first, again)
    assert len(calls) == 1
    for key, texts, role in (
        ("model 2", ["a", "b"], "query"),
        ("model 1", ["b", "a"], "query"),
        ("model 1", ["a", "b"], "document"),
    ):
        np.testing.assert_array_equal(cached(encode, key, tmp_path)(texts, role), hashed_encode(texts, role))
    assert len(calls) == 4


def test_evaluate_run_returns_every_row_and_caches_teacher_embeddings(
    tmp_path: Path, tiny_texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    loaded: list[int] = []
    precisions: list[str] = []

    def load_teacher(config, *, precision):
        precisions.append(precision)
        offset = config.max_length

        def encode(texts: list[str], role: str) -> np.ndarray:
            calls.append(len(texts))
            return hashed_encode([f"{offset} {text}" for text in texts], role)

        loaded.append(offset)
        return SimpleNamespace(encode=encode)

    module = ModuleType("jasper_fast.teachers.model")
    module.load_teacher = load_teacher  # type: ignore[attr-defined]
    module.describe_teacher = lambda c: {"model": c.model, "length": c.max_length}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jasper_fast.teachers.model", module)
    config = load_config(
        {
            "name": "x",
            "precision": "fp32",
            "student": {"model": "m", "heads": [32, 8]},
            "teachers": [{"model": "t", "max_length": 10}, {"model": "t", "max_length": 20}],
            "data": {"sources": [{"path": "docstrings"}], "cache": str(tmp_path / "cache")},
            "stages": [{"name": "s", "train": ["*"], "heads": [32, 8], "steps": 1, "lr": 0.1}],
        }
    )
    evalsets = load_evals(
        [
            EvalConfig(path=str(write_beir(tmp_path / "stories", tiny_texts[:20]))),
            EvalConfig(path=str(write_sts(tmp_path / "pairs.tsv", tiny_texts[:12]))),
        ]
    )
    both = [hashed_encode([f"{n} {t}" for t in tiny_texts[:100]], "document") for n in (10, 20)]
    train = normalise(np.concatenate(both, axis=1))

    def student(texts: list[str], role: str) -> dict[int, np.ndarray]:
        vectors = normalise(
            np.concatenate([hashed_encode([f"{n} {t}" for t in texts], role) for n in (10, 20)], axis=1)
        )
        return {32: vectors, 8: normalise(vectors[:, :8])}

    before = [{"model": "student before", "width": 4, "scores": {"stories/nDCG@10": 0.25}}]
    results = evaluate_run(config, evalsets, before, student, train)
    assert results["primary"] == {"set": "stories", "metric": "nDCG@10"}
    assert results["sets"][1] == {"name": "pairs", "kind": "sts", "metric": "Spearman", "sizes": {"pairs": 11}}
    rows = {(row["model"], row["width"]): row["scores"] for row in results["rows"]}
    assert list(rows) == [
        ("teacher", 32),
        ("teacher truncated", 8),
        ("teacher PCA", 8),
        ("student before", 4),
        ("student", 32),
        ("student", 8),
    ]
    assert set(rows["teacher", 32]) == {"stories/nDCG@10", "stories/recall@100", "pairs/Spearman"}
    assert rows["teacher", 32] == rows["student", 32], "this student is norm(concat(norm t_i)) itself"
    assert rows["teacher truncated", 8] == rows["student", 8]
    assert rows["teacher PCA", 8] != rows["teacher truncated", 8]
    encoded = len(calls)
    assert loaded == [10, 20]
    again = evaluate_run(config, evalsets, before, student, train)
    assert again == results and len(calls) == encoded and loaded == [10, 20], (
        "a second run reads teacher embeddings from the cache"
    )
    ready = config.model_copy(update={"teachers": [config.teachers[0].model_copy(update={"model": None})]})
    assert {row["model"] for row in evaluate_run(ready, evalsets, before, student, None)["rows"]} == {
        "student before",
        "student",
    }
    assert evaluate_run(config, [], before, student, None) == {}
    assert set(precisions) == {"fp32"}
    other = config.model_copy(update={"precision": "bf16"})
    evaluate_run(other, evalsets, before, student, train)
    assert loaded == [10, 20, 10, 20] and precisions[2:] == ["bf16", "bf16"], "the cache must separate precisions"


def test_a_perfect_encoder_has_perfect_scores(tmp_path: Path, tiny_texts: list[str]) -> None:
    evalset = load_eval(EvalConfig(path=str(write_beir(tmp_path / "stories", tiny_texts[:20]))))

    def perfect(texts: list[str], role: str) -> dict[int, np.ndarray]:
        at = [next(i for i, full in enumerate(tiny_texts) if text in f"title {i} {full}") for text in texts]
        return {200: np.eye(200, dtype=np.float32)[at]}

    (row,) = score_rows([evalset], {"model": perfect})
    assert row["scores"] == {"stories/nDCG@10": 1.0, "stories/recall@100": 1.0}


# --- the command


def test_command_compares_student_and_teacher(
    routed: Path, tiny_bert: Path, tmp_path: Path, tiny_texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    stories = write_beir(tmp_path / "stories", tiny_texts[:30], queries=20)
    pairs = write_sts(tmp_path / "pairs.tsv", tiny_texts[:30])
    out = tmp_path / "scores.json"
    given = [str(routed), str(stories), str(pairs), "--teacher", str(tiny_bert), "--limit", "10", "--json", str(out)]
    assert main([*given, "--max-length", "40"]) == 0
    printed = capsys.readouterr().out
    content = json.loads(out.read_text())
    assert [(row["model"], row["width"]) for row in content["rows"]] == [
        ("teacher", 32),
        ("student", 24),
        ("student", 8),
    ]
    teacher, student, _ = (row["scores"]["stories/nDCG@10"] for row in content["rows"])
    assert f"{100 * student:.2f} ({100 * student / teacher:.1f} %)" in printed
    assert "pairs/Spearman" in printed.splitlines()[0]
    assert (content["max_length"], content["limit"]) == (40, 10)
    assert main([str(routed), str(pairs), "--widths", "8"]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[2:3]] == [["model", "8"]]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{missing}", "{pairs}"], "no such model on this machine"),
        (["{empty}", "{pairs}"], "the folder holds no model"),
        (["{cut}", "{pairs}"], "cannot be loaded .* copy or save the model again"),
        (["{listless}", "{pairs}"], "cannot be loaded .* copy or save the model again"),
        (["{model}", "{pairs}", "--widths", "8,wide"], "--widths takes numbers"),
        (["{model}"], "no evaluation set is given"),
        (["run.yaml", "{pairs}"], "run.yaml is a configuration, and a model is expected.*train --config run.yaml"),
        (["run.yml"], "run.yml is a configuration"),
        ([" ", "{pairs}"], "the model's name is empty"),
        (["{model}", "{pairs}", "--teacher", "run.yaml"], "run.yaml is a configuration"),
        (["{model}", "{pairs}", "--json", "{empty}"], "a folder is where a file should be"),
        (["{model}", "{pairs}", "--json", "{pairs}/deeper/scores.json"], "a file is where a folder should be"),
    ],
)
def test_command_rejects_wrong_arguments(
    routed: Path, tmp_path: Path, tiny_texts: list[str], arguments: list[str], says: str
) -> None:
    (tmp_path / "empty").mkdir()
    cut, listless = (shutil.copytree(routed / "model", tmp_path / name) for name in ("cut", "listless"))
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:2000])
    (listless / "modules.json").write_text("[{")
    places = {
        "cut": cut,
        "listless": listless,
        "missing": tmp_path / "missing",
        "empty": tmp_path / "empty",
        "model": routed,
        "pairs": write_sts(tmp_path / "pairs.tsv", tiny_texts[:6]),
    }
    with pytest.raises(JasperError, match=says):
        main([argument.format(**places) for argument in arguments])


def test_table_has_no_fraction_of_a_negative_teacher() -> None:
    rows = [
        {"model": "teacher", "width": 4, "scores": {"x/Spearman": -0.1}},
        {"model": "student", "width": 4, "scores": {"x/Spearman": 0.3}},
    ]
    assert scores_table(rows).splitlines()[3].split() == ["student", "4", "30.00"]


@pytest.fixture(scope="module")
def flat(routed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that is 24 wide, like the widest head of the student."""
    folder = tmp_path_factory.mktemp("flat")
    model = flat_model(load_model(str(routed)), 24)
    with torch.no_grad():
        words = next(model[0].parameters())
        words.copy_(words.roll(1, dims=0))
    model.save(str(folder))
    return folder


def test_documents_by_a_teacher_are_searched_by_the_models_queries(
    routed: Path, flat: Path, tmp_path: Path, tiny_texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    stories = write_beir(tmp_path / "stories", tiny_texts[:30], queries=20)
    pairs = write_sts(tmp_path / "pairs.tsv", tiny_texts[:30])
    out = tmp_path / "scores.json"
    given = [str(routed), str(pairs), str(stories), "--documents-by", str(flat), "--json", str(out)]
    assert main([*given, "--precision", "float32,int8"]) == 0
    printed = capsys.readouterr().out
    content = json.loads(out.read_text())
    assert content["documents_by"] == str(flat)
    rows = {(row["model"], row["width"], row.get("precision")): row["scores"] for row in content["rows"]}
    assert [*rows][-2:] == [("documents by teacher", 24, None), ("documents by teacher", 24, "int8")]
    evalset = load_eval(EvalConfig(path=str(stories)))
    queries, documents = (
        model_encoder(load_model(str(path)), [24])(texts, role)[24]
        for path, texts, role in ((routed, evalset.queries, "query"), (flat, evalset.documents, "document"))
    )
    expected = metrics.score_embeddings(evalset, {"queries": queries, "documents": documents})
    assert rows["documents by teacher", 24, None] == {f"stories/{name}": value for name, value in expected.items()}
    assert expected["nDCG@10"] != rows["model", 24, None]["stories/nDCG@10"]
    assert f"documents by teacher: not at 8, which {flat} lacks" in printed
    assert "pairs: --documents-by does not apply to a set without queries" in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{stories}", "--widths", "8"], r"no width agrees \(got 8 of .*, expected one of 24\)"),
        (["{pairs}"], r"no set has queries and documents \(got pairs, expected a retrieval set\)"),
    ],
)
def test_documents_by_needs_an_equal_width_and_queries(
    routed: Path, flat: Path, tmp_path: Path, tiny_texts: list[str], arguments: list[str], says: str
) -> None:
    stories = write_beir(tmp_path / "stories", tiny_texts[:30], queries=20)
    pairs = write_sts(tmp_path / "pairs.tsv", tiny_texts[:6])
    with pytest.raises(JasperError, match=says):
        main([str(routed), *(a.format(stories=stories, pairs=pairs) for a in arguments), "--documents-by", str(flat)])
