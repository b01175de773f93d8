"""Export a trained student to formats that load without jasper_fast: sentence-transformers folders and ONNX.

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
VISION = "vision"  # folder of the vision tower; jasper_fast.pictures reads it, sentence-transformers ignores it
ONNX_FILE = "onnx/model.onnx"
ONNX_TOLERANCE = 1e-4  # largest accepted difference of a coordinate between ONNX and PyTorch
CHECK_TEXTS = ["one", "a sentence that is a little longer than the first", "words and more words, " * 6]


def export_student(
    student: Student,
    path: str | Path,
    *,
    card: Mapping[str, Any] | None = None,
    ranges: Mapping[int, np.ndarray] | None = None,
    replace: bool = False,
) -> Path:
    """Write a sentence-transformers model: Transformer, Pooling, a Router of Dense heads, Normalize.

    Stock sentence-transformers loads the folder before it is published. Its embeddings must match the student's.

    ``encode(texts, task="128")`` uses the 128-wide head. Without a task, the widest head is used. An unknown width
    raises an error.

    Args:
        student: trained student, on any device.
        path: new model folder. It is published complete or not at all.
        card: facts of the run, as from jasper_fast.card.run_facts. None: only the student's configuration.
        ranges: (2, width) float32 ranges of int8 codes by width, as from jasper_fast.codes.int8_ranges. They are
            saved in the folder. None: no ranges.
        replace: permission to replace an existing folder. Default: False.

    Returns:
        ``path``.

    Raises:
        JasperError: ``path`` exists already or cannot be written, or the exported embeddings differ from the student's.
    """
    with publish_dir(path, replace=replace) as folder:
        if student.vision is not None:
            student.vision.store_marks(student.encoder)
            student.vision.save(folder / VISION)
        student.encoder.save_pretrained(folder)
        student.tokenizer.save_pretrained(folder)
        write_json(folder / "sentence_bert_config.json", _transformer_settings(student))
        _write_modules(student, folder)
        write_json(folder / "config_sentence_transformers.json", _model_settings(student))
        for width, pair in (ranges or {}).items():
            np.save(folder / ranges_file(width), pair)
        facts = dict(card) if card is not None else {"student": student_facts(student.config)}
        write_card(folder, facts, student.widths)
        check_export(student, folder, trust_remote_code=student.config.trust_remote_code)
    return Path(path)


def _write_modules(student: Student, folder: Path) -> None:
    """Write the modules after the Transformer, and ``modules.json``, which lists all of them."""
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Router, Transformer

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
    router = Router(routes, widest, route_mappings={("query", None): widest, ("document", None): widest})
    modules = [(Pooling(student.hidden_size, "mean"), POOLING), (router, ROUTER), (Normalize(), NORMALIZE)]
    listing = [_entry(0, "", Transformer)]
    for number, (module, place) in enumerate(modules, 1):
        (folder / place).mkdir()
        module.save(str(folder / place))
        listing.append(_entry(number, place, type(module)))
    write_json(folder / "modules.json", listing)


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
    width = known_width(source, width)
    with publish_dir(out) as folder:
        write_flat(source, width, folder)
        check_same(source, folder, width, trust_remote_code=trust_remote_code)
    return Path(out)


def export_onnx(model: str | Path, width: int | None, out: str | Path, *, trust_remote_code: bool = False) -> Path:
    """Write one width as export_flat does, and an ONNX graph ``onnx/model.onnx`` in the same folder.

    The graph maps ``input_ids`` and ``attention_mask``, both (B, L) int64, to ``sentence_embedding``, (B, width)
    float32 with L2-normalised rows. B and L are dynamic. onnxruntime runs the graph before the folder is published.
    Its embeddings must match those of PyTorch.

    Args:
        model: model folder from export_student, or its run folder.
        width: width of the embeddings. None: the widest.
        out: new model folder.
        trust_remote_code: permission to run code from the model. Default: False.

    Returns:
        ``out`` as a path.

    Raises:
        JasperError: the model or the width does not exist, a package is missing, the architecture cannot be exported
            to ONNX, or the embeddings of the graph differ.
    """
    _need_onnx()
    source = model_folder(model)
    width = known_width(source, width)
    with publish_dir(out) as folder:
        write_flat(source, width, folder)
        loaded = load_model(str(folder), device="cpu", trust_remote_code=trust_remote_code)
        graph = folder / ONNX_FILE
        graph.parent.mkdir()
        with _explained_onnx(loaded, source):
            _write_graph(_Vectors(loaded), loaded, graph)
            difference = _onnx_difference(loaded, graph)
        if not difference <= ONNX_TOLERANCE:
            raise JasperError(
                f"{source}: the ONNX export differs from PyTorch (got a difference of {difference:.1e} in a "
                f"coordinate, expected at most {ONNX_TOLERANCE:.0e}). Fix: export without --onnx"
            )
    return Path(out)


def model_folder(path: str | Path) -> Path:
    """Return the exported model folder: ``path`` itself, or ``model`` in a run folder.

    Args:
        path: model folder or run folder.

    Raises:
        JasperError: the folder is missing, or it contains no exported model.
    """
    path = Path(path)
    for folder in (path / "model", path):
        if (folder / ROUTER / "router_config.json").is_file():
            return folder
    if not path.is_dir():
        raise JasperError(f"{path}: there is no such folder. Fix: give a run folder, for example runs/NAME")
    raise JasperError(
        f"{path}: no finished model here (no {ROUTER}/router_config.json in it or in its folder `model`). "
        "Fix: finish the run with the command that started it"
    )


def main(argv: list[str]) -> int:
    """Run the command line: export one width, with an ONNX graph if requested."""
    parser = argparse.ArgumentParser("python -m jasper_fast.export", description=__doc__)
    parser.add_argument("run", help="run folder, or the model folder in it")
    parser.add_argument("--width", type=whole_number, metavar="N", help="width of the embeddings (default: the widest)")
    parser.add_argument("--onnx", action="store_true", help="add an ONNX graph and check it with onnxruntime")
    parser.add_argument("--out", help="new folder (default: next to the model, named after the width)")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code from the model folder; only for models you trust"
    )
    arguments = parser.parse_args(argv)
    check_model_argument(arguments.run, "export")
    source = model_folder(arguments.run)
    width = known_width(source, arguments.width)
    ending = "-onnx" if arguments.onnx else ""
    out = arguments.out or source.resolve().parent / f"{source.resolve().name}-{width}{ending}"
    if arguments.onnx:
        written = export_onnx(source, width, out, trust_remote_code=arguments.trust_remote_code)
    else:
        written = export_flat(source, width, out, trust_remote_code=arguments.trust_remote_code)
    print(f"wrote {written}: embeddings {width} wide" + (f", graph in {ONNX_FILE}" if arguments.onnx else ""))
    return 0


class _Vectors(nn.Module):
    """Sentence-transformers model with two input tensors and one output tensor, as torch.onnx.export expects."""

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
    """Raise errors of torch's exporter and onnxruntime as a JasperError with the name of the architecture."""
    from onnxruntime.capi import onnxruntime_pybind11_state as runtime

    failures: list[type[Exception]] = [torch.onnx.OnnxExporterError]
    failures += [kind for kind in vars(runtime).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    try:
        yield
    except tuple(failures) as error:
        architecture = " and ".join(type(module.model).__name__ for module in transformers_of(loaded))
        raise JasperError(
            f"{source}: torch {torch.__version__} cannot export {architecture} to ONNX "
            f"({first_line(error.__cause__ or error)}). Nothing was published. Fix: export without --onnx"
        ) from error


def _write_graph(vectors: nn.Module, loaded: Any, path: Path) -> None:
    features = loaded.preprocess(CHECK_TEXTS[:2])
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    large = (
        sum(p.numel() * p.element_size() for p in vectors.parameters()) > 1 << 30
    )  # an ONNX file is limited to 2 GiB
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
    """Return the largest difference of a coordinate between onnxruntime and PyTorch, on shapes not used for tracing."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for texts in (CHECK_TEXTS, CHECK_TEXTS[:1], [CHECK_TEXTS[2]] * 5):
        features = loaded.preprocess(texts)
        inputs = {name: features[name].numpy() for name in ("input_ids", "attention_mask")}
        embeddings = torch.from_numpy(session.run(None, inputs)[0])
        worst = max(worst, float((embeddings - loaded.encode(texts, convert_to_tensor=True)).abs().max()))
    return worst


def _need_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise JasperError(
            f"--onnx: the package {error.name} is missing. Fix: `pip install onnx onnxscript onnxruntime` "
            "(or the extra `export`)"
        ) from None


def write_flat(source: Path, width: int, folder: Path) -> None:
    rewritten = {"modules.json", "README.md", FACTS_FILE, "sentence_bert_config.json"}
    for file in source.iterdir():
        of_other_width = file.match(ranges_file("*")) and file.name != ranges_file(width)
        if file.is_file() and file.name not in rewritten and not of_other_width:
            shutil.copy2(file, folder)
    shutil.copytree(source / ROUTER / routes_of(source)[width], folder / "2_Dense")
    hidden = json.loads((source / POOLING / "config.json").read_text(encoding="utf-8"))["embedding_dimension"]
    (folder / POOLING).mkdir()
    (folder / NORMALIZE).mkdir()
    write_json(
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
    write_json(folder / "sentence_bert_config.json", shared)
    places = {"Transformer": "", "Pooling": POOLING, "Dense": "2_Dense", "Normalize": NORMALIZE}
    listing = [
        {"idx": number, "name": str(number), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, place) in enumerate(places.items())
    ]
    write_json(folder / "modules.json", listing)
    facts = source / FACTS_FILE
    write_card(folder, json.loads(facts.read_text(encoding="utf-8")) if facts.is_file() else {}, [width], flat=True)


def routes_of(source: Path) -> dict[int, str]:
    """Map each width to the folder of its head, relative to the Router's folder, widest first.

    Args:
        source: model folder.

    Raises:
        JasperError: the Router's settings are damaged, or its routes are not widths.
    """
    file = source / ROUTER / "router_config.json"
    try:
        structure = json.loads(file.read_text(encoding="utf-8"))["structure"]
        routes = {int(name): str(folders[0]) for name, folders in structure.items()}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise JasperError(f"{file} is damaged ({first_line(error)}). Fix: export the run again") from error
    if not routes:
        raise JasperError(f"{file}: no heads are listed. Fix: export the run again")
    return dict(sorted(routes.items(), reverse=True))


def known_width(source: Path, width: int | None) -> int:
    widths = list(routes_of(source))
    if width is not None and width not in widths:
        raise JasperError(f"{source}: no head of width {width}. Fix: give --width {' or '.join(map(str, widths))}")
    return width or widths[0]


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


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_cli(main)
