"""Decode image files to RGB, and reject damaged files, too large images and other file types."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import TYPE_CHECKING

import numpy as np

from jasper_fast.utils.errors import JasperError

if TYPE_CHECKING:
    from PIL.Image import Image


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2")
MAX_FILE_BYTES = 1 << 30  # bytes of one image file; 100 million pixels of four 16-bit channels fit
MAX_PIXELS = 100_000_000  # a larger image is rejected before it is decoded
NO_PILLOW = "images: Pillow, which reads them, is not installed. Fix: `pip install pillow`"
OTHER_FORMATS = (  # file types often found among images: signature, its byte offset, and description with advice
    (b"%PDF", 0, "a PDF; save its pages as images"),
    (b"ftyp", 4, "a video; save a frame as an image"),
    (b"\x1aE\xdf\xa3", 0, "a video; save a frame as an image"),
    (b"OggS", 0, "a video or sound; save a frame as an image"),
    (b"<svg", 0, "an SVG drawing; save it as PNG"),
    (b"<?xml", 0, "an XML file; save drawings as PNG"),
)
STILL_IMAGE_BRANDS = (b"avif", b"avis", b"heic", b"mif1", b"msf1")  # image formats with the signature of a video
# The exceptions that Pillow's decoders raise for damaged files.
DECODE_ERRORS = (
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
    """An image or its captions cannot be used. The message gives the reason."""


def check_size(size: int) -> None:
    """Check the unpacked size of an archive member before it is read.

    Args:
        size: the size in bytes.

    Raises:
        BadImage: the size is above the limit for image files.
    """
    if size > MAX_FILE_BYTES:
        raise BadImage(f"too large when unpacked (got {size:,} bytes, expected at most {MAX_FILE_BYTES:,})")


def require_pillow() -> None:
    """Check that Pillow is installed.

    Raises:
        JasperError: Pillow is not installed.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise JasperError(NO_PILLOW) from None


def decode(data: bytes) -> Image:
    """Decode an image file to an upright RGB image, with transparency over white.

    An animation gives its first frame.

    Args:
        data: the complete content of an image file, in any format that Pillow reads.

    Raises:
        BadImage: the file is not an image, is damaged or truncated, or has more than 100 million pixels.
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise BadImage("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about sizes checked here and about unusual metadata
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(
                    f"too large (got {image.width} × {image.height} pixels, expected at most {MAX_PIXELS:,}). Fix: "
                    "shrink the image"
                )
            return to_upright_rgb(image)
    except (Image.DecompressionBombError, MemoryError):
        raise BadImage(f"too large (expected at most {MAX_PIXELS:,} pixels). Fix: shrink the image") from None
    except UnidentifiedImageError:
        raise BadImage(_other_format(data)) from None
    except DECODE_ERRORS as error:
        raise BadImage(
            f"damaged or truncated ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from None


def to_upright_rgb(image: Image) -> Image:
    """Convert an opened image to RGB, rotated by its EXIF orientation, with transparency over white.

    Raises:
        OSError: the image is truncated. Pillow's decoders raise any of ``DECODE_ERRORS`` for damaged files.
    """
    from PIL import ImageOps

    image.load()
    return _rgb(ImageOps.exif_transpose(image))


def resize(image: Image, size: int) -> np.ndarray:
    """Resize the whole image to a square, as SigLIP does. The aspect ratio is not kept.

    Args:
        image: an RGB image.
        size: the side of the square, in pixels.

    Returns:
        A (size, size, 3) uint8 array.
    """
    from PIL import Image

    # An extreme shape, such as 20,000 × 1, is first reduced by box filtering. Bicubic filtering over thousands of
    # pixels would be slow and would not look better.
    if max(image.size) > 32 * size:
        image = image.resize((min(image.width, 32 * size), min(image.height, 32 * size)), Image.Resampling.BOX)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def _rgb(image: Image) -> Image:
    from PIL import Image

    if image.mode.startswith("I;16") or image.mode in ("I", "F"):  # convert() clips more than 8 bits instead of scaling
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


def _other_format(data: bytes) -> str:
    start = data[:512].lstrip()
    for mark, place, kind in OTHER_FORMATS:
        if start[place : place + len(mark)].lower() == mark.lower() and start[8:12] not in STILL_IMAGE_BRANDS:
            return f"not an image but {kind}"
    return "not an image in a format that Pillow reads (JPEG, PNG, WebP, GIF, TIFF, BMP …)"
