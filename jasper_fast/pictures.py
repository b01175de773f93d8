"""An exported model that sees: vectors of pictures and of words from one folder, in two lines.

model = jasper_fast.pictures.load("runs/glyphs/model")
vectors = model.encode(["a.jpg", "b.png"])
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from jasper_fast.card import FACTS_FILE
from jasper_fast.config import StudentConfig
from jasper_fast.encode import pick_device, student_encoder
from jasper_fast.errors import JasperError
from jasper_fast.export import ROUTER, VISION, model_folder, routes_of
from jasper_fast.image_sources import shown
from jasper_fast.images import DAMAGE, PICTURES, BadImage, decode, resize, upright
from jasper_fast.listing import all_files, user_path
from jasper_fast.model import Student
from jasper_fast.models import OWN_CODE, first_line
from jasper_fast.text import lone_surrogate


class PictureModel:
    """Vectors of pictures and words of one exported student; all are L2-normalised float32.

    Args:
        student: with a vision tower, in evaluation mode.
    """

    def __init__(self, student: Student) -> None:
        self.student = student.eval()
        self.widths = student.widths

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Any], task: str | int | None = None, batch_size: int = 32) -> np.ndarray:
        """Vectors of pictures.

        Args:
            pictures: files by path, their bytes, or PIL images.
            task: the width, as in sentence-transformers' ``encode``; None: the widest.
            batch_size: pictures per forward pass.

        Returns:
            (n, width) float32, rows of length one.

        Raises:
            BadImage: a picture cannot be used; it is named.
            JasperError: the model has no such width, or what was given is no list.
        """
        if isinstance(pictures, str | bytes | Path):
            raise JasperError("expected a list of pictures, got one: put it into brackets, encode([picture])")
        width, side, student = self._width(task), self.student.seeing.side, self.student
        found = [np.zeros((0, width), dtype=np.float32)]
        for start in range(0, len(pictures), batch_size):
            squares = np.stack([_square(p, side) for p in pictures[start : start + batch_size]])  # (b, side, side, 3)
            pooled = student.pool(torch.from_numpy(squares).permute(0, 3, 1, 2))
            found.append(F.normalize(student.project(pooled, [width])[width], dim=1).cpu().numpy())
        return np.concatenate(found)

    def encode_text(self, texts: Sequence[str], task: str | int | None = None, role: str = "document") -> np.ndarray:
        """Vectors of words, (n, width) float32, as stock sentence-transformers gives them of the same folder.

        Args:
            role: "document", as captions were in training, or "query".
        """
        if isinstance(texts, str):
            raise JasperError("expected a list of texts, got one: put it into brackets, encode_text([text])")
        width, student = self._width(task), self.student
        if not texts:
            return np.zeros((0, width), dtype=np.float32)
        return student_encoder(student, [width], student.max_length, student.device, "fp32")(list(texts), role)[width]

    def encode_mixed(self, inputs: Sequence[Any], task: str | int | None = None) -> np.ndarray:
        """Vectors of words (``str`` that names no picture file) and pictures in one list, in its order, (n, width)."""
        words = [i for i, given in enumerate(inputs) if isinstance(given, str) and not _names_a_file(given)]
        others = sorted(set(range(len(inputs))) - set(words))
        found = np.zeros((len(inputs), self._width(task)), dtype=np.float32)
        found[words] = self.encode_text([inputs[i] for i in words], task)
        found[others] = self.encode([inputs[i] for i in others], task)
        return found

    def _width(self, task: str | int | None) -> int:
        if task is None:
            return self.widths[0]
        if str(task) not in map(str, self.widths):
            raise JasperError(f"the model has no width {task}; it has {', '.join(map(str, self.widths))}")
        return int(task)


def load(path: str | Path, *, trust_remote_code: bool = False) -> PictureModel:
    """An exported model, or the run folder around it, that embeds pictures and words.

    Args:
        path: of either.
        trust_remote_code: whether code that the model brings may run.

    Raises:
        JasperError: no such folder, its model reads text alone, or it brings code of its own that was not allowed.
    """
    folder = model_folder(path)
    if not (folder / VISION).is_dir():
        raise JasperError(f"{folder} reads text alone: it has no folder {VISION}; train it with a vision stage")
    return PictureModel(load_student(folder, trust_remote_code=trust_remote_code).to(pick_device()))


def picture_files(folder: str | Path) -> Iterator[Path]:
    """Yield the usable images in a folder and below in natural order; others are named and left out.

    Links to folders are followed. Hidden and system files are not listed.

    Raises:
        JasperError: there is no such folder, or no usable image in it.
    """
    root, found = user_path(str(folder)), False
    if not os.path.isdir(root):
        what = "is a file: give a folder of pictures, unpacked" if os.path.exists(root) else "there is no such folder"
        raise JasperError(f"{folder}: {what}")
    for file in all_files(root):
        if not file.name.lower().endswith(PICTURES):
            continue
        if (problem := _unusable(file)) is not None:
            print(f"left out {shown(str(file))}: {problem}")
            continue
        found = True
        yield file
    if not found:
        raise JasperError(f"{folder}: no picture here that can be used; known: {', '.join(PICTURES)}")


def _unusable(file: Path) -> str | None:
    """Say why an image cannot be indexed; None if it can."""
    if lone_surrogate(str(file)):
        return "its name is not UTF-8, so it cannot be stored; rename it"
    try:
        decode(file.read_bytes())
    except (OSError, BadImage) as error:
        return str(error)
    return None


def load_student(path: str | Path, *, trust_remote_code: bool = False, trust_tower_code: bool | None = None) -> Student:
    """The student of an exported folder: encoder, heads and, where there is one, the vision tower.

    What the folder says of itself never allows its own code: it may come from anywhere.

    Args:
        path: of the folder, or of the run around it.
        trust_remote_code: whether code that the model brings may run.
        trust_tower_code: the same of the vision tower alone; None: as the rest.

    Raises:
        JasperError: no such folder, it lacks the facts that jasper_fast writes, or it brings code of its own that was
            not allowed.
    """
    folder = model_folder(path)
    facts = folder / FACTS_FILE
    if not facts.is_file():
        raise JasperError(f"{facts} is missing: it says how the student was built; export the run again")
    fields = json.loads(facts.read_text(encoding="utf-8"))["student"]
    fields |= {"model": str(folder), "layers": None, "trust_remote_code": trust_remote_code}
    if fields.get("vision"):
        fields["vision"] |= {"model": str(folder / VISION), "tower": None, "revision": None}
        fields["vision"]["trust_remote_code"] = trust_remote_code if trust_tower_code is None else trust_tower_code
    try:
        student = Student.build(StudentConfig(**fields))
    except JasperError as error:
        if "trust_remote_code: true" in str(error):  # a configuration's words; here there is none
            raise JasperError(f"{folder}: {OWN_CODE}") from error
        raise
    heads = routes_of(folder)
    for name, head in student.heads.items():
        weights = load_file(folder / ROUTER / heads[int(name)] / "model.safetensors")
        head.load_state_dict({key.removeprefix("linear."): value for key, value in weights.items()})
    return student.eval()


def _square(picture: Any, side: int) -> np.ndarray:
    """A picture as (side, side, 3) uint8."""
    if isinstance(picture, bytes):
        return resize(decode(picture), side)
    if isinstance(picture, str | Path):
        try:
            return resize(decode(Path(picture).expanduser().read_bytes()), side)
        except (OSError, BadImage) as error:
            raise BadImage(f"{picture}: {error.strerror if isinstance(error, OSError) else error}") from None
    try:
        return resize(upright(picture), side)
    except (*DAMAGE, AttributeError) as error:
        raise BadImage(
            f"not an image that can be used (got {type(picture).__name__}: {first_line(error)}). Fix: give a path, "
            "bytes or a PIL image"
        ) from error


def _names_a_file(text: str) -> bool:
    return len(text) < 1024 and "\n" not in text and "\0" not in text and Path(text).expanduser().is_file()
