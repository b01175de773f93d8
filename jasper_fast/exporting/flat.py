"""Export one width as a flat sentence-transformers folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jasper_fast.exporting.parity import check_flat_export
from jasper_fast.models.folder import FACTS_FILE, POOLING, model_folder, read_json, write_json
from jasper_fast.models.heads import ROUTER, routes_of
from jasper_fast.models.quantization import ranges_file
from jasper_fast.reporting.model_card import write_card
from jasper_fast.utils.atomic import publish_dir
from jasper_fast.utils.errors import JasperError

# Keys with their defaults in sentence-transformers 6. Version 5 and older reject them.
NEW_DENSE_KEYS = {"module_input_name", "module_output_name"}
OLD_MODULES = "sentence_transformers.models"  # where all versions find the modules
POOLING_MODES = {  # the name of each mode's switch in version 5
    "cls_token": "cls",
    "mean_tokens": "mean",
    "max_tokens": "max",
    "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "weightedmean_tokens": "weightedmean",
    "lasttoken": "lasttoken",
}


def export_flat(model: str | Path, width: int | None, out: str | Path, *, trust_remote_code: bool = False) -> Path:
    """Write one width as Transformer, Pooling, Dense and Normalize, with module names that servers recognise.

    Args:
        model: model folder from export_student, or its run folder.
        width: width of the embeddings. None: the widest.
        out: new model folder.
        trust_remote_code: permission to run code from the model while the export is checked. Default: False.

    Returns:
        ``out`` as a path.

    Raises:
        JasperError: the model or the width does not exist, ``out`` exists already, or the exported embeddings differ
            from those of ``model``.
    """
    source = model_folder(model)
    width = resolve_width(source, width)
    with publish_dir(out) as folder:
        write_flat(source, width, folder)
        check_flat_export(source, folder, width, trust_remote_code=trust_remote_code)
    return Path(out)


def write_flat(source: Path, width: int, folder: Path) -> None:
    """Write one width of a model folder as a flat SentenceTransformer of four modules."""
    head = source / ROUTER / routes_of(source)[width]
    copy_model(source, width, folder, {"Pooling": source / POOLING, "Dense": head, "Normalize": None}, "flat")


def copy_model(source: Path, width: int, folder: Path, parts: dict[str, Path | None], form: str) -> None:
    """Copy an encoder with some modules after it, as sentence-transformers 4 and newer read them, and write its card.

    Args:
        source: model folder from export_student.
        width: width of the embeddings.
        folder: unpublished folder.
        parts: folder of each module by kind, in order. None: the module has no settings.
        form: form of the export, for the facts.
    """
    rewritten = {"modules.json", "README.md", FACTS_FILE}
    for file in source.iterdir():
        of_other_width = file.match(ranges_file("*")) and file.name != ranges_file(width)
        if file.is_file() and file.name not in rewritten and not of_other_width:
            shutil.copy2(file, folder)
    places = {"Transformer": ""} | {kind: f"{number}_{kind}" for number, kind in enumerate(parts, 1)}
    for kind, part in parts.items():
        (folder / places[kind]).mkdir() if part is None else shutil.copytree(part, folder / places[kind])
    write_json(
        folder / "modules.json",
        [
            {"idx": number, "name": str(number), "path": place, "type": f"{OLD_MODULES}.{kind}"}
            for number, (kind, place) in enumerate(places.items())
        ],
    )
    for_older_readers(folder)
    facts = read_json(source / FACTS_FILE) if (source / FACTS_FILE).is_file() else {}
    write_card(folder, {**facts, "export": {"form": form, "width": width}}, [width], flat=True)


def for_older_readers(folder: Path) -> None:
    """Rewrite the settings of a model folder without a Router as sentence-transformers 4 and 5 read them.

    Version 6 reads them too. Modules of other kinds than Transformer, Pooling, Dense and Normalize stay as they are.

    Args:
        folder: unpublished model folder with ``modules.json``.
    """
    listing = read_json(folder / "modules.json")
    for entry in listing:
        kind, place = entry["type"].rpartition(".")[2], folder / entry["path"]
        if kind not in OLD_SETTINGS:
            continue
        file, rewrite = OLD_SETTINGS[kind]
        write_json(place / file, rewrite(read_json(place / file) if (place / file).is_file() else {}))
        entry["type"] = f"{OLD_MODULES}.{kind}"
    write_json(folder / "modules.json", listing)
    _limit_tokenizer(folder, read_json(folder / "sentence_bert_config.json").get("max_seq_length"))


def _old_transformer(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: settings[key] for key in ("max_seq_length", "do_lower_case", "model_args") if key in settings}


def _old_pooling(settings: dict[str, Any]) -> dict[str, Any]:
    if "pooling_mode" not in settings:  # written for older readers already
        return settings
    return {
        "word_embedding_dimension": settings["embedding_dimension"],
        **{f"pooling_mode_{name}": mode == settings["pooling_mode"] for name, mode in POOLING_MODES.items()},
        "include_prompt": settings.get("include_prompt", True),
    }


def _old_dense(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in NEW_DENSE_KEYS}


# The file and the conversion of each module's settings. An empty folder would get lost in git and object stores.
OLD_SETTINGS: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "Transformer": ("sentence_bert_config.json", _old_transformer),
    "Pooling": ("config.json", _old_pooling),
    "Dense": ("config.json", _old_dense),
    "Normalize": ("config.json", lambda settings: {}),
}


def _limit_tokenizer(folder: Path, tokens: int | None) -> None:
    """Give the tokenizer's own settings the maximum length of the model.

    fastembed truncates at the smaller of the two, and a base model's ``max_length`` may be smaller.
    """
    file = folder / "tokenizer_config.json"
    if tokens is not None and file.is_file():
        limits = dict.fromkeys(("model_max_length", "max_length"), tokens)
        write_json(file, {**read_json(file), **limits})


def resolve_width(source: Path, width: int | None) -> int:
    """Check that the model has a width, and return it. None means the first width."""
    widths = list(routes_of(source))
    if width is not None and width not in widths:
        raise JasperError(f"{source}: no head of width {width}. Fix: give --width {' or '.join(map(str, widths))}")
    return width or widths[0]
