"""Open the files of an exported folder, each in its own runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jasper_fast.models.embedder import load_model, normalise
from jasper_fast.models.folder import read_json
from jasper_fast.models.hub import prompt_of

FILES = {"pytorch": "model.safetensors", "onnx": "onnx/model.onnx", "onnx-int8": "onnx/model_int8.onnx"}
BATCH = 32
INPUTS = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class Runtime:
    """An exported file, opened by the library that serves it.

    Args:
        name: "pytorch", "onnx" or "onnx-int8".
        file: the file in the folder.
        encode: function from texts and a role, "query" or "document", to (n, D) float32 unit rows. It adds the prompt.
    """

    name: str
    file: str
    encode: Callable[[list[str], str], np.ndarray]


def open_runtimes(folder: Path, names: Sequence[str] | None = None, *, threads: int | None = None) -> list[Runtime]:
    """Open every file of an exported folder that a runtime on this machine can read.

    Args:
        folder: flat model folder.
        names: runtimes to open. None: all.
        threads: CPU threads of ONNX Runtime. None: its default.
    """
    openers = {"pytorch": lambda file: _pytorch(folder)}
    openers |= {name: lambda file: _onnx(folder, file, threads) for name in ("onnx", "onnx-int8")}
    return [
        Runtime(name, file, openers[name](folder / file))
        for name, file in FILES.items()
        if (folder / file).is_file() and (names is None or name in names)
    ]


def _pytorch(folder: Path) -> Callable[[list[str], str], np.ndarray]:
    model = load_model(str(folder), device="cpu")

    def encode(texts: list[str], role: str) -> np.ndarray:
        return normalise(model.encode(texts, prompt_name=role if role in model.prompts else None))

    return encode


def _onnx(folder: Path, file: Path, threads: int | None) -> Callable[[list[str], str], np.ndarray]:
    import onnxruntime
    from transformers import AutoTokenizer

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
    longest = int(session.get_modelmeta().custom_metadata_map["max_tokens"])
    prompts = read_json(folder / "config_sentence_transformers.json").get("prompts", {})

    def encode(texts: list[str], role: str) -> np.ndarray:
        prompt = prompt_of(prompts, role) or ""
        order = np.argsort([len(text) for text in texts], kind="stable")
        rows: dict[int, np.ndarray] = {}
        for start in range(0, len(texts), BATCH):
            batch = order[start : start + BATCH]
            chosen = [prompt + texts[at] for at in batch]
            tokens = tokenizer(chosen, padding=True, truncation=True, max_length=longest, return_tensors="np")
            feed = {name: tokens[name].astype(np.int64) for name in INPUTS}
            rows |= dict(zip(batch.tolist(), session.run(["sentence_embedding"], feed)[0], strict=True))
        return normalise(np.stack([rows[at] for at in range(len(texts))]))

    return encode
