"""Docstring pairs: extraction, and separation of held-out pairs from training."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from jasper_fast.data import docstrings
from jasper_fast.data.text import normal_form
from jasper_fast.utils.errors import JasperError

SAMPLE = '''#!/usr/bin/env python
# A comment first.
"""Module summary that is long enough.

A body of the module that is long enough to be kept, since it has more than sixty-four characters.
"""
TABLE = """Not a docstring at all, only a string.

It stands behind an equals sign and is therefore no text about the code that follows it here.
"""


def f(
    a: int,  # """quoted""" in a comment
) -> dict[str, int]:  # the colon is followed by a comment
    r"""Raw summary with a \\d backslash
    over two lines.

    The body keeps a \\w backslash because the string is raw, and it is long enough to be kept by far.
    """


class C:

    """Summary after an empty line in a class.

    Escapes are read: a tab\\there, and an escaped quote \\""" in the middle of a body that goes on for a while.
    """

    def short(self):
        """Only a summary."""
'''


def test_finds_what_the_syntax_tree_holds(tmp_path: Path) -> None:
    file = tmp_path / "sample.py"
    file.write_text(SAMPLE)
    assert set(docstrings._pairs(file)) == tree_pairs(SAMPLE)
    assert len(tree_pairs(SAMPLE)) == 3


def test_half_a_character_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "sample.py"
    file.write_text(SAMPLE.replace("a tab\\there", "half \\ud800 of it"))
    assert len(set(docstrings._pairs(file))) == 2


@pytest.mark.parametrize("module", [json, ast, pytest])
def test_finds_the_docstrings_of_real_packages(module) -> None:
    for file in Path(module.__file__).parent.glob("*.py") if module is json else [Path(module.__file__)]:
        missed = tree_pairs(file.read_text()) - set(docstrings._pairs(file))
        assert not missed


def test_pairs_are_distinct_and_many() -> None:
    pairs = docstrings.docstring_pairs()
    assert len(pairs) > 3000
    for part in (0, 1):
        forms = [normal_form(pair[part]) for pair in pairs]
        assert len(set(forms)) == len(forms)
    assert pairs == sorted(pairs)
    assert all("\n" not in summary and len(body) >= docstrings.MIN_BODY for summary, body in pairs)


def test_kept_pairs_stay_out_of_training_however_few_are_asked_for() -> None:
    train, pool = docstrings.split_docstrings()
    again, some = docstrings.split_docstrings(100)
    assert some == pool[:100] and again == train
    held_out = {normal_form(text) for pair in pool for text in pair}
    assert not held_out & {normal_form(text) for pair in train for text in pair}
    assert 0.08 < len(pool) / (len(pool) + len(train)) < 0.12


def test_the_split_does_not_depend_on_what_else_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    _, pool = docstrings.split_docstrings()
    fewer = docstrings.docstring_pairs()[::2]
    monkeypatch.setattr(docstrings, "docstring_pairs", lambda: fewer)
    train, some = docstrings.split_docstrings()
    assert set(some) == set(pool) & set(fewer)
    assert not set(train) & set(pool)


def test_more_than_there_are_is_an_error() -> None:
    with pytest.raises(JasperError, match=r"too few held-out pairs .*expected 10000000\)"):
        docstrings.split_docstrings(10_000_000)


def tree_pairs(source: str) -> set[tuple[str, str]]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node, clean=False) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
    return {pair for text in texts if text and (pair := docstrings._split(text))}
