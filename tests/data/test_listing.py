"""Listing of folders: linked folders, hidden and system files, natural order."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jasper_fast.config.data import DataConfig, ImageSourceConfig, SourceConfig
from jasper_fast.data.image_sources import source_stamp as image_stamp
from jasper_fast.data.listing import is_hidden, listed_files, natural_key, user_path
from jasper_fast.data.text_dataset import build_texts
from jasper_fast.data.text_sources import read_source, source_files, source_stamp
from jasper_fast.utils.errors import JasperError

ORDERS = [
    ["part-1", "part-2", "part-10", "part-100"],
    ["a", "a01", "a1", "a2", "b"],
    ["2 of 3", "10 of 3"],
    ["v1.9.txt", "v1.10.txt"],
    ["00009.jsonl", "00010.jsonl", "000011.jsonl"],
    ["A.txt", "a.txt", "B.txt"],
    ["x2y3", "x2y10", "x10y1"],
    ["d2/z", "d10/a"],
    ["d/2", "d2/1"],
    ["n" + "9" * 5000, "n1" + "0" * 5000],
    ["\u0663", "\u0664"],  # digits of other scripts count as letters
]


@pytest.mark.parametrize("names", ORDERS, ids=lambda names: names[0][:20])
def test_numbers_in_names_are_ordered_by_value(names: list[str]) -> None:
    assert sorted(reversed(names), key=natural_key) == names
    assert sorted(map(Path, names), key=natural_key) == [Path(name) for name in names]


def put(file: Path, content: str = "") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content or f"the text of {file.stem}\n")
    return file


def texts(folder: Path) -> list[str]:
    return [text.removeprefix("the text of ") for (text,) in read_source(SourceConfig(path=str(folder)))]


HIDDEN = [
    "._a.txt",
    ".a.txt.swp",
    "__MACOSX/a.txt",
    "__macosx/x/a.txt",
    ".ipynb_checkpoints/a-checkpoint.txt",
    ".git/info/a.txt",
    ".cache/a.txt",
    "~$a.txt",
    ".~lock.a.txt#",
    "#a.txt#",
    "a.txt~",
    ".DS_Store",
    "Thumbs.db",
    "desktop.ini",
    "$RECYCLE.BIN/a.txt",
    "@eaDir/a.txt",
    "System Volume Information/a.txt",
]


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_and_system_files_are_no_data(name: str, tmp_path: Path) -> None:
    put(tmp_path / "data" / "sub" / "b.txt")
    before = source_stamp(SourceConfig(path=str(tmp_path / "data")))
    put(tmp_path / "data" / "sub" / name)
    assert is_hidden(name) and texts(tmp_path / "data") == ["b"]
    assert source_stamp(SourceConfig(path=str(tmp_path / "data"))) == before
    assert [file.name for file in listed_files(tmp_path / "data", ("",))] == ["b.txt"]


def test_what_only_looks_hidden_is_listed(tmp_path: Path) -> None:
    names = ["#1 hits.txt", "_part.txt", "a~b.txt", "a.b.txt", "macosx.txt"]
    for name in names:
        put(tmp_path / ".hidden above" / name)
    assert [file.name for file in listed_files(tmp_path / ".hidden above", (".txt",))] == sorted(names, key=natural_key)


NOTES = ["README.txt", "readme.TXT", "README.md.txt", "ReadMe_en.txt", "Read-Me first.txt", "LICENSE.txt"]
NOTES += ["licence.txt", "LICENSE-MIT.txt", "COPYING.txt", "README.txt.gz", "requirements.txt", "NOTICE.txt"]


@pytest.mark.parametrize("name", NOTES)
def test_texts_about_data_are_no_data(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "data" / "a.txt")
    put(tmp_path / "data" / "deep" / name, "MIT License")
    put(tmp_path / "data" / "table.xlsx")
    source = SourceConfig(path=str(tmp_path / "data"))
    assert texts(tmp_path / "data") == ["a"]
    build_texts(DataConfig(sources=[source], cut_share=0, cache=str(tmp_path / "cache")), 0)
    assert f"data: skipped deep/{name}, table.xlsx (not data of a supported format)" in capsys.readouterr().out
    (tmp_path / "data" / "a.txt").unlink()
    with pytest.raises(JasperError, match="no file of a supported format"):
        source_files(source)
    if name.endswith((".txt", ".TXT")):  # given as the source itself, it is data
        assert texts(tmp_path / "data" / "deep" / name) == ["MIT License"]


@pytest.mark.parametrize("name", ["readmes.txt", "readings.txt", "licenseplates.txt", "noticeboard.txt", "README.csv"])
def test_data_with_such_names_is_read(name: str, tmp_path: Path) -> None:
    put(tmp_path / name, "text\nthe text of x\n" if name.endswith(".csv") else "the text of x\n")
    assert texts(tmp_path) == ["x"]


def test_files_come_in_natural_order_whatever_the_case_of_their_suffix(tmp_path: Path) -> None:
    for name in ("part-10.TXT", "part-2.txt", "part-1.Txt", "sub2/x.txt", "sub10/y.txt"):
        put(tmp_path / name)
    assert texts(tmp_path) == ["part-1", "part-2", "part-10", "x", "y"]
    assert texts(tmp_path / "part-10.TXT") == ["part-10"]


def linked_twice(data: Path, far: Path) -> list[str]:
    (data / "one").symlink_to(far)
    (data / "two").symlink_to(far, target_is_directory=True)
    return ["a", "b", "b"]


def linked_relatively(data: Path, far: Path) -> list[str]:
    (data / "link").symlink_to(Path("..") / "far")
    return ["a", "b"]


def link_to_a_link(data: Path, far: Path) -> list[str]:
    (data.parent / "hop").symlink_to(far)
    (data / "link").symlink_to(data.parent / "hop")
    return ["a", "b"]


def linked_file(data: Path, far: Path) -> list[str]:
    (data / "b.txt").symlink_to(far / "b.txt")
    return ["a", "b"]


def cycle_upwards(data: Path, far: Path) -> list[str]:
    (data / "sub").mkdir()
    (data / "sub" / "up").symlink_to(data)
    put(data / "sub" / "c.txt")
    return ["a", "c"]


def cycle_between_two(data: Path, far: Path) -> list[str]:
    (data / "far").symlink_to(far)
    (far / "back").symlink_to(data)
    return ["a", "b"]


def link_to_itself_as_folder(data: Path, far: Path) -> list[str]:
    (data / "dot").symlink_to(".")
    return ["a"]


def linked_folder_itself(data: Path, far: Path) -> list[str]:
    real = data.rename(data.parent / "real")
    data.symlink_to(real)
    (real / "deep").mkdir()
    (real / "deep" / "link").symlink_to(far)
    return ["a", "b"]


def hidden_link(data: Path, far: Path) -> list[str]:
    (data / ".link").symlink_to(far)
    (data / ".gone").symlink_to(far / "nowhere")
    return ["a"]


LINKS = [linked_twice, linked_relatively, link_to_a_link, linked_file, cycle_upwards, cycle_between_two]
LINKS += [link_to_itself_as_folder, linked_folder_itself, hidden_link]


@pytest.mark.parametrize("link", LINKS)
def test_links_are_followed_and_end(link, tmp_path: Path) -> None:
    put(tmp_path / "data" / "a.txt")
    put(tmp_path / "far" / "b.txt")
    expected = link(tmp_path / "data", tmp_path / "far")
    assert texts(tmp_path / "data") == expected
    stamp = source_stamp(SourceConfig(path=str(tmp_path / "data")))
    assert len(stamp) == len(expected), "the stamp covers the files that are read"
    images = ImageSourceConfig(path=str(tmp_path / "data"))
    before = image_stamp(images)
    if "b" in expected:
        put(tmp_path / "far" / "b.txt", "another text, so another stamp\n")
        assert source_stamp(SourceConfig(path=str(tmp_path / "data"))) != stamp
        assert image_stamp(images) != before


@pytest.mark.parametrize("name", ["part-2.txt", "part2", "part.2", "deep/part"])
def test_broken_links_are_errors(name: str, tmp_path: Path) -> None:
    put(tmp_path / "data" / "a.txt")
    (tmp_path / "data" / "deep").mkdir()
    (tmp_path / "data" / name).symlink_to(tmp_path / "nowhere")
    for read in (texts, lambda folder: source_stamp(SourceConfig(path=str(folder)))):
        with pytest.raises(JasperError, match=rf"{name}: broken link \(.*nowhere is missing\)\. Fix: "):
            read(tmp_path / "data")
    with pytest.raises(JasperError, match="no such file or folder"):
        texts(tmp_path / "data" / name)


def test_pipes_are_no_files(tmp_path: Path) -> None:
    put(tmp_path / "a.txt")
    os.mkfifo(tmp_path / "b.txt")
    assert texts(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ["", " ", "\t", "a\0b"])
def test_an_empty_path_is_not_the_current_folder_and_one_with_nul_is_none(name: str) -> None:
    with pytest.raises(JasperError, match="the path of a file or folder is empty|the path contains a NUL"):
        user_path(name)


@pytest.mark.parametrize("name", ["x" * 5000 + ".txt", "~no such user/x.txt", "./a/b.jsonl"])
def test_paths_that_no_system_has_are_missing(name: str) -> None:
    with pytest.raises(JasperError, match="no such file or folder"):
        list(read_source(SourceConfig(path=name)))
