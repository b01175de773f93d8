"""Compare an exported folder, loaded by stock sentence-transformers, with the models that it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from jasper_fast.models.hub import CANNOT_LOAD, prompt_of
from jasper_fast.models.loading import without_bars
from jasper_fast.models.sentence_transformer import ROLES, encode_role
from jasper_fast.utils.errors import JasperError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from jasper_fast.models.student import Student


TOLERANCE = 1e-5  # maximum difference of a coordinate between an export and its source
PROBES = {  # texts that exports often encode differently, by property
    "one word": "seven",
    "a sentence": "The water of the seven rivers ran past the old road, and nobody knew how far.",
    "white space around it": "  two lines\nof text\t",
    "other scripts": "Straße, ночь, 水, नमस्ते, 🙂",
    "more than the maximum length": "words and more words, " * 400,
    "special tokens spelt out": "[CLS] a [SEP] b </s> <s> <|endoftext|>",
}


def check_export(student: Student, folder: Path, *, trust_remote_code: bool = False) -> None:
    """Compare the embeddings of an exported Router folder with the student's for every width and role.

    Args:
        student: source of the export.
        folder: unpublished export.
        trust_remote_code: permission to run the model's custom code.

    Raises:
        JasperError: the export cannot be loaded, or an embedding differs by more than 1e-5 in a coordinate.
    """
    stock = _open(folder, str(student.device), trust_remote_code)
    texts = list(PROBES.values())
    for role in ROLES:
        expected = _student_embeddings(student, texts, role)
        for width, vectors in expected.items():
            task = None if student.headless else str(width)
            exported = stock.encode(texts, prompt_name=role, task=task, convert_to_tensor=True)
            _compare(exported, vectors, f"{role} embeddings at width {width}")
        # The widest head is the default.
        default = (stock.encode_query if role == "query" else stock.encode_document)(texts, convert_to_tensor=True)
        _compare(default, expected[student.widths[0]], f"encode_{role}")
    if student.vision is not None:
        _check_images(student, folder)


def check_flat_export(first: Path, second: Path, width: int | None, *, trust_remote_code: bool = False) -> None:
    """Compare the embeddings of a flat export with those of its source at one width.

    Args:
        first: Router folder, or the folder of a student without a head.
        second: flat export.
        width: width of the flat export. None: the source has no Router.
        trust_remote_code: permission to run the model's custom code.

    Raises:
        JasperError: a folder cannot be loaded, or an embedding differs by more than 1e-5 in a coordinate.
    """
    router, flat = (_open(folder, "cpu", trust_remote_code) for folder in (first, second))
    texts = list(PROBES.values())
    for role in ROLES:
        task = None if width is None else str(width)
        expected = router.encode(texts, prompt_name=role, task=task, convert_to_tensor=True)
        exported = flat.encode(texts, prompt_name=role, convert_to_tensor=True)
        _compare(exported, expected, f"{role} embeddings at width {width}")


def source_rows(model: SentenceTransformer, role: str) -> np.ndarray:
    """Return a model's embeddings of the probes as queries or documents, (n, D) float64 rows of unit length.

    Args:
        model: sentence-transformers model. It stays in its mode, training or evaluation.
        role: "query" or "document". Prompts and routes are those of stock ``encode_query`` or ``encode_document``.
    """
    training = model.training
    try:
        rows = encode_role(model, list(PROBES.values()), role, prompt_of(model.prompts, role))
    finally:
        model.train(training)
    return F.normalize(rows.double(), dim=1).cpu().numpy()


def check_adapted(
    folder: Path,
    expected: Mapping[str, Mapping[int, np.ndarray]],
    task: str,
    device: str,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Compare the embeddings of an exported adapted model with the expected ones, for each role and width.

    Args:
        folder: unpublished export.
        expected: {role: {width: (n, width)}} embeddings of the probes, of any length.
        task: name of a width's task, with the fields ``{role}`` and ``{width}``.
        device: torch device name for the exported model.
        trust_remote_code: permission to run the model's custom code.

    Raises:
        JasperError: the export cannot be loaded, or an embedding differs by more than 1e-5 in a coordinate.
    """
    stock, texts = _open(folder, device, trust_remote_code), list(PROBES.values())
    for role, widths in expected.items():
        default = (stock.encode_query if role == "query" else stock.encode_document)(texts, convert_to_tensor=True)
        found = {
            width: stock.encode(
                texts, prompt_name=role, task=task.format(role=role, width=width), convert_to_tensor=True
            )
            for width in widths
        }
        rows = {width: F.normalize(torch.from_numpy(vectors), dim=1) for width, vectors in widths.items()}
        _compare(default.cpu(), rows[max(widths)], f"encode_{role}", "the models it was made from")
        for width in widths:
            what = f"{role} embeddings at width {width}"
            _compare(found[width].cpu(), rows[width], what, "the models it was made from")


def check_rows(
    folder: Path, expected: Mapping[str, np.ndarray], device: str, *, trust_remote_code: bool = False
) -> None:
    """Compare ``encode_query`` and ``encode_document`` of an export with the expected embeddings.

    Args:
        folder: unpublished export without a Router.
        expected: {role: (n, width)} embeddings of the probes, of any length.
        device: torch device name for the exported model.
        trust_remote_code: permission to run the model's custom code.

    Raises:
        JasperError: the export cannot be loaded, or an embedding differs by more than 1e-5 in a coordinate.
    """
    stock, texts = _open(folder, device, trust_remote_code), list(PROBES.values())
    for role, vectors in expected.items():
        found = (stock.encode_query if role == "query" else stock.encode_document)(texts, convert_to_tensor=True)
        rows = F.normalize(torch.from_numpy(vectors), dim=1)
        _compare(found.cpu(), rows, f"{role} embeddings", "its source")


@torch.no_grad()
def _check_images(student: Student, folder: Path) -> None:
    """Compare the image embeddings of an export with the student's at the widest head."""
    from jasper_fast.models.folder import load_student

    vision = student.config.vision
    reloaded = load_student(
        folder,
        trust_remote_code=student.config.trust_remote_code,
        trust_tower_code=vision is not None and vision.trust_remote_code,
    ).to(student.device)
    side, width = student.vision_tower.side, student.widths[0]
    images = torch.arange(2 * 3 * side * side).remainder(251).view(2, 3, side, side).to(torch.uint8)
    training = student.training
    student.eval()
    exported, expected = (
        F.normalize(model.project(model.pool(images), [width])[width], dim=1) for model in (reloaded, student)
    )
    student.train(training)
    _compare(exported, expected, "image embeddings")


@torch.no_grad()
def _student_embeddings(student: Student, texts: list[str], role: str) -> Mapping[int, Tensor]:
    training = student.training
    student.eval()
    try:
        heads = student.project(student.pool(student.tokenize(texts, role)))
        return {width: F.normalize(vectors, dim=1) for width, vectors in heads.items()}
    finally:
        student.train(training)


def _open(folder: Path, device: str, trust_remote_code: bool) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer

    from jasper_fast.utils.names import first_line

    try:
        with (
            without_bars(),
            torch.random.fork_rng(devices=[]),
        ):  # loading draws random weights before it reads the saved ones
            return SentenceTransformer(str(folder), device=device, trust_remote_code=trust_remote_code).eval()
    except CANNOT_LOAD as error:
        raise JasperError(
            f"the exported model cannot be loaded by sentence-transformers ({first_line(error)}). Nothing was "
            "published. Fix: report the student's architecture, or choose another student.model"
        ) from error


def _compare(exported: Tensor, expected: Tensor, what: str, source: str = "the trained one") -> None:
    """Raise if embeddings of the probes, (n, D) each, differ in width or by more than `TOLERANCE`."""
    if exported.shape != expected.shape:
        raise JasperError(
            f"the exported model differs from {source}: {what} (got a width of {exported.shape[1]}, expected "
            f"{expected.shape[1]}). Nothing was published. Fix: report the student's architecture"
        )
    difference = (exported.double() - expected.double()).abs().amax(dim=1)
    difference = torch.where(difference.isfinite(), difference, torch.inf)
    worst = int(difference.argmax())
    if float(difference[worst]) > TOLERANCE:
        raise JasperError(
            f"the exported model differs from {source}: {what}, probe {list(PROBES)[worst]!r} (got a difference "
            f"of {float(difference[worst]):.1e} in a coordinate, expected at most {TOLERANCE:.0e}). Nothing was "
            "published. Fix: report the architecture, or choose another model"
        )
