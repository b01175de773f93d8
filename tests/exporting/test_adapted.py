"""Exported adapted models: what stock sentence-transformers makes of them, what the card says, and bad input."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding, Transformer

from jasper_fast.exporting import adapted as exporting_adapted
from jasper_fast.exporting.adapted import export_asymmetric, export_symmetric
from jasper_fast.exporting.flat import export_flat
from jasper_fast.models.folder import load_student
from jasper_fast.utils.errors import JasperError
from tests.exporting.test_parity import cased, edit_json
from tests.helpers.adapted import TEXTS, D, H, random_matrix, source, unit

SEPARATE = """
import json, sys
import numpy as np

class NoJasperFast:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "jasper_fast":
            raise ImportError("jasper_fast must not be needed")

sys.meta_path.insert(0, NoJasperFast())
from sentence_transformers import SentenceTransformer

texts, wanted, out = json.loads(sys.argv[1])
models, vectors = {}, {}
for name, folder, method, options in wanted:
    if folder not in models:
        models[folder] = SentenceTransformer(folder, device="cpu")
    vectors[name] = getattr(models[folder], method)(texts, **options)
assert "jasper_fast" not in sys.modules
np.savez(out, **vectors)
"""


def test_stock_sentence_transformers_gives_the_same_embeddings(adapted: Any, plain: Any, tmp_path: Path) -> None:
    """Load the exports in a process that cannot import jasper_fast."""
    wanted, expected = [], {}

    def expect(name: str, folder: Path, role: str, task: str | None, vectors: np.ndarray) -> None:
        how = ("encode", {"prompt_name": role, "task": task}) if task else (f"encode_{role}", {})
        wanted.append((name, str(folder), *how))
        expected[name] = unit(vectors)

    student, forms = adapted.student, adapted.folder
    for role in ("query", "document"):
        rows = source(student, role, 12)
        for width, matrix in adapted.heads.items():
            expect(f"symmetric {role} {width}", forms / "symmetric", role, str(width), rows @ matrix)
        expect(f"symmetric {role}", forms / "symmetric", role, None, rows @ adapted.heads[D])
        rows, matrices = (
            (rows, adapted.heads) if role == "query" else (source(adapted.teacher, role), adapted.projections)
        )
        for width, matrix in matrices.items():
            expect(f"asymmetric {role} {width}", forms / "asymmetric", role, f"{role}-{width}", rows @ matrix)
        expect(f"asymmetric {role}", forms / "asymmetric", role, None, rows @ matrices[D])
    narrow = {16: random_matrix(20, 16)}
    symmetric = export_symmetric(plain, narrow, tmp_path / "plain")
    asymmetric = export_asymmetric(plain, student, narrow, {16: random_matrix(H, 16)}, tmp_path / "to-jasper")
    for role in ("query", "document"):
        expect(f"plain {role}", symmetric, role, None, source(plain, role) @ narrow[16])
    expect("plain, query", asymmetric, "query", None, source(plain, "query") @ narrow[16])
    expect("jasper document", asymmetric, "document", None, source(student, "document") @ random_matrix(H, 16))
    assert np.abs(expected["symmetric query"] - expected["symmetric document"]).max() > 1e-2  # a prompt is used
    arguments = json.dumps([TEXTS, wanted, str(tmp_path / "vectors.npz")])
    # -I: neither PYTHONPATH nor the working directory is searched
    done = subprocess.run(
        [sys.executable, "-I", "-c", SEPARATE, arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "newly initialized" not in done.stderr and "MISSING" not in done.stderr  # no made-up weights
    found = np.load(tmp_path / "vectors.npz")
    for name, vectors in expected.items():
        np.testing.assert_allclose(found[name], vectors, atol=1e-5, err_msg=name)


def test_layout(adapted: Any) -> None:
    """The weights of each encoder are stored once, and nothing is stored that the forms do not need."""
    symmetric, asymmetric = adapted.folder / "symmetric", adapted.folder / "asymmetric"
    for folder in (symmetric, asymmetric):
        suffixes = {file.suffix for file in folder.rglob("*") if file.is_file() and file.name != "LICENSE"}
        assert suffixes == {".safetensors", ".json", ".md"}
        assert all(any(place.iterdir()) for place in folder.rglob("*") if place.is_dir())  # git drops empty folders
        for file in folder.rglob("*.safetensors"):
            with safe_open(file, "np") as weights:
                assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F32"}  # noqa: SIM118
    kinds = [module["path"] for module in json.loads((symmetric / "modules.json").read_text())]
    assert kinds == ["", "1_Pooling", "2_Router", "3_Normalize"]  # as export_student writes it
    encoders = [file.parent.name for file in asymmetric.glob("*_Transformer/model.safetensors")]
    assert sorted(encoders) == ["document_0_Transformer", "query_0_Transformer"]
    routes = json.loads((asymmetric / "1_Router" / "router_config.json").read_text())["structure"]
    assert routes["document-32"] == ["query-32_1_Normalize"]  # no matrix at the teacher's width
    assert len(list((asymmetric / "1_Router").glob("*/model.safetensors"))) == 3
    for folder, place in ((symmetric, ""), (asymmetric, "query_0_Transformer")):
        settings = json.loads((folder / place / "sentence_bert_config.json").read_text())
        assert settings["max_seq_length"] == 12 and settings["model_args"] == {"add_pooling_layer": False}


def test_tasks(adapted: Any) -> None:
    symmetric, asymmetric = (
        SentenceTransformer(str(adapted.folder / form), device="cpu") for form in ("symmetric", "asymmetric")
    )
    np.testing.assert_allclose(symmetric.encode(TEXTS), symmetric.encode_document(TEXTS), atol=1e-6)
    for model, unknown in ((symmetric, ["16", "query-8"]), (asymmetric, ["8", "query-16", "none"])):
        for task in unknown:
            with pytest.raises(ValueError, match="No route found"):
                model.encode(TEXTS, task=task)
    with pytest.raises(ValueError, match="Could not determine route"):
        asymmetric.encode(TEXTS)
    assert symmetric.get_embedding_dimension() == asymmetric.get_embedding_dimension() == D
    assert asymmetric.prompts == {"query": "the city council ", "document": "apples, "}
    assert asymmetric.similarity_fn_name == "cosine"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sources_stay_as_they_are(dtype: torch.dtype, adapted: Any, tiny_qwen2: Path, tmp_path: Path) -> None:
    stem = Transformer(str(tiny_qwen2), model_kwargs={"dtype": dtype})
    teacher = SentenceTransformer(modules=[stem, Pooling(D)], device="cpu").train()
    student = copy.deepcopy(adapted.student).to(dtype).train()
    weights = {name: value.clone() for name, value in teacher.state_dict().items()}
    export_symmetric(student, adapted.heads, tmp_path / "symmetric", max_length=9)
    export_asymmetric(student, teacher, adapted.heads, {D: None, 8: random_matrix(D, 8)}, tmp_path / "asymmetric")
    assert student.max_seq_length == 20 and student.dtype == dtype and student.training and teacher.training
    assert all(torch.equal(weights[name], value) for name, value in teacher.state_dict().items())
    exported = SentenceTransformer(str(tmp_path / "asymmetric"), device="cpu")
    assert exported.dtype == torch.float32
    expected = unit(source(copy.deepcopy(student).float(), "query") @ adapted.heads[8])
    np.testing.assert_allclose(exported.encode(TEXTS, prompt_name="query", task="query-8"), expected, atol=1e-5)
    expected = source(copy.deepcopy(teacher).float(), "document")
    np.testing.assert_allclose(exported.encode_document(TEXTS), expected, atol=1e-5)


def test_static_embeddings(adapted: Any, tmp_path: Path) -> None:
    """A student without a Transformer."""
    tokenizer = adapted.student.tokenizer.backend_tokenizer
    student = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu")
    head = {4: random_matrix(16, 4)}
    folder = export_asymmetric(student, adapted.teacher, head, {4: random_matrix(D, 4)}, tmp_path / "out")
    exported = SentenceTransformer(str(folder), device="cpu")
    np.testing.assert_allclose(exported.encode_query(TEXTS), unit(source(student, "query") @ head[4]), atol=1e-5)


def test_truncated_embeddings(adapted: Any, tmp_path: Path) -> None:
    """With truncate_dim, a matrix has a row for each coordinate that is left."""
    student, teacher = copy.deepcopy(adapted.student), copy.deepcopy(adapted.teacher)
    student.truncate_dim, teacher.truncate_dim = 5, 16
    heads = {16: random_matrix(5, 16), 4: random_matrix(5, 4)}
    folder = export_asymmetric(student, teacher, heads, {16: None, 4: random_matrix(16, 4)}, tmp_path / "out")
    exported = SentenceTransformer(str(folder), device="cpu")
    assert exported.truncate_dim is None
    np.testing.assert_allclose(exported.encode_query(TEXTS), unit(source(student, "query") @ heads[16]), atol=1e-5)
    np.testing.assert_allclose(exported.encode_document(TEXTS), source(teacher, "document"), atol=1e-5)
    narrow = exported.encode(TEXTS, prompt_name="document", task="document-4")
    np.testing.assert_allclose(narrow, unit(source(teacher, "document") @ random_matrix(16, 4)), atol=1e-5)


def test_an_adapted_model_can_be_adapted_again(adapted: Any, tmp_path: Path) -> None:
    """The student of the second adaptation is a symmetric or an asymmetric form, and so is the teacher."""
    symmetric, asymmetric = (
        SentenceTransformer(str(adapted.folder / form), device="cpu") for form in ("symmetric", "asymmetric")
    )
    again = {6: random_matrix(D, 6)}
    folder = export_asymmetric(asymmetric, asymmetric, again, again, tmp_path / "out")
    exported = SentenceTransformer(str(folder), device="cpu")
    for role, encode in (("query", exported.encode_query), ("document", exported.encode_document)):
        np.testing.assert_allclose(encode(TEXTS), unit(source(asymmetric, role) @ again[6]), atol=1e-5)
    export_symmetric(symmetric, again, tmp_path / "symmetric")
    with pytest.raises(JasperError, match="different modules .* Fix: give a symmetric student"):
        export_symmetric(asymmetric, again, tmp_path / "none")


def test_a_repeated_export_needs_permission(adapted: Any, tmp_path: Path) -> None:
    folder = export_symmetric(adapted.student, {4: random_matrix(H, 4)}, tmp_path / "model")
    before = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    with pytest.raises(JasperError, match="exists already"):
        export_symmetric(adapted.student, {4: random_matrix(H, 4, 2)}, folder)
    np.testing.assert_array_equal(SentenceTransformer(str(folder), device="cpu").encode(TEXTS), before)
    for _ in range(2):
        export_symmetric(adapted.student, {4: random_matrix(H, 4, 2)}, folder, replace=True)
        after = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
        np.testing.assert_allclose(after, unit(source(adapted.student, "document") @ random_matrix(H, 4, 2)), atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_symmetric_form_is_a_model_of_jasper_fast(adapted: Any, plain: Any, tmp_path: Path) -> None:
    student = load_student(adapted.folder / "symmetric").eval()
    assert student.widths == [D, 8] and student.max_length == 12
    with torch.no_grad():
        rows = student.project(student.pool(student.tokenize(TEXTS, "query")), [8])[8].numpy()
    expected = unit(source(adapted.student, "query", 12) @ adapted.heads[8])
    np.testing.assert_allclose(unit(rows), expected, atol=1e-5)
    flat = SentenceTransformer(str(export_flat(adapted.folder / "symmetric", 8, tmp_path / "flat")), device="cpu")
    np.testing.assert_allclose(flat.encode_query(TEXTS), expected, atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "lasttoken"])
def test_a_flat_export_keeps_the_pooling(pooling: str, tiny_bert: Path, tmp_path: Path) -> None:
    model = SentenceTransformer(modules=[Transformer(str(tiny_bert)), Pooling(32, pooling)], device="cpu")
    export_symmetric(model, {6: random_matrix(32, 6)}, tmp_path / "model")
    flat = SentenceTransformer(str(export_flat(tmp_path / "model", 6, tmp_path / "flat")), device="cpu")
    np.testing.assert_allclose(flat.encode(TEXTS), unit(source(model, "document") @ random_matrix(32, 6)), atol=1e-5)


BAD = {
    "no head": ({}, {}, r"heads: no matrix .got none, expected one per width"),
    "matrix of another model": ({8: (32, 8)}, {8: (32, 8)}, r"heads\[8\]: .*got .32, 8., expected .24, 8."),
    "matrix of another width": ({8: (24, 7)}, {8: (32, 8)}, r"heads\[8\]: .*got .24, 7."),
    "projection of another teacher": ({8: (24, 8)}, {8: (24, 8)}, r"projections\[8\]: .*got .24, 8., expected .32, 8."),
    "other widths": ({8: (24, 8)}, {8: (32, 8), 4: (32, 4)}, r"other widths than the heads .got \[8, 4\]"),
    "no projection to a narrow width": (
        {8: (24, 8)},
        {8: None},
        r"projections\[8\]: None .* expected a matrix .32, 8.",
    ),
    "NaN": ({8: (24, 8, float("nan"))}, {8: (32, 8)}, r"heads\[8\]: the matrix holds NaN"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_matrices_are_rejected(case: str, adapted: Any, tmp_path: Path) -> None:
    *shapes, message = BAD[case]
    heads, projections = (
        {width: shape and np.full(shape[:2], (*shape, 1.0)[2]) for width, shape in given.items()} for given in shapes
    )
    with pytest.raises(JasperError, match=message + ".*Fix: "):
        export_asymmetric(adapted.student, adapted.teacher, heads, projections, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def edit_routes(**mappings: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "1_Router" / "router_config.json"
        content = json.loads(file.read_text())
        content["parameters"]["route_mappings"] = {f"('{role}', None)": route for role, route in mappings.items()}
        file.write_text(json.dumps(content))

    return edit


def in_encoder(role: str, spoil: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: spoil(folder / f"{role}_0_Transformer")


SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "prompt of the teacher lost": (
        edit_json("config_sentence_transformers.json", prompts={"query": "the city council ", "document": ""}),
        "encode_document",
    ),
    "prompt of the student lost": (
        edit_json("config_sentence_transformers.json", prompts={"query": "", "document": "apples, "}),
        "encode_query",
    ),
    "student truncated earlier": (
        in_encoder("query", edit_json("sentence_bert_config.json", max_seq_length=7)),
        "encode_query",
    ),
    "student without lower-casing": (in_encoder("query", cased), "encode_query"),
    "narrow documents by default": (
        edit_routes(query="query-32", document="document-8"),
        "encode_document .got a width",
    ),
    "other pooling of the teacher": (
        edit_json("document_1_Pooling/config.json", pooling_mode="mean"),
        "encode_document",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_an_export_that_differs_is_not_published(
    case: str, adapted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, message = SPOILT[case]
    monkeypatch.setattr(exporting_adapted, "write_card", lambda folder, *a: spoil(Path(folder)))
    projections = {D: None, 8: random_matrix(D, 8)}
    with pytest.raises(JasperError, match=f"differs from the models it was made from: {message}"):
        export_asymmetric(adapted.student, adapted.teacher, adapted.heads, projections, tmp_path / "out")
    assert not list(tmp_path.iterdir())
