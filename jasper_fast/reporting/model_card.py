"""Model card of an exported folder, rendered from a plain dictionary of the run's facts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from jasper_fast.config.run import Config
from jasper_fast.config.yaml import NOT_YAML, parse_yaml
from jasper_fast.models.folder import FACTS_FILE, read_json, student_facts
from jasper_fast.models.hub import resolve_model
from jasper_fast.models.quantization import ranges_file
from jasper_fast.reporting.exports import QUALITY_FILE, loss_line, quality_sources, quality_table
from jasper_fast.reporting.licences import UNKNOWN_LICENCE, derived_licence, licence_text, obligations
from jasper_fast.utils.atomic import write_atomic
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.names import HUB_NAME, public_name

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData


TEMPLATE = "model_card.md.jinja"
TEACHER = "teacher"  # model of the result rows that are shown at any width
INT8_GRAPH = "onnx/model_int8.onnx"
GRAPHS = ("onnx/model.onnx", INT8_GRAPH)  # the first one of a folder is in the examples
LONG_DIGEST = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{20,}\b")
SOURCE_NAMES = {
    "docstrings": "docstrings of the installed Python packages",
    "encyclopedia": "summaries of the Vital Articles of the English Wikipedia (CC BY-SA 4.0)",
    "facts": "short facts of the package randfacts (MIT)",
}


def run_facts(
    config: Config,
    *,
    results: Mapping[str, Any] | None = None,
    texts: int | None = None,
    revisions: Sequence[str | None] = (),
) -> dict[str, Any]:
    """Return the facts of a run for its model card, as plain JSON.

    Args:
        config: configuration of the run.
        results: content of results.json, for the table of scores. None: no scores.
        texts: number of training texts. None: unknown.
        revisions: revision of each teacher, None where unknown. The configuration's revision is used instead.
    """
    padded = [*revisions, *[None] * (len(config.teachers) - len(revisions))]
    teachers = [
        {
            "model": public_name(teacher.model)
            if teacher.model
            else f"embeddings in {Path(str(getattr(teacher, teacher.kind))).name}",
            "revision": revision or teacher.revision,
            "licence": model_licence(teacher.model, teacher.revision) if teacher.model else UNKNOWN_LICENCE,
        }
        for teacher, revision in zip(config.teachers, padded, strict=True)
    ]
    results = results or {}
    return {
        "name": config.name,
        "seed": config.seed,
        "student": student_facts(config.student),
        "licence": model_licence(config.student.model, config.student.revision),
        "language": card_header(config.student.model, config.student.revision).get("language"),
        "teachers": teachers,
        "sources": [public_name(source.path) for source in config.data.sources],
        "texts": texts,
        "early": results.get("early_line"),
        "stages": [stage.model_dump(mode="json") for stage in config.stages],
        "rows": list(results.get("rows", [])),
        "transductive": list(results.get("transductive", [])),
        "refit": results.get("refit", {}).get("line"),
        "encoding": results.get("facts", {}).get("encoding"),
        "device": results.get("facts", {}).get("device"),
        "pictures": results.get("pictures"),
        "picture_sources": [public_name(source.path) for source in config.images.sources] if config.images else [],
    }


def adapted_facts(
    student: str,
    teacher: str,
    *,
    name: str = "adapted student",
    teacher_revision: str | None = None,
    sources: Sequence[str] = (),
    documents: int | None = None,
    held_out: int | None = None,
    chosen: str | None = None,
    projections: Mapping[int, str] | None = None,
    scores: Sequence[Mapping[str, Any]] = (),
    into: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the facts of an adapted model for its model card, as plain JSON.

    If the student is a model of jasper_fast, the facts of its training are kept.

    Args:
        student: model that was adapted: folder of a model or of a run, or a name.
        teacher: model whose space the adapted embeddings are in. For precomputed embeddings, a description of them.
        name: title of the card.
        teacher_revision: revision of the teacher. None: not recorded.
        sources: names of the documents, as in a configuration.
        documents: number of documents that the maps were fitted to.
        held_out: number of documents that were held out to choose by.
        chosen: the chosen map, such as "documents and sentences, λ 10".
        projections: {width: its projection}, such as {64: "learned", 32: "principal axes"}.
        scores: held-out agreement with the teacher, one mapping per row of the table, with the same keys in each. The
            keys are the heads of the columns, and floats are shown with four decimals.
        into: ``kind``, ``rows`` and ``width`` of an existing index that the questions were mapped into. The teacher is
            then the name of this index. None: the model was adapted to documents.
    """
    folder = Path(resolve_model(student))
    trained = folder / FACTS_FILE
    if trained.is_file():
        facts = {key: value for key, value in read_json(trained).items() if key not in ("rows", "pictures", "onnx")}
        facts["student"] = {**facts["student"], "vision": None}
    else:
        facts = {"student": {"model": public_name(student)}, "licence": model_licence(student)}
        facts["language"] = card_header(student).get("language")
    others = {other["model"]: other for other in facts.get("teachers", [])}
    space = others.pop(public_name(teacher), {"model": public_name(teacher), "revision": None})
    space["licence"] = model_licence(teacher, teacher_revision)
    space["revision"] = teacher_revision or space["revision"]
    adapted = {
        "student": public_name(student),
        "teacher": space["model"],
        "sources": [public_name(source) for source in sources],
        "documents": documents,
        "held_out": held_out,
        "chosen": chosen,
        "projections": {str(width): kind for width, kind in (projections or {}).items()},
        "scores": [dict(row) for row in scores],
        "into": dict(into) if into is not None else None,
    }
    return {**facts, "name": name, "teachers": [space, *others.values()], "adapted": adapted}


def model_licence(name: str, revision: str | None = None) -> str:
    """Return the licence from a model's card, or UNKNOWN_LICENCE if the card is not on this machine.

    Args:
        name: hub name, path, or ``package:import_name/folder``.
        revision: branch, tag or commit on the hub. None: the default branch.
    """
    licence = card_header(name, revision).get("license")
    return str(licence) if licence else UNKNOWN_LICENCE


def card_header(name: str, revision: str | None = None) -> dict[str, Any]:
    """Return the front matter of a model's card, empty if the card is not on this machine.

    Args:
        name: hub name, path, or ``package:import_name/folder``.
        revision: branch, tag or commit on the hub. None: the default branch.
    """
    try:
        folder = Path(resolve_model(name))
    except JasperError:  # the package of the model is no longer installed
        return {}
    card: Path | None = folder / "README.md"
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, "README.md", revision=revision) if HUB_NAME.fullmatch(name) else None
        card = Path(cached) if isinstance(cached, str) else None
    if card is None or not card.is_file():
        return {}
    return front_matter(card.read_text(encoding="utf-8", errors="replace"))


def front_matter(text: str) -> dict[str, Any]:
    """Read the YAML front matter of a model card.

    A broken or missing header gives an empty mapping. If a key is repeated, its first value is used.
    """
    match = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    if match is None:
        return {}
    try:
        header = parse_yaml(match[1], duplicates=True)
    except NOT_YAML:
        return {}
    return header if isinstance(header, dict) else {}


def write_card(folder: str | Path, facts: Mapping[str, Any], widths: Sequence[int], *, flat: bool = False) -> None:
    """Write README.md, LICENSE and the facts behind them into an exported folder, each file atomically.

    Args:
        folder: exported model folder, with its weights. The card lists their sizes, and shows ``quality.json``.
        facts: facts of the run, as from run_facts. Sections without facts are left out of the card.
        widths: widths of the embeddings, widest first.
        flat: True for a model with one head and no Router. Default: False.

    Raises:
        JasperError: a file cannot be written.
    """
    folder = Path(folder)
    quantized = (folder / ranges_file(widths[-1])).is_file()
    quality = read_json(folder / QUALITY_FILE) if (folder / QUALITY_FILE).is_file() else None
    files = weight_files(folder)
    card = render_card(facts, widths, flat=flat, quantized=quantized, files=files, quality=quality)
    write_atomic(folder / FACTS_FILE, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    write_atomic(folder / "LICENSE", licence_text(facts))
    write_atomic(folder / "README.md", card)


def weight_files(folder: Path) -> list[tuple[str, int, int | None]]:
    """List the files with weights in a model folder, as (name, bytes, parameters). None: unknown parameters."""
    listed: list[tuple[str, int, int | None]] = []
    for file in sorted(folder.rglob("*")):
        if file.suffix == ".safetensors":
            count = None
            with suppress(SafetensorError), safe_open(file, "np") as weights:  # the export's check reports damage
                count = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118 (not a dict)
            listed.append((file.relative_to(folder).as_posix(), file.stat().st_size, count))
        elif file.suffix in (".onnx", ".data", ".bin", ".gguf"):
            listed.append((file.relative_to(folder).as_posix(), file.stat().st_size, None))
    return listed


def render_card(
    facts: Mapping[str, Any],
    widths: Sequence[int],
    *,
    flat: bool = False,
    quantized: bool = False,
    files: Sequence[tuple[str, int, int | None]] = (),
    quality: Mapping[str, Any] | None = None,
) -> str:
    """Return the model card as Markdown with YAML front matter.

    Args:
        facts: facts of the run, as from run_facts. Sections without facts are left out.
        widths: widths of the embeddings, widest first.
        flat: True for a model with one head and no Router. Default: False.
        quantized: True for a model folder with ranges of int8 codes. Default: False.
        files: files with weights, as from ``weight_files``. Empty: the card does not list them.
        quality: content of ``quality.json``. None: the files were not measured.
    """
    from huggingface_hub import ModelCard

    student = facts.get("student", {})
    prompts = student.get("prompts", {}).items()
    rows = [row for row in facts.get("rows", []) if row["width"] in widths or row["model"] == TEACHER]
    metrics = sorted({metric for row in rows for metric in row["scores"]})
    names = [name for name, _, _ in files]
    card = ModelCard.from_template(
        _metadata(facts),
        template_str=Path(__file__).with_name(TEMPLATE).read_text(encoding="utf-8"),
        name=facts.get("name", "student"),
        widths=list(widths),
        flat=flat,
        ranges_file=ranges_file(widths[-1]) if quantized else None,
        prefix_widths=facts.get("export", {}).get("prefix_widths"),
        prefix_heads=student.get("head_type") == "prefix",
        prompts={role: json.dumps(prompt, ensure_ascii=False) for role, prompt in prompts if prompt},
        **(_image_facts(facts) if not flat and student.get("vision") else {}),
        teachers=[
            (public_name(t["model"]), _short(t.get("revision")), t.get("licence", UNKNOWN_LICENCE))
            for t in facts.get("teachers", [])
        ],
        **(_training_facts(facts) if facts.get("stages") else {}),
        licence=derived_licence(facts),
        base_licence=facts.get("licence", UNKNOWN_LICENCE),
        obligations=obligations(facts),
        torch_weights=not names or any(name.endswith(".safetensors") for name in names),
        adapted=_adapted(facts["adapted"]) if "adapted" in facts else None,
        role=facts.get("export", {}).get("role"),
        onnx=facts.get("onnx"),
        graph=next((name for name in GRAPHS if name in names), None),
        speed=(facts.get("encoding") or {}).get("student_texts_per_s"),
        device=facts.get("device") or "the machine of the run",
        int8=INT8_GRAPH in names,
        files=[(f"`{name}`", f"{size / 1e6:.1f} MB", f"{count:,}" if count else "") for name, size, count in files],
        parameters=f"{sum(count or 0 for _, _, count in files):,}",
        **(_quality_facts(quality) if quality else {}),
        metrics=metrics,
        scores=[_score_row(row, metrics) for row in rows],
        transductive=facts.get("transductive", []),
    )
    return card.content + "\n"


def _quality_facts(quality: Mapping[str, Any]) -> dict[str, Any]:
    """Return the template's variables for the measured files."""
    widths = sorted({row["width"] for row in quality["rows"]}, reverse=True)
    return {
        "quality": quality_table(quality),
        "quality_sources": quality_sources(quality),
        "loss": loss_line(quality),
        "prefixes": widths[1:] if quality["form"] == "prefix" else [],
    }


def _adapted(adapted: Mapping[str, Any]) -> dict[str, Any]:
    """Return the template's variables for the section on the adaptation."""
    columns = list(dict.fromkeys(key for row in adapted.get("scores", []) for key in row))
    return {
        "teacher": "the teacher",
        **adapted,
        "columns": columns,
        "scores": [[_cell(row.get(column)) for column in columns] for row in adapted.get("scores", [])],
    }


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _score_row(row: Mapping[str, Any], metrics: Sequence[str]) -> list[Any]:
    """Return the table cells of one model, width and precision."""
    name = f"{row['model']}, {row['precision']}" if "precision" in row else row["model"]
    return [name, row["width"], *(f"{row['scores'][m]:.4f}" if m in row["scores"] else "" for m in metrics)]


def _short(revision: str | None) -> str:
    """Return a revision with digests cut to twelve digits."""
    return LONG_DIGEST.sub(r"\1", revision) if revision else "not recorded"


def _metadata(facts: Mapping[str, Any]) -> ModelCardData:
    """Return the fields of the front matter that the facts are enough for."""
    from huggingface_hub import ModelCardData

    base = public_name(facts.get("student", {}).get("model", ""))
    sources = facts.get("sources", [])
    datasets = [source for source in sources if HUB_NAME.fullmatch(source) and not Path(source).exists()]
    return ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "sentence-similarity", "feature-extraction", "distillation", "jasper_fast"],
        license=derived_licence(facts)[0],
        base_model=base if HUB_NAME.fullmatch(base) else None,
        datasets=datasets or None,
    )


def _image_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the template's variables for the section on images."""
    from jasper_fast.reporting.tables import scores_markdown

    results = facts.get("pictures")
    return {
        "image_tokens": facts["student"]["vision"]["image_tokens"],
        "image_sources": facts.get("picture_sources", []),
        "image_results": results,
        "image_table": scores_markdown(results) if results else "",
    }


def _training_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the template's variables for the section on training."""
    student, texts, language = facts["student"], facts.get("texts"), facts.get("language")
    layers = student.get("layers")
    return {
        "student_name": public_name(student["model"]),
        "layers": {int: f"its first {layers} layers", list: f"its layers {layers}"}.get(type(layers), "all layers"),
        "max_length": facts.get("adapted", {}).get("trained_length") or student["max_length"],
        "texts": f"{texts:,} texts" if texts else "texts",
        "sources": [SOURCE_NAMES.get(source, source) for source in facts.get("sources", [])],
        "seed": facts.get("seed"),
        "early": facts.get("early"),
        "languages": ", ".join([language] if isinstance(language, str) else map(str, language or [])),
        "stages": [_stage_row(stage) for stage in facts["stages"]],
        "refit": facts.get("refit"),
    }


def _stage_row(stage: Mapping[str, Any]) -> list[str]:
    """Return the table cells of one stage."""
    trains = [f"`{name}`" for name in stage["train"]]
    if stage["last_layers"]:
        trains.append("all layers" if stage["last_layers"] == "all" else f"last {stage['last_layers']} layers")
    losses = _weights(stage["weights"])
    if stage.get("narrow_weights"):
        losses += f"; narrow heads: {_weights(stage['narrow_weights'])}"
    heads = ", ".join(map(str, stage["heads"]))
    numbers = (str(stage["batch_size"]), f"{stage['lr']:g}", str(stage["steps"]))
    return [stage["name"], ", ".join(trains), heads, losses, *numbers]


def _weights(weights: Mapping[str, float]) -> str:
    return ", ".join(f"{weight:g} {loss}" for loss, weight in weights.items() if weight)
