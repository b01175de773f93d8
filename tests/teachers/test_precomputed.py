"""Precomputed embeddings: every row is matched to its text, or the file is rejected."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jasper_fast.config.data import DataConfig
from jasper_fast.config.load import load_config
from jasper_fast.config.models import TeacherConfig
from jasper_fast.data.text import text_digest
from jasper_fast.teachers.label import ensure_teachers
from jasper_fast.teachers.model import load_teacher
from jasper_fast.teachers.precomputed import PrecomputedEmbeddings, describe_precomputed
from jasper_fast.teachers.row_order import centred_similarities, fit_of_order, lexical_similarities, other_orders
from jasper_fast.utils.errors import JasperError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("datasets")

from datasets import Dataset  # noqa: E402

ROWS, WIDTH = 40, 6
DATA = DataConfig(sources=[{"path": "unused"}], cut_share=0.0, shuffle_share=0.0)


@pytest.fixture
def vectors() -> np.ndarray:
    """Draw random rows, (40, 6)."""
    return np.random.default_rng(1).standard_normal((ROWS, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def texts(tiny_texts: list[str]) -> Dataset:
    """Build a dataset of forty texts, in which every third one is a query."""
    return dataset(tiny_texts[:ROWS], ["document" if i % 3 else "query" for i in range(ROWS)])


def dataset(texts: list[str], roles: list[str]) -> Dataset:
    digests = [text_digest(text, role) for text, role in zip(texts, roles, strict=True)]
    return Dataset.from_dict({"text": texts, "role": roles, "digest": digests})


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def opened(path: Path, rows: int = ROWS, **settings: Any) -> PrecomputedEmbeddings:
    return PrecomputedEmbeddings(TeacherConfig(vectors=str(path), **settings), rows)


def read(path: Path, texts: Dataset, **settings: Any) -> np.ndarray:
    ready = opened(path, len(texts), **settings)
    ready.match(texts, DATA)
    return ready.read(0, len(texts), texts["digest"][:])


def write(path: Path, columns: dict[str, list[Any]]) -> Path:
    """Write columns to a file in the format of its suffix."""
    if path.suffix.lower() == ".parquet":
        pq.write_table(pa.table(columns), path, row_group_size=7)
    else:
        lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
        opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
        with opener(path, "wt") as file:
            file.write("\n".join(lines) + "\n")
    return path


# the order of a folder's files

ORDERS = {
    "numbers": [f"part-{i}.npy" for i in range(12)],
    "padded to other widths": ["x08.npy", "x9.npy", "x010.npy", "x11.npy"],
    "shards": [f"data-{i:05d}-of-00011.npy" for i in range(11)],
    "upper-case suffixes": ["a2.NPY", "a10.npy"],
    "two kinds": ["a2.parquet", "a10.npy"],
    "two numbers": ["e_0_900.npy", "e_900_1000.npy", "e_1000_1100.npy"],
    "numbers of 30 digits": ["1" * 29 + ".npy", "1" * 30 + ".npy"],
    "mixed case": ["Part-2.npy", "part-3.npy", "PART-10.npy"],
}


@pytest.mark.parametrize("names", ORDERS.values(), ids=ORDERS)
def test_files_are_read_in_natural_order(names: list[str], vectors: np.ndarray, tmp_path: Path) -> None:
    save_parts(tmp_path / "v", names, vectors)
    np.testing.assert_allclose(opened(tmp_path / "v").read(0, ROWS, [""] * ROWS), unit(vectors), atol=1e-6)


def save_parts(folder: Path, names: list[str], vectors: np.ndarray) -> None:
    folder.mkdir()
    for name, part in zip(names, np.array_split(vectors, len(names)), strict=True):
        if name.endswith(".parquet"):
            write(folder / name, {"vector": part.tolist()})
        else:
            with open(folder / name, "wb") as file:
                np.save(file, part)


AMBIGUOUS = {
    "one number twice": (["p1.npy", "p01.npy"], "its order relative to .* is ambiguous"),
    "case alone": (["p1.npy", "P1.npy"], "its order relative to .* is ambiguous"),
    "one part as two kinds": (["p1.npy", "p1.parquet"], "its order relative to .* is ambiguous"),
    "upper-case suffix twice": (["p1.npy", "p1.NPY"], "its order relative to .* is ambiguous"),
    "a shard is missing": (["d-0-of-3.npy", "d-2-of-3.npy"], r"got 2 files, expected \[3\] from their names"),
    "two sets of shards": (["d-0-of-1.npy", "e-0-of-2.npy", "e-1-of-2.npy"], r"got 3 files, expected \[1, 2\]"),
}


@pytest.mark.parametrize(("names", "message"), AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_an_ambiguous_order_is_rejected(names: list[str], message: str, vectors: np.ndarray, tmp_path: Path) -> None:
    save_parts(tmp_path / "v", names, vectors)
    with pytest.raises(JasperError, match=message):
        opened(tmp_path / "v")


def test_anomalies_of_a_folder_are_reported(vectors: np.ndarray, texts: Dataset, tmp_path: Path) -> None:
    folder = tmp_path / "v"
    save_parts(folder, ["p0.npy", "p1.npy", "p3.npy"], vectors)
    (folder / "old").mkdir()
    np.save(folder / "old" / "p2.npy", vectors)
    (folder / "._p0.npy").write_bytes(b"of macOS")
    odd = "p0.npy, p1.npy, p3.npy; their numbers have a gap; subfolders are not read: old"
    assert opened(folder).match(texts, DATA).endswith(odd)
    with pytest.raises(JasperError, match=f"40 embeddings for 41 training texts .*{odd}"):
        opened(folder, 41)
    linked = tmp_path / "linked"
    linked.symlink_to(folder)
    np.testing.assert_allclose(opened(linked).read(0, ROWS, [""] * ROWS), unit(vectors), atol=1e-6)
    (folder / "p4.npy").symlink_to(tmp_path / "absent.npy")
    with pytest.raises(JasperError, match="broken link"):
        opened(folder)
    for file in folder.glob("p*"):
        file.unlink()
    with pytest.raises(JasperError, match="no teacher embeddings here .*subfolders are not read: old"):
        describe_precomputed(TeacherConfig(vectors=str(folder)))


# rows with keys

SHUFFLED = np.random.default_rng(2).permutation(ROWS).tolist()


def keyed(texts: Dataset, vectors: np.ndarray, *keys: str, order: list[int] = SHUFFLED) -> dict[str, list[Any]]:
    rows = texts[order]
    return {**{key: rows[key] for key in keys}, "embedding": vectors[order].tolist()}


MATCHED: dict[str, tuple[str, Callable[[Dataset, np.ndarray], dict[str, list[Any]]]]] = {
    "digest": ("v.parquet", lambda t, v: keyed(t, v, "digest")),
    "text": ("v.parquet", lambda t, v: keyed(t, v, "text")),
    "text and role": ("v.parquet", lambda t, v: keyed(t, v, "role", "text")),
    "as written by --texts": ("v.parquet", lambda t, v: keyed(t, v, "text", "role", "digest")),
    "JSONL with texts": ("v.jsonl", lambda t, v: keyed(t, v, "text")),
    "JSONL with digests": ("v.jsonl", lambda t, v: keyed(t, v, "digest")),
    "compressed JSONL": ("v.jsonl.gz", lambda t, v: keyed(t, v, "text", "role")),
    "upper-case digests": (
        "v.parquet",
        lambda t, v: keyed(t, v) | {"digest": [t["digest"][i].upper() for i in SHUFFLED]},
    ),
    "more rows than texts": (
        "v.jsonl",
        lambda t, v: {
            "text": ["another text", *t["text"], "", "one more"],
            "vector": [[1.0] * WIDTH, *v.tolist(), [2.0] * WIDTH, [3.0] * WIDTH],
        },
    ),
    "white space at the ends": (
        "v.parquet",
        lambda t, v: {"text": [f" {text}\n" for text in t["text"]], "vector": v.tolist()},
    ),
    "the exact text first": (
        "v.jsonl",
        lambda t, v: {
            "text": [*(f"{text} " for text in t["text"]), *t["text"]],
            "vector": [[1.0] * WIDTH] * ROWS + v.tolist(),
        },
    ),
    "a text twice with one vector": (
        "v.parquet",
        lambda t, v: {"text": [*t["text"], t["text"][5]], "vector": [*v.tolist(), (2 * v[5]).tolist()]},
    ),
    "other lists of numbers": (
        "v.parquet",
        lambda t, v: keyed(t, v, "text") | {"tokens": [[1, 2]] * ROWS, "scores": [[0.5]] * ROWS},
    ),
}


@pytest.mark.parametrize(("name", "columns"), MATCHED.values(), ids=MATCHED)
def test_rows_are_matched_in_any_order(
    name: str, columns: Callable[..., Any], texts: Dataset, vectors: np.ndarray, tmp_path: Path
) -> None:
    path = write(tmp_path / name, columns(texts, vectors))
    np.testing.assert_allclose(read(path, texts), unit(vectors), atol=1e-6)


def test_a_folder_of_files_with_texts_needs_no_order(texts: Dataset, vectors: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    write(tmp_path / "v" / "b.jsonl", keyed(texts, vectors, "text", order=SHUFFLED[:15]))
    write(tmp_path / "v" / "B.parquet", keyed(texts, vectors, "digest", order=SHUFFLED[15:]))
    np.testing.assert_allclose(read(tmp_path / "v", texts), unit(vectors), atol=1e-6)


def test_a_text_in_two_roles_has_two_vectors(vectors: np.ndarray, tmp_path: Path) -> None:
    both = dataset(["a map"] * 2, ["query", "document"])
    columns = {"text": ["a map", "a map"], "role": ["document", "query"], "vector": vectors[:2].tolist()}
    found = read(write(tmp_path / "v.parquet", columns), both)
    np.testing.assert_allclose(found, unit(vectors[[1, 0]]), atol=1e-6)
    del columns["role"]
    with pytest.raises(JasperError, match="row 0 and v.parquet row 1 have the same text .* by a column `role`"):
        opened(write(tmp_path / "v.parquet", columns), 2)
    columns["vector"][1] = columns["vector"][0]
    np.testing.assert_allclose(read(write(tmp_path / "v.parquet", columns), both), unit(vectors[[0, 0]]), atol=1e-6)


def changed(column: str, row: int, value: Any) -> Callable[..., dict[str, list[Any]]]:
    def columns(texts: Dataset, vectors: np.ndarray) -> dict[str, list[Any]]:
        table = keyed(texts, vectors, "text", "role", "digest", order=[*range(ROWS)])
        for other in {"digest", "text"} - {column} if column != "embedding" else ():
            del table[other]
        table[column] = [*table[column][:row], value, *table[column][row + 1 :]]
        return table

    return columns


REJECTED = {
    "no text": (changed("text", 3, None), r"v.\w+(: row 3|, line 4): unusable `text` \(got 'None', expected a text\)"),
    "no digest": (changed("digest", 3, None), "unusable `digest` .*Fix: give every row a `digest`"),
    "an empty digest": (changed("digest", 39, ""), "unusable `digest` .*expected one that `teach --texts` wrote"),
    "another kind of digest": (changed("digest", 0, "ab" * 20), "unusable `digest`"),
    "an unknown role": (
        lambda t, v: keyed(t, v, "text") | {"role": ["passage"] * ROWS},
        "unusable `role` .*expected 'document' or 'query'",
    ),
    "a missing text": (
        changed("text", 7, "another"),
        r"1 of 40 training texts have no embedding among 40 rows: '.*' \(d",
    ),
    "a missing digest": (changed("digest", 7, "ab" * 16), "1 of 40 training texts have no embedding"),
    "half of the texts": (
        lambda t, v: keyed(t, v, "text", order=SHUFFLED[:20]),
        r"20 of 40 training texts have no embedding among 20 rows: (.* \((query|document)\)(, |\. )){3}Fix: add",
    ),
    "another role": (
        lambda t, v: keyed(t, v, "text") | {"role": ["document"] * ROWS},
        "14 of 40 training texts .*At least 14 of them differ only in role",
    ),
    "another case": (
        lambda t, v: keyed(t, v) | {"text": [t["text"][i].upper() for i in SHUFFLED]},
        "40 of 40 .*At least 40 of them differ only in role, Unicode form, case or white space",
    ),
    "other white space": (
        lambda t, v: keyed(t, v) | {"text": [t["text"][i].replace(" ", "  ") for i in SHUFFLED]},
        "40 of 40 .*At least 40 of them differ only in",
    ),
    "two vectors of a text": (
        lambda t, v: {"text": [*t["text"], t["text"][5]], "vector": [*v.tolist(), v[6].tolist()]},
        "row 5 and .* row 40 have the same text and different embeddings",
    ),
    "no vector": (changed("embedding", 3, None), r"(row 3 is null|line 4: has no embedding)"),
    "a short vector": (changed("embedding", 3, [1.0]), r"another width than the first row \(got 1, expected 6\)"),
    "a vector that is not finite": (changed("embedding", 3, [float("nan")] * WIDTH), "row 3 is not finite"),
    "a zero vector": (changed("embedding", 3, [0.0] * WIDTH), "row 3 is zero"),
}


@pytest.mark.parametrize("name", ["v.parquet", "v.jsonl"])
@pytest.mark.parametrize(("columns", "message"), REJECTED.values(), ids=REJECTED)
def test_rows_that_cannot_be_matched_are_rejected(
    name: str, columns: Callable[..., Any], message: str, texts: Dataset, vectors: np.ndarray, tmp_path: Path
) -> None:
    path = write(tmp_path / name, columns(texts, vectors))
    with pytest.raises(JasperError, match=message):
        read(path, texts)


def test_texts_in_another_unicode_form_are_named(vectors: np.ndarray, tmp_path: Path) -> None:
    path = write(tmp_path / "v.jsonl", {"text": ["cafe\u0301 \u2014 ouvert"], "vector": vectors[:1].tolist()})
    with pytest.raises(JasperError, match="At least 1 of them differ only in role, Unicode form"):
        read(path, dataset(["caf\u00e9 \u2014 ouvert"], ["document"]))


def test_columns_of_one_name_are_rejected(vectors: np.ndarray, tmp_path: Path) -> None:
    columns = [pa.array(vectors.tolist()), pa.array(["a"] * ROWS), pa.array(["b"] * ROWS)]
    pq.write_table(pa.Table.from_arrays(columns, names=["vector", "text", "text"]), tmp_path / "v.parquet")
    with pytest.raises(JasperError, match="two columns have the same name"):
        opened(tmp_path / "v.parquet")


def test_lists_of_other_lengths_that_add_up_are_rejected(vectors: np.ndarray, tmp_path: Path) -> None:
    rows = vectors.tolist()
    rows[3], rows[4] = rows[3] + [1.0], rows[4][:-1]
    with pytest.raises(JasperError, match=r"row 3: another width than the first row \(got 7, expected 6\)"):
        opened(write(tmp_path / "v.parquet", {"vector": rows}))


def test_files_with_and_without_texts_are_not_mixed(texts: Dataset, vectors: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    np.save(tmp_path / "v" / "a.npy", vectors[:20])
    write(tmp_path / "v" / "b.parquet", keyed(texts, vectors, "text", order=[*range(20, 40)]))
    with pytest.raises(JasperError, match="a.npy has no column `digest` or `text`, and b.parquet has one"):
        opened(tmp_path / "v")


def test_teachers_in_different_orders_are_matched_one_by_one(
    texts: Dataset, vectors: np.ndarray, tmp_path: Path
) -> None:
    write(tmp_path / "one.parquet", keyed(texts, vectors, "text"))
    write(tmp_path / "two.jsonl", keyed(texts, vectors[:, :4], "digest", order=SHUFFLED[::-1]))
    tree = run_of(tmp_path, [{"vectors": str(tmp_path / name)} for name in ("one.parquet", "two.jsonl")])
    found = ensure_teachers(load_config(tree), texts, progress=False).read(np.arange(ROWS)).numpy() * 2**0.5
    np.testing.assert_allclose(found, np.hstack([unit(vectors), unit(vectors[:, :4])]), atol=1e-3)


def run_of(folder: Path, teachers: list[dict[str, Any]], **student: Any) -> dict[str, Any]:
    stage = {"name": "s", "train": ["*"], "heads": [8], "batch_size": 4, "steps": 2, "lr": 0.1}
    return {
        "name": "tiny",
        "student": {"model": "unused", "heads": [8], "max_length": 32} | student,
        "teachers": teachers,
        "data": {
            "held_out": 0,
            "sources": [{"path": str(folder / "texts.txt")}],
            "cache": str(folder / "cache"),
            "cut_share": 0.0,
            "shuffle_share": 0.0,
        },
        "stages": [stage | {"weights": {"cosine": 0}}],
    }


# arrays of other forms

ARRAYS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "float16": lambda v: v.astype(np.float16),
    "float64": lambda v: v.astype(np.float64),
    "big-endian": lambda v: v.astype(">f4"),
    "Fortran order": np.asfortranarray,
    "not normalised": lambda v: v * 1000,
    "whole numbers": lambda v: np.rint(v * 1000),
    "negative scale of float16": lambda v: (v * 1e-3).astype(np.float16),
}


@pytest.mark.parametrize("form", ARRAYS.values(), ids=ARRAYS)
def test_float_arrays_of_any_form_are_read(form: Callable[..., Any], vectors: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", form(vectors))
    read = opened(tmp_path / "v.npy").read(0, ROWS, [""] * ROWS)
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, unit(vectors), atol=3e-3)


def pickled(file: Path) -> None:
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)


def archive(file: Path) -> None:
    with open(file, "wb") as out:
        np.savez(out, np.zeros((ROWS, WIDTH)))


def cut_short(file: Path) -> None:
    np.save(file, np.ones((ROWS, WIDTH)))
    os.truncate(file, 500)


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "integers": (lambda f: np.save(f, np.ones((ROWS, WIDTH), np.int8)), r"got int8 \(40, 6\), expected floats"),
    "booleans": (lambda f: np.save(f, np.ones((ROWS, WIDTH), bool)), "got bool"),
    "complex numbers": (lambda f: np.save(f, np.ones((ROWS, WIDTH), complex)), "got complex128"),
    "one dimension": (lambda f: np.save(f, np.ones(WIDTH)), r"got float64 \(6,\)"),
    "three dimensions": (lambda f: np.save(f, np.ones((ROWS, 1, WIDTH))), r"\(40, 1, 6\)"),
    "structured": (lambda f: np.save(f, np.ones(ROWS, [("a", "f4")])), "unusable array"),
    "objects": (pickled, "not a readable .npy file"),
    "an archive": (archive, "holds an .npz archive"),
    "an empty file": (lambda f: f.touch(), "not a readable .npy file"),
    "a file cut short": (cut_short, "not a readable .npy file"),
    "text": (lambda f: f.write_text("[[1, 2]]"), "not a readable .npy file"),
    "no rows": (lambda f: np.save(f, np.ones((0, WIDTH))), r"got float64 \(0, 6\)"),
    "no coordinates": (lambda f: np.save(f, np.ones((ROWS, 0))), r"got float64 \(40, 0\)"),
    "a folder": (lambda f: f.mkdir(), "no teacher embeddings here"),
}


@pytest.mark.parametrize(("make", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_unusable_arrays_are_rejected(make: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    make(tmp_path / "v.npy")
    with pytest.raises(JasperError, match=message):
        opened(tmp_path / "v.npy")


BAD_TABLES: dict[str, tuple[str, Any, str]] = {
    "integers": ("v.parquet", {"vector": [[1, 2]] * ROWS}, "expected one column of embeddings"),
    "two columns of lists": ("v.jsonl", {"a": [[1.0]], "b": [[2.0]]}, "got columns a, b"),
    "both names": ("v.parquet", {"vector": [[1.0]], "embedding": [[2.0]]}, "expected one column of embeddings"),
    "text as a vector": ("v.jsonl", {"embedding": ["AACAPw=="]}, "got columns embedding"),
    "no rows": ("v.parquet", {"vector": pa.array([], pa.list_(pa.float32()))}, "holds no embeddings"),
    "an empty JSONL": ("v.jsonl", {}, "holds no embeddings"),
    "a number without bounds": ("v.jsonl", {"vector": [[1.0], [10**400]]}, "line 2: has no embedding"),
    "booleans": ("v.jsonl", {"vector": [[True, False]]}, "expected one column of embeddings"),
    "half a vector": ("v.jsonl", {"vector": [[1.0, 2.0], [1.0, None]]}, "line 2: has no embedding"),
}


@pytest.mark.parametrize(("name", "columns", "message"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_unusable_tables_are_rejected(name: str, columns: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, columns) if columns else tmp_path / name
    path.touch()
    with pytest.raises(JasperError, match=message):
        opened(path)


# the order of rows without keys


@pytest.fixture(scope="module")
def mixed_texts(tiny_texts: list[str]) -> list[str]:
    """Shuffle the tiny texts like training texts. In their original order, neighbours are similar."""
    return [tiny_texts[row] for row in np.random.default_rng(5).permutation(len(tiny_texts))]


@pytest.fixture(scope="module")
def real(tiny_bert: Path, mixed_texts: list[str]) -> np.ndarray:
    """Embed the shuffled texts with a model, (200, 32)."""
    return load_teacher(TeacherConfig(model=str(tiny_bert)), precision="fp32").encode(mixed_texts)


def swapped(n: int, first: int, second: int, length: int) -> np.ndarray:
    order = np.arange(n)
    order[first : first + length], order[second : second + length] = (
        np.arange(second, second + length),
        np.arange(first, first + length),
    )
    return order


def scattered(n: int, fraction: float) -> np.ndarray:
    order, generator = np.arange(n), np.random.default_rng(3)
    some = generator.permutation(n)[: int(n * fraction)]
    order[some] = np.roll(some, 1)
    return order


WRONG_ORDERS = {
    "reversed": (np.arange(200)[::-1], "no better than in a random order"),
    "off by one": (np.roll(np.arange(200), 1), "no better than in a random order"),
    "shuffled": (np.random.default_rng(4).permutation(200), "no better than in a random order"),
    "neighbours swapped": (np.arange(200) ^ 1, "no better than in a random order"),
    "the second half reversed": (np.r_[0:100, 199:99:-1], "From v.npy row .* the embeddings do not fit"),
    "the first third shifted": (
        np.r_[np.roll(np.arange(66), 1), 66:200],
        "From v.npy row 0 .* the text 1 row before",
    ),
    "two blocks swapped": (swapped(200, 20, 120, 30), "From v.npy row .* do not fit"),
    "half of the rows": (scattered(200, 0.5), "of the embeddings do not fit"),
    "one row repeated, all others later": (
        np.r_[0:100, 99:199],
        "From v.npy row .* to v.npy row 199 each embedding fits the text 1 row before",
    ),
    "constant": (np.zeros(200, int), "all embeddings are equal"),
}


def genuine(texts: list[str]) -> Dataset:
    return dataset(texts, ["document"] * len(texts))


@pytest.mark.parametrize(("order", "message"), WRONG_ORDERS.values(), ids=WRONG_ORDERS)
def test_another_order_is_rejected(
    order: np.ndarray, message: str, real: np.ndarray, tiny_bert: Path, mixed_texts: list[str], tmp_path: Path
) -> None:
    np.save(tmp_path / "v.npy", real[order])
    config = load_config(run_of(tmp_path, [{"vectors": str(tmp_path / "v.npy")}], model=str(tiny_bert), layers=2))
    with pytest.raises(JasperError, match=message):
        ensure_teachers(config, genuine(mixed_texts), progress=False)
    assert not list((tmp_path / "cache").glob("teacher-*"))


def test_two_swapped_files_are_rejected(
    real: np.ndarray, tiny_bert: Path, mixed_texts: list[str], tmp_path: Path
) -> None:
    parts = np.split(real, 10)
    parts[2], parts[6] = parts[6], parts[2]
    save_parts(tmp_path / "v", [f"p{i}.npy" for i in range(10)], np.concatenate(parts))
    config = load_config(run_of(tmp_path, [{"vectors": str(tmp_path / "v")}], model=str(tiny_bert)))
    with pytest.raises(JasperError, match="row order. From p[26].npy row .* do not fit .*--texts texts.jsonl"):
        ensure_teachers(config, genuine(mixed_texts), progress=False)


STUDENTS = {"the teacher's own": "tiny_bert", "another random model": "tiny_qwen2", "one that is missing": None}


@pytest.mark.parametrize("fixture", STUDENTS.values(), ids=STUDENTS)
@pytest.mark.parametrize("rows", [200, 60, 30])
def test_the_right_order_is_accepted_with_any_student(
    fixture: str | None, rows: int, real: np.ndarray, mixed_texts: list[str], tmp_path: Path, request
) -> None:
    chosen = np.random.default_rng(6).permutation(200)[:rows]
    np.save(tmp_path / "v.npy", real[chosen])
    model = "unused" if fixture is None else str(request.getfixturevalue(fixture))
    config = load_config(run_of(tmp_path, [{"vectors": str(tmp_path / "v.npy")}], model=model))
    found = ensure_teachers(config, genuine([mixed_texts[row] for row in chosen]), progress=False)
    np.testing.assert_allclose(found.read(np.arange(rows)).numpy(), real[chosen], atol=1e-3)


def test_keys_override_the_check_of_the_order(vectors: np.ndarray, texts: Dataset, tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", vectors)  # unrelated to the texts
    write(tmp_path / "v.parquet", keyed(texts, vectors, "text"))
    for name, rejected in (("v.npy", True), ("v.parquet", False)):
        config = load_config(run_of(tmp_path, [{"vectors": str(tmp_path / name)}]))
        if rejected:
            with pytest.raises(
                JasperError,
                match="row order.*Fix: save the embeddings as .jsonl or .parquet with a column `digest` or",
            ):
                ensure_teachers(config, texts, progress=False)
        else:
            assert len(ensure_teachers(config, texts, progress=False)) == ROWS


# Texts of which neighbours are similar, as sections of a document are.

LINES = {
    "shifted": (lambda n: np.roll(np.arange(n), 1), "each embedding fits the text 1 row before better than its own"),
    "shifted up by two": (lambda n: np.roll(np.arange(n), -2), "each embedding fits the text 2 rows after better"),
    "reversed": (lambda n: np.arange(n)[::-1], "each embedding fits the text at the same distance from the other end"),
    "the second half shifted": (
        lambda n: np.r_[0 : n // 2, np.roll(np.arange(n // 2, n), 1)],
        "From v.npy row [1-9].* each embedding fits the text 1 row before better",
    ),
}


@pytest.fixture(scope="module")
def winding() -> tuple[np.ndarray, np.ndarray]:
    """Draw walks, in which neighbouring rows are similar: states of texts and embeddings of a teacher, (270, 8)."""
    generator = np.random.default_rng(8)
    steps = generator.standard_normal((270, 8))
    walk = np.array([sum(0.8**back * steps[row - back] for back in range(min(row, 12) + 1)) for row in range(270)])
    return walk, walk + 0.7 * generator.standard_normal(walk.shape)


ORDERS = {  # name: rows, order, message; a shifted half of 60 rows looks like noise
    f"{name}-{n}": (n, order, message)
    for n in (60, 270)
    for name, (order, message) in {"right": (np.arange, None), **LINES}.items()
    if n > 60 or not (message or "").startswith("From")
}


@pytest.mark.parametrize(("n", "order", "message"), ORDERS.values(), ids=ORDERS)
def test_an_order_that_fits_worse_than_another_is_rejected(
    n: int, order: Callable[[int], np.ndarray], message: str | None, winding, tmp_path: Path
) -> None:
    states, vectors = (part[:n] for part in winding)
    np.save(tmp_path / "v.npy", vectors[order(n)])
    ready = PrecomputedEmbeddings(TeacherConfig(vectors=str(tmp_path / "v.npy")), n)
    texts = dataset([f"text {i}" for i in range(n)], ["document"] * n)

    def check() -> str:
        return ready.check_order(texts, lambda texts, roles: [centred_similarities(states)])

    if message is None:
        assert "their order fits the texts" in check()
        return
    with pytest.raises(JasperError, match=message) as error:
        check()
    given, found = (float(re.search(rf"([-0-9.]+) in {which}", str(error.value))[1]) for which in ("the given", "that"))
    assert found > given + 0.1


def test_orders_that_are_compared_are_those_of_the_file() -> None:
    values = np.arange(20.0)[:, None] ** [0, 1, 2]
    names, found = [], []
    for name, texts, similarities, _ in other_orders(np.array([0, 9, 19]), 20, lambda rows: values[rows]):
        names.append(name)
        found.append(texts.tolist())
        assert similarities.shape == (len(texts), len(texts))
    assert found == [[0, 1], [1, 2], [0, 1], [1, 2], [0, 1], [1, 2], [0, 1, 2]]
    assert names[2:4] == ["the text 2 rows before", "the text 2 rows after"]


@pytest.mark.parametrize("n", [30, 100, 300])
def test_unrelated_embeddings_are_rarely_accepted(n: int, mixed_texts: list[str]) -> None:
    texts = [f"{text} {number}" for number, text in enumerate(mixed_texts * 2)][:n]
    reference = [lexical_similarities(texts)]
    generator = np.random.default_rng(7)
    fits = [fit_of_order(centred_similarities(generator.standard_normal((n, 16))), reference) for _ in range(12)]
    assert sum(fit.is_significant for fit in fits) <= 1


# the dry run and the command


def bad_run(folder: Path, name: str, order: np.ndarray, real: np.ndarray, texts: list[str]) -> dict[str, Any]:
    """Write faulty embeddings of one kind, and return the changes of the configuration that use them."""
    good = real[order]
    teacher: dict[str, Any] = {"vectors": str(folder / "v.npy")}
    change: dict[str, Any] = {"teachers": [teacher]}
    if name == "width":
        change["weights"] = {"cosine": 1}
    elif name == "rows":
        good = good[:-1]
    elif name == "order":
        good = good[::-1]
    elif name in ("not finite", "zero"):
        good[50] = np.nan if name == "not finite" else 0
    elif name == "truncate_dim":
        teacher["truncate_dim"] = 33
    elif name in ("texts", "digests"):
        teacher["vectors"] = str(folder / "v.jsonl")
        texts = [text if row else "another" for row, text in enumerate(texts)]
        keys = {"text": texts} if name == "texts" else {"digest": [text_digest(text) for text in texts]}
        write(folder / "v.jsonl", {**keys, "embedding": good.tolist()})
    np.save(folder / "v.npy", good)
    return change


REFUSED = {
    "width": "40 wide and the teachers' embeddings 32",
    "rows": "199 embeddings for 200 training texts",
    "order": "row order",
    "not finite": "row 50 is not finite",
    "zero": "row 50 is zero",
    "truncate_dim": r"truncate_dim exceeds the width of the embeddings \(got 33, expected at most 32\)",
    "texts": "1 of 200 training texts have no embedding",
    "digests": "1 of 200 training texts have no embedding",
}


@pytest.mark.parametrize(("name", "message"), REFUSED.items(), ids=REFUSED)
def test_the_dry_run_rejects_the_same_embeddings_as_training(
    name: str, message: str, real: np.ndarray, tiny_bert: Path, mixed_texts: list[str], tmp_path: Path
) -> None:
    from jasper_fast.data.prepare import prepare_texts
    from jasper_fast.train import train
    from jasper_fast.training.dry_run import describe_plan

    (tmp_path / "texts.txt").write_text("\n".join(mixed_texts))
    tree = run_of(tmp_path, [{"model": str(tiny_bert)}], model=str(tiny_bert))
    in_order = prepare_texts(load_config(tree)).texts["text"][:]
    order = np.array([mixed_texts.index(text) for text in in_order])
    change = bad_run(tmp_path, name, order, real, in_order)
    tree["teachers"] = change["teachers"]
    tree["stages"][0]["weights"] = change.get("weights", tree["stages"][0]["weights"])
    if name == "width":
        tree["student"]["heads"] = tree["stages"][0]["heads"] = [40]
    config = load_config(tree)
    for refuse in (lambda: describe_plan(config, tmp_path / "run"), lambda: train(config, out=tmp_path / "run")):
        with pytest.raises(JasperError, match=message):
            refuse()
    assert not list((tmp_path / "cache").glob("teacher-*"))


def test_the_dry_run_checks_the_widths_of_models(
    real: np.ndarray, tiny_bert: Path, mixed_texts: list[str], tmp_path: Path
) -> None:
    from jasper_fast.models.student import Student
    from jasper_fast.teachers.label import check_targets

    np.save(tmp_path / "v.npy", real)
    tree = run_of(tmp_path, [{"model": str(tiny_bert)}, {"vectors": str(tmp_path / "v.npy")}], model=str(tiny_bert))
    tree["stages"][0] |= {"weights": {"cosine": 1}, "heads": [72]}
    tree["student"]["heads"] = [72]
    config, texts = load_config(tree), genuine(mixed_texts)
    student = Student.build(config.student)
    message = r"72 wide and the teachers' embeddings 32 \+ 32 = 64"
    with pytest.raises(JasperError, match=message):
        check_targets(config, texts, student)
    tree["stages"][0]["weights"] = {"cosine": 0}
    ensure_teachers(load_config(tree), texts, progress=False)
    with pytest.raises(JasperError, match=message):  # the width comes from the cache
        check_targets(config, texts, student)
    assert student.device == torch.device("cpu")
