"""Export one width as a flat sentence-transformers folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from jasper_fast.exporting.parity import check_flat_export
from jasper_fast.models.folder import FACTS_FILE, NORMALIZE, POOLING, model_folder, read_json, write_json
from jasper_fast.models.heads import ROUTER, routes_of
from jasper_fast.models.quantization import ranges_file
from jasper_fast.reporting.model_card import write_card
from jasper_fast.utils.atomic import publish_dir
from jasper_fast.utils.errors import JasperError

# Keys with their defaults in sentence-transformers 6. Version 5 and older reject them.
NEW_DENSE_KEYS = {"module_input_name", "module_output_name"}


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
    rewritten = {"modules.json", "README.md", FACTS_FILE, "sentence_bert_config.json"}
    for file in source.iterdir():
        of_other_width = file.match(ranges_file("*")) and file.name != ranges_file(width)
        if file.is_file() and file.name not in rewritten and not of_other_width:
            shutil.copy2(file, folder)
    shutil.copytree(source / ROUTER / routes_of(source)[width], folder / "2_Dense")
    dense = folder / "2_Dense" / "config.json"
    write_json(dense, {k: v for k, v in read_json(dense).items() if k not in NEW_DENSE_KEYS})
    pooling = read_json(source / POOLING / "config.json")
    modes = {
        "cls_token": "cls",
        "mean_tokens": "mean",
        "max_tokens": "max",
        "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    }
    modes |= {"weightedmean_tokens": "weightedmean", "lasttoken": "lasttoken"}
    (folder / POOLING).mkdir()
    (folder / NORMALIZE).mkdir()
    write_json(
        folder / POOLING / "config.json",
        {
            "word_embedding_dimension": pooling["embedding_dimension"],
            **{f"pooling_mode_{name}": mode == pooling["pooling_mode"] for name, mode in modes.items()},
        },
    )
    write_json(folder / NORMALIZE / "config.json", {})  # git and object stores drop empty folders
    settings = read_json(source / "sentence_bert_config.json")
    shared = {key: settings[key] for key in ("max_seq_length", "do_lower_case", "model_args") if key in settings}
    write_json(folder / "sentence_bert_config.json", shared)
    _limit_tokenizer(folder, settings.get("max_seq_length"))
    places = {"Transformer": "", "Pooling": POOLING, "Dense": "2_Dense", "Normalize": NORMALIZE}
    listing = [
        {"idx": number, "name": str(number), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, place) in enumerate(places.items())
    ]
    write_json(folder / "modules.json", listing)
    write_card(folder, read_json(source / FACTS_FILE) if (source / FACTS_FILE).is_file() else {}, [width], flat=True)


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
