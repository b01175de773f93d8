"""Find out why two sides differ: batches, lengths of vectors, int8 codes, settings, rotations and other weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from jasper_fast.drift.alternatives import (
    SMALL,
    Match,
    Task,
    best_match,
    has_int8_weights,
    model_candidates,
    prompt_candidates,
)
from jasper_fast.drift.findings import Finding
from jasper_fast.drift.measures import cosines, int8_codes, is_unit, neighbour_order, same_products, sizes_differ
from jasper_fast.drift.side import NO_PROMPTS, Side
from jasper_fast.drift.stock import StockSide
from jasper_fast.drift.variants import Setting, Variants
from jasper_fast.exporting.golden import Text
from jasper_fast.utils.errors import JasperError

OTHER = {"A": "B", "B": "A"}
RELATED = 0.5  # mean cosine and rank correlation from which two models count as related
LEAK = 0.02  # mean cosine distance between batches and single texts, from which it is always a finding


@dataclass
class Diagnosis:
    """Search for the reasons of a difference.

    Args:
        sides: both sides by letter, "A" and "B".
        texts: n texts.
        rows: (n, D) embeddings by letter.
        limit: smallest cosine that counts as equal.
        dimensions: width at which both sides are compared. None: their own.
    """

    sides: Mapping[str, Side]
    texts: Sequence[Text]
    rows: dict[str, np.ndarray]
    limit: float
    dimensions: int | None = None
    notes: list[str] = field(default_factory=list)
    _alone: dict[str, np.ndarray] = field(default_factory=dict)  # embeddings of texts that share no batch
    _models: dict[str, Variants | None] = field(default_factory=dict)

    def find(self) -> list[Finding]:
        """Return all findings. [] means that the sides give the same embeddings."""
        codes = self._codes()
        sizes = [] if codes else self._sizes()
        if not self._differ():
            return [*codes, *sizes]
        padding = self._padding()
        return [*padding, *codes, *sizes, *(self._direction() if self._differ() else [])]

    def _differ(self) -> bool:
        a, b = self.rows["A"], self.rows["B"]
        return a.shape[1] != b.shape[1] or bool(self._distances().max() > 1 - self.limit)

    def _distances(self) -> np.ndarray:
        return 1 - cosines(self.rows["A"], self.rows["B"])

    def _padding(self) -> list[Finding]:
        """Compare each side with itself, one text at a time. A side that differs is measured without batches."""
        findings = []
        for letter, side in self.sides.items():
            if not side.live:
                continue
            alone = side.embed(self.texts, together=False)[:, : self.rows[letter].shape[1]]
            self._alone[letter] = alone
            leak = 1 - cosines(alone, self.rows[letter])
            if leak.max() <= 1 - self.limit:
                continue
            left = float((1 - cosines(alone, self.rows[OTHER[letter]])).mean())
            if left > float(self._distances().mean()) / 2 and leak.mean() < LEAK:
                continue  # scales of int8 inputs depend on the batch too
            self.rows[letter] = alone
            text = f"{letter} gives a text another embedding in a batch with longer texts than alone, so padding leaks"
            smallest = float(1 - self._distances().max())
            findings.append(Finding("padding", text, smallest, smallest >= self.limit))
        return findings

    def _codes(self) -> list[Finding]:
        return [
            Finding("int8", f"the numbers of {letter} are int8 codes")
            for letter in self.rows
            if int8_codes(self.rows[letter], self.rows[OTHER[letter]])
        ]

    def _sizes(self) -> list[Finding]:
        a, b = self.rows["A"], self.rows["B"]
        if not sizes_differ(a, b):
            return []
        means = {letter: float(np.linalg.norm(rows, axis=1).mean()) for letter, rows in self.rows.items()}
        longer = [letter for letter, rows in self.rows.items() if not is_unit(rows)]
        parts = [f"the vectors of {letter} have a mean length of {means[letter]:.4g}" for letter in longer]
        return [Finding("normalisation", " and ".join(parts) + ", not 1 each")]

    def _direction(self) -> list[Finding]:
        """Explain different directions: a prefix, a rotation, a setting, int8 weights, other weights."""
        widths = {letter: rows.shape[1] for letter, rows in self.rows.items()}
        if len(set(widths.values())) > 1 and self._distances().max() <= 1 - self.limit:
            return [self._prefix()]
        if same_products(self.rows["A"], self.rows["B"]):
            text = "B is a rotation of A: all inner products are the same, and the numbers are not"
            return [Finding("rotation", text)]
        match = self._match()
        if match is not None and match.changes:
            return [*match.findings(self.limit), *([] if match.exact_width else [self._prefix()])]
        if not any(self._model(letter) for letter in self.sides):
            self.notes.append(
                "no side has modules that can be changed, so pooling, head, length and int8 weights were not tried. "
                "Fix: give the folder of the model as A or B, or leave golden.json in it"
            )
        if len(set(widths.values())) > 1:
            return self._other_width()
        return [self._other_weights()]

    def _prefix(self) -> Finding:
        narrow, wide = sorted(self.rows, key=lambda letter: self.rows[letter].shape[1])
        numbers = [self.rows[letter].shape[1] for letter in (narrow, wide)]
        return Finding("width", f"{narrow} has the first {numbers[0]} of the {numbers[1]} numbers of {wide}")

    def _other_width(self) -> list[Finding]:
        a, b = (self.rows[letter].shape[1] for letter in "AB")
        text = f"A is {a} wide and B is {b} wide, and neither is the start of the other"
        found = [Finding("width", text)]
        return found if self._order() >= RELATED else [*found, Finding("model", self._model_text())]

    def _other_weights(self) -> Finding:
        """Tell int8 weights, another revision and another model apart."""
        mean, smallest = 1 - self._distances().mean(), 1 - self._distances().max()
        figures = f"(mean cosine {mean:.4f}, smallest {smallest:.4f})"
        declared = {letter for letter, side in self.sides.items() if side.facts.int8}
        if len(declared) == 1 and mean >= 1 - SMALL:
            return Finding("int8", f"{declared.pop()} has int8 weights {figures}")
        for letter in self.sides:
            model = self._model(letter)
            if model is not None and has_int8_weights(model, self._task(letter, alone=True)):
                text = f"{OTHER[letter]} differs from {letter} as {letter} with int8 weights does {figures}"
                return Finding("int8", text)
        if min(mean, self._order()) < RELATED:
            return Finding("model", self._model_text())
        return Finding("revision", f"no setting explains the difference {figures}, so A and B have other weights")

    def _model_text(self) -> str:
        names = {letter: side.facts.model for letter, side in self.sides.items()}
        shown = "".join(f". {letter} is {name}" for letter, name in names.items() if name)
        mean = 1 - float(self._distances().mean())
        figures = f"mean cosine {mean:.2f}, rank correlation of neighbours {self._order():.2f}"
        return f"A and B are different models ({figures}){shown}"

    def _order(self) -> float:
        return neighbour_order(self.rows["A"], self.rows["B"])[1]

    def _match(self) -> Match | None:
        """Return the best match of both directions: the first exact one, or the one that explains more."""
        matches = []
        for letter in self.sides:
            match = self._match_of(letter)
            if match is not None and match.distances.max() <= 1 - self.limit and match.exact_width:
                return match
            matches += [match] if match is not None else []
        return min(matches, key=lambda match: float(match.distances.mean()), default=None)

    def _match_of(self, letter: str) -> Match | None:
        side, task, known = self.sides[letter], self._task(letter), self.sides[OTHER[letter]].facts
        model = self._model(letter)
        if model is not None:
            current = model.embed(self.texts, Setting())[:, : task.cut]
            return best_match(task, current, model_candidates(model, task, known))
        if side.live:
            own = getattr(side, "prompts", NO_PROMPTS)
            return best_match(task, self.rows[letter], prompt_candidates(side, task, known, own))
        return None

    def _task(self, letter: str, *, alone: bool = False) -> Task:
        other = OTHER[letter]
        target = self._alone.get(other, self.rows[other]) if alone else self.rows[other]
        cut = self.dimensions if target.shape[1] == self.dimensions else None
        return Task(letter, other, self.texts, target, self.limit, cut)

    def _model(self, letter: str) -> Variants | None:
        """Return the model of a side whose settings can be changed, or None. A folder is opened once."""
        if letter not in self._models:
            self._models[letter] = self._open_model(letter)
        return self._models[letter]

    def _open_model(self, letter: str) -> Variants | None:
        side = self.sides[letter]
        if isinstance(side, StockSide):
            return side.variants
        source = side.model_source()
        if source is None:
            return None
        try:
            variants = StockSide(str(source)).variants
        except JasperError as error:
            self.notes.append(f"the model of {letter}'s folder cannot be loaded: {error}")
            return None
        own = variants.embed(self.texts, Setting())
        same = own.shape[1] >= self.rows[letter].shape[1] and not _too_far(own, self.rows[letter], self.limit)
        if same or side.facts.int8:
            return variants
        self.notes.append(f"the model in the folder of {letter} does not give the embeddings of {letter}")
        return None


def _too_far(first: np.ndarray, second: np.ndarray, limit: float) -> bool:
    return bool((1 - cosines(first, second)).max() > 1 - limit)


def declared_differences(sides: Iterable[Side]) -> list[str]:
    """List the declared settings that differ between two sides, if both declare them."""
    a, b = (side.facts for side in sides)
    lines = []
    for name in ("prompts", "pooling", "max_tokens", "modules"):
        first, second = getattr(a, name), getattr(b, name)
        if first is not None and second is not None and _plain(first) != _plain(second):
            lines.append(f"{name.replace('_', ' ')}: {_plain(first)} in A, {_plain(second)} in B")
    changed = [file for file in a.weights if file in b.weights and a.weights[file] != b.weights[file]]
    lines += [f"weights: {', '.join(changed)} differ"] if changed else []
    packages = [name for name in a.versions if name in b.versions and a.versions[name] != b.versions[name]]
    return lines + [f"{name}: {a.versions[name]} in A, {b.versions[name]} in B" for name in packages]


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: value[key] or "" for key in sorted(value)}
    return list(value) if isinstance(value, (list, tuple)) else value
