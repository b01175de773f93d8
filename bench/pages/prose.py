"""Check the prose of pages, docstrings and comments: ``python -m bench prose`` prints lengths and words to replace.

A sentence has at most 25 words. The mean is at most 18 words, and the 90th percentile at most 30. No word is in
SUBSTITUTIONS. Headings, tables and code blocks are not counted, and inline code is one word. Only code is exempt from
the word list. The pages are the README, CONTRIBUTING, CHANGELOG and docs/. The docstrings and comments are those of
jasper_fast/, kernels/ and bench/. A docstring also must not begin with a word of OPENERS.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).parents[2]
MEAN, P90, LONGEST = 18.0, 30, 25  # words per sentence
# Names of pages in docs/ that the rules do not cover yet.
LEGACY_PAGES: frozenset[str] = frozenset()
# Word to avoid (a regular expression, any case) and its replacement.
SUBSTITUTIONS = {
    r"told|tells? (?:of|in|that)": "say, report or describe",
    r"(?:is|are|was|were) (?:said|named|noticed)": "an active verb: the error names …",
    r"mend(?:s|ed|ing)?": "fix",
    r"anew": "again",
    r"(?:goes|go|went|going) on": "resume or continue",
    r"(?:stands?|stood|lies|lie|lay|lain)": "is",
    r"beside": "next to, or compared with",
    r"of (?:its|their|your|our|one's) own": "its, their, your",
    r"(?<!there )(?:is|are) (?-i:none)": "is missing",
    r"pictures?": "image",
    r"shares?": "fraction",
    r"as far as": "if, or up to",
    r"(?:at|in) hand": "available",
    r"whose vectors": "embeddings",
    r"lends?|lent": "reuse",
    r"unless asked for|where (?:it is )?asked for": "by default, or if you set …",
    r"eyes": "vision tower",
}
# A docstring begins with a verb in the imperative or a noun phrase, and not with one of these words.
OPENERS = frozenset({"What", "Whether", "Where", "Who", "Of", "From", "As", "How"})
# In docstrings and comments, threads may share memory: only the noun has a replacement.
NOUN_ONLY = {r"shares?": r"(?:a|an|the|its|their|own|each|this|\w+'s) shares?|shares? of"}
# (file, text) of accepted hits, each with a reason.
EXCEPTIONS: frozenset[tuple[str, str]] = frozenset()
SENTENCE_END = re.compile(
    r"(?<=[.!?])[\"')*_\]]*\s+"
    r"(?=[\"'(*_\[]*(?:[A-Z0-9`*\u0370-\u03ff]|\"[a-z]|:[a-z]+:`|jasper_fast|(?:sentence-)?transformers))"
)
ABBREVIATIONS = re.compile(r"\b(e\.g|i\.e|etc|vs|cf)\.\s")
LIST_ITEM = re.compile(r"\s*(?:[-*]|\d+\.)\s+")
SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields|Examples?|Notes?):$")
ENTRY = re.compile(r"[*\w.`, ]+(?: \([^)]*\))?:(?: |$)")  # "name: " or "name (type): " of a section
DIRECTIVE = re.compile(r"#\s*(?:noqa|type: ignore|mypy:|ruff:|fmt:|pragma:)")


@dataclass(frozen=True)
class Sentence:
    """Sentence of a page, with the first line of its paragraph."""

    line: int
    text: str

    @property
    def words(self) -> int:
        """Number of words."""
        return len([word for word in self.text.split() if re.search(r"\w", word)])


def pages() -> list[Path]:
    """List the pages to check."""
    chosen = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [*chosen, *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name not in LEGACY_PAGES)]


def sources() -> list[Path]:
    """List the Python files to check."""
    linked = ROOT / "jasper_fast" / "kernels"
    package = sorted(path for path in (ROOT / "jasper_fast").rglob("*.py") if linked not in path.parents)
    return [*package, *sorted((ROOT / "kernels").glob("*.py")), *sorted((ROOT / "bench").rglob("*.py"))]


def docstrings(source: str) -> list[tuple[int, str]]:
    """List the docstrings of a module, its classes and its functions, as tuples (first line, text).

    The text has no indentation, except for lines that are indented more than the quotes.
    """
    result = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            text := ast.get_docstring(node, clean=False)
        ):
            quotes = node.body[0]
            result.append((quotes.lineno, re.sub(rf"(?m)^ {{0,{quotes.col_offset}}}", "", text)))
    return sorted(result)


def docstring_page(docstring: str) -> str:
    """Rewrite a docstring as a page with the same lines. An entry of a section becomes a list item without its name."""
    section, literal, doctest = "", False, False
    result = []
    for line in docstring.splitlines():
        text, indented = line.strip(), line.startswith(" ")
        doctest = bool(text) and (doctest or text.startswith(">>>"))
        literal = literal and (indented or not text)
        if not indented and text:
            section = ""
        if doctest or literal:
            result.append("")
        elif not indented and (header := SECTION.match(text)):
            section = header[1]
            result.append("")
        elif section:
            named = section in ("Args", "Attributes", "Raises") and re.match(r" {4}\S", line)
            result.append(f"- {ENTRY.sub('', text, count=1)}" if named else text)
        else:
            result.append(line)
        if text.endswith("::"):
            literal = True
    return re.sub(r"``([^`]+)``", lambda match: "`code`" + "\n" * match[1].count("\n"), "\n".join(result))


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Yield the comments of a file as tuples (first line, text). Comments on consecutive lines are one."""
    block: list[str] = []
    begin = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or DIRECTIVE.match(token.string) or token.string.startswith("#!"):
            continue
        number = token.start[0]
        text = token.string.lstrip("#: ")
        alone = token.line.lstrip().startswith("#")
        if block and (number != last + 1 or not alone):
            yield begin, "\n".join(block)
            block = []
        if not block:
            begin = number
        block.append(text)
        last = number if alone else -1
    if block:
        yield begin, "\n".join(block)


def lines_without_code(text: str) -> Iterator[tuple[int, str]]:
    """Yield numbered lines without code and comments. Inline code becomes one word, and a link its text."""
    text = re.sub(r"<!--.*?-->", lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL)
    fenced, in_list, blank = False, False, True
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
            line = ""
        elif fenced or (line.startswith("    ") and blank and not in_list):
            yield number, ""
            continue
        if LIST_ITEM.match(line):
            in_list = True
        elif line.strip() and not line.startswith(" "):
            in_list = False
        blank = not line.strip()
        line = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", line)
        line = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line)
        yield number, re.sub(r"`[^`]+`", "`code`", line)


def sentences(text: str) -> list[Sentence]:
    """Split the prose of a page into sentences."""
    result: list[Sentence] = []
    begin, paragraph = 0, ""

    def close() -> None:
        nonlocal paragraph
        whole = ABBREVIATIONS.sub(lambda match: f"{match[1]} ", " ".join(paragraph.split()))
        result.extend(Sentence(begin, part) for part in SENTENCE_END.split(whole) if re.search(r"\w", part))
        paragraph = ""

    for number, line in lines_without_code(text):
        skipped = not line.strip() or line.lstrip().startswith(("#", "|"))
        item = LIST_ITEM.match(line)
        if skipped or item:
            close()
        if skipped:
            continue
        if not paragraph:
            begin = number
        paragraph += " " + (line[item.end() :] if item else line)
    close()
    return result


def hits(text: str, name: str) -> list[tuple[int, str, str]]:
    """Find words to replace outside code, as tuples (line, word, replacement)."""
    matches = []
    for number, line in lines_without_code(text):
        for pattern, better in SUBSTITUTIONS.items():
            if name.endswith(".py"):
                pattern = NOUN_ONLY.get(pattern, pattern)
            for match in re.finditer(rf"(?<![\w.-])(?:{pattern})(?![\w-])", line, flags=re.IGNORECASE):
                if (name, match[0]) not in EXCEPTIONS:
                    matches.append((number, match[0], better))
    return matches


def percentile_90(lengths: Sequence[int]) -> int:
    """Return the 90th percentile, without interpolation."""
    return sorted(lengths)[int(0.9 * (len(lengths) - 1))]


def bad_opening(docstring: str) -> str:
    """Return the first word of a docstring if it is one of OPENERS, and an empty string otherwise."""
    word = re.match(r"\W*(\w*)", docstring)
    return word[1] if word and word[1].capitalize() in OPENERS else ""


class Report:
    """Sentence lengths of the checked texts by group, and all problems."""

    def __init__(self) -> None:
        self.lengths: dict[str, list[int]] = {}
        self.problems: list[str] = []

    def check(self, group: str, name: str, text: str, first_line: int = 1) -> None:
        """Check a text.

        Args:
            group: row of the printed table.
            name: file of the text.
            text: Markdown.
            first_line: line of the file where the text begins.
        """
        for one in sentences(text):
            self.lengths.setdefault(group, []).append(one.words)
            if one.words > LONGEST:
                where = f"{name}:{one.line + first_line - 1}"
                self.problems.append(f"{where}: {one.words} words (expected at most {LONGEST}): {one.text}")
        for line, word, better in hits(text, name):
            self.problems.append(f"{name}:{line + first_line - 1}: {word!r}: write {better}")

    def check_source(self, name: str, source: str) -> None:
        """Check the docstrings and comments of a Python file."""
        folder = name.split("/")[0] if name.startswith(("jasper_fast/", "bench/")) else Path(name).parent.name
        for line, docstring in docstrings(source):
            self.check(f"{folder} docstrings", name, docstring_page(docstring), line)
            if word := bad_opening(docstring):
                self.problems.append(f"{name}:{line}: a docstring begins with {word!r}: write a verb or a noun")
        for line, comment in comments(source):
            self.check(f"{folder} comments", name, comment, line)

    def print_table(self) -> None:
        """Print a row for each group, and check the mean and the 90th percentile of all pages and each other group."""
        print(f"{'text':32} sentences  mean  p90  longest")
        pages = [group for group in self.lengths if group.endswith(".md")]
        rows = {group: self.lengths[group] for group in pages}
        if pages:
            rows["all pages"] = [length for group in pages for length in self.lengths[group]]
        rows |= self.lengths
        for group, lengths in rows.items():
            print(f"{group:32} {len(lengths):9} {mean(lengths):5.1f} {percentile_90(lengths):4} {max(lengths):8}")
            if group not in pages and (mean(lengths) > MEAN or percentile_90(lengths) > P90):
                self.problems.append(
                    f"{group}: expected a mean of at most {MEAN:g} and a 90th percentile of at most {P90}"
                )


def main(argv: list[str]) -> int:
    """Print the figures of each page and of docstrings and comments, and all problems. Return 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m bench prose", description=__doc__.splitlines()[0])
    parser.add_argument(
        "files",
        nargs="*",
        type=Path,
        help="pages and Python files to check; default: README, CONTRIBUTING, CHANGELOG, docs/, and all sources",
    )
    options = parser.parse_args(argv)
    report = Report()
    for path in options.files or [*pages(), *sources()]:
        text = path.read_text(encoding="utf-8")
        name = path.resolve().relative_to(ROOT).as_posix() if path.resolve().is_relative_to(ROOT) else str(path)
        if path.suffix == ".py":
            report.check_source(name, text)
        else:
            report.check(name, name, text)
    report.print_table()
    print("\n".join(report.problems) or "no problems")
    return int(bool(report.problems))
