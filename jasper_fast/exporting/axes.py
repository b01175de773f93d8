"""Find the rotation of a prefix export: axes of texts, or those of the heads that ``adapt`` has fitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from jasper_fast.config.data import SourceConfig
from jasper_fast.config.load import stored_config
from jasper_fast.config.yaml import read_yaml
from jasper_fast.data.text import join_columns
from jasper_fast.data.text_sources import sample_texts
from jasper_fast.fitting.agreement import Reference
from jasper_fast.fitting.projections import principal_axes
from jasper_fast.fitting.rotations import learned_rotation, nested_rotation
from jasper_fast.fitting.statistics import PairStatistics
from jasper_fast.models.embedder import model_encoder, normalise, role_heads
from jasper_fast.utils.atomic import write_atomic
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.names import first_line

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

ROTATION, STATISTICS, KIND = "axes.safetensors", "statistics.safetensors", "documents."  # saved by `adapt`
TEXTS, HELD_OUT, FEWEST = 10_000, 500, 20  # texts that are read, questions among them, and fewest to compare with
SECONDS = 30.0  # of learning, without the search for neighbours
PRINCIPAL, LEARNED, FITTED = "principal axes", "learned axes", "axes of the fitted heads"
FIX = "Fix: give --axes FILE with texts like those that the model will encode, and --columns with their columns"


@dataclass(frozen=True)
class Axes:
    """The rotation of a prefix export.

    Args:
        rotation: (d, d) float64, orthogonal.
        name: kind of the axes.
        texts: what they were computed from.
        overlap: {kind: {width: fraction of the ten nearest documents kept}} on held-out texts. Empty: not compared.
    """

    rotation: np.ndarray
    name: str
    texts: str
    overlap: Mapping[str, Mapping[int, float]] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Return the axes as plain JSON, without the rotation."""
        overlap = {name: {str(w): round(kept, 4) for w, kept in row.items()} for name, row in self.overlap.items()}
        return {"name": self.name, "texts": self.texts, "overlap": overlap}


def find_axes(
    source: Path, model: SentenceTransformer, widths: Sequence[int], file: str | None, columns: Sequence[str]
) -> Axes:
    """Return the axes of a model's embedding space.

    Args:
        source: run folder, model folder, or folder of an adapted model.
        model: the loaded model. Its document side encodes the texts.
        widths: widths of the prefixes to learn.
        file: texts in a format of ``data.sources``. None: what the adaptation saved, or the texts of the run.
        columns: columns of the file, which are joined to one text.

    Raises:
        JasperError: there are no texts, or a file of the adaptation is damaged.
    """
    if file is None:
        folder = next((path for path in (source, source.parent) if (path / STATISTICS).is_file()), None)
        if folder is not None:
            return _adapted_axes(folder, model)
        texts, name = _run_texts(source)
    else:
        texts, name = _texts([SourceConfig(path=file, columns=list(columns), join=True)]), Path(file).name
    encode = model_encoder(model)

    def embed(chosen: list[str]) -> np.ndarray:
        by_width = encode(chosen, "document")
        return by_width[max(by_width)]

    return text_axes(embed, texts, widths, f"{len(texts):,} texts of {name}")


def text_axes(embed: Callable[[list[str]], np.ndarray], texts: list[str], widths: Sequence[int], name: str) -> Axes:
    """Return principal axes of texts, or learned ones if these keep more neighbours of held-out texts.

    Args:
        embed: function from n texts to (n, d) float32 unit rows.
        texts: distinct texts in random order.
        widths: widths of the prefixes.
        name: description of the texts.
    """
    rows = embed(texts)
    held_out = min(HELD_OUT, len(rows) // 10)
    questions, documents = rows[:held_out], rows[held_out:]
    moment = documents.T.astype(np.float64) @ documents
    options = {
        PRINCIPAL: principal_axes(moment, rows.shape[1]),
        LEARNED: learned_rotation(documents, moment, widths, seconds=SECONDS),
    }
    if held_out < FEWEST or np.array_equal(options[PRINCIPAL], options[LEARNED]):
        return Axes(options[PRINCIPAL], PRINCIPAL, name)
    reference = Reference(questions, documents)
    overlap = {
        kind: {w: _kept(reference, questions, documents, axes[:, :w]) for w in widths} for kind, axes in options.items()
    }
    best = max(options, key=lambda kind: sum(overlap[kind].values()))  # the first of equals
    return Axes(options[best], best, name, overlap)


def _kept(reference: Reference, questions: np.ndarray, documents: np.ndarray, axes: np.ndarray) -> float:
    """Return the fraction of the ten nearest documents that axes (d, w) keep."""
    cut = [normalise(rows @ axes.astype(np.float32)) for rows in (questions, documents)]
    return float(reference.measure(*cut).overlap.mean())


def save_axes(folder: Path, axes: Axes) -> None:
    """Save the axes of an adaptation in its folder, for a later export.

    Args:
        folder: folder of the adapted model.
        axes: axes without an overlap.
    """
    facts = {"name": axes.name, "texts": axes.texts}
    write_atomic(folder / ROTATION, save({"rotation": np.ascontiguousarray(axes.rotation)}, facts))


def _adapted_axes(folder: Path, model: SentenceTransformer) -> Axes:
    """Return the axes that an adaptation has saved, or those of the heads that it has fitted.

    Raises:
        JasperError: a file of the adaptation is damaged.
    """
    file = folder / (ROTATION if (folder / ROTATION).is_file() else STATISTICS)
    try:
        with safe_open(file, "np") as opened:
            facts, names = opened.metadata() or {}, set(opened.keys())
            if file.name == ROTATION:
                return Axes(opened.get_tensor("rotation"), facts["name"], facts["texts"])
            arrays = {name: opened.get_tensor(name) for name in names if name.startswith(KIND)}
            return _fitted_axes(PairStatistics.of_arrays(arrays, KIND), model)
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise JasperError(f"{file} is damaged ({first_line(error)}). {FIX}") from error


def _fitted_axes(statistics: PairStatistics, model: SentenceTransformer) -> Axes:
    """Return axes of an adapted model's heads, completed by the principal axes of the teacher's documents."""
    texts = f"{statistics.count:,} documents of the adaptation"
    projections = _projections(model)
    rotation = nested_rotation(projections, statistics.target)
    return Axes(rotation, FITTED if projections else PRINCIPAL, texts)


def _projections(model: SentenceTransformer) -> dict[int, np.ndarray]:
    """Return the matrix (d, w) from the widest document embedding to each narrow one, of a model with linear heads."""
    heads = {width: _weight(head) for width, head in role_heads(model)[1]["document"].items()}
    widest = heads.pop(max(heads)) if heads else None
    narrow = {width: weight for width, weight in heads.items() if weight is not None}
    if widest is None:  # the widest embedding is the encoder's
        return {width: weight.T for width, weight in narrow.items()}
    return {width: np.linalg.lstsq(widest.T, weight.T, rcond=None)[0] for width, weight in narrow.items()}


def _weight(head: Sequence[Any]) -> np.ndarray | None:
    """Return the weight (w, H) float64 of a head's linear layer. None: it has none."""
    linear = getattr(head[0], "linear", None)
    return linear.weight.detach().double().cpu().numpy() if isinstance(linear, torch.nn.Linear) else None


def _run_texts(source: Path) -> tuple[list[str], str]:
    """Return a sample of the texts that a run trained on.

    Raises:
        JasperError: the model has no run, or its texts are gone.
    """
    file = next((path / "config.yaml" for path in (source, source.parent) if (path / "config.yaml").is_file()), None)
    if file is None:
        raise JasperError(f"{source}: no texts to order the dimensions by (got a model without its run). {FIX}")
    config = stored_config(dict(read_yaml(file, str(file))), str(file))
    return _texts(config.data.sources), f"the run {config.name}"


def _texts(sources: Sequence[SourceConfig]) -> list[str]:
    """Return at most ``TEXTS`` distinct texts of some sources in random order."""
    found: dict[str, None] = {}
    for source in sources:
        limit = min(source.limit or TEXTS, TEXTS)
        for cells, drawn in sample_texts(source.model_copy(update={"limit": limit}), 0):
            chosen = [join_columns(cells)] if source.join else [cells[place] for place in drawn]
            found |= dict.fromkeys(text for text in chosen if text.strip())
    texts = list(found)
    order = np.random.default_rng(0).permutation(len(texts))[:TEXTS]
    return [texts[place] for place in order]
