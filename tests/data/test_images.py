"""Images: decoding, sources, unusable files, held-out images, and the glyphs."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from jasper_fast.config.data import ImagesConfig, ImageSourceConfig
from jasper_fast.data.image_dataset import build_images, hold_out
from jasper_fast.data.image_files import BadImage, decode, resize
from jasper_fast.data.image_sources import read_images
from jasper_fast.utils.errors import JasperError

Image = pytest.importorskip("PIL.Image")


def encoded(image, kind: str = "png", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def plain(colour=(200, 60, 20), size=(6, 4)):
    return Image.new("RGB", size, colour)


def corner(data: bytes) -> tuple[int, ...]:
    image = decode(data)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def near(actual, expected, within=2) -> bool:
    return all(abs(a - b) <= within for a, b in zip(actual, expected, strict=True))


def test_modes_become_plain_rgb():
    assert corner(encoded(plain())) == (200, 60, 20)
    assert corner(encoded(Image.new("L", (2, 2), 90))) == (90, 90, 90)
    assert corner(encoded(Image.new("1", (2, 2), 1))) == (255, 255, 255)
    assert near(corner(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "jpeg")), (255, 0, 0), 4)
    palette = plain().quantize(4)
    assert near(corner(encoded(palette)), (200, 60, 20))
    assert near(corner(encoded(Image.new("I;16", (2, 2), 30000))), (30000 * 255 / 65535,) * 3)
    assert corner(encoded(Image.new("F", (2, 2), 0.5), "tiff")) in {(127,) * 3, (128,) * 3}


def test_transparency_lies_over_white():
    half = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    assert near(corner(encoded(half)), (127, 127, 127))
    assert corner(encoded(Image.new("RGBA", (2, 2), (9, 9, 9, 0)))) == (255, 255, 255)
    assert corner(encoded(Image.new("LA", (2, 2), (9, 0)))) == (255, 255, 255)
    see_through = plain().quantize(4)
    assert corner(encoded(see_through, transparency=see_through.getpixel((0, 0)))) == (255, 255, 255)


def test_exif_orientation_is_obeyed():
    picture = Image.new("RGB", (4, 2))
    picture.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise: the upper left corner moves to the right
    turned = decode(encoded(picture, exif=exif))
    assert turned.size == (2, 4) and turned.getpixel((1, 0)) == (255, 0, 0)


def test_an_animation_gives_its_first_frame():
    frames = [plain((255, 0, 0)), plain((0, 0, 255))]
    assert near(corner(encoded(frames[0], "gif", save_all=True, append_images=frames[1:])), (255, 0, 0))


def png_claiming(width: int, height: int) -> bytes:
    """Build a small file whose header claims a huge image."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"%PDF-1.7 ...", "a PDF"),
        (b"\0\0\0\x18ftypmp42" + b"\0" * 64, "a video"),
        (b"\x1aE\xdf\xa3" + b"\0" * 64, "a video"),
        (b"<svg xmlns=''/>", "an SVG"),
        (b"just some words", "not an image in a format"),
        (png_claiming(11_000, 10_000), "got 11000 × 10000 pixels, expected at most 100,000,000"),
        (png_claiming(20_000, 20_000), "expected at most 100,000,000 pixels"),
        (png_claiming(2**30, 2**30), "pixels"),
        (encoded(Image.effect_noise((64, 64), 80).convert("RGB"), "jpeg")[:700], "damaged or truncated"),
        (encoded(Image.effect_noise((64, 64), 80))[:900], "damaged or truncated"),
        (encoded(plain())[:20], "not an image|damaged"),
    ],
)
def test_what_is_no_picture_is_told(data, message):
    with pytest.raises(BadImage, match=message):
        decode(data)


@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (1, 20_000), (3, 3), (500, 20)])
def test_any_shape_becomes_a_square(size):
    square = resize(decode(encoded(plain(size=size))), 16)
    assert square.shape == (16, 16, 3) and square.dtype == np.uint8
    assert near(square[8, 8], (200, 60, 20))


def test_every_damaged_byte_is_a_picture_or_an_error_of_ours():
    whole = bytearray(encoded(Image.effect_noise((16, 16), 60), "jpeg"))
    generator = np.random.default_rng(0)
    for _ in range(200):
        spoilt = bytearray(whole)
        for place in generator.integers(len(whole), size=3):
            spoilt[place] = generator.integers(256)
        with suppress(BadImage):
            assert decode(bytes(spoilt)).mode == "RGB"


@pytest.fixture
def folder(tmp_path):
    """Write four images to a folder, and caption rows: two rows for one image, a list, and an empty caption."""
    pictures = {f"{name}.png": encoded(plain((50 * i, 0, 0))) for i, name in enumerate("abcd")}
    (tmp_path / "in").mkdir()
    for name, data in pictures.items():
        (tmp_path / "in" / name).write_bytes(data)
    rows = [
        {"image": "a.png", "caption": "first"},
        {"image": "b.png", "caption": ["second", "  ", "also\n second"]},
        {"image": "a.png", "caption": "first again"},
        {"image": "c.png", "caption": ""},
    ]
    (tmp_path / "in" / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path, pictures, rows


def found(**fields) -> dict[str, tuple[bytes | str, list[str]]]:
    items = read_images(ImageSourceConfig(**fields))
    return {where.rpartition(": ")[2].rpartition("/")[2]: (data, captions) for where, data, captions in items}


def test_a_folder_with_its_captions(folder):
    place, pictures, _ = folder
    items = found(path=str(place / "in"))
    assert items["a.png"] == (pictures["a.png"], ["first", "first again"])
    assert items["b.png"][1] == ["second", "also second"]
    assert items["c.png"][1] == [] and items["d.png"][1] == []  # skipped later, with a message
    assert len(found(path=str(place / "in"), limit=2)) == 2


def test_a_zip_beside_its_captions(folder):
    place, pictures, rows = folder
    with zipfile.ZipFile(place / "pictures.zip", "w") as archive:
        for name, data in pictures.items():
            archive.writestr(name, data)
    with gzip.open(place / "rows.jsonl.gz", "wt") as file:
        for row in rows:
            file.write(json.dumps({"file": row["image"], "alt": row["caption"]}) + "\n")
    fields = {"path": str(place / "pictures.zip"), "image_column": "file", "caption_columns": ["alt"]}
    assert found(**fields) == found(path=str(place / "in"))
    with pytest.raises(JasperError, match="no column 'image' with the file name"):
        found(path=str(place / "pictures.zip"))
    with pytest.raises(JasperError, match="no column 'caption'"):
        found(**fields | {"caption_columns": ["caption"]})
    (place / "more.jsonl").write_text("{}")
    with pytest.raises(JasperError, match=r"got 2 JSONL files, expected 1\). Fix: set `captions`"):
        found(**fields)
    assert found(**fields, captions=str(place / "rows.jsonl.gz"))
    (place / "cut.zip").write_bytes((place / "pictures.zip").read_bytes()[:-30])
    with pytest.raises(JasperError, match="cannot be read completely"):
        found(**fields | {"path": str(place / "cut.zip"), "captions": str(place / "rows.jsonl.gz")})


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_webdataset_tars_are_streamed(folder):
    place, pictures, _ = folder
    members = {
        "x/1.png": pictures["a.png"],
        "x/1.txt": b"one\n",
        "x/1.json": json.dumps({"caption": "uno", "width": 6}).encode(),
        "x/2.txt": b"alone",
        "x/3.png": pictures["b.png"],
        "x/3.json": b'{"other": 1}',
        "x/4.json": b'{"neither": "picture nor caption"}',
        "x/5.png": pictures["c.png"],
        "x/5.json": b'{"caption": ',
    }
    for ending in (".tar", ".tar.gz"):
        items = found(path=str(write_tar(place / f"shard{ending}", members)))
        assert items == {
            "1.png": (pictures["a.png"], ["one", "uno"]),
            "2.txt": ("has a caption but no image", []),
            "3.png": (pictures["b.png"], []),
            "5.png": (items["5.png"][0], []),
        }
        assert "its .json is not JSON" in items["5.png"][0]
    (place / "cut.tar").write_bytes((place / "shard.tar").read_bytes()[:1500])
    with pytest.raises(JasperError, match=r"truncated \(got 1500 bytes, expected a multiple of 512"):
        found(path=str(place / "cut.tar"))
    (place / "cut.tar.gz").write_bytes((place / "shard.tar.gz").read_bytes()[:150])
    with pytest.raises(JasperError, match="cannot be read completely"):
        found(path=str(place / "cut.tar.gz"))


def test_of_a_webdataset_sample_the_plain_picture_counts(tmp_path, folder, monkeypatch):
    _, pictures, _ = folder
    a, b, c = (pictures[f"{name}.png"] for name in "abc")
    members = {"1.jpg": a, "1.mask.png": b, "1.txt": b"x", "2.mask.png": b, "2.depth.png": c, "2.jpg": a, "2.txt": b"y"}
    members |= {"3.mask.png": b, "3.jpg": a, "3.png": c, "4.left.png": a, "4.right.png": b}
    items = found(path=str(write_tar(tmp_path / "masks.tar", members)))
    assert items == {"1.jpg": (a, ["x"]), "2.jpg": (a, ["y"]), "3.jpg": (a, []), "4.left.png": (a, [])}
    monkeypatch.setattr("jasper_fast.data.image_files.MAX_FILE_BYTES", 10)
    data, _ = found(path=str(tmp_path / "masks.tar"))["1.jpg"]
    assert data == f"too large when unpacked (got {len(a)} bytes, expected at most 10)"


def test_one_bad_row_is_a_bad_picture_not_the_end(folder, monkeypatch):
    place, pictures, rows = folder
    rows = [
        *rows,
        {"image": "nowhere.png", "caption": "of nothing"},
        {"image": None, "caption": "of nothing"},
        {"image": "d.png", "caption": "half \ud83d"},
        {"image": "b.png", "caption": 7},
        {"image": "odd \udcff.png", "caption": "x"},
    ]
    (place / "in" / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    items = [item[:2] for item in read_images(ImageSourceConfig(path=str(place / "in")))]
    bad = [f"{where}: {data}" for where, data in items if isinstance(data, str)]
    for problem in (
        f"nowhere.png: the file is missing (it is listed in {place}/in/captions.jsonl, line 5)",
        "line 6: column 'image' is not a file name (None)",
        r"line 7: column 'caption' has a lone surrogate ('\ud83d', half a character) at character 6",
        "line 8: column 'caption' is not text but int",
        "odd ?.png: the file is missing",
    ):
        assert sum(problem in line for line in bad) == 1, problem
    train, _ = build_images(images(place), place / "cache")
    assert train.captions() == [["first", "first again"], ["second", "also second"]]

    with zipfile.ZipFile(place / "pictures.zip", "w") as archive:
        for name, data in pictures.items():
            archive.writestr(name, data)
    content = bytearray((place / "pictures.zip").read_bytes())
    content[content.index(pictures["b.png"]) + 20] ^= 1  # break its checksum
    (place / "pictures.zip").write_bytes(content)
    fields = {"path": str(place / "pictures.zip"), "captions": str(place / "in" / "captions.jsonl")}
    items = found(**fields)
    assert items["a.png"][0] == pictures["a.png"] and "cannot be read (Bad CRC-32" in items["b.png"][0]
    locked = content.index(b"PK\x01\x02") + 8
    content[locked] |= 1  # mark the member as encrypted in the directory
    content[6] |= 1
    (place / "pictures.zip").write_bytes(content)
    assert "encrypted" in found(**fields)["a.png"][0]
    monkeypatch.setattr("jasper_fast.data.image_files.MAX_FILE_BYTES", 10)
    assert "expected at most 10)" in found(**fields)["c.png"][0]


def test_rows_may_lack_some_of_the_caption_columns(folder):
    place, _, _ = folder
    rows = [{"image": "a.png", "alt": "one"}, {"image": "b.png", "caption": "two", "alt": None}, {"image": "c.png"}]
    file = place / "in" / "captions.jsonl"
    fields = {"path": str(place / "in"), "caption_columns": ["caption", "alt"]}
    file.write_text("\n".join(map(json.dumps, rows[:2])))
    items = found(**fields)
    assert (items["a.png"][1], items["b.png"][1]) == (["one"], ["two"])
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(JasperError, match=r"line 3: no column 'caption' or 'alt' \(got columns: image\)"):
        found(**fields)


def picture_rows(cells: list):
    """Build a `datasets` table of images with the captions "0", "1", …"""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageColumn

    features = Features({"image": ImageColumn(), "caption": Value("string")})
    return Dataset.from_dict({"image": cells, "caption": [str(i) for i in range(len(cells))]}, features=features)


def test_pictures_in_files_of_their_own_and_empty_cells_of_a_dataset(folder, monkeypatch):
    place, pictures, _ = folder
    with zipfile.ZipFile(place / "pictures.zip", "w") as archive:
        archive.writestr("b.png", pictures["b.png"])
    paths = [str(place / "in" / "a.png"), f"zip://b.png::{place}/pictures.zip", str(place / "none.png")]
    cells = [*({"bytes": None, "path": path} for path in paths), None]
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: picture_rows(cells).to_iterable_dataset())
    items = [item[1:] for item in read_images(ImageSourceConfig(path="somebody/pictures"))]
    assert items[:2] == [(pictures["a.png"], ["0"]), (pictures["b.png"], ["1"])]
    assert [data for data, _ in items[2:]] == [f"its file {place}/none.png is missing", "the row has no image"]


def test_folders_of_parquet_and_of_saved_datasets_are_read(folder, tmp_path):
    from datasets import DatasetDict

    _, pictures, _ = folder
    rows = picture_rows([{"bytes": data, "path": None} for data in pictures.values()])
    expected = [(data, [str(i)]) for i, data in enumerate(pictures.values())]
    (tmp_path / "shards" / "data").mkdir(parents=True)
    for part in range(2):
        rows.select(range(2 * part, 2 * part + 2)).to_parquet(
            tmp_path / "shards" / "data" / f"train-{part:05d}-of-00002.parquet"
        )
    rows.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "splits")
    for name in ("shards", "saved", "splits"):
        items = [item[1:] for item in read_images(ImageSourceConfig(path=str(tmp_path / name)))]
        assert items == expected, name
    splits = {"path": str(tmp_path / "splits")}
    assert len(list(read_images(ImageSourceConfig(**splits, split="test")))) == 1
    with pytest.raises(JasperError, match=r"no split 'dev' \(got splits: train, test\)"):
        list(read_images(ImageSourceConfig(**splits, split="dev")))


def test_a_datasets_image_column_is_not_decoded_by_it(tmp_path):
    from datasets import Dataset, Features, Sequence, Value
    from datasets import Image as ImageColumn

    rows = {"picture": [{"bytes": b"broken", "path": None}, {"bytes": encoded(plain()), "path": None}]}
    features = Features({"picture": ImageColumn(), "words": Sequence(Value("string"))})
    Dataset.from_dict(rows | {"words": [["x"], ["y", "z"]]}, features=features).to_parquet(tmp_path / "some.parquet")
    fields = {"path": str(tmp_path / "some.parquet"), "image_column": "picture", "caption_columns": ["words"]}
    assert [item[1:] for item in read_images(ImageSourceConfig(**fields))] == [
        (b"broken", ["x"]),
        (rows["picture"][1]["bytes"], ["y", "z"]),
    ]
    with pytest.raises(JasperError, match="no column 'image'"):
        list(read_images(ImageSourceConfig(path=fields["path"])))
    with pytest.raises(JasperError, match="no such file or folder"):
        list(read_images(ImageSourceConfig(path="./not-here.parquet")))


def test_a_stream_that_breaks_off_is_told_with_its_row(monkeypatch):
    class Rows:
        features = None

        def __iter__(self):
            yield {"image": encoded(plain()), "text": "x"}
            raise ValueError("Bad split\nand more")

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Rows())
    with pytest.raises(JasperError, match=r"somebody/pictures \(train\): reading failed after 1 rows \(Bad split\)"):
        list(read_images(ImageSourceConfig(path="somebody/pictures", caption_columns=["text"])))


def images(place: Path, **fields) -> ImagesConfig:
    return ImagesConfig(sources=[{"path": str(place / "in")}], **fields)


def test_what_cannot_be_used_is_left_out_and_told_up_to_a_limit(folder, capsys):
    place, _, _ = folder
    (place / "in" / "b.png").write_bytes(b"%PDF-1.4")
    train, held_out = build_images(images(place), place / "cache")
    output = capsys.readouterr().out
    assert "skipped 3 images" in output and "b.png: not an image but a PDF" in output and "has no caption" in output
    assert len(train) == 1 and len(held_out) == 0 and train.captions() == [["first", "first again"]]
    assert len(train.left_out) == 3 and not held_out.left_out
    again, _ = build_images(images(place), place / "cache")
    assert capsys.readouterr().out == "" and again.left_out == train.left_out  # read from the cache
    with pytest.raises(JasperError, match=r"too many unusable images \(got 3, expected at most 2, .* images.max_bad"):
        build_images(images(place, max_bad=2), place / "cache")
    with pytest.raises(JasperError, match=r"too few usable images to hold out 1 \(got 1, expected at least 2\)"):
        build_images(images(place, held_out=1), place / "cache")


def test_captions_and_pixels_by_number(folder):
    place, _, _ = folder
    train, _ = build_images(images(place), place / "cache")
    assert train.starts.tolist() == [0, 2, 4]
    assert train.caption_texts(np.array([3, 0, 1, 2])) == ["also second", "first", "first again", "second"]
    pixels = train.pixels([1, 0, 1], 8)
    assert pixels.shape == (3, 3, 8, 8) and (pixels[0] == pixels[2]).all()
    assert pixels[:, :, 0, 0].tolist() == [[50, 0, 0], [0, 0, 0], [50, 0, 0]]
    assert (train.pixels([0], 8) == pixels[1:2]).all()  # from memory


def test_held_out_pictures_share_nothing_with_the_others():
    generator = np.random.default_rng(1)
    groups = [[f"p{generator.integers(80)}", f"c{generator.integers(120)}"] for _ in range(100)]
    held, beside = hold_out(groups, 20, seed=0)
    ties = {tie for row in held for tie in groups[row]}
    assert 0 < len(held) <= 20 and held == sorted(held)
    assert all(ties.isdisjoint(groups[row]) for row in set(range(100)) - set(held))
    assert beside == [] and held == hold_out(groups, 20, seed=0)[0] != hold_out(groups, 20, seed=1)[0]
    assert hold_out([[str(i)] for i in range(50)], 7, 0)[0] != list(range(7))
    assert len(hold_out([["a"], ["b"]], 1, 0)[0]) == 1


def test_extra_pictures_are_never_held_out_nor_trained_on_beside_one_that_is():
    groups = [
        ["p0", "a"],
        ["p1", "b"],
        ["p2", "c"],
        ["p3", "a"],
        ["p4", "b", "d"],
        ["p5", "d"],
        ["p0", "e"],
        ["p6", "f"],
    ]
    extra = [False] * 3 + [True] * 5
    alone, _ = hold_out(groups[:3], 1, 0)
    held, beside = hold_out(groups, 1, 0, extra)
    assert held == alone  # extra images do not change which images are held out
    assert beside == {0: [3, 6], 1: [4, 5], 2: []}[held[0]]
    assert hold_out(groups, 3, 0, extra) == ([0, 1, 2], [3, 4, 5, 6])


def test_other_fonts_draw_the_same_names_for_training_alone(tmp_path):
    pytest.importorskip("matplotlib")
    glyphs = {"path": "glyphs", "limit": 300}
    bold = {**glyphs, "font": "DejaVuSans-Bold", "train_only": True}
    train, held_out = build_images(ImagesConfig(sources=[glyphs], held_out=40), tmp_path)
    more, same = build_images(ImagesConfig(sources=[glyphs, bold], held_out=40), tmp_path)
    assert same.captions() == held_out.captions() and len(held_out) == 40
    names = {name for captions in held_out.captions() for name in captions}
    assert names.isdisjoint(name for captions in more.captions() for name in captions)
    assert len(train) + 200 < len(more) < len(train) + 300
    with pytest.raises(JasperError, match="does not ship font 'Comic'. Fix: use one of .*DejaVuSans,"):
        build_images(ImagesConfig(sources=[{**glyphs, "font": "Comic"}]), tmp_path)


def test_glyphs_are_distinct_drawings_with_their_names():
    pytest.importorskip("matplotlib")
    from jasper_fast.data.glyphs import draw_glyphs, glyph_names

    drawn = draw_glyphs()
    names = glyph_names()
    assert len(names) == sum(len(captions) for _, captions in drawn) == 5749
    assert len({pixels.tobytes() for pixels, _ in drawn}) == len(drawn) > 5000
    of_name = {name: pixels for pixels, captions in drawn for name in captions}
    assert (of_name["LATIN CAPITAL LETTER A"] == of_name["GREEK CAPITAL LETTER ALPHA"]).all()
    comma, apostrophe = (np.argwhere(of_name[n] < 128)[:, 0].mean() for n in ("COMMA", "APOSTROPHE"))
    assert comma > apostrophe + 10  # glyphs keep their height on the line
    edges = [min(p[0].min(), p[-1].min()) for p, _ in drawn]
    assert np.mean(np.array(edges) < 255) < 0.01  # almost none is cut at the top or bottom


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB", "F", "PA", "RGBX", "1", "L", "RGBA"])
def test_an_image_in_memory_is_read_as_its_file_is(mode: str) -> None:
    from PIL import Image

    from jasper_fast.pictures import _square

    image = Image.new("RGB", (8, 4), (200, 60, 60))
    assert _square(
        image.convert("RGB").convert("L").convert("F")
        if mode == "F"
        else image.convert({"LAB": "RGB", "PA": "RGBA"}.get(mode, mode)),
        4,
    ).shape == (4, 4, 3)


def test_an_image_in_memory_is_turned_upright() -> None:
    import io

    from PIL import Image

    from jasper_fast.pictures import _square

    image = Image.new("RGB", (8, 4), "white")
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    content = io.BytesIO()
    image.save(content, "png", exif=exif)
    content.seek(0)
    np.testing.assert_array_equal(_square(Image.open(content), 8), _square(content.getvalue(), 8))


@pytest.mark.parametrize("given", [None, 3, object()])
def test_what_is_no_image_is_an_error(given: object) -> None:
    from jasper_fast.data.image_files import BadImage
    from jasper_fast.pictures import _square

    with pytest.raises(BadImage, match="not a readable image"):
        _square(given, 8)
