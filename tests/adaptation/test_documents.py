"""The texts of an adaptation: whole documents, held-out ones with questions, and sentences of the others."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jasper_fast.adaptation.documents import FIRST_SENTENCES, TITLES, read_corpus, sentence_of, split_title
from jasper_fast.config.load import load_config
from jasper_fast.data.prepare import prepare_texts
from jasper_fast.utils.errors import JasperError


def write(folder, texts, titles=True):
    rows = [
        {"id": str(i), **({"title": f"Note {i} on {text.split()[1]}"} if titles else {}), "text": text}
        for i, text in enumerate(texts)
    ]
    (folder / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def config(folder, columns):
    source = {"path": str(folder / "docs.jsonl"), "columns": columns}
    return load_config(None, [("data.sources", [source]), ("data.cache", str(folder / "cache"))])


@pytest.fixture
def texts(tiny_texts):
    return [f"{a} {b} {c}" for a, b, c in zip(tiny_texts[:60], tiny_texts[60:120], tiny_texts[120:180], strict=True)]


def test_the_held_out_documents_are_those_of_training(tmp_path, texts):
    write(tmp_path, texts)
    settings = config(tmp_path, ["title", "text"])
    corpus, trained = read_corpus(settings.data), prepare_texts(settings)
    held_out = corpus.texts[: corpus.held_out]["digest"]
    assert held_out == trained.held_out["digest"][:] and corpus.held_out == 6
    assert corpus.documents == 60 and len(set(corpus.texts[: corpus.documents]["text"])) == 60
    fitted = corpus.texts[corpus.held_out : corpus.documents]["text"]
    assert all("\n" in text and text.count(".") >= 3 for text in fitted)  # whole documents, with their titles


def test_questions_are_titles_and_first_sentences_of_held_out_documents(tmp_path, texts):
    write(tmp_path, texts)
    corpus = read_corpus(config(tmp_path, ["title", "text"]).data)
    asked = corpus.texts[corpus.asked.start : corpus.asked.stop]
    assert corpus.kinds == {TITLES: 6, FIRST_SENTENCES: 6} and set(asked["role"]) == {"query"}
    documents = corpus.texts["text"]
    assert all(q in documents[row] for q, row in zip(asked["text"], corpus.answers, strict=True))
    assert corpus.answers.max() < corpus.held_out
    sentences = corpus.texts[corpus.sentences.start :]
    assert len(set(sentences["digest"])) == len(corpus.sentences) and set(sentences["role"]) == {"query"}
    assert not set(sentences["text"]) & set(asked["text"])
    assert 54 <= len(corpus.sentences) <= 108  # a title for each of the others, and a sentence for most


def test_documents_without_titles_are_asked_by_their_first_sentence(tmp_path, texts):
    write(tmp_path, texts, titles=False)
    corpus = read_corpus(config(tmp_path, ["text"]).data)
    assert corpus.kinds == {FIRST_SENTENCES: 6}


def test_without_questions_only_documents_are_read(tmp_path, texts):
    write(tmp_path, texts)
    corpus = read_corpus(config(tmp_path, ["title", "text"]).data, with_questions=False)
    assert len(corpus.texts) == corpus.documents == 60 and not corpus.questions and not len(corpus.sentences)


def test_documents_that_were_fitted_on_are_not_held_out(tmp_path, texts):
    write(tmp_path, texts)
    data = config(tmp_path, ["title", "text"]).data
    before = read_corpus(data)
    first, others = before.texts["digest"][0], before.texts[: before.documents]["digest"]
    after = read_corpus(data, lambda digests: np.array([digest != first for digest in digests]))
    assert after.held_out == before.held_out - 1 and after.documents == before.documents
    assert first in after.texts[after.held_out : after.documents]["digest"]
    assert set(after.texts[: after.documents]["digest"]) == set(others)


def test_duplicates_empty_and_one_word_documents_are_counted(tmp_path, texts):
    rows = [*texts, *texts[:5], "", " ", "word", "other"]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    corpus = read_corpus(config(tmp_path, ["text"]).data)
    assert corpus.counts.too_short == 2 and corpus.one_word == 2
    assert corpus.documents == 62  # distinct
    assert "2 too short" in corpus.counts.line(kept="document")


def test_too_few_documents_are_an_error_with_the_counts(tmp_path, texts):
    write(tmp_path, texts[:12])
    with pytest.raises(JasperError, match=r"too few documents .*got 12 distinct .*at least 30; .*12 documents read"):
        read_corpus(config(tmp_path, ["title", "text"]).data)


def test_titles_and_sentences():
    assert split_title("A title\nThe body of the text.", True) == ("A title", "The body of the text.")
    assert split_title("A title\nThe body of the text.", False) == ("", "A title\nThe body of the text.")
    assert split_title("A long first column\nshort", True) == ("", "A long first column\nshort")
    assert sentence_of("Only one sentence is here.") == ""
    assert sentence_of("One is here. Two is here.") in ("One is here.", "Two is here.")
    assert sentence_of("One is here. Two is here.") == sentence_of("One is here. Two is here.")


def test_digests_are_read_without_the_texts_and_in_blocks(tmp_path, monkeypatch):
    """At a million documents, a list of all texts would take gigabytes."""
    import tracemalloc

    from datasets import Dataset

    from jasper_fast.adaptation import documents
    from jasper_fast.data.text import text_digest
    from jasper_fast.data.text_counts import TextCounts
    from jasper_fast.teachers.reuse import digest_keys, text_keys

    digests = [text_digest(str(i)) for i in range(5000)]
    made = Dataset.from_dict({"text": ["x" * 2000] * 5000, "role": ["document"] * 5000, "digest": digests})
    made.save_to_disk(str(tmp_path / "d"))
    texts = Dataset.load_from_disk(str(tmp_path / "d"))
    corpus = documents.Corpus(texts, 10, 5000, 0, np.empty(0, np.int64), {}, TextCounts(), 0)
    monkeypatch.setattr(documents, "BLOCK", 512)
    next(corpus.digests(range(2)))
    tracemalloc.start()
    sizes = [len(block) for block in corpus.digests(corpus.fitted)]
    keys = text_keys(texts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sizes == [512] * 9 + [382] and [d for block in corpus.digests(range(700)) for d in block] == digests[:700]
    np.testing.assert_array_equal(keys, digest_keys(digests))
    assert peak < 4e6 < sum(map(len, made["text"])) / 2  # bytes
