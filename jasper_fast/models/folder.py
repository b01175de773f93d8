"""The folder of an exported model: its layout, and loading a student from it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from jasper_fast.config.models import StudentConfig
from jasper_fast.models.heads import ROUTER, load_heads
from jasper_fast.models.hub import CUSTOM_CODE, routes_by_role
from jasper_fast.models.student import Student
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.names import first_line, public_name

MIGRATION_FILE = "migration.json"  # in a model that was mapped into an index: the model that built the index
FACTS_FILE = "training.json"  # next to the card, for the cards of other exports of the model


def student_facts(config: StudentConfig) -> dict[str, Any]:
    """Return the student's configuration as plain JSON, without local folders."""
    facts = {**config.model_dump(mode="json"), "model": public_name(config.model)}
    if config.vision is not None and config.vision.model is not None:
        facts["vision"]["model"] = public_name(config.vision.model)
    return facts


POOLING = "1_Pooling"
VISION = "vision"  # folder of the vision tower; jasper_fast.pictures reads it, sentence-transformers ignores it


def model_folder(path: str | Path) -> Path:
    """Return the exported model folder of one encoder: ``path`` itself, or ``model`` or ``symmetric`` in it.

    Args:
        path: model folder, run folder, or folder of an adapted model.

    Raises:
        JasperError: the folder is missing, or it contains no exported model.
    """
    path = Path(path)
    for folder in (path / "model", path):
        if (folder / ROUTER / "router_config.json").is_file() or is_headless(folder):
            return folder
    if (path / "symmetric" / ROUTER / "router_config.json").is_file():
        print(f"note: {path}: using its form `symmetric`, because one encoder is needed", file=sys.stderr)
        return path / "symmetric"
    forms = [folder for folder in (path, path / "asymmetric") if (folder / "modules.json").is_file()]
    if any(routes_by_role(str(folder)) for folder in forms):
        raise JasperError(
            f"{path}: an asymmetric model has two encoders, and this needs one. Fix: give the folder `symmetric` of "
            "the adapted model"
        )
    if not path.is_dir():
        raise JasperError(f"{path}: there is no such folder. Fix: give a run folder, for example runs/NAME")
    raise JasperError(
        f"{path}: no finished model here (no {ROUTER}/router_config.json in it or in its folder `model`). "
        "Fix: finish the run with the command that started it"
    )


def is_headless(folder: Path) -> bool:
    """Return True if a model folder has a student without a head: Transformer, Pooling and Normalize."""
    if not (folder / FACTS_FILE).is_file() or not (folder / "modules.json").is_file():
        return False
    kinds = [module["type"].rpartition(".")[2] for module in read_json(folder / "modules.json")]
    return kinds == ["Transformer", "Pooling", "Normalize"]


def read_json(path: Path) -> Any:
    """Read a JSON file in UTF-8."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON in UTF-8."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_student(path: str | Path, *, trust_remote_code: bool = False, trust_tower_code: bool | None = None) -> Student:
    """Load the student of an exported folder: encoder, heads and the vision tower if there is one.

    Settings in the folder never permit its code to run, because the folder may come from anywhere.

    Args:
        path: model folder or run folder.
        trust_remote_code: permission to run code from the model. Default: False.
        trust_tower_code: permission to run code from the vision tower. None: as ``trust_remote_code``.

    Returns:
        The student on the CPU, in evaluation mode.

    Raises:
        JasperError: the folder is missing, a file in it is missing or corrupt, or it has code that may not run.

    Example:
        >>> student = load_student("runs/minilm-docstrings")  # doctest: +SKIP
        >>> student.widths  # doctest: +SKIP
        [384, 128, 64, 32]
    """
    folder = model_folder(path)
    facts = folder / FACTS_FILE
    if not facts.is_file():
        raise JasperError(f"{facts} is missing, and loading the student needs it. Fix: export the run again")
    try:
        fields = dict(json.loads(facts.read_text(encoding="utf-8"))["student"])
        fields["heads"]  # has a default in a configuration, but a model's widths are a fact
    except (ValueError, KeyError, TypeError) as error:
        raise JasperError(f"{facts} is corrupt ({first_line(error)}). Fix: export the run again") from error
    fields |= {"model": str(folder), "layers": None, "trust_remote_code": trust_remote_code}
    if fields.get("vision"):
        fields["vision"] |= {"model": str(folder / VISION), "tower": None, "revision": None}
        fields["vision"]["trust_remote_code"] = trust_remote_code if trust_tower_code is None else trust_tower_code
    try:
        student = Student.build(StudentConfig(**fields))
    except ValidationError as error:
        raise JasperError(f"{facts} is corrupt ({first_line(error)}). Fix: export the run again") from error
    except JasperError as error:
        if "trust_remote_code: true" in str(error):  # advice about a configuration file, which a folder lacks
            raise JasperError(f"{folder}: {CUSTOM_CODE}") from error
        raise
    if not student.headless:
        load_heads(student.heads, folder)
    return student.eval()
