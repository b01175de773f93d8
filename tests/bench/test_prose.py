"""Pages, docstrings and comments are plain English: short sentences, and no words from the substitution list."""

from __future__ import annotations

import pytest

from bench.pages import prose


def test_pages_docstrings_and_comments_keep_the_limits(capsys):
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


def problems(source):
    report = prose.Report()
    report.check_source("jasper_fast/file.py", source)
    return report.problems


LONG = "Word " + "word " * 24 + "end."
FUNCTION = 'def f(a, b):\n    """{}"""\n'
ARGS = "Add.\n\n    Args:\n        a: {}\n        b: (B, D) float32.\n    "


@pytest.mark.parametrize(
    ("source", "line", "message"),
    [
        ('"""Whether it is."""', 1, "begins with 'Whether'"),
        ('"""How to add."""', 1, "begins with 'How'"),
        ('class A:\n    """`What` it is."""', 2, "begins with 'What'"),
        (FUNCTION.format("from here."), 2, "begins with 'from'"),
        ('async def f():\n    """Of a kind."""', 2, "begins with 'Of'"),
        (FUNCTION.format("Add. It was mended."), 2, "write fix"),
        (FUNCTION.format("Add.\n\n    The picture is next."), 4, "write image"),
        (FUNCTION.format("Return the share of the rows."), 2, "write fraction"),
        (FUNCTION.format("Add. " + LONG), 2, "26 words"),
        (FUNCTION.format(ARGS.format(LONG)), 5, "26 words"),
        (FUNCTION.format(ARGS.format("a number of its own.")), 5, "write its"),
        (FUNCTION.format("Add.\n\n    Returns:\n        The sum.\n        " + LONG), 5, "26 words"),
        (FUNCTION.format("Add.\n\n    Raises:\n        ValueError: the row lies elsewhere."), 5, "write is"),
        ("x = 1\n# the number\n# is anew\n", 3, "write again"),
        ("x = 1  # a picture\n", 1, "write image"),
        ("# " + LONG, 1, "26 words"),
    ],
)
def test_problems_of_a_source_are_reported(source, line, message):
    (problem,) = problems(source)
    assert problem.startswith(f"jasper_fast/file.py:{line}: ") and message in problem


@pytest.mark.parametrize(
    "source",
    [
        '"""Add numbers.\n\n    pictures = "code of a block"\n\nDone."""',
        FUNCTION.format("Add ``pictures`` and `shares`."),
        FUNCTION.format("Add.\n\n    Example:\n        >>> pictures(1)\n        picture\n    "),
        FUNCTION.format("Add, as here::\n\n        picture\n\n    Done."),
        FUNCTION.format(ARGS.format("the first.")).replace("a:", "pictures:"),
        FUNCTION.format(ARGS.format("word " * 20 + "end.").replace("(B, D)", "word " * 20)),  # entries are apart
        FUNCTION.format("Add. " + "word " * 20 + 'end. "auto" is ' + "word " * 20 + "end."),
        FUNCTION.format("Return None if the sum is None or there are none."),
        FUNCTION.format("Return views that share memory."),
        'x = "What a picture"\n"""Whether this is a docstring: no."""',
        "x = pictures  # noqa: E501 picture\n",
        "#: heads of jasper_fast.pictures\nx = 1  # the first\ny = 2  # the second\n",
    ],
)
def test_code_names_and_literals_of_a_source_are_not_prose(source):
    assert not problems(source)


def test_lengths_of_docstrings_and_comments_are_printed(tmp_path, capsys):
    (tmp_path / "file.py").write_text('"""Add one.\n\nTwo words.\n"""\n# Three more words.\n')
    assert prose.main([str(tmp_path / "file.py")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1:] for line in printed[1:3]] == [
        ["docstrings", "2", "2.0", "2", "2"],
        ["comments", "1", "3.0", "3", "3"],
    ]


def test_a_mean_above_the_limit_fails(tmp_path, capsys):
    (tmp_path / "file.py").write_text("# " + "word " * 20 + "end.\n")
    assert prose.main([str(tmp_path / "file.py")]) == 1
    assert "comments: expected a mean of at most 18" in capsys.readouterr().out


def test_every_source_is_checked_once():
    files = [path.resolve() for path in prose.sources()]
    assert len(files) == len(set(files))
    assert {prose.ROOT / "jasper_fast/train.py", prose.ROOT / "kernels/rows.py"} <= set(files)
