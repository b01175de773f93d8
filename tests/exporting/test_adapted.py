"""Exported adapted models: what stock sentence-transformers makes of them, what the card says, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from torch import nn

from jasper_fast.config.models import StudentConfig
from jasper_fast.exporting.adapted import export_asymmetric, export_symmetric
from jasper_fast.exporting.student import export_student
from jasper_fast.models.embedder import load_model
from jasper_fast.models.student import Student
from jasper_fast.reporting.model_card import adapted_facts

PROMPTS = {"query": "the city council ", "document": ""}
TEACHER_PROMPTS = {"query": "not used: ", "document": "apples, "}
H, D = 24, 32  # widths of the jasper_fast student's embeddings and of the teacher's
TEXTS = [
    "forty boxes",
    "  The OLD lighthouse keeper\n",
    "an engine that runs on warm air. " * 20,
    "it took three weeks",
]
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


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def random_matrix(rows: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, rows, width]).standard_normal((rows, width))


@pytest.fixture(scope="module")
def student(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    """A jasper_fast model with a query prompt and prefix heads, whose heads have a bias."""
    torch.manual_seed(3)
    fields = {"heads": [H, 8], "head_type": "prefix", "max_length": 20, "prompts": PROMPTS, "layers": [0, 2]}
    folder = export_student(
        Student.build(StudentConfig(model=str(tiny_bert), **fields)), tmp_path_factory.mktemp("run") / "model"
    )
    return load_model(str(folder), device="cpu")


@pytest.fixture(scope="module")
def teacher(tiny_qwen2: Path) -> SentenceTransformer:
    """A teacher with another tokenizer and another length, with a linear layer and Normalize at its end."""
    torch.manual_seed(4)
    stem = Transformer(str(tiny_qwen2), max_seq_length=40)
    modules = [stem, Pooling(D, "lasttoken"), Dense(D, D, activation_function=nn.Identity()), Normalize()]
    return SentenceTransformer(modules=modules, prompts=dict(TEACHER_PROMPTS), device="cpu").eval()


@pytest.fixture(scope="module")
def plain(tiny_bert: Path) -> SentenceTransformer:
    """A stock model of another pooling, without Normalize, and a linear layer with an activation."""
    torch.manual_seed(5)
    modules = [Transformer(str(tiny_bert), max_seq_length=30), Pooling(32, "cls"), Dense(32, 20)]
    return SentenceTransformer(modules=modules, prompts=dict(PROMPTS), device="cpu").eval()


@pytest.fixture(scope="module")
def heads() -> dict[int, np.ndarray]:
    return {8: random_matrix(H, 8), D: random_matrix(H, D)}  # in any order


@pytest.fixture(scope="module")
def forms(student: SentenceTransformer, teacher: SentenceTransformer, heads: Any, tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("adapted") / "mine"
    card = adapted_facts("org/student", "org/teacher")
    export_symmetric(student, heads, folder / "symmetric", max_length=12, card=card)
    projections = {D: None, 8: random_matrix(D, 8, 1)}
    export_asymmetric(student, teacher, heads, projections, folder / "asymmetric", max_length=12, card=card)
    return folder


def source(model: SentenceTransformer, role: str, max_length: int | None = None) -> np.ndarray:
    """Return a model's own embeddings, (n, D) float64 unit rows."""
    before = model.max_seq_length
    model.max_seq_length = max_length or before
    vectors = (model.encode_query if role == "query" else model.encode_document)(TEXTS)
    model.max_seq_length = before
    return unit(vectors.astype(np.float64))


def test_stock_sentence_transformers_gives_the_same_embeddings(
    student: SentenceTransformer, teacher: Any, plain: Any, heads: Any, forms: Path, tmp_path: Path
) -> None:
    """Load the exports in a process that cannot import jasper_fast."""
    wanted, expected = [], {}

    def expect(name: str, folder: Path, role: str, task: str | None, vectors: np.ndarray) -> None:
        how = ("encode", {"prompt_name": role, "task": task}) if task else (f"encode_{role}", {})
        wanted.append((name, str(folder), *how))
        expected[name] = unit(vectors)

    projections = {D: np.eye(D), 8: random_matrix(D, 8, 1)}
    for role in ("query", "document"):
        rows = source(student, role, 12)
        for width, matrix in heads.items():
            expect(f"symmetric {role} {width}", forms / "symmetric", role, str(width), rows @ matrix)
        expect(f"symmetric {role}", forms / "symmetric", role, None, rows @ heads[D])
        rows, matrices = (rows, heads) if role == "query" else (source(teacher, role), projections)
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
