"""Models made of finished runs: soups of two, and closed-form heads on the states of several layers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from jasper_fast.fitting import PairStatistics, ridge_map
from jasper_fast.models.embedder import load_model, normalise, routes
from jasper_fast.models.hub import prompt_of
from jasper_fast.utils.errors import JasperError

STRENGTHS = (1.0, 10.0, 100.0, 1000.0)  # of the ridge regression
HELD_OUT = 0.1  # fraction of the texts that choose the strength
BATCH = 64  # texts

Encoder = Callable[[list[str], str], dict[int, np.ndarray]]


def soup(models: Sequence[Path], out: Path) -> Path:
    """Write a model whose weights are the mean of those of others.

    Args:
        models: folders of models with the same files and shapes.
        out: folder to write. It must not exist.

    Returns:
        ``out``.

    Raises:
        JasperError: the models differ in more than the values of their weights.
    """
    files = [sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors")) for folder in models]
    if any(names != files[0] for names in files) or not files[0]:
        raise JasperError(f"soup: got {[len(names) for names in files]} weight files that differ, expected the same")
    shutil.copytree(models[0], out)
    for name in files[0]:
        parts = [load_file(folder / name) for folder in models]
        shapes = [{key: (value.shape, value.dtype) for key, value in part.items()} for part in parts]
        if any(one != shapes[0] for one in shapes):
            raise JasperError(f"soup: {name} has other weights in each model, expected the same names and shapes")
        save_file({key: _mean([part[key] for part in parts]) for key in parts[0]}, out / name)
    return out


def _mean(values: list[torch.Tensor]) -> torch.Tensor:
    if not values[0].is_floating_point():
        return values[0]
    return torch.stack([value.double() for value in values]).mean(dim=0).to(values[0].dtype)


def closed_form_head(
    folder: Path, layers: int, texts: Sequence[str], roles: Sequence[str], teacher: np.ndarray, max_length: int
) -> Encoder:
    """Return an encoder with a linear head that is fitted to the teacher in closed form.

    The head reads the mean states of the last layers, each divided by its mean length, and concatenated. A tenth of
    the texts chooses the strength of the ridge regression.

    Args:
        folder: folder of a trained student.
        layers: number of layers, counted from the last.
        texts: n training texts.
        roles: their roles.
        teacher: (n, D) teacher embeddings.
        max_length: largest number of tokens.
    """
    model = load_model(str(folder), max_length)
    read = _layer_states(model, layers)
    states = np.empty(0)
    for role in sorted(set(roles)):
        places = [i for i, one in enumerate(roles) if one == role]
        part = read([texts[i] for i in places], role)
        if not states.size:
            states = np.empty((len(texts), *part.shape[1:]))
        states[places] = part
    scales = np.linalg.norm(states, axis=2).mean(axis=0)  # (layers,)

    def features(some: np.ndarray) -> np.ndarray:
        flat = (some / scales[:, None]).reshape(len(some), -1)
        return np.concatenate([flat, np.ones((len(some), 1))], axis=1)

    inputs, kept = features(states), max(1, round(len(texts) * (1.0 - HELD_OUT)))
    best = max(STRENGTHS, key=lambda strength: _agreement(inputs, teacher, kept, strength))
    head = ridge_map(_sums(inputs, teacher), best)

    def encode(some: list[str], role: str) -> dict[int, np.ndarray]:
        vectors = features(read(some, role)) @ head
        return {teacher.shape[1]: normalise(vectors.astype(np.float32))}

    return encode


def _sums(inputs: np.ndarray, teacher: np.ndarray) -> PairStatistics:
    sums = PairStatistics(inputs.shape[1], teacher.shape[1])
    sums.add(inputs, teacher.astype(np.float64))
    return sums


def _agreement(inputs: np.ndarray, teacher: np.ndarray, kept: int, strength: float) -> float:
    """Return the mean cosine of the texts after ``kept``, with a head fitted to those before."""
    if kept >= len(inputs):
        return 0.0
    vectors = normalise(inputs[kept:] @ ridge_map(_sums(inputs[:kept], teacher[:kept]), strength))
    return float((vectors * normalise(teacher[kept:])).sum(axis=1).mean())


def _layer_states(model: Any, layers: int) -> Callable[[list[str], str], np.ndarray]:
    """Return a function (texts, role) -> (n, layers, H) float64 mean states of the last layers."""
    stem, tokenizer = model[0].auto_model, model.tokenizer
    position, _ = routes(model)
    if position != 2:
        raise JasperError(f"got {position} modules before the heads, expected an encoder and its pooling")

    @torch.inference_mode()
    def read(texts: list[str], role: str) -> np.ndarray:
        prompted = [prompt_of(model.prompts, role) + text for text in texts]
        order = np.argsort([len(text) for text in prompted])
        states: np.ndarray | None = None
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            batch = tokenizer(
                [prompted[i] for i in places],
                padding=True,
                truncation=True,
                max_length=model.max_seq_length,
                return_tensors="pt",
            ).to(model.device)
            hidden = stem(**batch, output_hidden_states=True).hidden_states[-layers:]
            mask = batch["attention_mask"][:, :, None].to(hidden[0].dtype)
            means = torch.stack([(state * mask).sum(dim=1) / mask.sum(dim=1) for state in hidden], dim=1)
            if states is None:
                states = np.empty((len(texts), *means.shape[1:]))
            states[places] = means.double().cpu().numpy()
        assert states is not None, "there are no texts"
        return states

    return read
