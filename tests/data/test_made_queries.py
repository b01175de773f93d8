"""Queries made from documents without a language model."""

from __future__ import annotations

import re

import pytest

from jasper_fast.data import made_queries
from jasper_fast.data.made_queries import FUNCTION_WORDS, KINDS, MOST, WORD, MadeQuery, make_queries

TITLED = "Parse a date\n\nThe date is given in ISO 8601 form, with or without a time zone."
THREE = "The river froze in January. Boats were stuck for weeks. Nobody had seen such ice before that winter."
SHORT = "Return the mean of a list of numbers"
LONG = (
    "a compiler reads the whole source program and it builds a syntax tree from the tokens of the parser; then the "
    "optimizer removes dead branches of the syntax tree, and the register allocator assigns machine registers"
)


def by_kind(text: str, others: list[str] = (), seeds: int = 40) -> dict[str, list[MadeQuery]]:
    """Return the queries of a text for many seeds."""
    found: dict[str, list[MadeQuery]] = {}
    for seed in range(seeds):
        for query in make_queries([text, *others], seed):
            if query.document == 0:
                found.setdefault(query.kind, []).append(query)
    return found


def test_a_title_leaves_its_document():
    found = by_kind(TITLED)
    assert found["title"][0] == MadeQuery("Parse a date", 0, "title", TITLED.split("\n\n")[1])


def test_a_first_sentence_leaves_its_document_if_two_others_stay():
    found = by_kind(THREE)
    query = found["sentence"][0]
    assert query.text == "The river froze in January." and query.body == THREE[len(query.text) + 1 :]
    two = THREE.split(" Nobody")[0]
    assert "sentence" not in by_kind(two)


def test_a_short_text_is_a_query_for_other_documents():
    assert by_kind(SHORT)["text"] == [MadeQuery(SHORT, 0, "text")] * 40


def test_keywords_are_the_rare_words_in_the_order_of_the_document():
    others = [f"the tokens of the parser and a tree number {n} " + LONG[:20] for n in range(30)]
    found = by_kind(LONG, others, 60)
    order = [word.casefold() for word in WORD.findall(LONG)]
    for query in found["keywords"]:
        words = [word.casefold() for word in query.text.split()]
        assert 2 <= len(words) <= MOST and not FUNCTION_WORDS & set(words)
        assert [order.index(word) for word in words] == sorted(order.index(word) for word in words)
        assert "tokens" not in words and query.body is None  # in every document


def test_questions_ask_for_a_key_phrase_of_english_documents():
    found = by_kind(LONG, seeds=60)
    for query in found["question"]:
        assert any(re.fullmatch(form.format(".+"), query.text) for form in made_queries.QUESTIONS)
    phrases = {query.text for query in found["question"]}
    assert all("the" not in phrase.split()[-2:] for phrase in phrases) and len(phrases) > 3
    german = "Übersetzer lesen Quelltext, erzeugen Syntaxbäume, prüfen Typen, verteilen Register, ordnen Befehle neu an"
    assert set(by_kind(german)) == {"text", "keywords"}


def test_queries_depend_on_seed_and_text_alone():
    texts = [TITLED, THREE, SHORT, LONG]
    assert make_queries(texts, 3) == make_queries(list(texts), 3)
    assert len({tuple(query.text for query in make_queries(texts, seed)) for seed in range(8)}) > 1
    alone = {query.text for query in make_queries(texts[:3], 3)}
    assert alone <= {query.text for query in make_queries(texts[2::-1], 3)}  # the order of documents does not count


def test_a_limit_draws_documents():
    texts = [f"Sort {word} lists\n\nThe order of {word} lists is kept, and equal items stay." for word in "abcdefgh"]
    texts = [text.replace("Sort ", f"Sort {'x' * n}") for n, text in enumerate(texts)]
    few = make_queries(texts, 1, 3)
    assert len(few) == 3 and [query.document for query in few] == sorted(query.document for query in few)
    every = {query.text: query for query in make_queries(texts, 1)}
    assert len({tuple(query.document for query in make_queries(texts, seed, 3)) for seed in range(6)}) > 1
    assert all(query.text in every for query in few)
    assert make_queries(texts, 1, 0) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\n",
        "a",
        "\n\nb",
        "1234 5678",
        "x" * 5000,
        "汉字没有空格的文本" * 40,
        "\x00 \x01",
        "e\u0301 " * 300,
        "...",
        "? ! .",
    ],
)
def test_unusual_documents_give_a_query_or_none(text):
    for query in make_queries([text, LONG, text], 0):
        assert query.kind in KINDS and query.text.strip() and len(query.text) <= 1000


def test_equal_queries_are_made_once():
    assert len(make_queries([SHORT, SHORT.upper(), SHORT], 0)) == 1
