"""Precomputed embeddings matched by id or by the order of the sources, contradictory keys, and held-out labels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jasper_fast.config.load import load_config
from jasper_fast.config.models import TeacherConfig
from jasper_fast.data.prepare import prepare_texts
from jasper_fast.data.text import text_digest
from jasper_fast.teachers.label import ensure_teachers, label_dataset
from jasper_fast.teachers.model import load_teacher
from jasper_fast.utils.errors import JasperError

pytest.importorskip("datasets")

from datasets import Dataset  # noqa: E402

ROWS = 200
KEEP = np.arange(ROWS)
OTHER = np.random.default_rng(1).permutation(ROWS)


@pytest.fixture(scope="module")
def documents(tiny_texts: list[str]) -> list[str]:
    """Choose documents in an order in which neighbours are not similar."""
    return [tiny_texts[row] for row in np.random.default_rng(5).permutation(len(tiny_texts))]


@pytest.fixture(scope="module")
def vectors(tiny_bert: Path, documents: list[str]) -> np.ndarray:
    """Embed the documents with a model, (200, 32), in file order."""
    return load_teacher(TeacherConfig(model=str(tiny_bert)), precision="fp32").encode(documents)


@pytest.fixture
def run(tiny_bert: Path, documents: list[str], tmp_path: Path) -> Callable[..., Any]:
    """Write the source, and return a function that gives the configuration of a teacher's file."""
    rows = [{"id": number, "name": f"doc-{number}", "text": f" {text}"} for number, text in enumerate(documents)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def config(name: str, id_column: str | None = None, **teacher: Any) -> Any:
        return load_config(
            {
                "name": "keys",
                "student": {"model": str(tiny_bert), "layers": 1, "heads": [32]},
                "teachers": [{"vectors": str(tmp_path / name), **teacher}],
                "data": {
                    "sources": [{"path": str(tmp_path / "docs.jsonl"), "id_column": id_column}],
                    "cache": str(tmp_path / "cache"),
                    "held_out": 0,
                },
                "stages": [
                    {"name": "s", "train": ["heads.*"], "heads": [32], "batch_size": 8, "lr": 0.001, "steps": 1}
                ],
            }
        )

    return config


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def assert_matched(config: Any, documents: list[str], vectors: np.ndarray) -> None:
    """Check that every training text has the embedding of its document."""
    texts = prepare_texts(config).texts
    assert len(texts) == ROWS
    rows = [documents.index(text) for text in texts["text"]]
    found = ensure_teachers(config, texts, progress=False).read(np.arange(ROWS)).numpy()
    np.testing.assert_allclose(found, vectors[rows], atol=1e-3)


IDS: dict[str, tuple[str, Callable[[int], Any]]] = {
    "whole numbers": ("id", int),
    "whole numbers as text": ("id", str),
    "names": ("name", lambda number: f"doc-{number}"),
}


@pytest.mark.parametrize(("column", "id_of"), IDS.values(), ids=IDS)
def test_rows_are_matched_by_id(column: str, id_of, run, documents, vectors, tmp_path: Path) -> None:
    rows = [{"id": id_of(int(row)), "embedding": vectors[row].tolist()} for row in OTHER]
    write(tmp_path / "v.jsonl", [{"id": "unknown", "embedding": [1.0] * 32}, *rows])
    assert_matched(run("v.jsonl", column), documents, vectors)


def test_a_text_goes_before_an_id(run, documents, vectors, tmp_path: Path) -> None:
    rows = [{"id": 0, "text": documents[row], "values": vectors[row].tolist()} for row in OTHER]
    write(tmp_path / "v.jsonl", rows)
    assert_matched(run("v.jsonl", "id"), documents, vectors)


BAD_IDS: dict[str, tuple[Callable[[int], Any], str]] = {
    "unknown ids": (lambda row: f"x{row}", "no row has an id of the documents .*such as 'x199'.*such as '0'"),
    "one missing": (lambda row: row or "none", "1 of 200 training texts have no embedding.*--missing missing.jsonl"),
    "an id twice": (lambda row: max(row, 1), "have the same text and different embeddings"),
    "a fraction": (lambda row: row + 0.5, "unusable id .got float"),
    "null": (lambda row: row or None, "unusable id .got NoneType"),
}


@pytest.mark.parametrize(("id_of", "message"), BAD_IDS.values(), ids=BAD_IDS)
def test_unusable_ids_are_rejected(id_of, message: str, run, vectors, tmp_path: Path) -> None:
    write(tmp_path / "v.jsonl", [{"id": id_of(row), "embedding": vectors[row].tolist()} for row in range(ROWS)])
    config = run("v.jsonl", "id")
    with pytest.raises(JasperError, match=message):
        ensure_teachers(config, prepare_texts(config).texts, progress=False)


def test_sources_without_usable_ids_are_rejected(run, vectors, tmp_path: Path) -> None:
    write(tmp_path / "v.jsonl", [{"id": row, "embedding": vectors[row].tolist()} for row in range(ROWS)])
    for change, message in (
        ({"id_column": "nope"}, "no column 'nope' for the ids"),
        ({"id_column": "id", "columns": ["text", "name"], "join": False}, "one id has several texts.*join: true"),
    ):
        config = run("v.jsonl")
        tree = config.model_dump(mode="json")
        tree["data"]["sources"][0] |= change
        config = load_config(tree)
        with pytest.raises(JasperError, match=message):
            ensure_teachers(config, prepare_texts(config).texts, progress=False)


CONTRADICTIONS = {"digest of another text": 1, "digest of the text": 0}


@pytest.mark.parametrize("shift", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_digest_and_a_text_may_not_contradict_each_other(shift, run, documents, vectors, tmp_path: Path) -> None:
    digests = np.roll([text_digest(text) for text in documents], shift)
    rows = [
        {"text": text, "digest": str(digest), "embedding": vector.tolist()}
        for text, digest, vector in zip(documents, digests, vectors, strict=True)
    ]
    write(tmp_path / "v.jsonl", rows)
    config = run("v.jsonl")
    if not shift:
        assert_matched(config, documents, vectors)
        return
    with pytest.raises(JasperError, match="line 1: `digest` and `text` contradict each other"):
        ensure_teachers(config, prepare_texts(config).texts, progress=False)


# the order of the sources

FILE_ORDERS = {
    "file order": (KEEP, None),
    "reversed": (KEEP[::-1], "no better than in a random order"),
    "off by one": (np.roll(KEEP, 1), "no better than in a random order"),
    "shuffled": (OTHER, "no better than in a random order"),
    "a row missing": (KEEP[:-1], "199 embeddings for 200 documents"),
    "a row too many": (np.r_[KEEP, 0], "201 embeddings for 200 documents"),
}


@pytest.mark.parametrize(("order", "message"), FILE_ORDERS.values(), ids=FILE_ORDERS)
def test_the_order_of_the_sources(order, message, run, documents, vectors, tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", vectors[order].astype(np.float16))
    config = run("v.npy", order="source")
    if message is None:
        assert_matched(config, documents, vectors)
        return
    with pytest.raises(JasperError, match=message):
        ensure_teachers(config, prepare_texts(config).texts, progress=False)


def test_a_file_in_the_order_of_the_sources_is_told_the_field(run, vectors, tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", vectors)
    config = run("v.npy")
    with pytest.raises(JasperError, match="no better than in a random order.*Or set order: source, if row i belongs"):
        ensure_teachers(config, prepare_texts(config).texts, progress=False)


def test_the_order_of_texts_overrides_the_check_with_a_warning(run, vectors, tmp_path: Path, capsys) -> None:
    np.save(tmp_path / "v.npy", vectors)
    config = run("v.npy", order="texts")
    found = ensure_teachers(config, prepare_texts(config).texts).read(KEEP).numpy()
    np.testing.assert_allclose(found, vectors, atol=1e-3)
    assert "WARNING: row order? The embeddings fit the training texts no better" in capsys.readouterr().err


def test_few_rows_need_a_key_or_an_order(run, documents, vectors, tmp_path: Path, capsys) -> None:
    np.save(tmp_path / "v.npy", vectors[:5])
    few = Dataset.from_dict(
        {"text": documents[:5], "role": ["document"] * 5, "digest": [text_digest(text) for text in documents[:5]]}
    )
    with pytest.raises(JasperError, match=r"cannot be checked \(got 5 rows, expected at least 8\).*order: texts"):
        ensure_teachers(run("v.npy"), few, progress=False)
    assert len(ensure_teachers(run("v.npy", order="texts"), few)) == 5
    assert "WARNING: the order of 5 rows cannot be checked" in capsys.readouterr().err


def test_an_order_beside_keys_is_rejected(run, documents, vectors, tmp_path: Path) -> None:
    write(tmp_path / "v.jsonl", [{"text": documents[0], "embedding": vectors[0].tolist()}])
    config = run("v.jsonl", order="source")
    with pytest.raises(JasperError, match="which decides the order .got order: source.*leave `order` out"):
        ensure_teachers(config, prepare_texts(config).texts, progress=False)


# labels of other texts


def test_held_out_texts_are_labelled(run, documents, vectors, tiny_bert: Path, tmp_path: Path) -> None:
    write(
        tmp_path / "v.jsonl",
        [{"text": documents[row], "embedding": vectors[row].tolist()} for row in OTHER if row != 1],
    )
    tree = run("v.jsonl").model_dump(mode="json")
    tree["teachers"].append({"model": str(tiny_bert)})
    texts = [documents[0], documents[1], documents[2], "nobody has this text"]
    held_out = Dataset.from_dict(
        {"text": texts, "role": ["document"] * 4, "digest": [text_digest(text) for text in texts]}
    )
    labels = label_dataset(load_config(tree), held_out, progress=False)
    assert labels.rows.tolist() == [0, 2] and labels.missing == 2
    expected = np.hstack([vectors[[0, 2]]] * 2) / 2**0.5
    np.testing.assert_allclose(labels.embeddings.numpy(), expected, atol=2e-3)
    empty = label_dataset(load_config(tree), held_out.select([]), progress=False)
    assert len(empty.rows) == 0 and empty.missing == 0
    np.save(tmp_path / "v.npy", vectors)
    assert label_dataset(run("v.npy"), held_out, progress=False).missing == 4


# the configuration


@pytest.mark.parametrize("given", [{}, {"cut_share": 0.2}, {"cut_share": 0.2, "shuffle_share": 0.1}])
def test_precomputed_embeddings_turn_cutting_off(given: dict[str, float], run) -> None:
    tree = run("v.jsonl").model_dump(mode="json")
    data = {key: value for key, value in tree["data"].items() if not key.endswith("_share")}
    tree["data"] = data | given
    found = load_config(tree).data
    assert (found.cut_share, found.shuffle_share) == (given.get("cut_share", 0.0), given.get("shuffle_share", 0.0))
    tree["teachers"] = [{"model": "any"}]
    found = load_config(tree).data
    assert (found.cut_share, found.shuffle_share) == (given.get("cut_share", 0.3), given.get("shuffle_share", 0.0008))


# the files of `teach`


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_teach_writes_the_texts_and_those_without_an_embedding(run, vectors, documents, tmp_path, capsys) -> None:
    from jasper_fast import teach
    from jasper_fast.config.load import dump_config

    (tmp_path / "run.yaml").write_text(dump_config(run("v.jsonl", "id")))
    command = ["--config", str(tmp_path / "run.yaml")]
    assert teach.main([*command, "--texts", str(tmp_path / "texts.jsonl")]) == 0  # v.jsonl does not exist yet
    printed = capsys.readouterr().out
    assert f"200 texts written to {tmp_path / 'texts.jsonl'}" in printed and f"save the rows as {tmp_path}" in printed
    rows = read_jsonl(tmp_path / "texts.jsonl")
    assert len(rows) == ROWS and all(documents[int(row["id"])] == row["text"] for row in rows)
    assert teach.main([*command, "--missing", str(tmp_path / "missing.jsonl")]) == 0
    assert read_jsonl(tmp_path / "missing.jsonl") == rows
    by_id = [{"id": row, "embedding": vectors[row].tolist()} for row in range(ROWS)]
    write(tmp_path / "v.jsonl", by_id[3:])
    assert teach.main([*command, "--missing", str(tmp_path / "missing.jsonl")]) == 0
    assert sorted(row["id"] for row in read_jsonl(tmp_path / "missing.jsonl")) == ["0", "1", "2"]
    assert f"(now {tmp_path / 'v.jsonl'})" in capsys.readouterr().out
    write(tmp_path / "v.jsonl", by_id)
    (tmp_path / "missing.jsonl").unlink()
    assert teach.main([*command, "--missing", str(tmp_path / "missing.jsonl")]) == 0
    assert "every training text has an embedding" in capsys.readouterr().out
    assert not (tmp_path / "missing.jsonl").exists()


def test_missing_texts_need_keys(run, vectors, tmp_path: Path) -> None:
    from jasper_fast.teachers.text_files import missing_texts

    np.save(tmp_path / "v.npy", vectors)
    config = run("v.npy")
    texts = prepare_texts(config).texts
    with pytest.raises(JasperError, match="have no column `digest`, `text` or `id`"):
        missing_texts(texts, config)
    tree = config.model_dump(mode="json") | {"teachers": [{"model": "any"}]}
    with pytest.raises(JasperError, match="no teacher has `vectors`"):
        missing_texts(texts, load_config(tree))


# teachers wider than the student


@pytest.mark.parametrize("head_init", ["random", "identity"])
def test_a_wider_teacher_is_reduced_to_the_widest_head(head_init, run, documents, vectors, tmp_path, capsys) -> None:
    basis = np.linalg.qr(np.random.default_rng(2).standard_normal((128, 32)))[0]
    write(
        tmp_path / "v.jsonl",
        [{"text": documents[row], "embedding": (basis @ vectors[row]).tolist()} for row in range(ROWS)],
    )
    tree = run("v.jsonl").model_dump(mode="json")
    tree["student"] |= {"head_init": head_init, "layers": None, "max_length": 64}
    config = load_config(tree)
    texts = prepare_texts(config).texts
    labels = ensure_teachers(config, texts)
    assert labels.width == 32 and labels.widths == [128]
    assert "128 dimensions are reduced to 32 by PCA; that keeps 100.0% of the variance" in capsys.readouterr().err
    own = vectors[[documents.index(text) for text in texts["text"]]]
    assert labels.read_full(KEEP).shape == (len(KEEP), 128)
    reduced = labels.read(KEEP).numpy()
    np.testing.assert_allclose(reduced @ reduced.T, own @ own.T, atol=5e-3)
    closeness = float((reduced * own).sum(axis=1).mean())
    assert (
        closeness > 0.99 if head_init == "identity" else closeness < 0.9
    )  # the student's own space, if it starts there
    again = ensure_teachers(config, texts, progress=False)
    assert again.fingerprint == labels.fingerprint
    np.testing.assert_array_equal(again.read(KEEP).numpy(), reduced)
