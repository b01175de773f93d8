"""Comparison of an exported folder with the student it was written from, by stock sentence-transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from jasper_fast.errors import JasperError
from jasper_fast.stock import ROLES

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from jasper_fast.model import Student

TOLERANCE = 1e-5  # largest difference of a coordinate between an export and what it was written from
PROBES = {  # texts by the way in which they can go wrong
    "one word": "seven",
    "a sentence": "The water of the seven rivers ran past the old road, and nobody knew how far.",
    "white space around it": "  two lines\nof text\t",
    "other scripts": "Straße, ночь, 水, नमस्ते, 🙂",
    "more than the maximum length": "words and more words, " * 400,
    "special tokens spelt out": "[CLS] a [SEP] b </s> <s> <|endoftext|>",
}


def check_export(student: Student, folder: Path, *, trust_remote_code: bool = False) -> None:
    """Compare the embeddings of an exported Router folder with the student's, for every width and role.

    Args:
        student: source of the export.
        folder: export, not yet published.
        trust_remote_code: permission to run code that the model brings.

    Raises:
        JasperError: the export cannot be loaded, or an embedding differs by more than 1e-5 in a coordinate.
    """
    stock = _open(folder, str(student.device), trust_remote_code)
    texts = list(PROBES.values())
    for role in ROLES:
        expected = _student_vectors(student, texts, role)
        for width, vectors in expected.items():
            found = stock.encode(texts, prompt_name=role, task=str(width), convert_to_tensor=True)
            _compare(found, vectors, f"{role} embeddings at width {width}")
        # The widest head answers where no width is asked for.
        default = (stock.encode_query if role == "query" else stock.encode_document)(texts, convert_to_tensor=True)
        _compare(default, expected[student.widths[0]], f"encode_{role}")
    if student.vision is not None:
        _check_images(student, folder)


def check_same(first: Path, second: Path, width: int, *, trust_remote_code: bool = False) -> None:
    """Compare a flat export with the Router folder it was written from, at one width.

    Raises:
        JasperError: one cannot be loaded, or an embedding differs by more than 1e-5 in a coordinate.
    """
    router, flat = (_open(folder, "cpu", trust_remote_code) for folder in (first, second))
    texts = list(PROBES.values())
    for role in ROLES:
        expected = router.encode(texts, prompt_name=role, task=str(width), convert_to_tensor=True)
        found = flat.encode(texts, prompt_name=role, convert_to_tensor=True)
        _compare(found, expected, f"{role} embeddings at width {width}")


@torch.no_grad()
def _check_images(student: Student, folder: Path) -> None:
    """Compare image embeddings of an export with the student's, at the widest head."""
    from jasper_fast.pictures import load_student

    vision = student.config.vision
    reloaded = load_student(
        folder,
        trust_remote_code=student.config.trust_remote_code,
        trust_tower_code=vision is not None and vision.trust_remote_code,
    ).to(student.device)
    side, width = student.seeing.side, student.widths[0]
    images = torch.arange(2 * 3 * side * side).remainder(251).view(2, 3, side, side).to(torch.uint8)
    training = student.training
    student.eval()
    found, expected = (
        F.normalize(model.project(model.pool(images), [width])[width], dim=1) for model in (reloaded, student)
    )
    student.train(training)
    _compare(found, expected, "image embeddings")


@torch.no_grad()
def _student_vectors(student: Student, texts: list[str], role: str) -> Mapping[int, Tensor]:
    training = student.training
    student.eval()
    try:
        heads = student.project(student.pool(student.tokenize(texts, role)))
        return {width: F.normalize(vectors, dim=1) for width, vectors in heads.items()}
    finally:
        student.train(training)


def _open(folder: Path, device: str, trust_remote_code: bool) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer

    from jasper_fast.models import CANNOT_LOAD, first_line

    try:
        with torch.random.fork_rng(devices=[]):  # loading draws weights before it reads them
            return SentenceTransformer(str(folder), device=device, trust_remote_code=trust_remote_code).eval()
    except CANNOT_LOAD as error:
        raise JasperError(
            f"the exported model cannot be loaded by sentence-transformers ({first_line(error)}); nothing was "
            "published. Fix: report the student's architecture, or choose another student.model"
        ) from error


def _compare(found: Tensor, expected: Tensor, what: str) -> None:
    if found.shape != expected.shape:
        raise JasperError(
            f"the exported model differs from what was trained: {what} (got a width of {found.shape[1]}, expected "
            f"{expected.shape[1]}); nothing was published. Fix: report the student's architecture"
        )
    difference = (found.double() - expected.double()).abs().amax(dim=1)
    difference = torch.where(difference.isfinite(), difference, torch.inf)
    worst = int(difference.argmax())
    if float(difference[worst]) > TOLERANCE:
        raise JasperError(
            f"the exported model differs from what was trained: {what}, probe {list(PROBES)[worst]!r} (got a "
            f"difference of {float(difference[worst]):.1e} in a coordinate, expected at most {TOLERANCE:.0e}); nothing "
            "was published. Fix: report the student's architecture, or choose another student.model"
        )
