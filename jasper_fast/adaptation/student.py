"""The run that trains the student: from the teacher's layers, or on from a given student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jasper_fast.adaptation.documents import Corpus, texts_in
from jasper_fast.adaptation.request import Request
from jasper_fast.config.run import Config
from jasper_fast.models.embedder import load_model
from jasper_fast.models.folder import FACTS_FILE
from jasper_fast.models.heads import ROUTER, routes_of
from jasper_fast.models.hub import resolve_model
from jasper_fast.models.sentence_transformer import set_length, transformers_of
from jasper_fast.utils.atomic import write_atomic
from jasper_fast.utils.errors import JasperError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

QUESTIONS = "questions.jsonl"  # titles and sentences of the documents, which training reads as questions
LONGEST = 256  # tokens of a training text


def first_training(request: Request) -> Config:
    """Return the configuration of ``train --texts`` with a budget of minutes."""
    return request.config.model_copy(update={"minutes": request.minutes})


def continued_training(request: Request, corpus: Corpus, model: SentenceTransformer) -> Config:
    """Return the configuration of a run that trains a given student on, and write the questions that it reads.

    It trains all layers and the widest head, on whole documents, passages, titles and sentences.

    Args:
        request: the call, with ``model`` and ``minutes``.
        corpus: the texts.
        model: the loaded student.

    Raises:
        JasperError: the student cannot be trained on, or the questions cannot be written.
    """
    assert request.model is not None and request.model.model is not None
    name = request.model.model
    student = student_settings(name, model)
    source = request.source.model_dump(mode="json")
    sources: list[dict[str, Any]] = [source]
    if len(corpus.sentences):
        file = request.out / QUESTIONS
        write_questions(corpus, file)
        sources.append({"path": str(file), "columns": ["text"], "role": "query"})
    vectors = request.teacher.vectors is not None
    config = {
        "name": request.config.name,
        "student": {**student, "trust_remote_code": request.model.trust_remote_code},
        "teachers": [request.teacher.model_dump(mode="json")],
        "data": {
            "sources": sources,
            "cut_share": 0.0 if vectors else 0.7,
            "shuffle_share": 0.0,
            "cut_sentences": [1, 8],
            "held_out": request.config.data.held_out,
            "seed": request.config.data.seed,
            "cache": request.config.data.cache,
        },
        "stages": [
            {
                "name": "adapt",
                "train": [f"heads.{student['heads'][0]}.*"],
                "last_layers": "all",
                "heads": student["heads"],
                "batch_size": 32,
                "small_data": "adapt",
                "minutes": request.minutes,
                "lr": 2.0e-4,
            }
        ],
    }
    return Config.model_validate(config)


def write_questions(corpus: Corpus, file: Path) -> None:
    """Write the titles and sentences of the documents that are not held out, a JSON object a line."""
    texts = (text for block in texts_in(corpus.texts, corpus.sentences) for text in block["text"])
    content = b"".join((json.dumps({"text": text}, ensure_ascii=False) + "\n").encode() for text in texts)
    if not file.is_file() or file.read_bytes() != content:  # a file that stays as it is keeps its place in the cache
        write_atomic(file, content)


def student_settings(name: str, model: SentenceTransformer) -> dict[str, Any]:
    """Return the section `student` that starts at the given student's own embeddings.

    Args:
        name: the student's folder or name.
        model: the loaded student.

    Raises:
        JasperError: the model has other parts than those that training knows.
    """
    folder = Path(resolve_model(name)).expanduser()
    (encoder,) = [*transformers_of(model)][:1] or [None]
    length = min(int(getattr(encoder, "max_seq_length", None) or LONGEST), LONGEST)
    if (folder / FACTS_FILE).is_file() and (folder / ROUTER / "router_config.json").is_file():
        facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))["student"]
        kept = {key: facts[key] for key in ("prompts", "bidirectional") if key in facts}
        heads = [max(routes_of(folder))]
        return {"model": str(folder), "heads": heads, "head_init": "model", "max_length": length, **kept}
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    known = all(isinstance(module, (Transformer, Pooling, Normalize)) for module in model)
    pooling = [module.pooling_mode for module in model if isinstance(module, Pooling)]
    if encoder is None or not known or pooling != ["mean"]:
        raise JasperError(
            f"{name}: only a run of this project, or a model with mean pooling, can be trained further (got "
            f"{', '.join(type(module).__name__ for module in model)}). Fix: leave --minutes out"
        )
    width = int(model.get_embedding_dimension() or 0)
    prompts = {role: (model.prompts or {}).get(role) or "" for role in ("query", "document")}
    return {"model": name, "heads": [width], "head_init": "identity", "max_length": length, "prompts": prompts}


def check_student(request: Request) -> None:
    """Reject a length beyond the student's positions, and a student that cannot be trained on.

    Args:
        request: the call.

    Raises:
        JasperError: the student cannot do what is asked.
    """
    name = str(request.model.model) if request.model is not None else request.config.student.model
    if request.max_length is None and (request.model is None or request.minutes is None):
        return
    model = load_model(name, trust_remote_code=request.trust_remote_code)
    if request.model is not None and request.minutes is not None:
        student_settings(name, model)
    if request.max_length is not None:
        set_length(model, request.max_length, name)
