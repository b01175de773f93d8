"""The computations of an adaptation: count pairs, choose a length, learn projections. None writes a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jasper_fast.adaptation.choose import (
    Choice,
    HeldOutVectors,
    LengthChoice,
    candidate_lengths,
    choose_length,
    choose_projection,
)
from jasper_fast.adaptation.documents import BLOCK, Corpus
from jasper_fast.adaptation.embeddings import Vectors, own_length
from jasper_fast.adaptation.state import KINDS, State
from jasper_fast.exporting.axes import LEARNED, PRINCIPAL, Axes
from jasper_fast.fitting.projections import (
    BLUNT,
    MINED,
    SHARP,
    SHARP_WIDTH,
    learned_axes,
    mined_groups,
    principal_axes,
)
from jasper_fast.fitting.rotations import learned_rotation
from jasper_fast.models.backbone import position_limit
from jasper_fast.models.embedder import model_encoder
from jasper_fast.models.sentence_transformer import set_length, transformers_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

CORPUS_ROWS = 20_000  # documents that the held-out questions are compared on
LENGTH_ROWS = 500  # documents that lengths are compared on
SAVED_ROWS = 131_072  # counted texts between two savings of the statistics
SECONDS = 20.0  # to learn the projection of a width


def count_pairs(
    state: State, corpus: Corpus, student: Vectors, teacher: Vectors, save: Callable[[], None]
) -> dict[str, int]:
    """Add the pairs of embeddings of all texts that are not counted yet, and return their number by kind.

    A block of texts is in memory at a time. Held-out documents and questions are left out.

    Args:
        state: the saved state, which is changed.
        corpus: the texts.
        student: the student's embeddings of these.
        teacher: the teacher's.
        save: function that writes the state.
    """
    new = dict.fromkeys(KINDS, 0)
    unsaved = 0
    for kind, rows in zip(KINDS, (corpus.fitted, corpus.sentences), strict=True):
        for start in range(rows.start, rows.stop, BLOCK):
            block = range(start, min(start + BLOCK, rows.stop))
            digests = corpus.texts[block.start : block.stop]["digest"]
            fresh = state.is_new(kind, digests)
            if fresh.any():
                chosen = [digest for digest, wanted in zip(digests, fresh, strict=True) if wanted]
                state.add(kind, student.read(block)[fresh], teacher.read(block)[fresh], chosen)
                new[kind] += len(chosen)
                unsaved += len(chosen)
            if unsaved >= SAVED_ROWS:
                save()
                unsaved = 0
    if unsaved:
        save()
    return new


def held_out_vectors(corpus: Corpus, student: Vectors, teacher: Vectors) -> HeldOutVectors:
    """Return the embeddings that choices and scores are made with.

    Without questions, the held-out documents are the questions. They are then not among the searched documents.

    Args:
        corpus: the texts.
        student: the student's embeddings of these.
        teacher: the teacher's.
    """
    asked = corpus.asked if corpus.questions else range(corpus.held_out)
    rows = range(0 if corpus.questions else corpus.held_out, corpus.documents)[:CORPUS_ROWS]
    return HeldOutVectors(
        student_questions=student.read(asked),
        teacher_questions=teacher.read(asked),
        corpus_student=student.read(rows),
        corpus_teacher=teacher.read(rows),
        answers=corpus.answers if corpus.questions else None,
    )


def lengths_to_compare(model: SentenceTransformer, counts: np.ndarray) -> list[int]:
    """Return the lengths in tokens that are worth trying, the student's own first.

    Args:
        model: the student.
        counts: tokens of a sample of the documents, not truncated.
    """
    longest = int(counts.max(initial=1))
    current = own_length(model) or longest
    limits = [position_limit(module.model) for module in transformers_of(model)]
    limit = min((int(limit) for limit in limits if limit), default=max(current, longest))
    return candidate_lengths(counts, current, limit)


def pick_length(
    name: str, model: SentenceTransformer, corpus: Corpus, teacher: Vectors, counts: np.ndarray
) -> LengthChoice:
    """Choose the student's length on the first documents, the held-out ones among them.

    Args:
        name: the student.
        model: the student, loaded, whose length is changed.
        corpus: the texts, with questions.
        teacher: the teacher's embeddings of these.
        counts: tokens of a sample of the documents, not truncated.
    """
    lengths = lengths_to_compare(model, counts)
    current = lengths[0]
    rows = range(min(max(LENGTH_ROWS, corpus.held_out), corpus.documents))
    texts = list(corpus.texts[: rows.stop]["text"])
    asked = list(corpus.texts[corpus.asked.start : corpus.asked.stop]["text"])

    def encode(length: int) -> np.ndarray:
        print(f"reading {len(texts):,} documents up to {length:,} tokens", flush=True)
        set_length(model, length, name)
        return _widest(model_encoder(model)(texts, "document"))

    if len(lengths) == 1 or not asked:
        return LengthChoice(current, current, [], "it reads almost all documents to their end")
    held = HeldOutVectors(
        student_questions=_widest(model_encoder(model)(asked, "query")),
        teacher_questions=teacher.read(corpus.asked),
        corpus_student=encode(current),
        corpus_teacher=teacher.read(rows),
        answers=corpus.answers,
    )
    return choose_length(encode, lengths, current, held)


def _widest(by_width: Mapping[int, np.ndarray]) -> np.ndarray:
    return by_width[max(by_width)]


def project(
    corpus: Corpus,
    teacher: Vectors,
    second_moment: np.ndarray,
    held: HeldOutVectors,
    maps: dict[str, Choice],
    widths: Sequence[int],
) -> tuple[dict[int, Choice], Axes | None]:
    """Choose the narrow projection of each width, of both forms: principal axes of the documents, or learned ones.

    Args:
        corpus: the texts.
        teacher: the teacher's embeddings of these.
        second_moment: (d, d) sum TᵀT over the counted documents.
        held: held-out embeddings.
        maps: the chosen map of each form.
        widths: widths below d.

    Returns:
        The projections, and the rotation of the prefix form, which the narrowest width decides. None: no width.
    """
    if not widths:
        return {}, None
    matrices = {form: fitted.map for form, fitted in maps.items()}
    chosen: dict[int, Choice] = {}
    documents = teacher.read(corpus.fitted[:MINED])
    groups = mined_groups(documents)
    for width in widths:
        axes = principal_axes(second_moment, width)
        temperature = SHARP if width <= SHARP_WIDTH else BLUNT
        learned = learned_axes(documents, axes, seconds=SECONDS, temperature=temperature, groups=groups)
        options = {"PCA": axes, "learned": learned}
        chosen[width] = choose_projection(held, matrices, options)
    rotations = {
        PRINCIPAL: principal_axes(second_moment, len(second_moment)),
        LEARNED: learned_rotation(documents, second_moment, widths, seconds=SECONDS, groups=groups),
    }
    narrowest = {name: rotation[:, : min(widths)] for name, rotation in rotations.items()}
    name = choose_projection(held, matrices, narrowest).name
    return chosen, Axes(rotations[name], name, f"{corpus.documents - corpus.held_out:,} documents of the adaptation")
