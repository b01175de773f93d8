"""Count what became of the texts of the sources, and describe it in one line."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class TextCounts:
    """Numbers of texts that were read, left out and kept.

    Every text is accounted for: `unexplained` is 0.

    Args:
        rows: rows of the sources, within their limits.
        documents: texts of these rows. They are as many as the rows, unless columns are separate texts.
        held_out: rows whose documents are held out.
        held_out_texts: texts of these rows, as of ``documents``.
        like_held_out: texts left out because they equal a held-out text, or a part of it.
        excluded: texts and pieces left out because they belong to an evaluation set.
        too_short: texts and pieces with fewer than ``min_chars`` characters.
        duplicates: texts left out because the same text is kept.
        cut: documents that were cut into pieces.
        kept: documents that could be cut: not held out, excluded or queries.
        pieces: pieces of the documents that were cut.
        shuffled: texts whose words were shuffled.
        variants: additional texts with replaced words.
        beyond_limit: texts that ``data.limit`` left out.
        texts: training texts.
        limits: the limits of sources that left texts out, e.g. "data.sources.0.limit: 2,000 of 5,000 texts".
    """

    rows: int = 0
    documents: int = 0
    held_out: int = 0
    held_out_texts: int = 0
    like_held_out: int = 0
    excluded: int = 0
    too_short: int = 0
    duplicates: int = 0
    cut: int = 0
    kept: int = 0
    pieces: int = 0
    shuffled: int = 0
    variants: int = 0
    beyond_limit: int = 0
    texts: int = 0
    limits: tuple[str, ...] = ()

    @classmethod
    def from_counter(cls, counts: Counter[str], limits: list[str]) -> TextCounts:
        """Return the counts by name. Names that are no field are ignored."""
        return cls(**{f.name: counts[f.name] for f in fields(cls) if f.name != "limits"}, limits=tuple(limits))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TextCounts:
        """Return the counts that `to_dict` wrote."""
        return cls(**{**values, "limits": tuple(values["limits"])})

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as JSON has them."""
        return {**asdict(self), "limits": list(self.limits)}

    @property
    def unexplained(self) -> int:
        """The number of texts that no count explains."""
        made = self.documents - self.held_out_texts - self.cut + self.pieces + self.variants
        lost = self.excluded + self.too_short + self.like_held_out + self.duplicates + self.beyond_limit
        return made - lost - self.texts

    def line(self, lengths: str = "", kept: str = "training text") -> str:
        """Describe in one line what became of the documents.

        Args:
            kept: name of a text that is left, in the singular.
            lengths: a clause about long texts, from `jasper_fast.models.lengths.describe_lengths`. Empty: none.

        Example:
            >>> TextCounts(rows=20, documents=20, held_out=2, held_out_texts=2, duplicates=1, texts=17).line()
            'texts: 20 documents read, 2 held out, 1 duplicate → 17 training texts'
        """
        read = [_number(self.documents, "document") + " read"]
        if self.rows != self.documents:
            read = [f"{_number(self.rows, 'row')} read with {_number(self.documents, 'text')} in their columns"]
        read += [f"limited by {limit}" for limit in self.limits]
        read += [f"{self.held_out:,} held out"] if self.held_out else []
        read += [f"{self.excluded:,} dropped as evaluation texts"] if self.excluded else []
        read += [f"{self.like_held_out:,} equal to a held-out text or a part of it"] if self.like_held_out else []
        read += [f"{self.too_short:,} too short"] if self.too_short else []
        read += [_number(self.duplicates, "duplicate")] if self.duplicates else []
        made = []
        if self.cut:
            made.append(f"{_percent(self.cut / self.kept)} cut into {_number(self.pieces, 'piece')}")
        made += [f"{self.shuffled:,} with shuffled words"] if self.shuffled else []
        made += [_number(self.variants, "variant")] if self.variants else []
        left = _number(self.texts, kept)
        left += f" (data.limit leaves out {self.beyond_limit:,})" if self.beyond_limit else ""
        steps = "; ".join(filter(None, [", ".join(read), ", ".join(made)]))
        return f"texts: {steps} → {left}" + (f"; {lengths}" if lengths else "")


def _number(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} %" if fraction >= 0.01 else f"{100 * fraction:.2g} %"
