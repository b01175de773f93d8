"""Export a student as a sentence-transformers folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from jasper_fast.exporting.parity import check_export
from jasper_fast.models.folder import POOLING, VISION, student_facts, write_json
from jasper_fast.models.heads import ROUTER
from jasper_fast.models.loading import without_bars
from jasper_fast.models.quantization import ranges_file
from jasper_fast.reporting.licences import UNKNOWN_LICENCE
from jasper_fast.reporting.model_card import card_header, write_card
from jasper_fast.utils.atomic import publish_dir

if TYPE_CHECKING:
    from jasper_fast.models.student import Student


def export_student(
    student: Student,
    path: str | Path,
    *,
    card: Mapping[str, Any] | None = None,
    ranges: Mapping[int, np.ndarray] | None = None,
    replace: bool = False,
) -> Path:
    """Write a sentence-transformers model: Transformer, Pooling, a Router of Dense heads if it has heads, Normalize.

    Stock sentence-transformers loads the folder before it is published. Its embeddings must match the student's.

    ``encode(texts, task="128")`` uses the 128-wide head. Without a task, the widest head is used. An unknown width
    raises an error.

    Args:
        student: trained student, on any device.
        path: new model folder. It is published complete or not at all.
        card: facts of the run, as from ``run_facts`` of the model card. None: only the student's configuration.
        ranges: (2, width) float32 ranges of int8 codes by width, as from ``int8_ranges``. They are saved in the folder.
            None: no ranges.
        replace: permission to replace an existing folder. Default: False.

    Returns:
        ``path``.

    Raises:
        JasperError: ``path`` exists already or cannot be written, or the exported embeddings differ from the student's.
    """
    with publish_dir(path, replace=replace) as folder:
        if student.vision is not None:
            student.vision.store_boundary_embeddings(student.encoder)
            student.vision.save(folder / VISION)
        with without_bars():
            student.encoder.save_pretrained(folder)
        student.tokenizer.save_pretrained(folder)
        write_json(folder / "sentence_bert_config.json", _transformer_settings(student))
        _write_modules(student, folder)
        write_json(folder / "config_sentence_transformers.json", _model_settings(student))
        for width, pair in (ranges or {}).items():
            np.save(folder / ranges_file(width), pair)
        write_card(folder, _facts(student) if card is None else card, student.widths, flat=student.headless)
        check_export(student, folder, trust_remote_code=student.config.trust_remote_code)
    return Path(path)


def _facts(student: Student) -> dict[str, Any]:
    """Return what is known of a student without its run."""
    config = student.config
    header = card_header(config.model, config.revision)
    licence = str(header.get("license") or UNKNOWN_LICENCE)
    return {"student": student_facts(config), "licence": licence, "language": header.get("language")}


def _write_modules(student: Student, folder: Path) -> None:
    """Write the modules after the Transformer, and ``modules.json``, which lists all of them."""
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    modules: list[tuple[Any, str]] = [(Pooling(student.hidden_size, "mean"), POOLING)]
    modules += [] if student.headless else [(_router(student), ROUTER)]
    modules.append((Normalize(), f"{len(modules) + 1}_Normalize"))
    listing = [_entry(0, "", Transformer)]
    for number, (module, place) in enumerate(modules, 1):
        (folder / place).mkdir()
        module.save(str(folder / place))
        listing.append(_entry(number, place, type(module)))
    write_json(folder / "modules.json", listing)


def _router(student: Student) -> Any:
    """Return a Router with a Dense layer for each width. The widest is the default."""
    from sentence_transformers.sentence_transformer.modules import Dense, Router

    routes = {}
    for width in student.widths:
        weight, bias = student.head(width)  # cloned below: prefix heads are views, which safetensors rejects
        routes[str(width)] = [
            Dense(
                student.hidden_size,
                width,
                activation_function=nn.Identity(),
                init_weight=weight.float().cpu().clone(),
                init_bias=bias.float().cpu().clone(),
            )
        ]
    widest = str(student.widths[0])
    # There is no route for (None, None), because it would accept widths that do not exist.
    return Router(routes, widest, route_mappings={("query", None): widest, ("document", None): widest})


def _transformer_settings(student: Student) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "max_seq_length": student.max_length,
        "do_lower_case": False,  # the tokenizer lower-cases if the base model needs it
        "transformer_task": "feature-extraction",
        # Explicit, because with a chat template in the tokenizer every text would become a chat message.
        "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        "module_output_name": "token_embeddings",
    }
    if getattr(student.encoder, "pooler", True) is None:
        settings["model_args"] = {"add_pooling_layer": False}  # otherwise loading adds a pooler with random weights
    return settings


def _model_settings(student: Student) -> dict[str, Any]:
    import sentence_transformers
    import transformers

    return {
        "model_type": "SentenceTransformer",
        "__version__": {
            "sentence_transformers": sentence_transformers.__version__,
            "transformers": transformers.__version__,
            "pytorch": torch.__version__,
        },
        "prompts": student.prefixes,
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }


def _entry(number: int, place: str, kind: type) -> dict[str, Any]:
    return {"idx": number, "name": str(number), "path": place, "type": f"{kind.__module__}.{kind.__name__}"}
