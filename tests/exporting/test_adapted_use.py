"""Adapted models in evaluation, search and mteb, and as DIR with both forms. Their cards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jasper_fast.config.models import StudentConfig
from jasper_fast.evaluate import main as evaluate
from jasper_fast.export import main as export
from jasper_fast.exporting.adapted import export_symmetric
from jasper_fast.models.embedder import flat_model, load_model, model_encoder, routes
from jasper_fast.models.folder import load_student
from jasper_fast.models.hub import adapted_form, resolve_model, routes_by_role
from jasper_fast.models.sentence_transformer import roles_differ
from jasper_fast.models.student import Student
from jasper_fast.reporting.model_card import UNKNOWN_LICENCE, adapted_facts, front_matter
from jasper_fast.search import main as search
from jasper_fast.text_index import TextIndex
from jasper_fast.utils.errors import JasperError
from tests.exporting.test_export import python_blocks
from tests.helpers.adapted import TEXTS, D, source, unit

FORMS = ["symmetric", "asymmetric"]


def expected(adapted: Any, form: str, role: str, width: int, texts: list[str] = TEXTS) -> np.ndarray:
    if form == "symmetric" or role == "query":
        return unit(source(adapted.student, role, 12, texts) @ adapted.heads[width])
    return unit(source(adapted.teacher, role, texts=texts) @ adapted.projections[width])


@pytest.mark.parametrize("form", FORMS)
def test_encoders_give_each_role_its_embeddings(form: str, adapted: Any) -> None:
    model = load_model(str(adapted.folder / form), device="cpu")
    assert roles_differ(model) == routes_by_role(str(adapted.folder / form)) == (form == "asymmetric")
    assert sorted(routes(model)[1]) == [8, D]
    encode, flat = model_encoder(model), flat_model(model, 8)
    for role in ("query", "document"):
        found = encode(TEXTS, role)
        assert list(found) == [D, 8]
        for width, vectors in found.items():
            np.testing.assert_allclose(vectors, expected(adapted, form, role, width), atol=1e-5)
        narrow = (flat.encode_query if role == "query" else flat.encode_document)(TEXTS)
        np.testing.assert_allclose(narrow, found[8], atol=1e-6)
    for build in (lambda: model_encoder(model, [16]), lambda: flat_model(model, 16)):
        with pytest.raises(JasperError, match=r"width 16 .expected one of 8, 32"):
            build()


def test_max_length_is_that_of_documents(adapted: Any) -> None:
    model = load_model(str(adapted.folder / "asymmetric"), 6, device="cpu")
    encode = model_encoder(model, [D])
    np.testing.assert_allclose(encode(TEXTS, "query")[D], expected(adapted, "asymmetric", "query", D), atol=1e-5)
    np.testing.assert_allclose(encode(TEXTS, "document")[D], source(adapted.teacher, "document", 6), atol=1e-5)
    for form in FORMS:
        with pytest.raises(JasperError, match="max length 100 is beyond the model's 64 positions"):
            load_model(str(adapted.folder / form), 100, device="cpu")


def test_search(adapted: Any, tiny_texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder with both forms is indexed in its asymmetric form, and questions are encoded as queries."""
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(tiny_texts[:30]) + "\n" + "a bridge near the river " * 20 + "\n")
    index = tmp_path / "index"
    documents = [*tiny_texts[:30], ("a bridge near the river " * 20).strip()]
    resolve_model.__globals__["_report_form"].cache_clear()
    arguments = ["--width", "8", "--max-length", "30", "--out", str(index)]
    assert search(["build", str(adapted.folder), str(file), *arguments]) == 0
    printed = capsys.readouterr().err
    assert printed.count("using the form whose student encodes questions and whose teacher encodes documents") == 1
    assert f"For the other form, give {adapted.folder / 'symmetric'}" in printed
    assert "longer than 30 tokens" in printed  # counted by the teacher's tokenizer and length
    (tmp_path / "more.txt").write_text("\n".join(tiny_texts[30:40]) + "\n")
    assert search(["add", str(index), str(tmp_path / "more.txt")]) == 0
    opened = TextIndex(index)
    assert opened.role == "query" and len(opened) == 41
    stored = source(adapted.teacher, "document", 30, [*documents, *tiny_texts[30:40]]) @ adapted.projections[8]
    scores = expected(adapted, "asymmetric", "query", 8) @ unit(stored).T
    for row, hits in zip(scores, opened.ask(TEXTS, 5), strict=True):
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(row)[::-1][:5], atol=1e-5)
    assert json.loads((index / "search.json").read_text())["model"] == str(adapted.folder / "asymmetric")
    with pytest.raises(JasperError, match="not the model"):
        TextIndex(index, str(adapted.folder / "symmetric"))


def test_a_folder_with_one_form(adapted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(adapted.folder / "symmetric", tmp_path / "symmetric")
    assert resolve_model(str(tmp_path)) == resolve_model(str(tmp_path)) == str(tmp_path / "symmetric")
    printed = capsys.readouterr().err
    assert printed.count("(symmetric). It is the only form there") == 1
    assert adapted_form(tmp_path / "symmetric") is None and adapted_form(tmp_path / "absent") is None


def test_evaluate(adapted: Any, tiny_texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [f"{i % 5}.0\t{tiny_texts[i]}\t{tiny_texts[99 - i]}" for i in range(20)]
    (tmp_path / "pairs.tsv").write_text("score\tsentence1\tsentence2\n" + "\n".join(pairs) + "\n")
    given = [str(adapted.folder), str(tmp_path / "pairs.tsv"), "--teacher", str(adapted.folder / "asymmetric")]
    assert evaluate([*given, "--json", str(tmp_path / "scores.json")]) == 0
    rows = json.loads((tmp_path / "scores.json").read_text())["rows"]
    assert [(row["model"], row["width"]) for row in rows] == [("teacher", D), ("student", D), ("student", 8)]
    assert rows[0]["scores"] == rows[1]["scores"]


def test_what_needs_one_encoder(adapted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export([str(adapted.folder), "--width", "8", "--out", str(tmp_path / "flat")]) == 0
    assert "using its form `symmetric`, because one encoder is needed" in capsys.readouterr().err
    for given in (adapted.folder / "asymmetric", tmp_path / "one"):
        if given.parent == tmp_path:
            shutil.copytree(adapted.folder / "asymmetric", given / "asymmetric")
        with pytest.raises(JasperError, match="two encoders, and this needs one. Fix: give the folder `symmetric`"):
            load_student(given)
    with pytest.raises(JasperError, match="holds several encoders.*such as the folder `symmetric`"):
        Student.build(StudentConfig(model=str(adapted.folder / "asymmetric")))


@pytest.mark.parametrize("form", FORMS)
def test_card_examples_run_in_the_folder(form: str, adapted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(adapted.folder / form)
    names: dict[str, Any] = {}
    for block in python_blocks(Path("README.md").read_text()):
        exec(block, names)
    query, document = "How do I reverse a list?", "list.reverse() reverses a list in place."
    np.testing.assert_allclose(names["queries"], expected(adapted, form, "query", 8, [query]), atol=1e-5)
    np.testing.assert_allclose(names["documents"], expected(adapted, form, "document", 8, [document]), atol=1e-5)
    assert names["scores"].shape == (1, 1)


def write_models(folder: Path, licences: dict[str, str]) -> dict[str, str]:
    for name, licence in licences.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    return {name: str(folder / name) for name in licences}


def test_the_card_says_what_was_adapted_on_what(adapted: Any, tmp_path: Path) -> None:
    models = write_models(tmp_path, {"student": "mit", "teacher": "apache-2.0"})
    rows = [
        {"model": "student", "form": "symmetric", "width": D, "overlap@10": 0.61, "nDCG@10": 0.7},
        {"model": "teacher", "width": D, "overlap@10": 1.0},
    ]
    card = adapted_facts(
        **models, name="mine", sources=[str(tmp_path / "docs.jsonl")], documents=1234, held_out=123,
        chosen="documents, λ 10", projections={8: "learned"}, scores=rows,
    )  # fmt: skip
    assert json.loads(json.dumps(card)) == card and str(tmp_path) not in json.dumps(card)
    text = (export_symmetric(adapted.student, adapted.heads, tmp_path / "out", card=card) / "README.md").read_text()
    for said in (
        "# mine\n",
        "adapted to documents so that its embeddings are in the space of teacher. It was adapted with jasper_fast.",
        "documents do not need the teacher",
        "One index may hold documents of both forms, if both have the same projection",
        "- Student: student.\n- Teacher: teacher.\n- Longest query: 20 tokens. The rest of it is not read.\n",
        "- Longest document: 20 tokens.",
        "\n- Documents: 1,234 from docs.jsonl. The choices below were made on",
        "made on 123 others.\n",
        "- Map from the student's embeddings to the teacher's: documents, λ 10.",
        "- Projection to 8 dimensions: learned.",
        "| model | form | width | overlap@10 | nDCG@10 |\n| --- | --- | --- | --- | --- |\n"
        "| student | symmetric | 32 | 0.6100 | 0.7000 |\n| teacher |  | 32 | 1.0000 |  |",
        "| teacher | not recorded | apache-2.0 |",
        "Licence of the base model: mit.",
        '- query: `"the city council "`',
    ):
        assert said in text, said
    assert front_matter(text)["license"] == "mit"
    asymmetric = (adapted.folder / "asymmetric" / "README.md").read_text()
    assert "- Longest query: 12 tokens. The rest of it is not read.\n- Longest document: 40 tokens." in asymmetric
    assert "org/teacher encodes documents. New documents need this teacher." in asymmetric
    assert 'task="document-8"' in asymmetric and "`encode` without a task raises an error" in asymmetric


@pytest.mark.parametrize(
    ("licences", "form", "licence", "reason"),
    [
        (("mit", "apache-2.0"), "symmetric", "mit", "permit it"),
        (("mit", "apache-2.0"), "asymmetric", "other", "the folder holds several models"),
        (("mit", "mit"), "asymmetric", "mit", "all teachers have the licence mit"),
        (("mit", "other"), "asymmetric", "other", "licence of teacher teacher is unknown"),
    ],
)
def test_licence(licences: tuple[str, str], form: str, licence: str, reason: str, tmp_path: Path) -> None:
    from jasper_fast.reporting.licences import derived_licence

    models = write_models(tmp_path, dict(zip(("student", "teacher"), licences, strict=True)))
    facts = adapted_facts(**models)
    facts["adapted"]["form"] = form
    found, why = derived_licence(facts)
    assert found == licence and reason in why


def test_facts_of_a_trained_student_are_kept(adapted: Any, tmp_path: Path) -> None:
    facts = {
        "student": {"model": "org/base", "heads": [24, 8], "vision": {"image_tokens": 4}},
        "licence": "mit",
        "teachers": [{"model": "org/teacher", "revision": "abc", "licence": "mit"}, {"model": "b", "licence": "mit"}],
        "rows": [{"model": "student", "width": 24, "scores": {"x": 1.0}}],
        "texts": 7,
    }
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "modules.json").write_text("[]")
    (tmp_path / "model" / "training.json").write_text(json.dumps(facts))
    kept = adapted_facts(str(tmp_path), "org/teacher")
    assert kept["student"] == {"model": "org/base", "heads": [24, 8], "vision": None} and "rows" not in kept
    assert [(t["model"], t.get("revision")) for t in kept["teachers"]] == [("org/teacher", "abc"), ("b", None)]
    assert kept["adapted"]["student"] == tmp_path.name and kept["texts"] == 7
    assert adapted_facts(str(tmp_path), "vectors.npy")["teachers"][0] == {
        "model": "vectors.npy", "revision": None, "licence": UNKNOWN_LICENCE,
    }  # fmt: skip
