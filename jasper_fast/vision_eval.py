"""Retrieval scores between pictures and their captions, with a floor and a reference, and a contact sheet.

Floor: a ridge regression from the picture's pixels and their spectrum onto captions' vectors. Reference: a picture
whose vector is that of its other captions, all but the one that asks; a picture with one caption has none. A student
can beat the reference, because it sees the picture and not only what others wrote about it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch

from jasper_fast.encode import student_encoder
from jasper_fast.encoders import normalise
from jasper_fast.files import write_atomic
from jasper_fast.image_batches import image_embeddings
from jasper_fast.image_data import Images
from jasper_fast.metrics import top_documents
from jasper_fast.model import Student

STUDENT, FLOOR, REFERENCE = "student", "floor: ridge regression", "reference: its other captions"
OLD_NAMES = {"ceiling: its other captions": REFERENCE}  # in results of earlier versions
DEPTHS = (1, 5, 10)
SHEET = "pictures.png"
FLOOR_SIDE, FLOOR_ROWS = 32, 8000  # pixels per side that the floor sees, and pictures that it is fitted on
RIDGES = (1e1, 1e2, 1e3, 1e4, 1e5)
SHEET_QUERIES, SHEET_TOP = 12, 8


def evaluate_pictures(
    student: Student,
    train: Images,
    kept: Images,
    device: torch.device,
    precision: Literal["auto", "fp32", "bf16"],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores of the held-out pictures at every width, and what a contact sheet is drawn of.

    Returns:
        ({"pictures": int, "captions": int, "rows": [{"model", "width", "scores"}]}, {"captions", "own", "found"}):
        scores are named e.g. "text → image R@10", and the reference has none where no picture has two captions;
        ``found`` (queries, top) are positions among the held-out pictures.
    """
    encode = student_encoder(student, student.widths, student.max_length, device, precision)
    texts = [caption for captions in kept.captions() for caption in captions]
    own = np.repeat(np.arange(len(kept)), np.diff(kept.starts))  # (captions,): the picture of each
    captions, pictures = encode(texts, "document"), image_embeddings(student, kept, device, precision)
    rows = [_row(STUDENT, width, pictures[width], captions[width], own) for width in student.widths]
    if len(train):
        taught = train.captions(np.arange(min(len(train), FLOOR_ROWS)))
        flat = encode([caption for captions in taught for caption in captions], "document")
        groups = np.repeat(np.arange(len(taught)), [len(captions) for captions in taught])
        seen, unseen = (floor_features(part) for part in (train, kept))
        for width in student.widths:
            guess = fit_ridge(seen, _means(flat[width], groups, len(taught)))(unseen)
            rows.append(_row(FLOOR, width, guess, captions[width], own))
    for width in student.widths:
        rows.append({"model": REFERENCE, "width": width, "scores": reference_scores(captions[width], own, len(kept))})
    widest = student.widths[0]
    chosen = np.random.default_rng(0).choice(len(texts), size=min(SHEET_QUERIES, len(texts)), replace=False)
    found = top_documents(captions[widest][chosen], pictures[widest], SHEET_TOP)
    sheet = {"captions": [texts[i] for i in chosen], "own": own[chosen].tolist(), "found": found.tolist()}
    return {"pictures": len(kept), "captions": len(texts), "rows": rows}, sheet


def retrieval_scores(pictures: np.ndarray, captions: np.ndarray, own: np.ndarray) -> dict[str, float]:
    """R@1/5/10 (shares) and median rank (from 1) both ways; equal scores count against the model.

    Args:
        pictures: (n, D) unit vectors.
        captions: (m, D) unit vectors.
        own: (m,) int, the picture of each caption; a picture finds its best caption.
    """
    scores = captions.astype(np.float64) @ pictures.T.astype(np.float64)  # (m, n)
    right = scores[np.arange(len(own)), own]  # (m,)
    to_image = (scores >= right[:, None]).sum(axis=1)  # the rank of each caption's picture, ties the worst
    best = np.full(len(pictures), -np.inf)
    np.maximum.at(best, own, right)
    theirs = own[:, None] == np.arange(len(pictures))  # (m, n)
    to_text = 1 + ((scores >= best) & ~theirs).sum(axis=0)
    return _recall(to_image, to_text)


def reference_scores(captions: np.ndarray, own: np.ndarray, count: int) -> dict[str, float]:
    """Score pictures whose vectors are the means of their captions', without the one that asks or is found.

    Only pictures with several captions are asked for; empty where there are none.

    Args:
        captions: (m, D) unit vectors.
        own: (m,) int, the picture of each caption.
        count: pictures.
    """
    sums = np.zeros((count, captions.shape[1]))
    np.add.at(sums, own, captions)
    several = np.bincount(own, minlength=count) > 1  # (count,) bool
    asked = np.flatnonzero(several[own])
    if not len(asked):
        return {}
    whole, every = normalise(sums).T.astype(np.float64), captions.T.astype(np.float64)  # (D, count), (D, m)
    to_image, ranks = np.zeros(len(asked), np.int64), np.zeros(len(asked), np.int64)
    for start in range(0, len(asked), 1024):
        part = asked[start : start + 1024]
        rows, mine = np.arange(len(part)), own[part]
        others = normalise(sums[mine] - captions[part]).astype(np.float64)  # (b, D): each one's picture without it
        to_captions = others @ every  # (b, m)
        right = to_captions[rows, part][:, None]  # (b, 1)
        to_pictures = captions[part].astype(np.float64) @ whole  # (b, count)
        to_pictures[rows, mine] = right[:, 0]
        to_image[start : start + 1024] = (to_pictures >= right).sum(axis=1)
        ranks[start : start + 1024] = 1 + ((to_captions >= right) & (mine[:, None] != own)).sum(axis=1)
    to_text = np.full(count, len(own))
    np.minimum.at(to_text, own[asked], ranks)  # a picture finds its best caption
    return _recall(to_image, to_text[several])


def _recall(to_image: np.ndarray, to_text: np.ndarray) -> dict[str, float]:
    """The scores of ranks from 1, both ways."""
    found: dict[str, float] = {}
    for way, ranks in (("text → image", to_image), ("image → text", to_text)):
        found |= {f"{way} R@{k}": float((ranks <= k).mean()) for k in DEPTHS}
        found[f"{way} median rank"] = float(np.median(ranks))
    return found


def floor_features(images: Images) -> np.ndarray:
    """Pixels of 32 × 32 in grey and the amplitudes of their spectrum, (n, 1568) float32, for at most 8,000 pictures."""
    count = min(len(images), FLOOR_ROWS)
    parts = []
    for start in range(0, count, 1024):
        pixels = images.pixels(np.arange(start, min(start + 1024, count)), FLOOR_SIDE).float().mean(dim=1) / 255.0
        spectrum = torch.fft.rfft2(pixels).abs().log1p()  # (b, 32, 17)
        parts.append(torch.cat([pixels.flatten(1), spectrum.flatten(1)], dim=1).numpy())
    return np.concatenate(parts)


def fit_ridge(features: np.ndarray, targets: np.ndarray) -> Any:
    """A ridge regression whose strength is chosen on every fifth row; maps features to unit vectors."""
    mean, deviation = features.mean(axis=0), features.std(axis=0) + 1e-6
    x = ((features - mean) / deviation).astype(np.float64)
    centre = targets.mean(axis=0)
    y = (targets - centre).astype(np.float64)
    held = np.arange(len(x)) % 5 == 4
    if not held.any():
        held[:] = True
    fit = ~held if (~held).any() else held
    gram, moment = x[fit].T @ x[fit], x[fit].T @ y[fit]
    errors = {}
    values, axes = np.linalg.eigh(gram)
    rotated, seen = axes.T @ moment, x[held] @ axes
    for ridge in RIDGES:
        errors[ridge] = float(((seen @ (rotated / (values + ridge)[:, None]) - y[held]) ** 2).mean())
    best = min(errors, key=errors.__getitem__)
    weights = np.linalg.solve(x.T @ x + best * np.eye(x.shape[1]), x.T @ y)
    return lambda rows: normalise((((rows - mean) / deviation) @ weights + centre).astype(np.float32))


def plot_sheet(sheet: Mapping[str, Any], kept: Images, file: IO[bytes], side: int = 96) -> None:
    """A contact sheet: each row a caption, its own picture, and the pictures it found, the right one framed.

    Args:
        sheet: from :func:`evaluate_pictures`.
        file: the PNG is written there.
    """
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", 13)
    gap, left, top = 8, 300, 34
    places = sorted({*sheet["own"], *(i for found in sheet["found"] for i in found)})
    pixels = dict(zip(places, kept.pixels(places, side).permute(0, 2, 3, 1).numpy(), strict=True))
    wide = max(len(found) for found in sheet["found"])
    size = (left + (wide + 1) * (side + gap) + 3 * gap, top + len(sheet["captions"]) * (side + gap) + gap)
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for x, title in ((gap, "caption asked for"), (left, "its picture"), (left + side + 4 * gap, "found, best first")):
        draw.text((x, gap), title, fill="#555555", font=font)
    for line, (caption, own, found) in enumerate(zip(sheet["captions"], sheet["own"], sheet["found"], strict=True)):
        y = top + line * (side + gap)
        draw.multiline_text((gap, y + 4), _wrapped(caption, 36, 5), fill="black", font=font)
        page.paste(Image.fromarray(pixels[own]), (left, y))
        for place, picture in enumerate(found):
            x = left + side + 4 * gap + place * (side + gap)
            page.paste(Image.fromarray(pixels[picture]), (x, y))
            right = picture == own
            draw.rectangle(
                (x - 2, y - 2, x + side + 1, y + side + 1),
                outline="#009E73" if right else "#DDDDDD",
                width=3 if right else 1,
            )
    page.save(file, "png")


def write_sheet(path: Path, sheet: Mapping[str, Any], kept: Images) -> bool:
    """Draw the contact sheet where matplotlib, whose font it uses, is installed."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return False
    content = io.BytesIO()
    plot_sheet(sheet, kept, content)
    write_atomic(path, content.getvalue())
    return True


def scores_markdown(results: Mapping[str, Any]) -> str:
    """The table of the report and the card: every model and width."""
    ways = ("text → image", "image → text")
    names = [*(f"R@{k}" for k in DEPTHS), "median rank"]
    lines = [
        "| | width | " + " | ".join(f"{way} {name}" for way in ways for name in names) + " |",
        "| --- | ---: |" + " ---: |" * (len(ways) * len(names)),
    ]
    for row in results["rows"]:
        cells = []
        for way in ways if row["scores"] else []:
            cells += [f"{100 * row['scores'][f'{way} R@{k}']:.1f}" for k in DEPTHS]
            cells.append(f"{row['scores'][f'{way} median rank']:g}")
        cells = cells or ["–"] * (len(ways) * len(names))
        name = OLD_NAMES.get(row["model"], row["model"])
        lines.append(f"| {name} | {row['width']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def pictures_line(results: Mapping[str, Any]) -> str:
    """One line: recall at ten both ways at the widest, beside the floor."""
    student, floor = (
        next((row["scores"] for row in results["rows"] if row["model"] == model), None) for model in (STUDENT, FLOOR)
    )
    parts = []
    for way in ("text → image", "image → text"):
        name = f"{way} R@10"
        beside = "" if floor is None else f" (floor {100 * floor[name]:.1f})"
        assert student is not None
        parts.append(f"{name} {100 * student[name]:.1f}{beside}, R@1 {100 * student[f'{way} R@1']:.1f}")
    return f"{results['pictures']} held-out pictures: " + "; ".join(parts)


def _row(model: str, width: int, pictures: np.ndarray, captions: np.ndarray, own: np.ndarray) -> dict[str, Any]:
    return {"model": model, "width": width, "scores": retrieval_scores(pictures, captions, own)}


def _means(vectors: np.ndarray, groups: np.ndarray, count: int) -> np.ndarray:
    """The mean of each group's vectors, of length one, (count, D)."""
    sums = np.zeros((count, vectors.shape[1]), dtype=np.float32)
    np.add.at(sums, groups, vectors)
    return normalise(sums)


def _wrapped(text: str, width: int, lines: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …"))
