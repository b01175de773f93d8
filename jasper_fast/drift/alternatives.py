"""Search for the setting of one side under which it gives the embeddings of the other side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from jasper_fast.drift.findings import Finding, prompt_text
from jasper_fast.drift.measures import correlation, cosines, unit
from jasper_fast.drift.side import Facts, Prompts, Side
from jasper_fast.drift.variants import POOLINGS, ROUNDINGS, SWAPPED, Setting, Variants, prompt_variants
from jasper_fast.exporting.golden import ROLES, Text

COMMON_PROMPTS: tuple[Prompts, ...] = tuple(
    dict(zip(ROLES, pair, strict=True))
    for pair in (
        ("query: ", "passage: "),
        ("search_query: ", "search_document: "),
        ("Represent this sentence for searching relevant passages: ", ""),
        ("query: ", ""),
    )
)
LENGTHS = (8, 16, 32, 64, 100, 128, 200, 250, 256, 300, 384, 400, 500, 510, 512, 1024, 2048, 4096, 8192)
SCREENED = 4  # texts of each role on which settings are tried first
VERIFIED = 4  # settings that are then tried on all texts
PARTLY = 0.25  # of the mean difference that may remain, for a setting that explains most of it
# Smallest correlation of a difference with the one that rounded weights make. For a student of 3 layers, int8 graphs of
# two kinds have 0.48 and 0.45, and a copy with noise in the weights has 0.05.
INT8_CORRELATION = 0.3
SMALL = 0.2  # mean cosine distance up to which int8 weights are tried


@dataclass(frozen=True)
class Change:
    """A setting of one side, with the findings that it means."""

    kind: str
    text: str


Embed = Callable[[Sequence[Text]], np.ndarray]
Candidate = tuple[tuple[Change, ...], Embed]
Choice = tuple[Change | None, dict[str, Any]]  # a change, and its fields of a setting


@dataclass(frozen=True)
class Match:
    """The setting that brings one side closest to the other.

    Args:
        changes: changed settings. Empty: the side as it is.
        distances: (n,) cosine distances that remain.
        exact_width: False if only the first numbers of the wider side were compared.
    """

    changes: tuple[Change, ...]
    distances: np.ndarray
    exact_width: bool

    def findings(self, limit: float) -> list[Finding]:
        """Return the changes as findings."""
        smallest = float(1 - self.distances.max())
        return [Finding(change.kind, change.text, smallest, smallest >= limit) for change in self.changes]


@dataclass(frozen=True)
class Task:
    """A side to change and the embeddings to reach.

    Args:
        this: letter of the side to change.
        other: letter of the other side.
        texts: n texts.
        target: (n, D) embeddings of the other side.
        limit: smallest cosine that counts as equal.
        cut: numbers to keep of the changed side's embeddings. None keeps all.
    """

    this: str
    other: str
    texts: Sequence[Text]
    target: np.ndarray
    limit: float
    cut: int | None = None

    def screened(self, current: np.ndarray) -> Task:
        """Return the task for a few short texts that differ most simply."""
        different = np.flatnonzero(1 - cosines(current, self.target) > 1 - self.limit)
        chosen: list[int] = []
        for role in ROLES:
            of_role = [i for i in different if self.texts[i].role == role]
            chosen += sorted(of_role, key=lambda i: len(self.texts[i].text))[:SCREENED]
        return replace(self, texts=[self.texts[i] for i in chosen], target=self.target[chosen])


def best_match(task: Task, current: np.ndarray, candidates: Iterable[Candidate]) -> Match | None:
    """Try candidates on a few texts, then the best of them on all texts.

    Args:
        task: side and target.
        current: (n, E) embeddings of the side as it is.
        candidates: changes, and a function that embeds texts with them.

    Returns:
        The match with the fewest changes that explains the difference, or else the one that explains most of it.
        None if none does.
    """
    few = task.screened(current)
    candidates = list(candidates) if few.texts else []
    if not candidates:
        return None
    tried: list[tuple[tuple[bool, float, int], tuple[Change, ...], Embed]] = []
    for changes, embed in candidates:
        match = _match(few, changes, embed)
        fits = bool(match.distances.max() <= 1 - task.limit)
        rank = len(changes) + (not match.exact_width) if fits else float(match.distances.mean())
        tried.append(((not fits, rank, len(tried)), changes, embed))
    tried.sort(key=lambda entry: entry[0])
    matches = []
    for _, changes, embed in tried[:VERIFIED]:
        matches.append(_match(task, changes, embed))
        if matches[-1].distances.max() <= 1 - task.limit:
            return matches[-1]
    best = min(matches, key=lambda match: float(match.distances.mean()))
    before = float((1 - cosines(current, task.target)).mean())
    return best if best.distances.mean() <= PARTLY * before else None


def _match(task: Task, changes: tuple[Change, ...], embed: Embed) -> Match:
    rows = embed(task.texts)[:, : task.cut]
    return Match(changes, 1 - cosines(rows, task.target), rows.shape[1] == task.target.shape[1])


def model_candidates(variants: Variants, task: Task, known: Facts) -> Iterator[Candidate]:
    """Yield changes of a model's settings, with functions that embed with them.

    Prompts, roles, pooling and head are also changed together. Lengths are changed alone.

    Args:
        variants: the model.
        task: side and target, for the words of the changes.
        known: declared settings of the other side, which are tried too.
    """
    width = task.target.shape[1]
    choices = (
        _prompt_choices(variants, task, known),
        _pooling_choices(variants, task),
        _head_choices(variants, task, width),
    )
    for choice in product(*choices):
        changes = tuple(change for change, _ in choice if change is not None)
        setting = Setting(**{key: value for _, fields in choice for key, value in fields.items()})
        yield changes, _embed_with(variants, setting)
    own = variants.max_tokens
    if own is not None:
        for length in dict.fromkeys([known.max_tokens or own, *LENGTHS, own - 1, 2 * own]):
            if length != own and variants.accepts(length):
                text = f"{task.other} reads {length} tokens of a text, and {task.this} reads {own}"
                yield (Change("length", text),), _embed_with(variants, Setting(length=length))


def _embed_with(variants: Variants, setting: Setting) -> Embed:
    return lambda texts: variants.embed(texts, setting)


def _prompt_choices(variants: Variants, task: Task, known: Facts) -> list[Choice]:
    own = variants.prompts
    choices: list[Choice] = [(None, {})]
    swapped = {role: own[SWAPPED[role]] for role in ROLES}
    if swapped != own or variants.asymmetric:
        choices.append((Change("roles", _swapped_text(task)), {"prompts": swapped, "routes": SWAPPED}))
    for used in prompt_variants(own, [*([known.prompts] if known.prompts else []), *COMMON_PROMPTS]):
        choices.append((Change("prompt", prompt_text(task.this, task.other, own, used)), {"prompts": used}))
    return choices


def _pooling_choices(variants: Variants, task: Task) -> list[Choice]:
    others = [mode for mode in POOLINGS if mode != variants.pooling] if variants.pooling is not None else []
    text = "{} pools by {}, and {} by {}"
    changes = [Change("pooling", text.format(task.other, mode, task.this, variants.pooling)) for mode in others]
    return [(None, {}), *((change, {"pooling": mode}) for change, mode in zip(changes, others, strict=True))]


def _head_choices(variants: Variants, task: Task, width: int) -> list[Choice]:
    choices: list[Choice] = [(None, {})]
    if variants.has_head:
        choices.append((Change("head", f"{task.other} leaves out the Dense head of {task.this}"), {"head": False}))
    for head in variants.widths:
        if head == width != variants.width:
            text = f"{task.other} is the head of width {head} of {task.this}"
            choices.append((Change("width", text), {"width": head}))
        elif head > width:
            text = f"{task.other} has the first {width} numbers of the head of width {head} of {task.this}"
            choices.append((Change("width", text), {"width": head, "first": width}))
    return choices


def _swapped_text(task: Task) -> str:
    return f"{task.other} embeds queries as documents and documents as queries, compared with {task.this}"


def prompt_candidates(side: Side, task: Task, known: Facts, own: Prompts) -> Iterator[Candidate]:
    """Yield other prompts for a side whose modules cannot be changed, with functions that embed with them.

    Args:
        side: the side, which embeds any text.
        task: side and target, for the words of the changes.
        known: declared settings of the other side.
        own: prompts that the side or its client puts before texts.
    """
    swapped = {role: own[SWAPPED[role]] for role in ROLES}
    if swapped != own:
        yield (Change("roles", _swapped_text(task)),), lambda texts: side.embed(texts, swapped)
    for used in prompt_variants(own, [known.prompts] if known.prompts else []):
        yield (Change("prompt", prompt_text(task.this, task.other, own, used)),), _embed_after(side, used)


def _embed_after(side: Side, prompts: Prompts) -> Embed:
    return lambda texts: side.embed(texts, prompts)


def has_int8_weights(variants: Variants, task: Task) -> bool:
    """Return True if the other side differs from a model as the model with int8 weights does.

    Rounding is known: the same weights get the same errors. So the two differences point in one direction.
    """
    own = unit(variants.embed(task.texts, Setting())[:, : task.cut])
    if own.shape != task.target.shape:
        return False
    difference = unit(task.target) - own
    if float((difference**2).sum(axis=1).mean()) / 2 > SMALL:
        return False
    roundings = (Setting(rounding=rounding) for rounding in ROUNDINGS)
    rows = (unit(variants.embed(task.texts, rounding)[:, : task.cut]) for rounding in roundings)
    return any(correlation(difference, changed - own) >= INT8_CORRELATION for changed in rows)
