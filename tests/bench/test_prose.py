"""The README and docs keep to plain English: short sentences, and no words from the substitution list."""

from __future__ import annotations

import pytest

from bench.pages import prose


def test_the_pages_keep_the_limits(capsys):
    assert prose.main([]) == 0, capsys.readouterr().out


def test_every_exception_and_legacy_page_is_still_needed():
    for name, word in prose.EXCEPTIONS:
        assert word in (prose.ROOT / name).read_text(encoding="utf-8")
    assert all((prose.ROOT / "docs" / name).is_file() for name in prose.LEGACY_PAGES)


def test_code_tables_and_headings_are_not_sentences():
    page = "# Title\n\nOne two. Three `a b c` four.\n\n```\nnot this\n```\n\n| cell. |\n\n- item one\n- item two"
    found = prose.sentences(page)
    assert [one.text for one in found] == ["One two.", "Three `code` four.", "item one", "item two"]
    assert [one.line for one in found] == [3, 3, 11, 12]


def test_links_and_abbreviations_do_not_end_a_sentence():
    page = "Read [the page](docs/a.md), e.g. This one, and\nstop there. jasper_fast begins another."
    assert [one.words for one in prose.sentences(page)] == [9, 3]


@pytest.mark.parametrize(
    "text", ["It was told.", "a picture", "A | share | of", "which goes on", "## As far as it goes"]
)
def test_words_to_replace_are_found(text):
    assert prose.hits(text, "README.md")


def test_code_may_hold_any_word():
    assert not prose.hits("`--pictures` and [it](docs/pictures.md)\n\n```\npictures\n```\n", "README.md")


def test_a_long_sentence_fails(tmp_path, capsys):
    (tmp_path / "page.md").write_text("word " * 26 + "end.\n")
    assert prose.main([str(tmp_path / "page.md")]) == 1
    assert "27 words (expected at most 25)" in capsys.readouterr().out
