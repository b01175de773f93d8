"""The saved state of an adaptation: its settings, and the statistics with the texts that they cover."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from jasper_fast.config.diff import config_difference
from jasper_fast.fitting.statistics import PairStatistics
from jasper_fast.teachers.reuse import digest_keys
from jasper_fast.training.run.folder import LOCK, RESULTS
from jasper_fast.utils.atomic import REPLACED, TEMPORARY, write_atomic
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.fingerprint import settings_digest
from jasper_fast.utils.names import first_line

ADAPT, STATISTICS = "adapt.json", "statistics.safetensors"
FORMAT = 1  # increment it when this version cannot continue older folders
DOCUMENTS, SENTENCES = KINDS = ("documents", "sentences")
PROBES = 32  # documents with kept embeddings, to recognise vectors of another model
MIN_COSINE = 0.999  # of two embeddings of one text by one model


@dataclass
class State:
    """The saved state of an adaptation.

    Args:
        folder: its folder.
        settings: what may not change, as JSON.
        facts: what was decided or measured, as JSON: ``length``, ``texts`` and others.
        sums: statistics by kind of text. Empty before the first rows are counted.
        counted: (n,) uint64, the first half of the digest of each counted text, by kind.
        probes: digests (k,) uint64 and teacher embeddings (k, d) float32 of some counted documents.
    """

    folder: Path
    settings: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    sums: dict[str, PairStatistics] = field(default_factory=dict)
    counted: dict[str, np.ndarray] = field(default_factory=lambda: {kind: np.empty(0, np.uint64) for kind in KINDS})
    probes: tuple[np.ndarray, np.ndarray] | None = None
    models: str | None = None  # digest of the identities of student and teacher whose statistics were loaded

    @property
    def finished(self) -> bool:
        """True if the last call wrote its results, and no later one has begun."""
        return (self.folder / RESULTS).is_file()

    def save_facts(self, **facts: Any) -> None:
        """Add facts and write them with the settings."""
        self.facts |= facts
        content = {"format": FORMAT, "settings": self.settings, "facts": self.facts}
        write_atomic(self.folder / ADAPT, json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n")

    def save_statistics(self, models: dict[str, Any]) -> None:
        """Write the statistics with the texts that they cover, in one file.

        Args:
            models: identities of student and teacher.
        """
        arrays: dict[str, np.ndarray] = {}
        for kind, sums in self.sums.items():
            arrays |= sums.arrays(f"{kind}.")
            arrays[f"{kind}.texts"] = self.counted[kind]
        if self.probes is not None:
            arrays["probes.texts"], arrays["probes.vectors"] = self.probes
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}  # safetensors ignores strides
        write_atomic(self.folder / STATISTICS, save(arrays, {"models": settings_digest(models)}))

    def load_statistics(self) -> None:
        """Load the statistics if there are any.

        Raises:
            JasperError: the file is damaged.
        """
        file = self.folder / STATISTICS
        if not file.is_file():
            return
        try:
            with safe_open(file, "np") as opened:
                self.models = (opened.metadata() or {}).get("models")
                arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, no mapping
            self.sums = {k: PairStatistics.of_arrays(arrays, f"{k}.") for k in KINDS if f"{k}.texts" in arrays}
        except (SafetensorError, ValueError, OSError) as error:
            raise JasperError(
                f"{file} is damaged ({first_line(error)}). Fix: delete it, and the documents are counted again"
            ) from error
        self.counted |= {kind: arrays[f"{kind}.texts"] for kind in self.sums}
        if "probes.texts" in arrays:
            self.probes = arrays["probes.texts"], arrays["probes.vectors"]

    def check_models(self, models: dict[str, Any]) -> None:
        """Reject statistics of another student or teacher.

        Args:
            models: identities of student and teacher.

        Raises:
            JasperError: the loaded statistics are of others.
        """
        if self.models is not None and self.models != settings_digest(models):
            raise JasperError(
                f"{self.folder / STATISTICS} is of another student or teacher. Fix: use another --out, or delete the "
                "file to count the documents again"
            )

    def is_new(self, kind: str, digests: list[str]) -> np.ndarray:
        """Return which texts are not counted yet, (n,) bool.

        Only the first 64 bits of a digest are compared. Among a million texts, two share them with a probability of
        3e-8.
        """
        return ~np.isin(short_keys(digests), self.counted[kind])

    def add(self, kind: str, student: np.ndarray, teacher: np.ndarray, digests: list[str]) -> None:
        """Count texts.

        Args:
            kind: "documents" or "sentences".
            student: (n, h) float32 unit rows.
            teacher: (n, d) float32 unit rows.
            digests: digests of the n texts, which are not counted yet.
        """
        if kind not in self.sums:
            self.sums[kind] = PairStatistics(student.shape[1], teacher.shape[1])
        self.sums[kind].add(student, teacher)
        keys = short_keys(digests)
        self.counted[kind] = np.concatenate([self.counted[kind], keys])
        if kind == KINDS[0] and self.probes is None:
            self.probes = keys[:PROBES], np.ascontiguousarray(teacher[:PROBES])

    def check_probes(self, texts: np.ndarray, read: Callable[[np.ndarray], np.ndarray], name: str) -> None:
        """Reject vectors of another model, by the documents with kept embeddings.

        Args:
            texts: (n,) uint64, the first 64 bits of the digests of n documents.
            read: function from some of their positions, (k,) int64, to the vectors (k, d) of these, unit rows.
            name: the vectors, for the message.

        Raises:
            JasperError: a document has another vector than before.
        """
        if self.probes is None:
            return
        keys, kept = self.probes
        _, old, new = np.intersect1d(keys, texts, return_indices=True)
        if not len(old):
            return
        vectors = read(new)
        same_width = vectors.shape[1] == kept.shape[1]
        worst = float((vectors * kept[old]).sum(axis=1).min()) if same_width else 0.0
        if worst < MIN_COSINE:
            got = f"a cosine of {worst:.3f}" if same_width else f"widths {kept.shape[1]} and {vectors.shape[1]}"
            raise JasperError(
                f"{name}: a document has another vector than in earlier calls (got {got}, expected a cosine of at "
                f"least {MIN_COSINE}). Fix: give vectors of the same model, or use another --out"
            )


def short_keys(digests: list[str]) -> np.ndarray:
    """Return the first 64 bits of digests, (n,) uint64."""
    return digest_keys(digests)[:, 0] if digests else np.empty(0, np.uint64)


def open_state(folder: Path, settings: dict[str, Any]) -> State:
    """Load the state of a folder, or begin one.

    Args:
        folder: the folder of the adaptation, which this process holds.
        settings: the settings of this call.

    Raises:
        JasperError: the folder holds something else, or an adaptation with other settings.
    """
    file = folder / ADAPT
    if not file.is_file():
        check_vacant(folder)
        return State(folder, settings)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version, stored, facts = content["format"], dict(content["settings"]), dict(content["facts"])
    except (ValueError, KeyError, TypeError) as error:
        raise JasperError(f"{file} is damaged ({first_line(error)}). Fix: restore it, or use another --out") from error
    if version != FORMAT:
        raise JasperError(f"{file} is of another version of jasper_fast. Fix: use another --out")
    if difference := config_difference(stored, settings):
        raise JasperError(
            f"{folder} is an adaptation with other settings (stored -> given):\n  - "
            + "\n  - ".join(difference)
            + "\nFix: repeat the old settings to continue it, or use another --out"
        )
    return State(folder, settings, facts)


def check_vacant(folder: Path) -> None:
    """Reject a folder that holds something else than an adaptation.

    Raises:
        JasperError: it does.
    """
    if not folder.is_dir() or (folder / ADAPT).is_file():
        return
    ours = (LOCK, TEMPORARY, REPLACED)
    found = sorted(path.name for path in folder.iterdir() if not path.name.startswith(ours))
    if found:
        raise JasperError(
            f"{folder} holds something else (got {', '.join(found[:3])}, expected an adaptation or an empty folder). "
            "Fix: use another --out"
        )
