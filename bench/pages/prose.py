"""Check the prose of the README and docs/: ``python -m bench prose`` prints sentence lengths and words to replace.

A sentence has at most 25 words. The mean is at most 18 words, and the 90th percentile at most 30. No word is in
SUBSTITUTIONS. Headings, tables and code blocks are not counted, and inline code is one word. Only code is exempt from
the word list.
"""

from __future__ import annotations

import argparse
import re
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
    r"(?:is|are) none": "is missing",
    r"pictures?": "image",
    r"shares?": "fraction",
    r"as far as": "if, or up to",
    r"(?:at|in) hand": "available",
    r"whose vectors": "embeddings",
    r"lends?|lent": "reuse",
    r"unless asked for|where (?:it is )?asked for": "by default, or if you set …",
    r"eyes": "vision tower",
}
# (file, text) of accepted hits, each with a reason.
EXCEPTIONS: frozenset[tuple[str, str]] = frozenset()
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')*_\]]*\s+(?=[\"'(*_\[]*(?:[A-Z0-9`*]|jasper_fast))")
ABBREVIATIONS = re.compile(r"\b(e\.g|i\.e|etc|vs|cf)\.\s")
LIST_ITEM = re.compile(r"\s*(?:[-*]|\d+\.)\s+")


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
            for match in re.finditer(rf"(?<![\w-])(?:{pattern})(?![\w-])", line, flags=re.IGNORECASE):
                if (name, match[0]) not in EXCEPTIONS:
                    matches.append((number, match[0], better))
    return matches


def percentile_90(lengths: Sequence[int]) -> int:
    """Return the 90th percentile, without interpolation."""
    return sorted(lengths)[int(0.9 * (len(lengths) - 1))]


def main(argv: list[str]) -> int:
    """Print the figures of each page and all problems. Return 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m bench prose", description=__doc__.splitlines()[0])
    parser.add_argument(
        "files", nargs="*", type=Path, help="pages to check; default: README, CONTRIBUTING, CHANGELOG and docs/"
    )
    options = parser.parse_args(argv)
    everything: list[int] = []
    problems: list[str] = []
    print(f"{'page':32} sentences  mean  p90  longest")
    for path in options.files or pages():
        text = path.read_text(encoding="utf-8")
        name = path.resolve().relative_to(ROOT).as_posix() if path.resolve().is_relative_to(ROOT) else str(path)
        page_sentences = sentences(text)
        lengths = [sentence.words for sentence in page_sentences]
        everything += lengths
        if lengths:
            print(f"{name:32} {len(lengths):9} {mean(lengths):5.1f} {percentile_90(lengths):4} {max(lengths):8}")
        problems += [
            f"{name}:{one.line}: {one.words} words (expected at most {LONGEST}): {one.text}"
            for one in page_sentences
            if one.words > LONGEST
        ]
        problems += [f"{name}:{line}: {word!r}: write {better}" for line, word, better in hits(text, name)]
    print(f"{'all':32} {len(everything):9} {mean(everything):5.1f} {percentile_90(everything):4} {max(everything):8}")
    if mean(everything) > MEAN or percentile_90(everything) > P90:
        problems.append(f"expected a mean of at most {MEAN:g} and a 90th percentile of at most {P90}")
    print("\n".join(problems) or "no problems")
    return int(bool(problems))
