"""Folders, zips and tars of images from other systems: system files, unusual names, duplicates, encodings."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from jasper_fast.config.data import ImagesConfig, ImageSourceConfig
from jasper_fast.data.image_dataset import build_images
from jasper_fast.data.image_sources import read_images, source_stamp
from jasper_fast.pictures import image_files
from jasper_fast.utils.errors import JasperError

Image = pytest.importorskip("PIL.Image")


GHOST = b"\0\5\x16\7\0\2\0\0Mac OS X        "  # AppleDouble


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 9, 9)).save(file, "png")
    return file.getvalue()


def caption_rows(file: Path, names: Iterable[str]) -> str:
    file.write_text("".join(json.dumps({"image": n, "caption": f"image {i}"}) + "\n" for i, n in enumerate(names)))
    return str(file)


def read(path: Path, **fields) -> list[tuple[bytes | str, list[str]]]:
    return [item[1:] for item in read_images(ImageSourceConfig(path=str(path), **fields))]


GHOSTS = [
    "__MACOSX/p/._0.png",
    "p/._0.png",
    "p/.DS_Store",
    "p/Thumbs.db",
    ".hidden/0.png",
    "p/@eaDir/0.png",
    "p/~$0.png",
]


@pytest.mark.parametrize("ghost", GHOSTS)
def test_ghosts_in_zips_folders_and_tars_are_no_images(ghost: str, tmp_path: Path) -> None:
    good = [(png(0), ["image 0"]), (png(1), ["image 1"])]
    members = {"p/0.png": png(0), ghost: GHOST, "p/1.png": png(1)}
    rows = caption_rows(tmp_path / "rows.jsonl", ["p/0.png", "p/1.png"])
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    assert read(tmp_path / "a.zip", captions=rows) == good
    for name, data in members.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    assert read(tmp_path / "in", captions=rows) == good
    assert [file.name for file in image_files(tmp_path / "in")] == ["0.png", "1.png"]
    assert str(tmp_path / "in" / ghost) not in {
        name for name, *_ in source_stamp(ImageSourceConfig(path=str(tmp_path / "in")))
    }
    write_tar(tmp_path / "a.tar", [*members.items()])
    assert [data for data, _ in read(tmp_path / "a.tar")] == [png(0), png(1)]


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_ghosts_between_the_files_of_a_sample_do_not_part_it(tmp_path: Path) -> None:
    members = []
    for i in range(3):
        for kind, data in (("png", png(i)), ("txt", f"image {i}".encode())):
            members += [(f"./._{i}.{kind}", GHOST), (f"./{i}.{kind}", data)]
    assert read(write_tar(tmp_path / "a.tar", members)) == [(png(i), [f"image {i}"]) for i in range(3)]


def test_hidden_tars_and_caption_files_in_a_folder_are_ignored(tmp_path: Path) -> None:
    for number in (10, 2):
        write_tar(tmp_path / f"shard-{number}.TAR", [("a.png", png(number)), ("a.txt", b"x")])
    (tmp_path / "._shard-2.tar").write_bytes(GHOST)
    assert [data for data, _ in read(tmp_path)] == [png(2), png(10)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "A.PNG").write_bytes(png(1))
    (tmp_path / "in" / "._rows.jsonl").write_bytes(GHOST)
    caption_rows(tmp_path / "in" / "rows.jsonl", ["A.PNG"])
    assert read(tmp_path / "in") == [(png(1), ["image 0"])]


def without_utf8_mark(path: Path, name: str) -> None:
    """Write a member with a UTF-8 name but without the UTF-8 flag, like macOS."""
    placeholder = "x" * len(name.encode())
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(placeholder, png(0))
    path.write_bytes(path.read_bytes().replace(placeholder.encode(), name.encode()))


def marked(path: Path, name: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, png(0))


def in_cp437(path: Path, name: str) -> None:
    placeholder = "x" * len(name)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(placeholder, png(0))
    path.write_bytes(path.read_bytes().replace(placeholder.encode(), name.encode("cp437")))


NAMES: dict[str, tuple[Callable[[Path, str], None], str, str]] = {
    "backslashes": (marked, "p\\q\\a.png", "p/q/a.png"),
    "backslashes in the captions": (marked, "p/q/a.png", "p\\q\\a.png"),
    "dot folder": (marked, "./p/a.png", "p/a.png"),
    "dot folder in the captions": (marked, "p/a.png", "./p/a.png"),
    "space after a comma": (marked, "p/a.png", " p/a.png"),
    "unmarked UTF-8": (without_utf8_mark, "p/\u00e9t\u00e9.png", "p/\u00e9t\u00e9.png"),
    "unmarked and decomposed": (
        without_utf8_mark,
        unicodedata.normalize("NFD", "\u00e9t\u00e9.png"),
        "\u00e9t\u00e9.png",
    ),
    "decomposed": (marked, unicodedata.normalize("NFD", "\u00e9.png"), "\u00e9.png"),
    "composed": (marked, "\u00e9.png", unicodedata.normalize("NFD", "\u00e9.png")),
    "unmarked Japanese": (without_utf8_mark, "\u5199\u771f.png", "\u5199\u771f.png"),
    "DOS": (in_cp437, "\u00e9t\u00e9.png", "\u00e9t\u00e9.png"),
    "upper-case suffix": (marked, "A.PNG", "A.PNG"),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_in_zips_are_those_of_the_captions(case: str, tmp_path: Path) -> None:
    write, stored, listed = NAMES[case]
    write(tmp_path / "A.ZIP", stored)
    rows = caption_rows(tmp_path / "rows.jsonl", [listed])
    assert read(tmp_path / "A.ZIP", captions=rows) == [(png(0), ["image 0"])]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_twice_count_once_or_are_named(tmp_path: Path) -> None:
    rows = caption_rows(tmp_path / "rows.jsonl", ["a.png", "b.png"])
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, data in (("a.png", png(0)), ("a.png", png(0)), ("b.png", png(1)), ("b.png", png(2))):
            archive.writestr(name, data)
    first, second = read(tmp_path / "a.zip", captions=rows)
    assert first == (png(0), ["image 0"]) and second[0] == "appears twice in the archive, with different content"
    members = [("a.png", png(0)), ("a.png", png(1)), ("a.txt", b"x"), ("b.png", png(2)), ("b.txt", b"y")]
    first, second = read(write_tar(tmp_path / "a.tar", members))
    assert first == ("its .png file appears twice in the archive", []) and second == (png(2), ["y"])


CAPTIONS = {
    "plain": ("txt", b"caf\xc3\xa9\n", ["caf\u00e9"]),
    "mark": ("txt", b"\xef\xbb\xbfcaf\xc3\xa9", ["caf\u00e9"]),
    "UTF-16": ("caption", "caf\u00e9\r\n".encode("utf-16"), ["caf\u00e9"]),
    "upper-case": ("TXT", b" two\r\nlines ", ["two lines"]),
    "JSON with a mark": ("json", b'\xef\xbb\xbf{"caption": "x"}', ["x"]),
    "JSON in UTF-16": ("json", '{"caption": "x"}'.encode("utf-16"), ["x"]),
    "windows": ("txt", b"caf\xe9", "its .txt is not UTF-8"),
    "JSON of windows": ("json", b'{"caption": "caf\xe9"}', "its .json is not UTF-8"),
    "surrogate": ("json", b'{"caption": "x \\ud83d"}', "column 'caption' has a lone surrogate ('\\ud83d', half"),
    "deep": ("json", b"[" * 100_000, "its .json is not JSON"),
}


@pytest.mark.parametrize("case", CAPTIONS)
def test_captions_in_tars_follow_the_rules_of_files(case: str, tmp_path: Path) -> None:
    kind, content, expected = CAPTIONS[case]
    ((data, captions),) = read(write_tar(tmp_path / "a.tar", [("a.png", png(0)), (f"a.{kind}", content)]))
    if isinstance(expected, list):
        assert (data, captions) == (png(0), expected)
    else:
        assert isinstance(data, str) and data.startswith(expected) and captions == []


CAPTION_TABLES = {
    "csv": ("captions.csv", '\ufefffile_name, text\r\na.png,"one, ""two"""\r\n'),
    "tsv": ("captions.TSV", 'text\tfile_name\none, "two"\ta.png\n'),
    "jsonl.zst": ("captions.jsonl", '\ufeff{"file_name": "a.png", "text": "one, \\"two\\""}\r'),
}


@pytest.mark.parametrize("case", CAPTION_TABLES)
def test_caption_files_may_be_tables(case: str, tmp_path: Path) -> None:
    name, content = CAPTION_TABLES[case]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png(0))
    (tmp_path / name).write_text(content, newline="")
    fields = {"captions": str(tmp_path / name), "image_column": "file_name", "caption_columns": ["text"]}
    assert read(tmp_path / "in", **fields) == [(png(0), ['one, "two"'])]


def test_images_in_linked_folders_are_read_and_searched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "in").mkdir()
    for number in (10, 2):
        (tmp_path / "far" / f"{number}.PNG").write_bytes(png(number))
    (tmp_path / "in" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "back").symlink_to(tmp_path / "in")
    caption_rows(tmp_path / "in" / "rows.jsonl", ["link/2.PNG", "link/10.PNG"])
    assert [data for data, _ in read(tmp_path / "in")] == [png(2), png(10)]
    stamp = source_stamp(ImageSourceConfig(path=str(tmp_path / "in")))
    assert {name for name, *_ in stamp} >= {str(tmp_path / "in" / "link" / f"{n}.PNG") for n in (2, 10)}
    (tmp_path / "in" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / os.fsdecode(b"in/odd-\xff.png")).write_bytes(png(1))
    assert [file.name for file in image_files(tmp_path / "in")] == ["2.PNG", "10.PNG"]
    output = capsys.readouterr().out
    assert "gone.png: " in output and "No such file" in output and "odd-?.png: its name is not UTF-8" in output


def test_parquet_files_in_linked_folders_are_not_lost(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for folder in ("in", "far"):
        (tmp_path / folder).mkdir()
        pq.write_table(pa.table({"image": [png(1)], "caption": [folder]}), tmp_path / folder / "x.parquet")
    assert [captions for _, captions in read(tmp_path / "in")] == [["in"]]
    (tmp_path / "in" / "link").symlink_to(tmp_path / "far")
    with pytest.raises(JasperError, match="in/link: `datasets` does not follow this link"):
        read(tmp_path / "in")


def test_captions_that_differ_in_form_alone_are_held_out_together(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    forms = ["caf\u00e9", "cafe\u0301", "\uff23AF\u00c9"]
    rows = [{"image": f"{i}.png", "caption": form} for i, form in enumerate([*forms, "x", "y", "z"])]
    for i, row in enumerate(rows):
        (tmp_path / "in" / row["image"]).write_bytes(png(i))
    (tmp_path / "in" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for seed in range(8):
        config = ImagesConfig(sources=[ImageSourceConfig(path=str(tmp_path / "in"))], held_out=3, seed=seed)
        _, held = build_images(config, str(tmp_path / "cache"))
        among = sum(caption[0] in forms for caption in held.captions())
        assert among in (0, 3)


def test_damaged_archives_are_named(tmp_path: Path) -> None:
    rows = caption_rows(tmp_path / "rows.jsonl", ["a.png"])
    for name, content in (
        ("a.zip", b"PK\3\4 cut"),
        ("b.tar.xz", b"\xfd7zXZ\0 cut"),
        ("c.tar", b"x" * 700),
        ("d.tgz", struct.pack("<I", 0x8B1F)),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(JasperError, match=name):
            read(tmp_path / name, captions=rows if name == "a.zip" else None)
