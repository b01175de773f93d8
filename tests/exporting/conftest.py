"""An adapted model in both forms: its student, its teacher, and its matrices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
from tests.helpers.adapted import PROMPTS, TEACHER_PROMPTS, D, H, random_matrix


@dataclass(frozen=True)
class Adapted:
    """DIR with its two forms, and what they were made from. The exported maximum length of the student is 12."""

    folder: Path
    student: SentenceTransformer
    teacher: SentenceTransformer
    heads: dict[int, np.ndarray]
    projections: dict[int, np.ndarray]


@pytest.fixture(scope="session")
def student(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    """A jasper_fast model with a query prompt and prefix heads, whose heads have a bias."""
    torch.manual_seed(3)
    fields = {"heads": [H, 8], "head_type": "prefix", "max_length": 20, "prompts": PROMPTS, "layers": [0, 2]}
    folder = tmp_path_factory.mktemp("run") / "model"
    export_student(Student.build(StudentConfig(model=str(tiny_bert), **fields)), folder)
    return load_model(str(folder), device="cpu")


@pytest.fixture(scope="session")
def teacher(tiny_qwen2: Path) -> SentenceTransformer:
    """A teacher with another tokenizer and another length, with a linear layer and Normalize at its end."""
    torch.manual_seed(4)
    stem = Transformer(str(tiny_qwen2), max_seq_length=40)
    modules = [stem, Pooling(D, "lasttoken"), Dense(D, D, activation_function=nn.Identity()), Normalize()]
    return SentenceTransformer(modules=modules, prompts=dict(TEACHER_PROMPTS), device="cpu").eval()


@pytest.fixture(scope="session")
def plain(tiny_bert: Path) -> SentenceTransformer:
    """A stock model with another pooling, a linear layer with an activation, and no Normalize."""
    torch.manual_seed(5)
    modules = [Transformer(str(tiny_bert), max_seq_length=30), Pooling(32, "cls"), Dense(32, 20)]
    return SentenceTransformer(modules=modules, prompts=dict(PROMPTS), device="cpu").eval()


@pytest.fixture(scope="session")
def adapted(student: SentenceTransformer, teacher: SentenceTransformer, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("adapted") / "mine"
    heads = {8: random_matrix(H, 8), D: random_matrix(H, D)}  # in any order
    projections = {D: None, 8: random_matrix(D, 8, 1)}
    card = adapted_facts("org/student", "org/teacher", sources=["my/documents.jsonl"], documents=1234)
    export_symmetric(student, heads, folder / "symmetric", max_length=12, card=card)
    export_asymmetric(student, teacher, heads, projections, folder / "asymmetric", max_length=12, card=card)
    return Adapted(folder, student, teacher, heads, {**projections, D: np.eye(D)})
