"""Write a trained student in forms that need no jasper_fast: sentence-transformers folders and ONNX.

``python -m jasper_fast.export RUN --width 128 [--onnx] [--out DIR]`` takes a run folder or an exported model.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from jasper_fast.card import FACTS_FILE, student_facts, write_card
from jasper_fast.codes import ranges_file
from jasper_fast.command_line import check_model_argument, whole_number
from jasper_fast.encoders import load_model
from jasper_fast.errors import JasperError, run_cli
from jasper_fast.files import publish_dir
from jasper_fast.models import first_line
from jasper_fast.parity import check_export, check_same
from jasper_fast.stock import transformers_of

if TYPE_CHECKING:
    from jasper_fast.model import Student

POOLING, ROUTER, NORMALIZE = "1_Pooling", "2_Router", "3_Normalize"
VISION = "vision"  # the tower; sentence-transformers does not read it, jasper_fast.pictures does
ONNX_FILE = "onnx/model.onnx"
ONNX_TOLERANCE = 1e-4  # largest difference of a coordinate that an export may show against PyTorch
CHECK_TEXTS = ["one", "a sentence that is a little longer than the first", "words and more words, " * 6]


def export_student(
    student: Student,
    path: str | Path,
    *,
    card: Mapping[str, Any] | None = None,
    ranges: Mapping[int, np.ndarray] | None = None,
    replace: bool = False,
) -> Path:
    """Write a folder that stock sentence-transformers loads: Transformer, Pooling, a Router of Dense heads, Normalize.

    Before it is published, stock sentence-transformers loads it and must give the student's embeddings.

    ``encode(texts, task="128")`` takes the 128-wide head; without a task the widest answers; an unknown width raises.

    Args:
        student: on any device.
        path: where the folder appears, whole or not at all.
        card: facts of the run, as from jasper_fast.card.run_facts.
        ranges: of int8 codes by width, as from jasper_fast.codes.int8_ranges; written beside the model.
        replace: whether a folder that is there gives way.

    Returns:
        ``path``.

    Raises:
        JasperError: the place is taken or cannot be written, or the export's embeddings are not the student's.
    """
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Router, Transformer

    with publish_dir(path, replace=replace) as folder:
        if student.vision is not None:
            student.vision.store_marks(student.encoder)
            student.vision.save(folder / VISION)
        student.encoder.save_pretrained(folder)
        student.tokenizer.save_pretrained(folder)
        _write_json(folder / "sentence_bert_config.json", _transformer_settings(student))
        routes = {}
        for width in student.widths:
            weight, bias = student.head(width)  # cloned below: safetensors refuses views, as prefix heads give
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
        # No route for (None, None): it would answer to widths that do not exist.
        router = Router(routes, widest, route_mappings={("query", None): widest, ("document", None): widest})
        modules = [(Pooling(student.hidden_size, "mean"), POOLING), (router, ROUTER), (Normalize(), NORMALIZE)]
        listing = [_entry(0, "", Transformer)]
        for number, (module, place) in enumerate(modules, 1):
            (folder / place).mkdir()
            module.save(str(folder / place))
            listing.append(_entry(number, place, type(module)))
        _write_json(folder / "modules.json", listing)
        _write_json(folder / "config_sentence_transformers.json", _model_settings(student))
        for width, pair in (ranges or {}).items():
            np.save(folder / ranges_file(width), pair)
        facts = dict(card) if card is not None else {"student": student_facts(student.config)}
        write_card(folder, facts, student.widths)
        check_export(student, folder, trust_remote_code=student.config.trust_remote_code)
    return Path(path)


def export_flat(model: str | Path, width: int | None, out: str | Path, *, trust_remote_code: bool = False) -> Path:
    """Write one width as Transformer, Pooling, Dense, Normalize, under the names that servers know.

    Args:
        model: a folder that export_student wrote, or the run folder around it.
        width: of the embeddings; None: the widest.
        out: the new folder.
        trust_remote_code: permission to run code that the model brings, to check the export.

    Raises:
        JasperError: no such model or width, ``out`` is taken, or the embeddings are not those of ``model``.
    """
    source = model_folder(model)
    width = _known_width(source, width)
    with publish_dir(out) as folder:
        _write_flat(source, width, folder)
        check_same(source, folder, width, trust_remote_code=trust_remote_code)
    return Path(out)


def export_onnx(model: str | Path, width: int | None, out: str | Path, *, trust_remote_code: bool = False) -> Path:
    """Write the flat form of one width with ``onnx/model.onnx`` in it: token ids in, unit vectors out.

    The graph takes ``input_ids`` and ``attention_mask`` (B, L) int64 and gives ``sentence_embedding`` (B, width)
    float32, for any B and L. Before it is published it is run with onnxruntime and compared with PyTorch.

    Args:
        model: a folder that export_student wrote, or the run folder around it.
        width: of the vectors; None: the widest.
        out: where the folder appears.
        trust_remote_code: whether code that the model brings may run.

    Raises:
        JasperError: no such model or width, a package is missing, the architecture has no ONNX form, or the graph's
            embeddings differ.
    """
    _need_onnx()
    source = model_folder(model)
    width = _known_width(source, width)
    with publish_dir(out) as folder:
        _write_flat(source, width, folder)
        loaded = load_model(str(folder), device="cpu", trust_remote_code=trust_remote_code)
        graph = folder / ONNX_FILE
        graph.parent.mkdir()
        with _explained_onnx(loaded, source):
            _write_graph(_Vectors(loaded), loaded, graph)
            difference = _onnx_difference(loaded, graph)
        if not difference <= ONNX_TOLERANCE:
            raise JasperError(
                f"the ONNX form of {source} differs from PyTorch by {difference:.1e} in a coordinate (at most "
                f"{ONNX_TOLERANCE:.0e} is accepted); use the form without --onnx"
            )
    return Path(out)


def model_folder(path: str | Path) -> Path:
    """The exported model that a path means: itself, or ``model`` in a run folder.

    Raises:
        JasperError: there is none, or it has no Router of widths.
    """
    path = Path(path)
    for folder in (path / "model", path):
        if (folder / ROUTER / "router_config.json").is_file():
            return folder
    if not path.is_dir():
        raise JasperError(f"{path}: there is no such folder; give a run folder, e.g. runs/NAME")
    raise JasperError(
        f"{path} holds no finished model ({ROUTER}/router_config.json is not in it or in its folder `model`); "
        "finish the run with the command that started it"
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m jasper_fast.export", description=__doc__)
    parser.add_argument("run", help="a run folder, or the model folder in it")
    parser.add_argument("--width", type=whole_number, metavar="N", help="width of the vectors (default: the widest)")
    parser.add_argument("--onnx", action="store_true", help="with an ONNX graph, checked with onnxruntime")
    parser.add_argument("--out", help="the new folder (default: beside the model, named after the width)")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that the model brings, if you trust it"
    )
    arguments = parser.parse_args(argv)
    check_model_argument(arguments.run, "export")
    source = model_folder(arguments.run)
    width = _known_width(source, arguments.width)
    ending = "-onnx" if arguments.onnx else ""
    out = arguments.out or source.resolve().parent / f"{source.resolve().name}-{width}{ending}"
    if arguments.onnx:
        written = export_onnx(source, width, out, trust_remote_code=arguments.trust_remote_code)
    else:
        written = export_flat(source, width, out, trust_remote_code=arguments.trust_remote_code)
    print(f"wrote {written}: vectors {width} wide" + (f", graph in {ONNX_FILE}" if arguments.onnx else ""))
    return 0


class _Vectors(nn.Module):
    """A sentence-transformers model as a function of two tensors, which is what a graph can be made of."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.steps = nn.ModuleList(model)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        features: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        for step in self.steps:
            features = step(features)
        return features["sentence_embedding"]


@contextmanager
def _explained_onnx(loaded: Any, source: Path) -> Iterator[None]:
    """Turn what torch's exporter or onnxruntime raises into an error that names the architecture."""
    from onnxruntime.capi import onnxruntime_pybind11_state as runtime

    failures: list[type[Exception]] = [torch.onnx.OnnxExporterError]
    failures += [kind for kind in vars(runtime).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    try:
        yield
    except tuple(failures) as error:
        architecture = " and ".join(type(module.model).__name__ for module in transformers_of(loaded))
        raise JasperError(
            f"{source}: {architecture} has no ONNX form that torch {torch.__version__} can write "
            f"({first_line(error.__cause__ or error)}); nothing was published. Fix: use the form without --onnx"
        ) from error


def _write_graph(vectors: nn.Module, loaded: Any, path: Path) -> None:
    features = loaded.preprocess(CHECK_TEXTS[:2])
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    large = sum(p.numel() * p.element_size() for p in vectors.parameters()) > 1 << 30  # one file holds 2 GiB at most
    torch.onnx.export(
        vectors.eval(),
        (features["input_ids"], features["attention_mask"]),
        str(path),
        input_names=["input_ids", "attention_mask"],
        output_names=["sentence_embedding"],
        dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
        dynamo=True,
        external_data=large,
        verbose=False,
    )


def _onnx_difference(loaded: Any, path: Path) -> float:
    """Largest difference of a coordinate between onnxruntime and PyTorch, on shapes the graph was not made of."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for texts in (CHECK_TEXTS, CHECK_TEXTS[:1], [CHECK_TEXTS[2]] * 5):
        features = loaded.preprocess(texts)
        given = {name: features[name].numpy() for name in ("input_ids", "attention_mask")}
        found = torch.from_numpy(session.run(None, given)[0])
        worst = max(worst, float((found - loaded.encode(texts, convert_to_tensor=True)).abs().max()))
    return worst


def _need_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise JasperError(
            f"--onnx needs the package {error.name}; type `pip install onnx onnxscript onnxruntime` "
            "(the extra `export` has them)"
        ) from None


def _write_flat(source: Path, width: int, folder: Path) -> None:
    own = {"modules.json", "README.md", FACTS_FILE, "sentence_bert_config.json"}
    for file in source.iterdir():
        other = file.match(ranges_file("*")) and file.name != ranges_file(width)
        if file.is_file() and file.name not in own and not other:
            shutil.copy2(file, folder)
    shutil.copytree(source / ROUTER / routes_of(source)[width], folder / "2_Dense")
    hidden = json.loads((source / POOLING / "config.json").read_text(encoding="utf-8"))["embedding_dimension"]
    (folder / POOLING).mkdir()
    (folder / NORMALIZE).mkdir()
    _write_json(
        folder / POOLING / "config.json",
        {
            "word_embedding_dimension": hidden,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
    )
    settings = json.loads((source / "sentence_bert_config.json").read_text(encoding="utf-8"))
    shared = {key: settings[key] for key in ("max_seq_length", "do_lower_case", "model_args") if key in settings}
    _write_json(folder / "sentence_bert_config.json", shared)
    places = {"Transformer": "", "Pooling": POOLING, "Dense": "2_Dense", "Normalize": NORMALIZE}
    listing = [
        {"idx": number, "name": str(number), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, place) in enumerate(places.items())
    ]
    _write_json(folder / "modules.json", listing)
    facts = source / FACTS_FILE
    write_card(folder, json.loads(facts.read_text(encoding="utf-8")) if facts.is_file() else {}, [width], flat=True)


def routes_of(source: Path) -> dict[int, str]:
    """Map each width to its head's folder inside the Router's, widest first.

    Raises:
        JasperError: the Router's settings are damaged, or its routes are not widths.
    """
    file = source / ROUTER / "router_config.json"
    try:
        structure = json.loads(file.read_text(encoding="utf-8"))["structure"]
        found = {int(name): str(places[0]) for name, places in structure.items()}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise JasperError(f"{file} is damaged ({first_line(error)}). Fix: export the run again") from error
    if not found:
        raise JasperError(f"{file} names no head. Fix: export the run again")
    return dict(sorted(found.items(), reverse=True))


def _known_width(source: Path, width: int | None) -> int:
    widths = list(routes_of(source))
    if width is not None and width not in widths:
        raise JasperError(f"{source} has no head of width {width}; give --width {' or '.join(map(str, widths))}")
    return width or widths[0]


def _transformer_settings(student: Student) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "max_seq_length": student.max_length,
        "do_lower_case": False,  # it is in the tokenizer where the base model asked for it
        "transformer_task": "feature-extraction",
        # Said outright: a tokenizer with a chat template would otherwise have every text rendered as a chat message.
        "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        "module_output_name": "token_embeddings",
    }
    if getattr(student.encoder, "pooler", True) is None:
        settings["model_args"] = {"add_pooling_layer": False}  # loading would add one with random weights
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


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_cli(main)
