"""Run an ONNX graph of texts with its tokenizer: the graph of an embedding model, or of a cross-encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jasper_fast.data.listing import user_path
from jasper_fast.models.hub import is_weights, read_settings, resolve_model
from jasper_fast.models.probes import LONG, SHORT
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.fingerprint import file_sha256, sha256
from jasper_fast.utils.names import first_line

SUFFIX = ".onnx"
GRAPHS = ("onnx/model.onnx", "model.onnx")  # in this order, if a folder is given
NO_LIMIT = 10**6  # tokenizers without a maximum length have a huge one
TOLERANCE = 1e-4  # relative change of an output by another text in the batch, from which texts are read alone
SETTINGS = ("*.json", "*.txt", "*.model", "1_Pooling/config.json")  # files next to a graph that decide its results

Arrays = Mapping[str, np.ndarray]


def find_graph(source: str) -> Path | None:
    """Return the ONNX file of a model, or None if PyTorch runs the model.

    Args:
        source: ``FILE.onnx``, or a model as in `resolve_model`. A folder is a graph if it has no PyTorch weights.

    Raises:
        JasperError: the file does not exist.
    """
    if source.endswith(SUFFIX):
        file = user_path(source)
        if file.is_dir():
            return None
        if not file.is_file():
            raise JasperError(f"{source}: there is no such file. Fix: correct the path of the ONNX graph")
        return file
    folder = Path(resolve_model(source))
    graph = next((folder / name for name in GRAPHS if (folder / name).is_file()), None)
    has_weights = graph is not None and any(map(is_weights, folder.rglob("*")))
    return None if has_weights else graph


def graph_folder(file: Path) -> Path | None:
    """Return the folder of a graph's tokenizer: the folder of the graph, or the one above. None: no tokenizer."""
    return next((place for place in (file.parent, file.parent.parent) if _has_tokenizer(place)), None)


def settings_name(source: str) -> str:
    """Return a model's name, or the folder of an ONNX file, for functions that read the settings of a model."""
    file = find_graph(source) if source.endswith(SUFFIX) else None
    return source if file is None else str(graph_folder(file) or file.parent)


def graph_revision(file: Path) -> str:
    """Return ``sha256:…`` over a graph, its external weights, and the settings and vocabulary in its folder."""
    folder = graph_folder(file) or file.parent
    weights = sorted(file.parent.glob(f"{file.name}*"))
    settings = sorted({path for glob in SETTINGS for path in folder.glob(glob) if path.is_file()})
    named = [(path.name, path) for path in weights]
    named += [(path.relative_to(folder).as_posix(), path) for path in settings if path not in weights]
    digest = sha256(f"{name}\0{file_sha256(path)}\n" for name, path in named)
    return f"sha256:{digest}"


def open_session(name: str, file: Path, threads: int | None = None) -> Any:
    """Open a graph in onnxruntime on the CPU.

    Args:
        name: model, for messages.
        file: ONNX file.
        threads: CPU threads. None: the default of onnxruntime.

    Raises:
        JasperError: onnxruntime is missing, or cannot load the graph.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise JasperError(
            f"{name}: the package {error.name} is missing, which runs ONNX graphs. Fix: `pip install onnxruntime` (or "
            "the extra `export`)"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its classes of errors have no common base
        raise JasperError(
            f"{name}: onnxruntime cannot load the graph ({first_line(error)}). Fix: copy or export the model again"
        ) from None


def tokenizer_folder(name: str, file: Path) -> Path:
    """Return the folder of a graph's tokenizer and settings.

    Raises:
        JasperError: there is no tokenizer next to the graph or in the folder above.
    """
    folder = graph_folder(file)
    if folder is None:
        raise JasperError(
            f"{name}: no tokenizer next to the graph (expected tokenizer.json in {file.parent} or in the folder "
            "above). Fix: copy the whole export"
        )
    return folder


def load_tokenizer(name: str, folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a graph from its folder.

    Raises:
        JasperError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # errors of transformers and tokenizers have no common base
        raise JasperError(
            f"{name}: the tokenizer cannot be loaded ({first_line(error)}). Fix: copy the whole export"
        ) from None


def graph_inputs(name: str, wanted: Sequence[str], features: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the inputs of a graph, as int64, from the result of a tokenizer.

    Args:
        name: model, for messages.
        wanted: names of the inputs.
        features: result of the tokenizer.

    Raises:
        JasperError: the graph needs an input that the tokenizer lacks.
    """
    inputs = {key: features.get(key) for key in wanted}
    missing = [key for key, value in inputs.items() if value is None]
    if missing:
        raise JasperError(
            f"{name}: the tokenizer has no {' and '.join(missing)}, which the graph needs. Fix: give a graph and a "
            "tokenizer of the same export"
        )
    return {key: np.asarray(value).astype(np.int64) for key, value in inputs.items() if value is not None}


class TextGraph:
    """An ONNX graph that reads texts or pairs of texts, run by onnxruntime on the CPU.

    Args:
        name: model, for messages.
        file: ONNX file. Its tokenizer is in its folder, or in the folder above.
        threads: CPU threads. None: the default of onnxruntime.
        trust_remote_code: permission to run the tokenizer's code.

    Attributes:
        folder: folder of the tokenizer and the settings.
        tokenizer: Hugging Face tokenizer. It pads on the right.
        outputs: shape of each output by name. Unknown sizes are None or text.
        limit: most tokens of a text by the settings. None: they state no limit.
        alone: True if `run` reads one row after the other, because a row's result depends on the other rows of a batch.
            `probe` finds that out.

    Raises:
        JasperError: onnxruntime or the tokenizer is missing, or one of both cannot be loaded.
    """

    def __init__(self, name: str, file: Path, *, threads: int | None = None, trust_remote_code: bool = False) -> None:
        self.name, self.file, self.alone = name, file, False
        self.folder = tokenizer_folder(name, file)
        self._session = open_session(name, file, threads)
        self.tokenizer = load_tokenizer(name, self.folder, trust_remote_code=trust_remote_code)
        if self.tokenizer.pad_token_id is None:
            raise JasperError(
                f'{name}: its tokenizer has no padding token. Fix: set "pad_token" in tokenizer_config.json'
            )
        self.tokenizer.padding_side = "right"
        self._inputs = [node.name for node in self._session.get_inputs()]
        self._types = "token_type_ids" in self._inputs
        self.outputs: dict[str, list[Any]] = {node.name: list(node.shape) for node in self._session.get_outputs()}
        self.limit = self._read_limit()

    def _read_limit(self) -> int | None:
        metadata = self._session.get_modelmeta().custom_metadata_map
        places = {"sentence_bert_config.json": "max_seq_length", "config.json": "max_position_embeddings"}
        stated = [self.tokenizer.model_max_length, metadata.get("max_tokens")]
        stated += [read_settings(str(self.folder), None, file).get(key) for file, key in places.items()]
        known = [int(value) for value in stated if str(value).isdigit() and 0 < int(value) < NO_LIMIT]
        return min(known, default=None)

    def tokenize(self, texts: Sequence[Any], max_length: int) -> dict[str, np.ndarray]:
        """Tokenize n texts or pairs into padded arrays, (n, tokens) int64 each, cut at ``max_length`` tokens.

        Raises:
            JasperError: the graph needs an input that the tokenizer lacks.
        """
        pairs = bool(texts) and not isinstance(texts[0], str)
        columns = [list(column) for column in zip(*texts, strict=True)] if pairs else [list(texts)]
        options = {"padding": True, "truncation": True, "max_length": max_length, "return_tensors": "np"}
        encoded = self.tokenizer(*columns, return_token_type_ids=self._types, **options)
        return {"attention_mask": encoded["attention_mask"], **graph_inputs(self.name, self._inputs, encoded)}

    def run(self, features: Arrays, output: str) -> np.ndarray:
        """Return one output of the graph for a batch of n rows, (n, …) float32.

        Args:
            features: result of `tokenize`, or the same arrays from elsewhere.
            output: name of the output.

        Raises:
            JasperError: onnxruntime cannot run the graph.
        """
        if not self.alone or len(features["attention_mask"]) < 2:
            return self._run(features, output)
        lengths = features["attention_mask"].sum(axis=1)
        rows = [
            self._run({key: value[i : i + 1, :length] for key, value in features.items()}, output)[0]
            for i, length in enumerate(lengths)
        ]
        if rows[0].ndim < 2 or len({row.shape for row in rows}) == 1:
            return np.stack(rows)
        padded = np.zeros((len(rows), int(lengths.max()), rows[0].shape[1]), np.float32)  # outputs for each token
        for row, values in zip(padded, rows, strict=True):
            row[: len(values)] = values
        return padded

    def probe(self, output: str, short: Any = SHORT, long: Any = LONG) -> None:
        """Find out if a row's output depends on the other rows of its batch, and set `alone`.

        Graphs with dynamically quantized activations have one scale for all activations of a batch.

        Args:
            output: name of the output.
            short: a short text or pair.
            long: a longer text or pair.
        """
        tokens = self.limit or 64
        single = self.run(self.tokenize([short], tokens), output)[0].astype(np.float64)
        among = self.run(self.tokenize([short, long], tokens), output)[0].astype(np.float64)
        if single.ndim == 2:
            among = among[: len(single)]
        self.alone = bool(np.linalg.norm(among - single) > TOLERANCE * np.linalg.norm(single))

    def _run(self, features: Arrays, output: str) -> np.ndarray:
        try:
            inputs = graph_inputs(self.name, self._inputs, features)
            result: np.ndarray = self._session.run([output], inputs)[0]
        except JasperError:
            raise
        except Exception as error:
            raise JasperError(
                f"{self.name}: onnxruntime cannot run the graph ({first_line(error)}). Fix: lower max_length if texts "
                "are longer than the graph allows, or export the model again"
            ) from error
        return result.astype(np.float32, copy=False)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))
