"""Load an ONNX graph as a teacher: onnxruntime runs it, and pooling and prompts are those of other teachers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from jasper_fast.config.models import TeacherConfig
from jasper_fast.models.graph import TextGraph, graph_folder, graph_revision
from jasper_fast.models.hub import PROMPTS, read_settings
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.names import first_line

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

POOLED = "sentence_embedding"
POOLING = "1_Pooling/config.json"


def load_graph_teacher(config: TeacherConfig, file: Path, pooling: str | None) -> SentenceTransformer:
    """Build a model from a graph, its tokenizer, and pooling.

    The output with states of tokens is pooled by ``pooling``, by the settings next to the graph, or by the mean. An
    output ``sentence_embedding`` is used as it is, unless ``pooling`` is given.

    Args:
        config: teacher with ``model``.
        file: its ONNX file.
        pooling: name of a pooling in sentence-transformers. None: the model's own.

    Raises:
        JasperError: onnxruntime or the tokenizer is missing, a file is damaged, the outputs have an unknown shape, or
            the teacher asks for a ``dense`` head.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize

    from jasper_fast.models.graph_module import GraphModule

    name = str(config.model)
    if config.dense is not None:
        raise JasperError(
            f"{name}: `dense: {config.dense}` needs a PyTorch model (got an ONNX graph). Fix: omit `dense`"
        )
    graph = TextGraph(name, file, threads=torch.get_num_threads(), trust_remote_code=config.trust_remote_code)
    output = _output(graph, pooling)
    graph.probe(output)
    module = GraphModule(graph, output)
    modules: list[Any] = (
        [module] if module.pools else [module, _pooling(graph, module.get_embedding_dimension(), pooling)]
    )
    prompts = read_settings(str(graph.folder), None, PROMPTS).get("prompts") or {}
    return SentenceTransformer(modules=[*modules, Normalize()], prompts=prompts, device="cpu")


def graph_note(model: SentenceTransformer) -> str | None:
    """Return a message about the batches of a graph teacher, or None."""
    if not model[0].graph.alone:
        return None
    return "the graph reads one text at a time, because its int8 activations have one scale for a whole batch"


def describe_graph(model: str, file: Path) -> dict[str, str]:
    """Return the name of a teacher's graph without local folders, and the identity of its files.

    Args:
        model: model as in the configuration.
        file: its ONNX file.
    """
    folder = (graph_folder(file) or file.parent).resolve()
    local = model.endswith(file.suffix) or Path(model).expanduser().is_dir()
    name = f"{folder.name}/{file.resolve().relative_to(folder).as_posix()}" if local else model
    return {"model": name, "revision": graph_revision(file)}


def _output(graph: TextGraph, pooling: str | None) -> str:
    states = [name for name, shape in graph.outputs.items() if len(shape) == 3]
    pooled = [name for name, shape in graph.outputs.items() if len(shape) == 2]
    if POOLED in pooled and (pooling is None or not states):
        chosen = [POOLED]
    else:
        chosen = states[:1] or (pooled if len(graph.outputs) == 1 else [])
    if not chosen:
        listed = ", ".join(f"{name} {shape}" for name, shape in graph.outputs.items())
        raise JasperError(
            f"{graph.name}: the graph has no output with embeddings (got {listed}, expected {POOLED} of shape (batch, "
            "width), or states of shape (batch, tokens, width)). Fix: export the encoder again, with one of these"
        )
    if pooling is not None and chosen[0] in pooled:
        raise JasperError(
            f"{graph.name}: pooling cannot be changed, because it is inside the graph (got outputs "
            f"{', '.join(graph.outputs)}). Fix: set `pooling: auto` for this teacher"
        )
    return chosen[0]


def _pooling(graph: TextGraph, width: int, pooling: str | None) -> Any:
    """Return the pooling module: the asked one, that of the settings next to the graph, or the mean."""
    from sentence_transformers.sentence_transformer.modules import Pooling

    if pooling is not None or not read_settings(str(graph.folder), None, POOLING):
        return Pooling(width, pooling or "mean")
    try:
        module = Pooling.load(str(graph.folder), subfolder=POOLING.partition("/")[0])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise JasperError(
            f"{graph.name}: {POOLING} is damaged ({first_line(error)}). Fix: copy the model again, or set `pooling`"
        ) from error
    if not module.include_prompt:
        raise JasperError(
            f"{graph.name}: {POOLING} leaves the prompt out of the pooling, which graphs cannot do. Fix: set "
            "`pooling`, or use the model in PyTorch form"
        )
    return module
