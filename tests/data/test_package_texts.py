"""Built-in sources that packages carry as data files: rows, errors, and the packages themselves."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from jasper_fast.config.data import SourceConfig
from jasper_fast.data import encyclopedia, facts
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
CONTENTS = {"encyclopedia": json.dumps(ARTICLES), "facts": "Cats sleep.\n\n  Bees \tdance. \n"}
OTHER_CONTENTS = {"encyclopedia": json.dumps({"Art": ARTICLES["Art"]}), "facts": "Dogs bark."}
SOURCES: dict[str, ModuleType] = {"encyclopedia": encyclopedia, "facts": facts}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Return the data file of each source, in a package that cannot be imported."""
    paths = {}
    for name, module in SOURCES.items():
        package: Any = f"tiny_{name}"
        paths[name] = tmp_path / package / module.FILE
        paths[name].parent.mkdir(parents=True)
        paths[name].write_text(CONTENTS[name], encoding="utf-8")
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('read it, do not import it')")
        monkeypatch.setattr(module, "PACKAGE", package)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return paths


def test_articles_are_headings_and_summaries_in_one_line(files: dict[str, Path]) -> None:
    rows = encyclopedia.training_rows()
    assert rows == [("Art", "Art is made."), ("Distance: Separation between two points", "A number. Or not.")]
    files["encyclopedia"].write_text(json.dumps(dict(reversed(ARTICLES.items()))))
    assert encyclopedia.training_rows() == rows


def test_facts_are_single_texts_in_one_line(files: dict[str, Path]) -> None:
    assert facts.training_rows() == [("Cats sleep.",), ("Bees dance.",)]


@pytest.mark.parametrize("name", SOURCES)
def test_it_is_a_source_like_others(name: str, files: dict[str, Path]) -> None:
    source = SourceConfig(path=name)
    check_source(source)
    assert is_local(source) and source_files(source) == [] and source.join is (name == "facts")
    assert list(read_source(source)) == SOURCES[name].training_rows()
    assert sum(len(drawn) for _, drawn in sample_texts(source.model_copy(update={"limit": 1}), seed=0)) == 1
    stamp = source_stamp(source)
    files[name].write_text(OTHER_CONTENTS[name])
    assert source_stamp(source) != stamp


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("encyclopedia", b"{broken", "has another form: "),
        ("encyclopedia", b'["Art"]', "has another form: "),
        ("encyclopedia", b'{"Art": {"title": "Art"}}', "has another form: KeyError: 'description'"),
        ("encyclopedia", b'{"Art": {"title": "Art", "description": 7, "extract": "x"}}', "has another form: "),
        ("encyclopedia", None, "cannot be read: "),
        ("facts", b" \n\n", "has another form: it has no lines"),
        ("facts", b"\xff\xfe", "cannot be read: "),
        ("facts", None, "cannot be read: "),
    ],
)
def test_an_unusable_file_names_the_fix(name: str, content: bytes | None, problem: str, files: dict[str, Path]) -> None:
    if content is None:
        files[name].unlink()
    else:
        files[name].write_bytes(content)
    with pytest.raises(JasperError, match=rf"^{name}: tiny_{name}/.* {problem}.*Fix: .*\[demo\]"):
        SOURCES[name].training_rows()


@pytest.mark.parametrize("name", SOURCES)
def test_a_missing_package_names_the_fix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution = SOURCES[name].DISTRIBUTION
    monkeypatch.setattr(SOURCES[name], "PACKAGE", "no_such_package_of_texts")
    with pytest.raises(JasperError, match=rf"{distribution}, which has the texts, is missing.*\[demo\]"):
        SOURCES[name].training_rows()


@pytest.mark.parametrize(("name", "texts", "shortest"), [("encyclopedia", 10_000, 40), ("facts", 7_000, 10)])
def test_the_packages_of_the_extra_have_different_texts(name: str, texts: int, shortest: int) -> None:
    if importlib.util.find_spec(SOURCES[name].PACKAGE) is None:
        pytest.skip("the extra `demo` is not installed")
    last = [row[-1] for row in SOURCES[name].training_rows()]
    assert len(last) > texts and min(map(len, last)) > shortest
    assert len(set(map(normal_form, last))) > 0.99 * len(last)


@pytest.mark.parametrize(("name", "licence"), [("encyclopedia", "CC BY-SA 4.0"), ("facts", "MIT")])
def test_the_model_card_names_the_licence_of_the_texts(name: str, licence: str) -> None:
    assert licence in SOURCE_NAMES[name]
