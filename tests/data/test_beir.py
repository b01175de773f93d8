"""BEIR sets are scored as in BEIR: absent ids, grades of 0, qrels formats and ties."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jasper_fast.config.data import EvalConfig
from jasper_fast.data.eval_loaders import load_eval
from jasper_fast.data.eval_sets import RetrievalSet
from jasper_fast.data.judgements import read_judgements
from jasper_fast.evaluate import main
from jasper_fast.evaluation import metrics
from jasper_fast.evaluation.score import describe_sets, note_lines
from jasper_fast.utils.errors import JasperError
from tests.helpers.packing import pack

CORPUS = [{"_id": f"d{i}", "title": "", "text": f"text {i}"} for i in range(4)]
QUERIES = [{"_id": f"q{i}", "text": f"question {i}"} for i in range(3)]
HEADER = "query-id\tcorpus-id\tscore\n"


def write_set(folder: Path, qrels: str, corpus: list[dict] = CORPUS, queries: list[dict] = QUERIES) -> Path:
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    (folder / "qrels" / "test.tsv").write_bytes(qrels.encode())
    return folder


def load(folder: Path, **fields: Any) -> RetrievalSet:
    evalset = load_eval(EvalConfig(path=str(folder), **fields))
    assert isinstance(evalset, RetrievalSet)
    return evalset


def scored(evalset: RetrievalSet, queries: np.ndarray, documents: np.ndarray) -> dict[str, float]:
    return metrics.score_embeddings(evalset, {"queries": queries, "documents": documents})


# --- the scores of BEIR and mteb


def beir_scores(qrels: dict[str, dict[str, int]], results: dict[str, dict[str, float]]) -> dict[str, float]:
    """Call pytrec_eval like BEIR's EvaluateRetrieval.evaluate, without rounding."""
    import pytrec_eval

    scores = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.100"}).evaluate(results)
    return {
        "nDCG@10": sum(s["ndcg_cut_10"] for s in scores.values()) / len(scores),
        "recall@100": sum(s["recall_100"] for s in scores.values()) / len(scores),
    }


def random_set(seed: int, folder: Path) -> tuple[RetrievalSet, dict, dict, np.ndarray, np.ndarray]:
    """Build a set with graded, absent and irrelevant documents, and integer vectors that give many equal scores."""
    random = np.random.default_rng(seed)
    count = int(random.choice([3, 40, 100, 101, 300]))
    names = [f"{'ab'[i % 2]}{i}" for i in random.permutation(count)]
    corpus = [{"_id": name, "text": f"text {name}" if i else ""} for i, name in enumerate(names)]
    queries = [{"_id": f"q{i}", "text": f"question {i}"} for i in range(12)]
    qrels: dict[str, dict[str, int]] = {}
    for i in range(10):  # the last two queries have no judgement
        judged = [*random.choice(names, min(count, 8)), *(f"absent{j}" for j in range(random.integers(0, 4)))]
        highest = 0 if i == 0 else 3
        qrels[f"q{i}"] = {str(name): int(random.integers(-1 if i else 0, highest + 1)) for name in judged}
    qrels["q1"] = {"absent": 2}
    lines = [f"{q}\t{d}\t{grade}\n" for q, grades in qrels.items() for d, grade in grades.items()]
    lines += ["gone\tabsent\t1\n", f"gone\t{names[0]}\t0\n"]
    random.shuffle(lines)
    lines.append(f"q2\t{names[1]}\t2\n")  # judged twice: the last one counts
    qrels["q2"][names[1]] = 2
    evalset = load(write_set(folder, HEADER + "".join(lines), corpus, queries))
    asked, documents = (random.integers(-1, 2, (n, 4)).astype(np.float32) for n in (10, count))
    scores = asked @ documents.T
    results = {f"q{i}": dict(zip(names, scores[i].tolist(), strict=True)) for i in range(10)}
    return evalset, qrels, results, asked, documents


@pytest.mark.parametrize("seed", range(20))
def test_scores_are_those_of_beir_and_mteb(seed: int, tmp_path: Path) -> None:
    evalset, qrels, results, asked, documents = random_set(seed, tmp_path / "set")
    scores = scored(evalset, asked, documents)
    assert scores == pytest.approx(beir_scores(qrels, results), abs=1e-9)
    mteb_scores = pytest.importorskip("mteb._evaluators.retrieval_metrics").calculate_retrieval_scores(
        results, qrels, [10, 100]
    )
    assert scores["nDCG@10"] == pytest.approx(mteb_scores.ndcg["NDCG@10"], abs=1e-5)
    assert scores["recall@100"] == pytest.approx(mteb_scores.recall["Recall@100"], abs=1e-5)


def test_equal_scores_rank_by_position_in_sets_without_ids() -> None:
    documents = np.ones((300, 2), dtype=np.float32)
    for relevant, score in ((0, 1.0), (9, 1 / np.log2(11)), (10, 0.0)):
        evalset = RetrievalSet("x", ["q"], [f"d{i}" for i in range(300)], [{relevant: 1}])
        assert scored(evalset, documents[:1], documents)["nDCG@10"] == pytest.approx(score)
    assert scored(RetrievalSet("x", ["q"], ["d"] * 300, [{99: 1}]), documents[:1], documents)["recall@100"] == 1
    assert scored(RetrievalSet("x", ["q"], ["d"] * 300, [{100: 1}]), documents[:1], documents)["recall@100"] == 0


# --- absent documents and queries

COUNTED = {
    "absent document": ("q0\td1\t1\nq0\tdX\t1\n", "1 judgement of an absent document", 1 / (1 + 1 / np.log2(3))),
    "absent documents": ("q0\td0\t1\nq0\tX\t0\nq0\tY\t0\n", "2 judgements of absent documents", 1.0),
    "absent query": ("q0\td0\t1\nqX\td0\t1\n", "1 judgement of an absent query", 1.0),
    "absent both": ("q0\td0\t1\nqX\tdX\t1\nqY\td0\t2\n", "2 judgements of absent queries", 1.0),
    "all of a query's": (
        "q0\td0\t1\nq1\tX\t1\nq1\tY\t1\n",
        "2 judgements of absent documents",
        0.5,
    ),
    "zeros alone": ("q0\td0\t1\nq1\td1\t0\nq2\td0\t1\n", "1 query without a relevant document (scored 0)", 2 / 3),
    "negative": ("q0\td0\t1\nq1\td1\t-2\nq2\td2\t-1\n", "2 queries without a relevant document (scored 0)", 1 / 3),
    "several": (
        "q0\td0\t1\nq0\tX\t1\nqX\td0\t1\nq1\td1\t0\n",
        "1 judgement of an absent document, 1 judgement of an absent query, "
        "1 query without a relevant document (scored 0)",
        1 / (1 + 1 / np.log2(3)) / 2,
    ),
    "nothing": ("q0\td0\t1\n", "", 1.0),
}


@pytest.mark.parametrize("case", COUNTED)
def test_what_a_set_lacks_is_counted_and_scored(case: str, tmp_path: Path) -> None:
    lines, remarks, score = COUNTED[case]
    evalset = load(write_set(tmp_path / "set", HEADER + lines))
    assert evalset.notes() == remarks
    assert note_lines(describe_sets([evalset])["sets"]) == ([f"set: {remarks}"] if remarks else [])
    documents = np.eye(4, dtype=np.float32)
    first = [
        next(iter([d for d in grades if d < 4]), 3) for grades in evalset.relevant
    ]  # each query retrieves its first relevant document
    assert scored(evalset, documents[first], documents)["nDCG@10"] == pytest.approx(score)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("q0\tX\t1\nq1\tY\t1\n", "the judgements do not match the corpus and the queries"),
        ("X\td0\t1\nY\td1\t1\n", "the judgements do not match the corpus and the queries"),
        ("q0\tX\t1\nX\td1\t1\nq1\td1\t0\n", "no relevant pair is in both"),
        ("d0\tq0\t1\nd1\tq1\t1\n", "the judgements do not match the corpus and the queries"),  # columns swapped
        ("q0\td0\t0\nq1\td1\t-1\n", "no query has a relevant document (a score above 0)"),
        ("", "no query has a relevant document (a score above 0)"),
    ],
)
def test_a_set_of_which_nothing_can_be_scored_is_rejected(lines: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(JasperError) as caught:
        load(write_set(tmp_path / "set", HEADER + lines))
    assert says in str(caught.value) and "test.tsv" in str(caught.value) and "Fix: " in str(caught.value)


def test_an_absent_document_is_none_of_the_corpus(tmp_path: Path) -> None:
    evalset = load(write_set(tmp_path / "set", HEADER + "q0\td1\t1\nq0\tX\t2\nq1\tX\t1\n"))
    assert evalset.relevant == [{1: 1, 4: 2}, {4: 1}] and len(evalset.documents) == 4
    assert evalset.ids == ["d0", "d1", "d2", "d3", "X"]


def test_evaluate_and_its_json_name_what_is_absent(tmp_path: Path, tiny_bert: Path, capsys) -> None:
    folder = write_set(tmp_path / "arguana", HEADER + "q0\td1\t1\nq1\td2\t1\nq1\tdX\t1\nqX\td1\t1\nq2\td1\t0\n")
    assert main([str(tiny_bert), str(folder), "--json", str(tmp_path / "scores.json")]) == 0
    line = (
        "1 judgement of an absent document, 1 judgement of an absent query, "
        "1 query without a relevant document (scored 0)"
    )
    assert f"arguana: {line}" in capsys.readouterr().out.splitlines()
    (described,) = json.loads((tmp_path / "scores.json").read_text())["sets"]
    assert described == {"name": "arguana", "kind": "beir", "metric": "nDCG@10", "remarks": line} | {
        "sizes": {"documents": 4, "queries": 3}
    }


# --- forms of files

JUDGED = {"q0": {"d0": 1, "d1": 2}, "q1": {"d2": 1}}
FORMS = {
    "BEIR": HEADER + "q0\td0\t1\nq0\td1\t2\nq1\td2\t1\n",
    "no header": "q0\td0\t1\nq0\td1\t2\nq1\td2\t1\n",
    "other header": "qid\tpid\tlabel\nq0\td0\t1\nq0\td1\t2\nq1\td2\t1\n",
    "unknown header": "a\tb\tc\nq0\td0\t1\nq0\td1\t2\nq1\td2\t1\n",
    "other order": "score\tcorpus-id\tquery-id\n1\td0\tq0\n2\td1\tq0\n1\td2\tq1\n",
    "more columns": HEADER.replace("\n", "\tnote\n") + "q0\td0\t1\tx\nq0\td1\t2\ty\nq1\td2\t1\tz\n",
    "TREC": "q0 0 d0 1\nq0 0 d1 2\nq1 0 d2 1\n",
    "TREC with tabs": "q0\tQ0\td0\t1\nq0\tQ0\td1\t2\nq1\tQ0\td2\t1\n",
    "spaces": "q0  d0 1\nq0 d1  2\n q1 d2 1 \n",
    "CRLF": (HEADER + "q0\td0\t1\nq0\td1\t2\nq1\td2\t1\n").replace("\n", "\r\n"),
    "CR": (HEADER + "q0\td0\t1\nq0\td1\t2\nq1\td2\t1\n").replace("\n", "\r"),
    "BOM": "\ufeff" + HEADER + "q0\td0\t1\nq0\td1\t2\nq1\td2\t1\n",
    "trailing blanks": HEADER + "q0 \t d0\t1 \nq0\td1\t2\t\n\nq1\td2\t1\n \n",
    "no last line end": HEADER + "q0\td0\t1\nq0\td1\t2\nq1\td2\t1",
    "decimal grades": HEADER + "q0\td0\t1.0\nq0\td1\t2.0\nq1\td2\t1e0\n",
    "quoted": '"query-id"\t"corpus-id"\t"score"\n"q0"\t"d0"\t1\nq0\t"d1"\t"2"\n"q1"\t"d2"\t1\n',
    "twice": HEADER + "q0\td0\t1\nq0\td1\t0\nq0\td1\t2\nq1\td2\t1\nq1\td2\t1\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_qrels_is_read(form: str, tmp_path: Path) -> None:
    file = tmp_path / "qrels.tsv"
    file.write_bytes(FORMS[form].encode())
    assert read_judgements(file) == JUDGED


@pytest.mark.parametrize(
    "name", ["test.tsv", "TEST.TSV", "test.tsv.gz", "test.txt", "dev.tsv", "test.tsv.zst", "test.jsonl.gz"]
)
def test_qrels_are_found_under_their_usual_names(name: str, tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", "")
    (folder / "qrels" / "test.tsv").unlink()
    rows = [{"query-id": q, "corpus-id": d, "score": n} for q, grades in JUDGED.items() for d, n in grades.items()]
    content = "".join(json.dumps(row) + "\n" for row in rows) if ".jsonl" in name else FORMS["BEIR"]
    (folder / "qrels" / name).write_bytes(pack(content.encode(), name))
    (folder / "qrels" / "._test.tsv").write_bytes(b"\0\5\x16\7")
    assert load(folder).relevant == [{0: 1, 1: 2}, {2: 1}]
    assert load(folder / "qrels" / name).relevant == [{0: 1, 1: 2}, {2: 1}]


def test_ids_may_be_numbers_or_have_spaces_around_them(tmp_path: Path) -> None:
    corpus = [{"_id": 1, "text": "one"}, {"_id": " 2 ", "text": ""}, {"_id": "3", "text": "three", "title": None}]
    queries = [{"_id": 7, "text": "x"}, {"_id": "8 ", "text": "y"}]
    evalset = load(write_set(tmp_path / "set", HEADER + "7\t 1\t1\n8\t2\t1\n7\t3\t2\n", corpus, queries))
    assert evalset.relevant == [{0: 1, 2: 2}, {1: 1}] and evalset.documents == ["one", "", "three"]


def test_rows_that_are_there_twice_count_once(tmp_path: Path) -> None:
    evalset = load(write_set(tmp_path / "set", FORMS["BEIR"], [*CORPUS, CORPUS[1], CORPUS[0]], [*QUERIES, QUERIES[0]]))
    assert len(evalset.documents) == 4 and evalset.relevant == [{0: 1, 1: 2}, {2: 1}]


@pytest.mark.parametrize(
    "row",
    [{"query": "q0", "score": 1}, {"query-id": "q0", "corpus-id": "d0"}, {"qid": "q0", "did": "d0", "score": None}],
)
def test_judgements_in_json_without_their_columns_are_named(row: dict, tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(JasperError, match="test.jsonl, line 1: (not )?a (judgement|grade)"):
        read_judgements(file)


def test_the_limit_draws_from_all_judged_queries(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", HEADER + "q0\td0\t1\nq1\td1\t0\nq2\tX\t1\n")
    whole = load(folder)
    assert whole.queries == ["question 0", "question 1", "question 2"] and whole.relevant == [{0: 1}, {}, {4: 1}]
    assert len(load(folder, limit=2).queries) == 2


SURROGATES = {
    "document": ("corpus.jsonl", {"_id": "d9", "text": "half \ud83d"}, "`text`", 6),
    "title": ("corpus.jsonl", {"_id": "d9", "title": "\ude00", "text": "x"}, "`title`", 1),
    "document id": ("corpus.jsonl", {"_id": "d\ud800", "text": "x"}, "`_id`", 2),
    "query": ("queries.jsonl", {"_id": "q9", "text": "who\udfff?"}, "`text`", 4),
    "query id": ("queries.jsonl", {"_id": "\udc00q", "text": "x"}, "`_id`", 1),
}


@pytest.mark.parametrize("case", SURROGATES)
def test_lone_surrogates_are_named_with_file_line_and_place(case: str, tmp_path: Path) -> None:
    name, row, cell, place = SURROGATES[case]
    folder = write_set(tmp_path / "set", FORMS["BEIR"])
    with (folder / name).open("a") as file:
        file.write(json.dumps(row) + "\n")
    line = 5 if name == "corpus.jsonl" else 4
    with pytest.raises(JasperError) as caught:
        load(folder)
    assert f"{folder / name}, line {line}: {cell} has a lone surrogate" in str(caught.value)
    assert f"at character {place}." in str(caught.value)


@pytest.mark.parametrize(("text", "label"), [("half \ud83d", 1), ("whole", "label \ud83d")])
def test_lone_surrogates_of_classification_sets(text: str, label: Any, tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}, {"text": text, "label": label}]
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(JasperError, match=r"train.jsonl, line 3: `(text|label)` has a lone surrogate"):
        load_eval(EvalConfig(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("header", "rows"),
    [
        ("corpus-id\tquery-id\tgain", "1\t2\t1"),
        ("docid\tquestion\tscore", "1\t2\t1"),
        ("qid\tdocid\tutility", "1\t2\t1"),
    ],
)
def test_columns_known_in_part_are_not_read_by_position(header: str, rows: str, tmp_path: Path) -> None:
    from jasper_fast.data.judgements import read_judgements

    (tmp_path / "test.tsv").write_text(f"{header}\n{rows}\n")
    with pytest.raises(JasperError, match="line 1: unknown columns"):
        read_judgements(tmp_path / "test.tsv")
