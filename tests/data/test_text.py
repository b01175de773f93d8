"""Texts with invisible differences count as equal, so an evaluation text is excluded from training in any form."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jasper_fast.config.data import DataConfig, SourceConfig
from jasper_fast.data.text import lone_surrogate, normal_form
from jasper_fast.data.text_dataset import build_texts

SAME = {
    "decomposed": ("caf\u00e9 au lait", unicodedata.normalize("NFD", "caf\u00e9 au lait")),
    "full width": ("ABC 123", "\uff21\uff22\uff23\u3000\uff11\uff12\uff13"),
    "no-break space": ("a b c", "a\u00a0b\u202fc"),
    "zero-width space": ("whole word", "wh\u200bole wo\u200drd"),
    "soft hyphen": ("cooperation", "co\u00adopera\u00adtion"),
    "byte order mark": ("a question", "\ufeffa question"),
    "inner mark": ("a question", "a \ufeffquestion"),
    "ligature": ("the office", "the o\ufb03ce"),
    "sharp s": ("STRASSE", "stra\u00dfe"),
    "capital sharp s": ("strasse", "STRA\u1e9eE"),
    "dotted capital I": ("i\u0307stanbul", "\u0130stanbul"),
    "superscript": ("x2", "x\u00b2"),
    "Hangul": ("\ud55c\uae00", unicodedata.normalize("NFD", "\ud55c\uae00")),
    "half-width kana": ("\u30ab\u30e1\u30e9", "\uff76\uff92\uff97"),
    "final sigma": ("\u03bf\u03b4\u03bf\u03c2", "\u039f\u0394\u039f\u03a3"),
    "variation selector": ("\u2764 love", "\u2764\ufe0f love"),
    "direction marks": ("left right", "\u200eleft\u200f \u202aright\u202c"),
    "line separator": ("a b", "a\u2028b"),
    "Kelvin sign": ("5 k", "5 \u212a"),
    "joiner before an accent": ("\u00e9", "e\u200d\u0301"),
}


@pytest.mark.parametrize("case", SAME)
def test_forms_of_one_text_are_the_same_and_kept_from_training(case: str, tmp_path: Path) -> None:
    evaluated, trained = SAME[case]
    assert normal_form(evaluated) == normal_form(trained)
    rows = [{"text": trained}, {"text": evaluated}, {"text": "something else"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(
        sources=[SourceConfig(path=str(tmp_path / "rows.jsonl"))], cut_share=0, cache=str(tmp_path / "cache")
    )
    for barred in (evaluated, trained):
        assert build_texts(data, 0, {normal_form(barred)})["text"][:] == ["something else"]


@pytest.mark.parametrize(("one", "other"), [("a b", "ab"), ("resume", "r\u00e9sum\u00e9"), ("x", "x."), ("1", "2")])
def test_other_texts_stay_apart(one: str, other: str) -> None:
    assert normal_form(one) != normal_form(other)


@given(st.text())
def test_the_normal_form_is_that_of_itself(text: str) -> None:
    assert normal_form(normal_form(text)) == normal_form(text)


@given(st.text(st.characters(max_codepoint=127)))
def test_plain_texts_keep_their_former_form(text: str) -> None:
    assert normal_form(text) == " ".join(text.split()).casefold()


@pytest.mark.parametrize(
    ("text", "place"), [("", 0), ("\U0001f600", 0), ("\ud83d", 1), ("ab\udcffc\ud800", 3), ("\ud83d\ude00", 1)]
)
def test_lone_surrogates_are_found(text: str, place: int) -> None:
    problem = lone_surrogate(text)
    assert (problem is None) if place == 0 else f"at character {place}" in str(problem)
