"""Retrieval scores between images and their captions, with a floor and a reference, and a contact sheet.

The floor is a ridge regression from an image's pixels and their spectrum to caption embeddings. The reference
represents an image by the mean embedding of its other captions, without the caption that is the query. An image with a
single caption has no reference. A student can beat the reference, because it sees the image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional as F

from jasper_fast.data.image_dataset import Images
from jasper_fast.evaluation.metrics import top_documents
from jasper_fast.models.embedder import normalise
from jasper_fast.models.encode import student_encoder
from jasper_fast.models.micro_batches import EVAL_MICRO_BATCH, ImageBatches
from jasper_fast.models.student import Student

STUDENT, FLOOR, REFERENCE = "student", "floor: ridge regression", "reference: its other captions"
DEPTHS = (1, 5, 10)
FLOOR_SIDE, FLOOR_ROWS = 32, 8000  # side of the floor's images in pixels, and images to fit it on
RIDGES = (1e1, 1e2, 1e3, 1e4, 1e5)
SHEET_QUERIES, SHEET_TOP = 12, 8


def evaluate_images(
    student: Student,
    train: Images,
    held_out: Images,
    device: torch.device,
    precision: Literal["auto", "fp32", "bf16"],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Score image retrieval on the held-out images at every width, and collect the content of a contact sheet.

    Args:
        student: student with a vision tower.
        train: training images, for the floor.
        held_out: held-out images.
        device: device to encode on.
        precision: "fp32", "bf16", or "auto" for the best that the device supports.

    Returns:
        The scores, ``{"pictures": int, "captions": int, "rows": [{"model", "width", "scores"}]}``, and the sheet,
        ``{"captions", "own", "found"}``. Scores have names such as "text → image R@10". They are empty for the
        reference if no image has two captions. ``found``, (queries, top), are positions among the held-out images.
    """
    encode = student_encoder(student, student.widths, student.max_length, device, precision)
    texts = [caption for captions in held_out.captions() for caption in captions]
    image_of = np.repeat(np.arange(len(held_out)), np.diff(held_out.starts))  # (captions,): image of each caption
    captions, images = encode(texts, "document"), image_embeddings(student, held_out, device, precision)
    rows = [_row(STUDENT, width, images[width], captions[width], image_of) for width in student.widths]
    if len(train):
        predicted = _floor_embeddings(train, held_out, encode)
        rows += [_row(FLOOR, width, predicted[width], captions[width], image_of) for width in student.widths]
    for width in student.widths:
        rows.append(
            {"model": REFERENCE, "width": width, "scores": reference_scores(captions[width], image_of, len(held_out))}
        )
    widest = student.widths[0]
    chosen = np.random.default_rng(0).choice(len(texts), size=min(SHEET_QUERIES, len(texts)), replace=False)
    best = top_documents(captions[widest][chosen], images[widest], SHEET_TOP)
    sheet = {"captions": [texts[i] for i in chosen], "own": image_of[chosen].tolist(), "found": best.tolist()}
    return {"pictures": len(held_out), "captions": len(texts), "rows": rows}, sheet


def _floor_embeddings(
    train: Images, held_out: Images, encode: Callable[[list[str], str], dict[int, np.ndarray]]
) -> dict[int, np.ndarray]:
    """Predict embeddings of the held-out images by ridge regression, (n, width) float32 by width."""
    captions = train.captions(np.arange(min(len(train), FLOOR_ROWS)))
    embeddings = encode([caption for group in captions for caption in group], "document")
    groups = np.repeat(np.arange(len(captions)), [len(group) for group in captions])
    train_features, features = floor_features(train), floor_features(held_out)
    return {
        width: fit_ridge(train_features, _means(rows, groups, len(captions)))(features)
        for width, rows in embeddings.items()
    }


def retrieval_scores(images: np.ndarray, captions: np.ndarray, image_of: np.ndarray) -> dict[str, float]:
    """Compute R@1, R@5, R@10 (fractions) and the median rank (from 1) in both directions.

    Ties count against the model. An image is ranked by its best caption.

    Args:
        images: (n, D) L2-normalised image embeddings.
        captions: (m, D) L2-normalised caption embeddings.
        image_of: (m,) int, index of each caption's image.
    """
    scores = captions.astype(np.float64) @ images.T.astype(np.float64)  # (m, n)
    right = scores[np.arange(len(image_of)), image_of]  # (m,)
    to_image = (scores >= right[:, None]).sum(axis=1)  # rank of each caption's image, ties count as worse
    best = np.full(len(images), -np.inf)
    np.maximum.at(best, image_of, right)
    is_own_image = image_of[:, None] == np.arange(len(images))  # (m, n)
    to_text = 1 + ((scores >= best) & ~is_own_image).sum(axis=0)
    return _recall(to_image, to_text)


def reference_scores(captions: np.ndarray, image_of: np.ndarray, count: int) -> dict[str, float]:
    """Score images that are represented by the mean embedding of their other captions.

    The caption that is the query or the target is excluded from the mean. Only images with several captions count.

    Args:
        captions: (m, D) L2-normalised caption embeddings.
        image_of: (m,) int, index of each caption's image.
        count: number of images.

    Returns:
        Scores as from retrieval_scores, empty if no image has several captions.
    """
    sums = np.zeros((count, captions.shape[1]))
    np.add.at(sums, image_of, captions)
    several = np.bincount(image_of, minlength=count) > 1  # (count,) bool
    queries = np.flatnonzero(several[image_of])
    if not len(queries):
        return {}
    mean_embeddings, caption_columns = (
        normalise(sums).T.astype(np.float64),
        captions.T.astype(np.float64),
    )  # (D, count), (D, m)
    to_image, ranks = np.zeros(len(queries), np.int64), np.zeros(len(queries), np.int64)
    for start in range(0, len(queries), 1024):
        part = queries[start : start + 1024]
        rows, mine = np.arange(len(part)), image_of[part]
        others = normalise(sums[mine] - captions[part]).astype(
            np.float64
        )  # (b, D): each query's image without the query
        to_captions = others @ caption_columns  # (b, m)
        right = to_captions[rows, part][:, None]  # (b, 1)
        to_images = captions[part].astype(np.float64) @ mean_embeddings  # (b, count)
        to_images[rows, mine] = right[:, 0]
        to_image[start : start + 1024] = (to_images >= right).sum(axis=1)
        ranks[start : start + 1024] = 1 + ((to_captions >= right) & (mine[:, None] != image_of)).sum(axis=1)
    to_text = np.full(count, len(image_of))
    np.minimum.at(to_text, image_of[queries], ranks)  # an image is ranked by its best caption
    return _recall(to_image, to_text[several])


def _recall(to_image: np.ndarray, to_text: np.ndarray) -> dict[str, float]:
    """Return recall and median rank in both directions, from ranks that start at 1."""
    scores: dict[str, float] = {}
    for way, ranks in (("text → image", to_image), ("image → text", to_text)):
        scores |= {f"{way} R@{k}": float((ranks <= k).mean()) for k in DEPTHS}
        scores[f"{way} median rank"] = float(np.median(ranks))
    return scores


def floor_features(images: Images) -> np.ndarray:
    """Return 32 × 32 grey pixels and their spectrum's amplitudes, (n, 1568) float32, of at most 8,000 images."""
    count = min(len(images), FLOOR_ROWS)
    parts = []
    for start in range(0, count, 1024):
        pixels = images.pixels(np.arange(start, min(start + 1024, count)), FLOOR_SIDE).float().mean(dim=1) / 255.0
        spectrum = torch.fft.rfft2(pixels).abs().log1p()  # (b, 32, 17)
        parts.append(torch.cat([pixels.flatten(1), spectrum.flatten(1)], dim=1).numpy())
    return np.concatenate(parts)


def fit_ridge(features: np.ndarray, targets: np.ndarray) -> Any:
    """Fit a ridge regression, with its strength chosen on every fifth row.

    Args:
        features: (n, F) float32 features.
        targets: (n, D) float32 targets.

    Returns:
        A function from (m, F) features to (m, D) float32 L2-normalised predictions.
    """
    mean, deviation = features.mean(axis=0), features.std(axis=0) + 1e-6
    x = ((features - mean) / deviation).astype(np.float64)
    centre = targets.mean(axis=0)
    y = (targets - centre).astype(np.float64)
    validation = np.arange(len(x)) % 5 == 4
    if not validation.any():
        validation[:] = True
    fit = ~validation if (~validation).any() else validation
    gram, moment = x[fit].T @ x[fit], x[fit].T @ y[fit]
    errors = {}
    values, axes = np.linalg.eigh(gram)
    rotated, inputs = axes.T @ moment, x[validation] @ axes
    for ridge in RIDGES:
        errors[ridge] = float(((inputs @ (rotated / (values + ridge)[:, None]) - y[validation]) ** 2).mean())
    best = min(errors, key=errors.__getitem__)
    weights = np.linalg.solve(x.T @ x + best * np.eye(x.shape[1]), x.T @ y)
    return lambda rows: normalise((((rows - mean) / deviation) @ weights + centre).astype(np.float32))


def _row(model: str, width: int, images: np.ndarray, captions: np.ndarray, image_of: np.ndarray) -> dict[str, Any]:
    return {"model": model, "width": width, "scores": retrieval_scores(images, captions, image_of)}


def _means(vectors: np.ndarray, groups: np.ndarray, count: int) -> np.ndarray:
    """Return the L2-normalised mean embedding of each group, (count, D) float32."""
    sums = np.zeros((count, vectors.shape[1]), dtype=np.float32)
    np.add.at(sums, groups, vectors)
    return normalise(sums)


@torch.no_grad()
def image_embeddings(
    student: Student, images: Images, device: torch.device, precision: Literal["auto", "fp32", "bf16"]
) -> dict[int, np.ndarray]:
    """Return the unit embeddings of all images by width, {width: (n, width)}."""
    training = student.training
    student.eval()
    parts = []
    for start in range(0, len(images), EVAL_MICRO_BATCH):
        pixels = images.pixels(np.arange(start, min(start + EVAL_MICRO_BATCH, len(images))), student.vision_tower.side)
        parts.append(ImageBatches([pixels], 0).pool(student, device, precision))
    vectors = student.project(torch.cat(parts))
    student.train(training)
    return {width: F.normalize(v.float(), dim=1).cpu().numpy() for width, v in vectors.items()}
