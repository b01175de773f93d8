"""Draw captioned images without a download: the named glyphs of DejaVu Sans, which matplotlib ships.

All glyphs are drawn at the same size and on the same base line, so a comma differs from an apostrophe. Some letters of
different alphabets look identical (Latin A, Greek Alpha). They are one image with several captions, so training never
sees a held-out drawing under another name.
"""

from __future__ import annotations

import functools
import unicodedata
from pathlib import Path

import numpy as np

from jasper_fast.utils.errors import JasperError

GLYPHS = "glyphs"
FONTS, FONT = "fonts/ttf", "DejaVuSans"  # matplotlib's font folder, and the default font
BASELINE = 0.72  # distance of the base line from the top, as a fraction of the image height
FONT_SIZE = 0.69  # font size as a fraction of the image side; the tallest accented glyphs still fit


def font_file(font: str = FONT) -> Path:
    """Return the file of a font that matplotlib ships.

    Args:
        font: the file name without .ttf.

    Raises:
        JasperError: matplotlib is not installed, or does not ship this font.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise JasperError(
            "glyphs: matplotlib, which ships the fonts, is missing. Fix: `pip install matplotlib`"
        ) from None
    folder = Path(matplotlib.get_data_path()) / FONTS
    shipped = sorted(file.stem for file in folder.glob("*.ttf"))
    if font not in shipped:
        raise JasperError(f"glyphs: matplotlib does not ship font {font!r}. Fix: use one of {', '.join(shipped)}")
    return folder / f"{font}.ttf"


def draw_glyphs(side: int = 64, font: str = FONT) -> list[tuple[np.ndarray, list[str]]]:
    """Draw every visible glyph that has a Unicode name, black on white.

    Args:
        side: the side of the square images, in pixels.
        font: the file name of the font, without .ttf.

    Returns:
        One pair per distinct drawing, in the order of code points: the (side, side) uint8 image and its Unicode names.

    Raises:
        JasperError: matplotlib is not installed, or does not ship this font.
    """
    path = font_file(font)
    from matplotlib.ft2font import FT2Font
    from PIL import Image, ImageDraw, ImageFont

    # The other layout engine shapes text and does not draw some isolated marks.
    face = ImageFont.truetype(str(path), round(side * FONT_SIZE), layout_engine=ImageFont.Layout.BASIC)
    names_of: dict[bytes, list[str]] = {}
    for point in sorted(FT2Font(str(path)).get_charmap()):
        name = unicodedata.name(chr(point), "")
        left, top, right, bottom = face.getbbox(chr(point), anchor="ls")
        if not name or right <= left or bottom <= top:
            continue
        image = Image.new("L", (side, side), 255)
        origin = (side / 2 - (left + right) / 2, side * BASELINE)  # centred: a too wide glyph loses both edges equally
        ImageDraw.Draw(image).text(origin, chr(point), font=face, fill=0, anchor="ls")
        pixels = np.asarray(image)
        if pixels.min() < 255:
            names_of.setdefault(pixels.tobytes(), []).append(name)
    return [(np.frombuffer(pixels, np.uint8).reshape(side, side), names) for pixels, names in names_of.items()]


@functools.cache
def glyph_names() -> list[str]:
    """Return the Unicode names of all drawn glyphs, as training texts."""
    return [name for _, names in draw_glyphs(32) for name in names]


def training_rows() -> list[tuple[str]]:
    """Return the names of `glyph_names` as the rows of a built-in text source.

    Raises:
        JasperError: matplotlib is not installed.
    """
    return [(name,) for name in glyph_names()]
