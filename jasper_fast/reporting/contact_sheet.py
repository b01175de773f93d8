"""Draw a contact sheet: captions and the images found for them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from jasper_fast.data.image_dataset import Images
from jasper_fast.utils.atomic import write_atomic

SHEET = "pictures.png"
SIDE = 96  # side of an image in pixels


def plot_sheet(sheet: Mapping[str, Any], held_out: Images, file: IO[bytes]) -> None:
    """Draw a contact sheet. A row shows a caption, its image, and the images it retrieved, with the right one framed.

    Args:
        sheet: content of the sheet, from :func:`evaluate_images`.
        held_out: held-out images.
        file: binary file for the PNG.
    """
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", 13)
    gap, left, top = 8, 300, 34
    places = sorted({*sheet["own"], *(i for retrieved in sheet["found"] for i in retrieved)})
    pixels = dict(zip(places, held_out.pixels(places, SIDE).permute(0, 2, 3, 1).numpy(), strict=True))
    wide = max(map(len, sheet["found"]))
    size = (left + (wide + 1) * (SIDE + gap) + 3 * gap, top + len(sheet["captions"]) * (SIDE + gap) + gap)
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for x, title in ((gap, "query"), (left, "its image"), (left + SIDE + 4 * gap, "retrieved, best first")):
        draw.text((x, gap), title, fill="#555555", font=font)
    rows = zip(sheet["captions"], sheet["own"], sheet["found"], strict=True)
    for line, (caption, target, retrieved) in enumerate(rows):
        y = top + line * (SIDE + gap)
        draw.multiline_text((gap, y + 4), _wrapped(caption, 36, 5), fill="black", font=font)
        page.paste(Image.fromarray(pixels[target]), (left, y))
        for place, image in enumerate(retrieved):
            x = left + SIDE + 4 * gap + place * (SIDE + gap)
            page.paste(Image.fromarray(pixels[image]), (x, y))
            right = image == target
            draw.rectangle(
                (x - 2, y - 2, x + SIDE + 1, y + SIDE + 1),
                outline="#009E73" if right else "#DDDDDD",
                width=3 if right else 1,
            )
    page.save(file, "png")


def write_sheet(path: Path, sheet: Mapping[str, Any], held_out: Images) -> bool:
    """Draw the contact sheet to a file, if matplotlib is installed. The sheet uses its font.

    Args:
        path: PNG file to write.
        sheet: content of the sheet, from :func:`evaluate_images`.
        held_out: held-out images.

    Returns:
        True if the sheet was drawn, False if matplotlib is missing.

    Raises:
        JasperError: the file cannot be written.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return False
    content = io.BytesIO()
    plot_sheet(sheet, held_out, content)
    write_atomic(path, content.getvalue())
    return True


def _wrapped(text: str, width: int, lines: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …"))
