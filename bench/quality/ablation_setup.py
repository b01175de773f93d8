"""Data that all arms of the ablation share: a frozen encoder's states of texts and sets, and teacher embeddings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jasper_fast.config.run import Config
from jasper_fast.data.eval_loaders import load_evals
from jasper_fast.data.eval_sets import EvalSet
from jasper_fast.evaluation.metrics import score_codes, score_embeddings
from jasper_fast.evaluation.score import PCA_ROWS, TEACHER, embed, score_rows, teacher_floors
from jasper_fast.models.embedder import load_model, normalise, routes
from jasper_fast.models.hub import prompt_of
from jasper_fast.models.quantization import PRECISIONS
from jasper_fast.teachers.encoder import cached, teacher_encoder
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.fingerprint import content_digest

LEXICAL_WIDTH = 128
STUDENT = "student"


class Target:
    """Teacher embeddings of every text, in memory."""

    def __init__(self, vectors: Tensor, fingerprint: str) -> None:
        self.vectors, self.fingerprint = vectors, fingerprint
        self.width, self.revisions = vectors.shape[1], [None]

    def read(self, rows: np.ndarray) -> Tensor:
        """Return the embeddings of these texts, (len(rows), E) float32."""
        return self.vectors[rows]


class World:
    """Texts, evaluation sets and teachers that all arms share, encoded once.

    Args:
        config: configuration of the encoder's run.
        states: (n, H) float32 states of the training texts, followed by the documents of the retrieval sets.
        texts: number of training texts.
        evals: evaluation sets, each with the states of its groups of texts.
        head: full-width head of the trained encoder.
        teachers: teacher embeddings by name, of all states or of the training texts alone.
        encoder: digest of the encoder's weights.
    """

    def __init__(
        self,
        config: Config,
        states: Tensor,
        texts: int,
        evals: list[tuple[EvalSet, dict[str, Tensor]]],
        head: nn.Linear,
        teachers: dict[str, Target],
        encoder: str,
    ) -> None:
        self.config, self.states, self.texts, self.evals, self.teachers = config, states, texts, evals, teachers
        self.cache = config.data.cache
        self.width = head.out_features
        self._head = head
        self.identity = {
            "encoder": encoder,
            "teachers": {name: target.fingerprint for name, target in teachers.items()},
            "sets": [[evalset.name, len(list(evalset.texts()))] for evalset, _ in evals],
        }
        self.facts = {"texts": texts, "searched": len(states) - texts, "states": states.shape[1]}

    def widest_head(self) -> nn.Linear:
        """Return a copy of the full-width head after the encoder's training."""
        copy = nn.Linear(self._head.in_features, self._head.out_features)
        copy.load_state_dict(self._head.state_dict())
        return copy

    def floors(self, widths: list[int]) -> list[dict[str, Any]]:
        """Return result rows of teacher and student, at full width and reduced by PCA and by truncation.

        There are also rows of the student's codes at full width, with a ``precision``.
        """
        plain = self.teachers["one"]
        teacher = teacher_encoder(self.config.teachers, self.cache, self.config.precision)
        rows = []
        if teacher is not None:
            reduces = teacher_floors(plain.read(np.arange(min(self.texts, PCA_ROWS))).numpy(), widths)
            rows += score_rows([evalset for evalset, _ in self.evals], {TEACHER: teacher}, reduces)
        with torch.no_grad():
            train = normalise(self._head(self.states[: min(self.texts, PCA_ROWS)]).numpy())
            student = {
                e.name: {g: normalise(self._head(s).numpy()) for g, s in states.items()} for e, states in self.evals
            }
        forms = {f"{STUDENT}{name.removeprefix(TEACHER)}": by for name, by in teacher_floors(train, widths).items()}
        for name, by_width in {STUDENT: {self.width: lambda vectors: vectors}, **forms}.items():
            for width, reduce in by_width.items():
                scores = {}
                for evalset, _ in self.evals:
                    metrics = score_embeddings(evalset, {g: reduce(v) for g, v in student[evalset.name].items()})
                    scores |= {f"{evalset.name}/{metric}": value for metric, value in metrics.items()}
                rows.append({"model": name, "width": width, "scores": scores})
        for precision in PRECISIONS[1:]:
            scores = {}
            for evalset, _ in self.evals:
                metrics = score_codes(evalset, student[evalset.name], precision)
                scores |= {f"{evalset.name}/{metric}": value for metric, value in metrics.items()}
            rows.append({"model": STUDENT, "width": self.width, "precision": precision, "scores": scores})
        return rows


def prepare(config: Config, run: str | None, work: Path) -> World:
    """Train the encoder, or load it from ``run``, and encode every text once.

    Args:
        config: configuration of the encoder's run.
        run: run folder or model of a trained encoder. None: train one.
        work: folder for the encoder and the cached states.

    Raises:
        JasperError: the encoder has no Router, or no head of the configuration's full width.
    """
    from jasper_fast.data.prepare import prepare_texts
    from jasper_fast.teachers.label import ensure_teachers
    from jasper_fast.train import train

    folder = Path(run) if run else train(config, out=work / "encoder")
    trusted = config.student.trust_remote_code
    model = load_model(str(folder), config.student.max_length, trust_remote_code=trusted)
    position, heads = routes(model)
    if config.student.heads[0] not in heads:
        raise JasperError(
            f"{folder}: no full-width head (got {sorted(heads)}, expected {config.student.heads[0]}). "
            "Fix: give a run of this configuration"
        )
    encoder = _digest(model)
    read = cached(_state_encoder(model, position), f"{encoder} {config.student.max_length}", work / "states")
    texts = prepare_texts(config).texts
    words, roles = texts["text"][:], np.array(texts["role"][:])
    states = np.empty((len(words), heads[config.student.heads[0]][0].linear.in_features), dtype=np.float32)
    for role in sorted(set(roles.tolist())):
        places = np.flatnonzero(roles == role)
        states[places] = read([words[i] for i in places], role)
    evals = []
    for evalset in load_evals(config.evaluate):
        groups = evalset.groups()
        evals.append((evalset, {g: torch.from_numpy(read(list(part), role)) for g, (part, role) in groups.items()}))
    taught = ensure_teachers(config, texts)
    one = taught.read(np.arange(len(words)))
    searched = [(evalset, of["documents"]) for evalset, of in evals if "documents" in of]
    teacher = teacher_encoder(config.teachers, config.data.cache, config.precision)
    if teacher is not None and searched:  # only the documents: no queries or judgements
        documents = [embed(evalset, teacher)[one.shape[1]]["documents"] for evalset, _ in searched]
        one = torch.cat([one, *map(torch.from_numpy, documents)])
        states = np.concatenate([states, *(of.numpy() for _, of in searched)])
    lexical = torch.from_numpy(_lexical(words, taught.fingerprint, work))
    both = torch.nn.functional.normalize(torch.cat([one[: len(words)], lexical], dim=1), dim=1)
    targets = {"one": Target(one, taught.fingerprint), "two": Target(both, f"{taught.fingerprint}+lexical")}
    head = heads[config.student.heads[0]][0].linear.cpu()
    with torch.no_grad():
        own = torch.nn.functional.normalize(head(torch.from_numpy(states)), dim=1)
    targets["own"] = Target(own, f"{taught.fingerprint}+{encoder}")
    return World(config, torch.from_numpy(states), len(words), evals, head, targets, encoder)


def _digest(model: nn.Module) -> str:
    """Return a digest of a model's weights."""
    weights = sorted(model.state_dict().items())
    return content_digest((name.encode() + value.float().cpu().numpy().tobytes() for name, value in weights), size=8)


def _state_encoder(model: Any, router: int) -> Callable[[list[str], str], np.ndarray]:
    """Return a function (texts, role) -> (n, H) float32 pooled states, from the modules before the Router."""
    from sentence_transformers import SentenceTransformer

    stem = SentenceTransformer(modules=list(model)[:router], device=str(model.device)).eval()

    def encode(texts: list[str], role: str) -> np.ndarray:
        prompt = prompt_of(model.prompts, role)
        return np.asarray(
            stem.encode(texts, prompt=prompt, convert_to_numpy=True, show_progress_bar=False), dtype=np.float32
        )

    return encode


def _lexical(words: list[str], fingerprint: str, work: Path) -> np.ndarray:
    """Return the embeddings of a lexical teacher, TF-IDF reduced to at most LEXICAL_WIDTH, cached in ``work``."""

    def encode(texts: list[str], role: str) -> np.ndarray:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer

        counts = TfidfVectorizer(sublinear_tf=True, min_df=2, max_features=20_000).fit_transform(texts)
        width = min(LEXICAL_WIDTH, min(counts.shape) - 1)
        return normalise(TruncatedSVD(width, random_state=0).fit_transform(counts))

    return cached(encode, json.dumps(["lexical", LEXICAL_WIDTH, fingerprint]), work / "states")(words, "document")
