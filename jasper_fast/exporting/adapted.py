"""Export a student that was adapted to documents: its embeddings, times a matrix, are in its teacher's space.

*symmetric*: the student encodes queries and documents. *asymmetric*: the student encodes queries, and the teacher
encodes documents. Stock sentence-transformers loads both forms.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from jasper_fast.exporting.parity import check_adapted, source_rows
from jasper_fast.models.folder import read_json, write_json
from jasper_fast.models.hub import prompt_of
from jasper_fast.models.loading import without_bars
from jasper_fast.models.quantization import ranges_file
from jasper_fast.models.sentence_transformer import ROLES, role_modules, roles_differ, set_length, transformers_of
from jasper_fast.reporting.model_card import write_card
from jasper_fast.utils.atomic import publish_dir
from jasper_fast.utils.errors import JasperError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense

NO_LIMIT = 10**9  # tokens; tokenizers without a limit have a larger number
Linear = tuple[np.ndarray, np.ndarray | None]  # weight (out, in) and bias (out,), float64


def export_symmetric(
    student: SentenceTransformer,
    heads: Mapping[int, np.ndarray],
    path: str | Path,
    *,
    max_length: int | None = None,
    card: Mapping[str, Any] | None = None,
    ranges: Mapping[int, np.ndarray] | None = None,
    replace: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Write a model whose student encodes queries and documents: the student's modules, a Router of heads, Normalize.

    The folder has the form of ``export_student``. ``encode(texts, task="64")`` gives the 64-wide embeddings, and the
    widest ones are the default. A linear layer at the end of the student, such as the widest head of a jasper_fast
    model, is multiplied into the new heads.

    Args:
        student: sentence-transformers model on any device, with embeddings of width h. It stays as it is.
        heads: {w: (h, w)}. The embeddings of width w are those of the student times this matrix, normalised.
        path: new model folder. It is published complete or not at all.
        max_length: maximum number of tokens per text. None: the student's.
        card: facts for the model card, as from ``adapted_facts`` of the model card. None: only the widths.
        ranges: {w: (2, w) float32 ranges of int8 codes}, as from ``int8_ranges``, saved in the folder. None: no ranges.
        replace: permission to replace an existing folder. Default: False.
        trust_remote_code: permission to run the student's code while the export is checked. Default: False.

    Returns:
        ``path``.

    Raises:
        JasperError: a matrix does not fit the student, or the student has different modules for queries and
            documents. ``path`` cannot be written, or the exported embeddings differ from the student's.

    Example:
        >>> export_symmetric(student, {384: W, 64: W @ P}, "adapted/symmetric")  # doctest: +SKIP
    """
    from sentence_transformers.sentence_transformer.modules import Normalize, Router

    if roles_differ(student):
        raise JasperError(
            "export_symmetric: the student encodes queries and documents with different modules (expected the same "
            "ones). Fix: give a symmetric student, or use export_asymmetric"
        )
    student = _copy(student, max_length)
    rows = {role: source_rows(student, role) for role in ROLES}
    matrices = _matrices("heads", heads, rows["query"].shape[1])
    stem, linear = split_head(role_modules(student, "document"))
    linear = linear or identity_layer(student, "document")
    routes = {str(width): [dense_layer(linear, matrix)] for width, matrix in matrices.items()}
    widest = next(iter(routes))
    # There is no route for (None, None), because it would accept widths that do not exist.
    router = Router(routes, widest, route_mappings={(role, None): widest for role in ROLES})
    prompts = {role: prompt_of(student.prompts, role) for role in ROLES}
    with publish_dir(path, replace=replace) as folder:
        save_modules([*stem, router, Normalize()], prompts, str(student.device), folder)
        _save_ranges(ranges, folder)
        write_card(folder, _facts(card, "symmetric", dict.fromkeys(ROLES, student), list(matrices)), list(matrices))
        expected = {role: {w: rows[role] @ matrix for w, matrix in matrices.items()} for role in ROLES}
        check_adapted(folder, expected, "{width}", str(student.device), trust_remote_code=trust_remote_code)
    return Path(path)


def export_asymmetric(
    student: SentenceTransformer,
    teacher: SentenceTransformer,
    heads: Mapping[int, np.ndarray],
    projections: Mapping[int, np.ndarray | None],
    path: str | Path,
    *,
    max_length: int | None = None,
    card: Mapping[str, Any] | None = None,
    ranges: Mapping[int, np.ndarray] | None = None,
    replace: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Write a model whose student encodes queries and whose teacher encodes documents, both in one space.

    Stock ``encode_query`` and ``encode_document`` give the widest embeddings. ``encode(texts, prompt_name="query",
    task="query-64")`` and ``encode(texts, prompt_name="document", task="document-64")`` give another width. ``encode``
    without a task raises an error. Each encoder keeps its tokenizer, prompt and maximum length.

    Args:
        student: sentence-transformers model on any device, with query embeddings of width h. It stays as it is.
        teacher: sentence-transformers model, with document embeddings of width d.
        heads: {w: (h, w)}. The query embeddings of width w are those of the student times this matrix, normalised.
        projections: {w: (d, w)} for the same widths. The document embeddings are those of the teacher times this
            matrix, normalised. None at width d: the teacher's embeddings.
        path: new model folder. It is published complete or not at all.
        max_length: maximum number of tokens per query. None: the student's.
        card: facts for the model card, as from ``adapted_facts`` of the model card. None: only the widths.
        ranges: {w: (2, w) float32 ranges of int8 codes}, as from ``int8_ranges``, saved in the folder. None: no ranges.
        replace: permission to replace an existing folder. Default: False.
        trust_remote_code: permission to run the models' code while the export is checked. Default: False.

    Returns:
        ``path``.

    Raises:
        JasperError: a matrix does not fit its model, ``path`` cannot be written, or the exported embeddings differ
            from those of the student and the teacher.

    Example:
        >>> export_asymmetric(student, teacher, {384: W, 64: W @ P}, {384: None, 64: P}, "out")  # doctest: +SKIP
    """
    from sentence_transformers.sentence_transformer.modules import Normalize, Router

    student, teacher = _copy(student, max_length), teacher if _is_float32(teacher) else _copy(teacher, None)
    encoders, device = {"query": student, "document": teacher}, str(teacher.device)
    rows = {role: source_rows(encoder, role) for role, encoder in encoders.items()}
    queries = _matrices("heads", heads, rows["query"].shape[1])
    documents = _projections(projections, list(queries), rows["document"].shape[1])
    stem, linear = split_head(role_modules(student, "query"))
    linear, whole = linear or identity_layer(student, "query"), identity_layer(teacher, "document")
    normalize = Normalize()  # shared by all routes, so that it is saved once
    routes = {f"query-{w}": [dense_layer(linear, matrix), normalize] for w, matrix in queries.items()}
    for width, projection in documents.items():
        cut = [] if projection is None and width == len(whole[0]) else [dense_layer(whole, _or_eye(projection, width))]
        routes[f"document-{width}"] = [*cut, normalize]
    tasks = {(task, None): task.partition("-")[0] for task in routes}
    modules = [
        Router(
            {"query": stem, "document": role_modules(teacher, "document")}, allow_empty_key=False, route_mappings=tasks
        ),
        Router(
            routes, allow_empty_key=False, route_mappings={(role, None): f"{role}-{max(queries)}" for role in ROLES}
        ),
    ]
    prompts = {role: prompt_of(encoder.prompts, role) for role, encoder in encoders.items()}
    with publish_dir(path, replace=replace) as folder:
        save_modules(modules, prompts, device, folder)
        _save_ranges(ranges, folder)
        write_card(folder, _facts(card, "asymmetric", encoders, list(queries)), list(queries))
        expected = {
            "query": {w: rows["query"] @ matrix for w, matrix in queries.items()},
            "document": {w: rows["document"] @ _or_eye(matrix, w) for w, matrix in documents.items()},
        }
        check_adapted(folder, expected, "{role}-{width}", device, trust_remote_code=trust_remote_code)
    return Path(path)


def _copy(model: SentenceTransformer, max_length: int | None) -> SentenceTransformer:
    """Return a float32 copy of a model in evaluation mode, with another maximum length if one is given."""
    model = copy.deepcopy(model).float().eval()
    if max_length is not None:
        for module in transformers_of(model):
            module.query_length = module.document_length = None
        set_length(model, max_length, "the student")
    return model


def _is_float32(model: SentenceTransformer) -> bool:
    return all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point())


def _matrices(name: str, given: Mapping[int, np.ndarray], rows: int) -> dict[int, np.ndarray]:
    """Return checked float64 matrices (rows, w) by width, widest first."""
    if not given:
        raise JasperError(f"{name}: no matrix (got none, expected one per width). Fix: give at least one width")
    matrices = {}
    for width in sorted(given, reverse=True):
        matrix = np.asarray(given[width], dtype=np.float64)
        if matrix.shape != (rows, width):
            raise JasperError(
                f"{name}[{width}]: the matrix does not fit the model's embeddings (got {matrix.shape}, expected "
                f"{(rows, width)}). Fix: fit it to embeddings of this model"
            )
        if not np.isfinite(matrix).all():
            raise JasperError(f"{name}[{width}]: the matrix holds NaN or infinity. Fix: fit it again")
        matrices[width] = matrix
    return matrices


def _projections(
    given: Mapping[int, np.ndarray | None], widths: Sequence[int], rows: int
) -> dict[int, np.ndarray | None]:
    """Return checked projections of the teacher for each width. None is allowed at the teacher's own width."""
    if sorted(given, reverse=True) != list(widths):
        raise JasperError(
            f"projections: other widths than the heads (got {sorted(given, reverse=True)}, expected {list(widths)}). "
            "Fix: give a head and a projection for each width"
        )
    for width, matrix in given.items():
        if matrix is None and width != rows:
            raise JasperError(
                f"projections[{width}]: None keeps the teacher's {rows} dimensions (got None, expected a matrix "
                f"{(rows, width)}). Fix: give the projection"
            )
    matrices = _matrices("projections", {w: _or_eye(matrix, rows) for w, matrix in given.items()}, rows)
    return {width: None if given[width] is None else matrix for width, matrix in matrices.items()}


def _or_eye(matrix: np.ndarray | None, width: int) -> np.ndarray:
    return np.eye(width) if matrix is None else matrix


def split_head(modules: Sequence[Any]) -> tuple[list[Any], Linear | None]:
    """Take a model apart: the modules before its last linear layer, and this layer if there is one.

    Normalize modules at the end are left out, because a head has its own Normalize after it.
    """
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize

    stem, name = list(modules), "sentence_embedding"
    while (
        len(stem) > 1
        and isinstance(stem[-1], Normalize)
        and {stem[-1].module_input_name, stem[-1].module_output_name} == {name}
    ):
        stem.pop()
    last = stem[-1]
    linear = isinstance(last, Dense) and isinstance(last.activation_function, nn.Identity) and not last.use_residual
    if len(stem) == 1 or not linear or {last.module_input_name, last.module_output_name} != {name}:
        return stem, None
    bias = last.linear.bias
    return stem[:-1], (_float64(last.linear.weight), None if bias is None else _float64(bias))


def _float64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()


def identity_layer(model: SentenceTransformer, role: str) -> Linear:
    """Return the linear layer that leaves a model's whole embedding as it is, with no coordinates cut off."""
    with model.truncate_embeddings(None):
        return np.eye(source_rows(model, role).shape[1]), None


def dense_layer(linear: Linear, matrix: np.ndarray) -> Dense:
    """Return the product of a linear layer and a matrix (k, w), which takes the first k coordinates of its output."""
    from sentence_transformers.sentence_transformer.modules import Dense

    (weight, bias), kept = linear, len(matrix)
    product = torch.from_numpy(matrix.T @ weight[:kept]).float()
    return Dense(
        product.shape[1],
        product.shape[0],
        bias=bias is not None,
        activation_function=nn.Identity(),
        init_weight=product,
        init_bias=None if bias is None else torch.from_numpy(matrix.T @ bias[:kept]).float(),
    )


def save_modules(modules: list[Any], prompts: Mapping[str, str], device: str, folder: Path) -> None:
    """Write a sentence-transformers model, without a card."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(modules=modules, prompts=dict(prompts), similarity_fn_name="cosine", device=device)
    with without_bars():
        model.save(str(folder), create_model_card=False)
    for module, place in _places(modules[0]):
        file = folder / place / "sentence_bert_config.json"
        settings = {**read_json(file), "max_seq_length": module.max_seq_length, "do_lower_case": False}
        if getattr(module.model, "pooler", True) is None:
            settings["model_args"] = {"add_pooling_layer": False}  # otherwise loading adds random weights
        write_json(file, settings)


def _save_ranges(ranges: Mapping[int, np.ndarray] | None, folder: Path) -> None:
    for width, pair in (ranges or {}).items():
        np.save(folder / ranges_file(width), pair)


def _places(first: Any) -> Iterator[tuple[Any, str]]:
    """Yield the Transformers of a model's first module, with their folders."""
    from sentence_transformers.base.modules import Router, Transformer

    parts = [(first, "")]
    if isinstance(first, Router):
        parts = [(route[0], f"{name}_0_{type(route[0]).__name__}") for name, route in first.sub_modules.items()]
    yield from ((module, place) for module, place in parts if isinstance(module, Transformer))


def _facts(
    card: Mapping[str, Any] | None, form: str, encoders: Mapping[str, SentenceTransformer], widths: Sequence[int]
) -> dict[str, Any]:
    """Return the facts for the card, with the form and the student as exported. ``encoders`` has a model per role."""
    facts, student = dict(card or {}), encoders["query"]
    fields = facts.get("student", {})
    adapted = {**facts.get("adapted", {}), "form": form, "max_length": {}, "trained_length": fields.get("max_length")}
    for role, encoder in encoders.items():
        lengths = [int(module.max_seq_length or NO_LIMIT) for module in transformers_of(encoder, role)]
        adapted["max_length"] |= {role: max(lengths)} if lengths and max(lengths) < NO_LIMIT else {}
    exported = {
        "model": "student",
        **fields,
        "prompts": {role: prompt_of(encoders[role].prompts, role) for role in ROLES},
    }
    if "query" in adapted["max_length"] and _averages(student):  # what load_student can load
        exported |= {"heads": list(widths), "head_type": "independent", "max_length": adapted["max_length"]["query"]}
    return {**facts, "student": exported, "adapted": adapted}


def _averages(model: SentenceTransformer) -> bool:
    """Return True if a model is a Transformer, mean pooling, and at most linear layers and Normalize after them."""
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    stem, _ = split_head(role_modules(model, "document"))
    kinds = [type(module) for module in stem]
    return kinds == [Transformer, Pooling] and stem[1].pooling_mode == "mean" and stem[1].include_prompt
