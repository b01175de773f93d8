"""Real pictures with captions on every machine: the named glyphs of DejaVu Sans, which matplotlib ships.

A glyph is drawn as it stands on a line: same size, same base line, so that a comma differs from an apostrophe. Letters
of several alphabets share a drawing (Latin A, Greek Alpha); they are one picture with several captions, so a drawing
that is kept for evaluation is never seen in training under another name.
"""

from __future__ import annotations

import functools
import unicodedata
from pathlib import Path

import numpy as np

from jasper_fast.errors import JasperError

GLYPHS = "glyphs"
FONTS, FONT = "fonts/ttf", "DejaVuSans"  # matplotlib's folder of fonts; the one whose glyphs are meant
BASE_LINE = 0.72  # of the picture's height, from above
SIZE_OF_EM = 0.69  # of the picture's side: the tallest glyphs with their accents still fit


def font_file(font: str = FONT) -> Path:
    """A font as matplotlib carries it.

    Args:
        font: its file's name, without .ttf.

    Raises:
        JasperError: matplotlib is not installed, or has no such font.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise JasperError("the glyphs are those of matplotlib's fonts; type `pip install matplotlib`") from None
    folder = Path(matplotlib.get_data_path()) / FONTS
    known = sorted(file.stem for file in folder.glob("*.ttf"))
    if font not in known:
        raise JasperError(f"glyphs: matplotlib ships no font {font!r}; choose one of {', '.join(known)}")
    return folder / f"{font}.ttf"


def draw_glyphs(side: int = 64, font: str = FONT) -> list[tuple[np.ndarray, list[str]]]:
    """Every glyph that has a Unicode name and leaves ink, black on white, in the order of code points.

    Args:
        side: of the square pictures, in pixels.
        font: whose.

    Returns:
        ((side, side) uint8, its names) of each distinct drawing.
    """
    path = font_file(font)
    from matplotlib.ft2font import FT2Font
    from PIL import Image, ImageDraw, ImageFont

    # The other layout engine shapes text: it draws some lone marks not at all.
    face = ImageFont.truetype(str(path), round(side * SIZE_OF_EM), layout_engine=ImageFont.Layout.BASIC)
    found: dict[bytes, list[str]] = {}
    for point in sorted(FT2Font(str(path)).get_charmap()):
        name = unicodedata.name(chr(point), "")
        left, top, right, bottom = face.getbbox(chr(point), anchor="ls")
        if not name or right <= left or bottom <= top:
            continue
        picture = Image.new("L", (side, side), 255)
        place = (side / 2 - (left + right) / 2, side * BASE_LINE)  # a glyph too wide is cut alike on both sides
        ImageDraw.Draw(picture).text(place, chr(point), font=face, fill=0, anchor="ls")
        pixels = np.asarray(picture)
        if pixels.min() < 255:
            found.setdefault(pixels.tobytes(), []).append(name)
    return [(np.frombuffer(pixels, np.uint8).reshape(side, side), names) for pixels, names in found.items()]


@functools.cache
def glyph_names() -> list[str]:
    """The names of all drawn glyphs, the training texts of a student that is to find them by name."""
    return [name for _, names in draw_glyphs(32) for name in names]
