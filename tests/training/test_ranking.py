"""Queries, candidates and scores of a ranking stage."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from jasper_fast.config.load import load_config
from jasper_fast.data.text import normal_form
from jasper_fast.teachers.label import ensure_teachers
from jasper_fast.training import ranking as module
from jasper_fast.training.preflight import prepare
from jasper_fast.training.rank_queries import ranking_queries
from jasper_fast.training.ranking import make_ranking, mine
from jasper_fast.training.run.run import Run
from jasper_fast.training.stages.rank import batch_rows
from jasper_fast.utils.errors import JasperError
from tests.helpers.rank_stages import Judge, rank_settings, replace_cross_encoder, write_queries
from tests.helpers.runs import write_data

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_texts):
    folder = tmp_path_factory.mktemp("ranking")
    write_data(folder, tiny_texts)
    write_queries(folder, tiny_texts)
    return folder


@pytest.fixture(scope="module")
def world(folder, tiny_bert):
    """Training texts with their teacher's embeddings."""
    config = load_config(rank_settings(folder, tiny_bert))
    _, data = prepare(config)
    return config, data, ensure_teachers(config, data.texts, progress=False)


def of(config, **rank):
    stages = [stage.model_dump(mode="json") for stage in config.stages]
    stages[1]["rank"] |= rank
    return load_config(config.model_dump(mode="json") | {"stages": stages})


def ranked(world, used=None, **rank):
    config, data, labels = world
    config = of(config, **rank)
    queries = ranking_queries(config, 1, data)
    used = np.arange(len(queries)) if used is None else used
    settings = config.stages[1].rank
    return make_ranking(Run.local(config, CPU), "rank", settings, queries, data.texts, labels, used)


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (40, 5), (40, 60), (3, 2)])
def test_mined_documents_are_the_nearest_by_the_slow_way(rows, count, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 16)
    generator = torch.Generator().manual_seed(rows)
    documents = F.normalize(torch.randn(rows, 9, generator=generator), dim=1)
    asked = F.normalize(torch.randn(21, 9, generator=generator), dim=1)
    chosen = np.arange(rows)[:: 2 if rows > 3 else 1]
    found = mine(asked, lambda at: documents[at], chosen, rows, min(count, rows))
    scores = (asked.double() @ documents.double().T)[:, chosen]
    expected = chosen[scores.argsort(dim=1, descending=True).numpy()][:, :count]
    assert np.array_equal(found[:, : expected.shape[1]], expected) and (found[:, expected.shape[1] :] == -1).all()


def test_candidates_and_scores_are_the_teachers_by_the_slow_way(world):
    config, data, labels = world
    ranking = ranked(world)
    queries, texts = ranking.queries, data.texts["text"][:]
    every = torch.cat([labels.read_full(np.arange(len(texts))), ranking.vectors]).double()
    place = {row: len(texts) + at for at, row in enumerate(ranking.own.tolist())}
    place |= {row: row for row in range(len(texts))}
    kinds = set()
    for query in range(len(queries)):
        rows, scores, positive = (part[query] for part in ranking.candidates)
        source, barred = queries.sources[query], queries.barred[query]
        kinds.add((source >= len(texts), source >= 0, barred >= 0))
        cosines = every @ every[place[len(texts) + query]]
        order = [row for row in cosines[: len(texts)].argsort(descending=True).tolist() if row not in (source, barred)]
        expected = ([source] if source >= 0 else []) + order
        assert rows.tolist() == expected[:5] and len(set(rows.tolist())) == 5
        expected_scores = [float(cosines[place[row]]) for row in rows.tolist()]
        assert scores.tolist() == pytest.approx(expected_scores, abs=1e-3)
        assert positive == (0 if source >= 0 else int(np.argmax(scores)))
    assert len(kinds) > 1
    assert torch.equal(ranking.targets(np.arange(3)), labels.read(np.arange(3)))
    mixed = np.array([5, len(texts) + 2, 1, len(texts)])
    assert torch.allclose(ranking.targets(mixed).double(), every[[place[row] for row in mixed.tolist()]], atol=1e-6)


def test_only_queries_that_the_stage_reads_are_embedded_and_their_candidates_are_cached(world, monkeypatch):
    used = np.array([1, 4, 7])
    first = ranked(world, used)
    queries = first.queries
    sources = queries.sources[used]
    assert set(first.own) == {queries.trained + 1, queries.trained + 4, queries.trained + 7} | {
        row for row in sources.tolist() if row >= queries.trained
    }
    whole = ranked(world)
    assert np.array_equal(first.candidates.rows, whole.candidates.rows[used])
    monkeypatch.setattr(module, "mine", lambda *given: pytest.fail("mined again"))
    again = ranked(world, used)
    assert all(np.array_equal(a, b) for a, b in zip(again.candidates, first.candidates, strict=True))


def test_a_damaged_cache_of_candidates_is_made_again(world):
    used = np.array([0, 3])
    first = ranked(world, used)
    for file in (module.Path(world[0].data.cache)).glob("candidates-*.npy"):
        file.write_bytes(file.read_bytes()[:-7])
    assert np.array_equal(ranked(world, used).candidates.rows, first.candidates.rows)


def test_a_cross_encoder_scores_each_pair_once(world, monkeypatch):
    monkeypatch.setattr(module, "open_cross_encoder", None)
    judge = replace_cross_encoder(Judge())
    ranking = ranked(world, targets="judge", candidates=4)
    texts = world[1].texts
    for query in (0, 5):
        asked = ranking.queries.read(texts, np.array([ranking.queries.trained + query]))[0]
        found = ranking.queries.read(texts, ranking.candidates.rows[query])[0]
        expected = Judge().scores([(asked[0], document) for document in found])
        assert ranking.candidates.scores[query].tolist() == expected.tolist()
    assert judge.scored == int((ranking.candidates.rows >= 0).sum())
    again = ranked(world, targets="judge", candidates=4)
    assert judge.scored == int((ranking.candidates.rows >= 0).sum())
    assert np.array_equal(again.candidates.scores, ranking.candidates.scores)


def test_grades_rank_only_the_candidates_of_the_file(world, folder, tiny_texts):
    ranking = ranked(world, queries=str(folder / "queries.jsonl"), targets="grades")
    queries, texts = ranking.queries, world[1].texts
    assert len(queries) == 12 and "12 given" in queries.line
    assert ranking.candidates.scores[:, :3].tolist() == [[2.0, 1.0, 0.0]] * 12
    assert (ranking.candidates.rows[:, 3:] == -1).all() and ranking.candidates.positives.tolist() == [0] * 12
    best, second, third = queries.read(texts, ranking.candidates.rows[4, :3])[0]
    assert (best, second, third) == (tiny_texts[24], tiny_texts[4], "a document of its own, number 4")


def test_listed_candidates_come_before_mined_ones(world, folder):
    ranking = ranked(world, queries=str(folder / "queries.jsonl"))
    assert (ranking.candidates.rows >= 0).all() and ranking.candidates.positives.tolist() == [0] * 12
    assert np.array_equal(ranking.candidates.rows[:, :3], ranking.queries.listed[:, :3])
    assert all(len(set(rows)) == 5 for rows in ranking.candidates.rows.tolist())


def test_grades_of_nothing_give_no_right_answer(world, tmp_path, tiny_texts):
    file = tmp_path / "q.jsonl"
    rows = [{"query": f"none {n}", "candidates": tiny_texts[n : n + 2], "grades": [0, -1]} for n in range(3)]
    file.write_text("\n".join(map(json.dumps, rows)))
    ranking = ranked(world, queries=str(file), targets="grades")
    assert ranking.candidates.positives.tolist() == [-1] * 3
    _, inputs = batch_rows(ranking, np.arange(3))
    assert inputs.positives.tolist() == [-1] * 3


def test_queries_are_never_held_out_or_evaluated_texts(folder, tiny_bert, tiny_texts, tmp_path):
    documents = [f"{text}\n{other} {third}" for text, other, third in zip(*[iter(tiny_texts)] * 3, strict=False)]
    source = tmp_path / "texts.jsonl"
    source.write_text("\n".join(json.dumps({"text": text}) for text in documents * 1))
    tree = rank_settings(folder, tiny_bert)
    tree["data"] |= {"sources": [str(source)], "held_out": 6, "cut_share": 0.0, "cache": str(tmp_path / "cache")}
    config = load_config(tree)
    _, data = prepare(config)
    plain = ranking_queries(config, 1, data)
    asked = [normal_form(text) for text in plain.texts["text"][: len(plain)]]
    held_out = {normal_form(text) for column in ("text", "query", "body") for text in data.held_out_texts[column][:]}
    assert held_out - {""} and not held_out & set(asked)
    title = next(text for text in plain.texts["text"][: len(plain)] if text in tiny_texts)
    (tmp_path / "pairs.tsv").write_text(
        f"score\tsentence1\tsentence2\n1.0\t{title}\tsomething else\n2.0\tx\ty\n3.0\tz\tw\n"
    )
    config = load_config(tree | {"evaluate": [str(tmp_path / "pairs.tsv")]})
    _, data = prepare(config)
    fewer = ranking_queries(config, 1, data)
    assert title not in fewer.texts["text"][:] and "evaluation texts" in fewer.line


def test_limit_and_texts_restrict_queries_and_documents(world):
    config, data, _ = world
    few = ranking_queries(of(config, limit=7), 1, data)
    assert len(few) == 7
    stages = [stage.model_dump(mode="json") for stage in config.stages]
    stages[1]["texts"] = 30
    short = ranking_queries(load_config(config.model_dump(mode="json") | {"stages": stages}), 1, data)
    assert short.documents.tolist() == list(range(30)) and short.sources.max() < short.trained + len(short.texts)
    assert (short.barred < 30).all()
    assert ranking_queries(config, 1, data) is ranking_queries(config, 1, data)
    assert few.fingerprint != short.fingerprint


def test_training_texts_that_are_queries_are_used_as_they_are(folder, tiny_bert, tmp_path, tiny_texts):
    (tmp_path / "asked.jsonl").write_text("\n".join(json.dumps({"text": f"who {n} asked"}) for n in range(9)))
    tree = rank_settings(folder, tiny_bert)
    tree["data"]["sources"] = [tree["data"]["sources"][0], {"path": str(tmp_path / "asked.jsonl"), "role": "query"}]
    config = load_config(tree)
    _, data = prepare(config)
    queries = ranking_queries(config, 1, data)
    assert "9 given" in queries.line and not set(queries.documents) & {
        row for row, role in enumerate(data.texts["role"]) if role == "query"
    }


def test_a_batch_has_its_distinct_documents_and_numbers_them(world):
    ranking = ranked(world)
    asked = np.array([3, 0, 9, 4])
    rows, inputs = batch_rows(ranking, asked)
    chosen = ranking.of(asked)
    assert rows[:4].tolist() == (ranking.queries.trained + asked).tolist()
    documents = rows[4:]
    assert len(set(documents.tolist())) == len(documents) == len(np.unique(chosen.rows))
    assert np.array_equal(documents[inputs.candidates.numpy()], chosen.rows)
    assert np.array_equal(documents[inputs.positives.numpy()], chosen.rows[np.arange(4), chosen.positives])
    for ranks in (1, 2, 3, 4):
        same, divided = batch_rows(ranking, asked, ranks)
        assert np.array_equal(same, rows) and sum(divided.counts) == len(rows)
        gathered = np.empty(len(rows), np.int64)
        gathered[divided.order.numpy()] = rows  # what each rank sends, in the order of ranks
        parts = np.split(gathered, np.cumsum(divided.counts)[:-1])
        for rank, part in enumerate(parts):
            expected = np.array_split(rows[:4], ranks)[rank].tolist() + np.array_split(rows[4:], ranks)[rank].tolist()
            assert part.tolist() == expected


def test_too_few_documents_or_no_query_is_an_error(folder, tiny_bert, tmp_path):
    for text, message in (("12", "no query"), ("one document that is long enough", "1 training documents")):
        count = 9 if text == "12" else 1
        (tmp_path / "few.jsonl").write_text("\n".join(json.dumps({"text": f"{text}{n}"}) for n in range(count)))
        tree = rank_settings(folder, tiny_bert)
        tree["data"] |= {"sources": [str(tmp_path / "few.jsonl")], "held_out": 0}
        tree["stages"][0]["batch_size"] = 1
        tree["stages"][0]["weights"] = {"cosine": 10.0, "similarity": 0.0, "relative_similarity": 0.0}
        with pytest.raises(JasperError, match=message):
            prepare(load_config(tree))
