"""Pictures from bytes: decoded to plain RGB whatever they were; refused where broken, too large or no picture."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import TYPE_CHECKING

import numpy as np

from jasper_fast.errors import JasperError

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2")
MAX_FILE = 1 << 30  # bytes of one image's file: 100 million pixels of four times 16 bits fit
MAX_PIXELS = 100_000_000  # more is refused before any of it is decoded
NO_PILLOW = "pictures are read with Pillow, which is not installed; type `pip install pillow`"
OTHER_KINDS = (  # what lies among pictures by mistake: first bytes, their place, and what to call it
    (b"%PDF", 0, "a PDF; save its pages as pictures"),
    (b"ftyp", 4, "a video; save a frame as a picture"),
    (b"\x1aE\xdf\xa3", 0, "a video; save a frame as a picture"),
    (b"OggS", 0, "a video or sound; save a frame as a picture"),
    (b"<svg", 0, "an SVG drawing; save it as PNG"),
    (b"<?xml", 0, "an XML file; save drawings as PNG"),
)
STILL_PICTURES = (b"avif", b"avis", b"heic", b"mif1", b"msf1")  # brands that share their first bytes with videos
# What Pillow's decoders are known to raise on damaged files.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
)


class BadImage(JasperError):
    """A picture, or its captions, cannot be used; the message says why."""


def check_size(size: int) -> None:
    """Check the unpacked size of an archive's member before it is read.

    Raises:
        BadImage: it is more than any image needs.
    """
    if size > MAX_FILE:
        raise BadImage(f"unpacks to {size:,} bytes; at most {MAX_FILE:,} are read")


def need_pillow() -> None:
    """Raises:
    JasperError: Pillow is not installed.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise JasperError(NO_PILLOW) from None


def decode(data: bytes) -> Image:
    """One picture as RGB: upright by its EXIF orientation, transparency over white, of an animation the first frame.

    Args:
        data: a whole file of any format that Pillow reads.

    Raises:
        BadImage: not a picture, broken, cut short, or of more than 100 million pixels.
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise BadImage("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes that the next lines refuse, and of odd metadata
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(
                    f"{image.width} × {image.height} pixels are more than {MAX_PIXELS:,}; shrink the picture"
                )
            return upright(image)
    except (Image.DecompressionBombError, MemoryError):
        raise BadImage(f"it would unpack to more than {MAX_PIXELS:,} pixels; shrink the picture") from None
    except UnidentifiedImageError:
        raise BadImage(_what_else(data)) from None
    except DAMAGE as error:
        raise BadImage(
            f"broken or cut short ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from None


def upright(image: Image) -> Image:
    """An opened image as RGB, turned upright by its EXIF orientation, with transparency over white."""
    from PIL import ImageOps

    image.load()
    return _rgb(ImageOps.exif_transpose(image))


def resize(image: Image, size: int) -> np.ndarray:
    """The whole picture as a square, as SigLIP takes it (the aspect is not kept).

    Returns:
        (size, size, 3) uint8.
    """
    from PIL import Image

    # A picture of 20,000 × 1 is first brought near the size: bicubic weights over thousands of pixels help nobody.
    if max(image.size) > 32 * size:
        image = image.resize((min(image.width, 32 * size), min(image.height, 32 * size)), Image.Resampling.BOX)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def _rgb(image: Image) -> Image:
    from PIL import Image

    if image.mode.startswith("I;16") or image.mode in ("I", "F"):  # more than 8 bits: convert() would clip, not scale
        values = np.asarray(image, dtype=np.float32)
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        top = 65535.0 if image.mode.startswith("I") and values.max() <= 65535 else max(1.0, float(values.max()))
        if image.mode == "F" and values.max() > 1.0:
            top = max(255.0, float(values.max()))
        return Image.fromarray((values.clip(0, top) * (255.0 / top)).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _what_else(data: bytes) -> str:
    start = data[:512].lstrip()
    for mark, place, kind in OTHER_KINDS:
        if start[place : place + len(mark)].lower() == mark.lower() and start[8:12] not in STILL_PICTURES:
            return f"not a picture but {kind}"
    return "not a picture of a format that Pillow reads (JPEG, PNG, WebP, GIF, TIFF, BMP …)"
