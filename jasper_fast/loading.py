"""Checked loading: a model's files hold exactly what the model needs, and its tokenizer belongs to it.

Students, teachers, evaluated and searched models all come through here. transformers only warns about weights that are
missing or left over, and builds an empty tokenizer where its files are missing; here both are errors.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from jasper_fast.errors import JasperError

T = TypeVar("T")

# Levels that training wrappers (torch.compile, FSDP, activation checkpointing, DeepSpeed) put inside weight names.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
WRAPPER = re.compile(rf"(?:{'|'.join(WRAPPERS)})\.")
NESTING = 3  # times that one name may hold a wrapper
UNUSED = ("pooler",)  # modules whose output mean pooling never reads; checkpoints often lack them
SHOWN = 3  # weight names that an error lists
# Rows of an embedding table beyond the vocabulary: padding to a multiple is common, another vocabulary is a mistake.
SPARE_ROWS, SPARE_FRACTION, SPARE_OF_FEW = 1024, 0.04, 0.25
PROBE_WORDS = 20  # of a tokenizer's own vocabulary, which it must tell apart


@dataclass(frozen=True)
class LoadedWeights:
    """The result of one ``from_pretrained`` call: the model and the weight names that did not match."""

    model: Any
    missing: frozenset[str]
    unexpected: frozenset[str]
    mismatched: frozenset[tuple[str, tuple[int, ...], tuple[int, ...]]]  # name, shape in the file, shape expected


def load_checked(load: Callable[[dict[str, Any]], T], name: str) -> T:
    """Load one or several transformers and reject weights that do not match.

    Names that a training wrapper prefixed (``module.``, ``_orig_mod.``, ``0.auto_model.``) load without the prefix.

    Args:
        load: gets keyword arguments for ``from_pretrained`` and returns what it loaded.
        name: model, for messages.

    Raises:
        JasperError: a weight is missing, has another shape, or has no place in the model.
    """
    with recorded_loads() as loads:
        loaded = load({})
    renames = _wrapper_renames(loads)
    if renames:
        with recorded_loads() as loads:
            loaded = load({"key_mapping": renames})
    for one in loads:
        if problem := weight_problem(one):
            raise JasperError(f"{name}: {problem}")
    return loaded


@contextmanager
def recorded_loads() -> Iterator[list[LoadedWeights]]:
    """Record what every ``from_pretrained`` call of the block found; its warnings are not printed. Not thread-safe."""
    from transformers import PreTrainedModel
    from transformers.utils import logging

    original = PreTrainedModel.__dict__["from_pretrained"]
    loads: list[LoadedWeights] = []

    def recording(cls: Any, *args: Any, output_loading_info: bool = False, **options: Any) -> Any:
        options["ignore_mismatched_sizes"] = True  # they are rejected by name, which transformers' own error lacks
        model, info = original.__func__(cls, *args, output_loading_info=True, **options)
        names = (frozenset(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        loads.append(LoadedWeights(model, *names))
        return (model, info) if output_loading_info else model

    verbosity = logging.get_verbosity()
    PreTrainedModel.from_pretrained = classmethod(recording)
    logging.set_verbosity_error()
    try:
        yield loads
    finally:
        PreTrainedModel.from_pretrained = original
        logging.set_verbosity(verbosity)


def weight_problem(load: LoadedWeights) -> str | None:
    """Describe how a file's weights differ from the model's, or return None."""
    missing = sorted(name for name in load.missing if not _is_unused(name))
    left_over = sorted(name for name in load.unexpected if not _is_head(load.model, name))
    architecture = type(load.model).__name__
    if load.mismatched:
        name, found, expected = sorted(load.mismatched)[0]
        return (
            f"{len(load.mismatched)} weights have another shape than config.json says (got {name} {tuple(found)}, "
            f"expected {tuple(expected)}). Fix: copy or download the model again, weights and config.json together"
        )
    if missing:
        return (
            f"{_listed(missing)} missing from its files, so {architecture} would start with random values there. Fix: "
            "copy or save the whole model again"
            + (f" (the files also hold {_listed(left_over)} unknown to it)" if left_over else "")
        )
    if left_over:
        return (
            f"its files hold {_listed(left_over)} unknown to {architecture}, so part of the model would not be loaded. "
            "Fix: save the model again with the config.json of these weights; merge adapters before saving"
        )
    return None


def _is_unused(name: str) -> bool:
    return name.partition(".")[0] in UNUSED


def _is_head(model: Any, name: str) -> bool:
    """Tell whether a left-over weight belongs to a task head, which the bare encoder does not have."""
    name = name.removeprefix(f"{model.base_model_prefix}.")
    part = name.partition(".")[0]
    if _is_unused(name):
        return True
    if part in dict(model.named_children()):
        return False
    return model.is_custom_code() or part in _task_heads(model)


def _task_heads(model: Any) -> set[str]:
    """Top-level modules of every class that transformers has for the model's configuration."""
    import transformers
    from transformers.models.auto import modeling_auto

    tables = [table for key, table in vars(modeling_auto).items() if re.fullmatch(r"MODEL_\w+_MAPPING", key)]
    listed = [table[type(model.config)] for table in tables if type(model.config) in table]
    classes = {c for entry in listed for c in (entry if isinstance(entry, tuple) else (entry,))}
    classes |= {getattr(transformers, name, None) for name in model.config.architectures or []} - {None}
    found: set[str] = set()
    for one in classes:
        try:
            with torch.device("meta"):
                found.update(name for name, _ in one(model.config).named_children())
        except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, ImportError):
            continue  # a class that this configuration cannot build saved no weights with it
    return found


def _wrapper_renames(loads: list[LoadedWeights]) -> dict[str, str]:
    """Regular expressions that strip a training wrapper's levels from the left-over names; empty where none did it."""
    renames: dict[str, str] = {}
    for load in loads:
        missing = {name for name in load.missing if not _is_unused(name)}
        plain = [WRAPPER.sub("", name) for name in load.unexpected]
        prefixes = Counter(prefix for name in plain if (prefix := _prefix(name, missing)) is not None)
        if not missing or not prefixes:
            continue
        prefix, _ = prefixes.most_common(1)[0]
        for depth in range(NESTING):  # transformers replaces one match of each expression
            renames[rf"(?:{WRAPPER.pattern}){{1,{depth + 1}}}"] = ""
        if prefix:
            renames[rf"^{re.escape(prefix)}"] = ""
    return renames


def _prefix(name: str, wanted: set[str]) -> str | None:
    """Return what precedes a wanted name in ``name``; None where it ends in none of them."""
    start = 0
    while name[start:] not in wanted:
        start = name.find(".", start) + 1
        if not start:
            return None
    return name[:start]


def _listed(names: list[str]) -> str:
    more = len(names) - SHOWN
    return f"{len(names)} weights ({', '.join(names[:SHOWN])}{f' and {more} more' if more > 0 else ''})"


def check_tokenizer(tokenizer: Any, model: Any, name: str) -> None:
    """Reject a tokenizer that is empty, or belongs to another model.

    Args:
        tokenizer: Hugging Face tokenizer.
        model: transformer that reads its ids.
        name: model, for messages.

    Raises:
        JasperError: missing vocabulary, ids beyond the embedding table, another padding id, or unknown token types.
    """
    problem = (
        _empty_vocabulary(tokenizer)
        or _foreign_ids(tokenizer, embedding_rows(model))
        or _foreign_padding(tokenizer, model, name)
        or _foreign_types(tokenizer, text_config(model))
    )
    if problem:
        raise JasperError(f"{name}: {problem}")


def embedding_rows(model: Any) -> int | None:
    """Rows of the input embedding table, or None for a model without one."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except (NotImplementedError, AttributeError):
        return None
    return int(weight.shape[0]) if isinstance(weight, torch.Tensor) else None


def text_config(model: Any) -> Any:
    """The configuration of the part that reads text."""
    return model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config


def _empty_vocabulary(tokenizer: Any) -> str | None:
    tokens = sorted(set(_vocabulary(tokenizer)) - set(tokenizer.all_special_tokens), key=len, reverse=True)
    words = [tokenizer.convert_tokens_to_string([token]) for token in tokens[:PROBE_WORDS]]
    ids = {tuple(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in ("a", "1", *words)}
    if len(ids) > 1:
        return None
    return (
        f"its tokenizer reads all words alike (got {len(tokenizer)} tokens, expected a vocabulary). Fix: copy the "
        "tokenizer files (tokenizer.json, vocab.txt, spiece.model or the like) into the model's folder"
    )


def _vocabulary(tokenizer: Any) -> Mapping[str, int]:
    try:
        return tokenizer.get_vocab()
    except NotImplementedError:  # optional for a tokenizer that a model brings
        return {}


def _foreign_ids(tokenizer: Any, rows: int | None) -> str | None:
    vocabulary = _vocabulary(tokenizer)
    if rows is None or not vocabulary:
        return None
    token, top = max(vocabulary.items(), key=lambda item: item[1])
    if top >= rows:
        return (
            f"token {token!r} has id {top}, but the embedding table has {rows} rows. Fix: call "
            f"model.resize_token_embeddings({top + 1}) and save the model again, or copy the model's own tokenizer"
        )
    if rows - 1 - top > max(SPARE_FRACTION * rows, min(SPARE_ROWS, SPARE_OF_FEW * rows)):
        return (
            f"the tokenizer is of another model (got {top + 1} tokens, expected about {rows}, the rows of the "
            "embedding table). Fix: copy the model's own tokenizer files into its folder"
        )
    return None


def _foreign_padding(tokenizer: Any, model: Any, name: str) -> str | None:
    """Describe a padding id that shifts positions. Elsewhere padding is masked, and a note is enough."""
    own, expected = tokenizer.pad_token_id, getattr(text_config(model), "pad_token_id", None)
    if own is None or expected is None or expected < 0 or own == expected:
        return None
    differ = f"tokenizer and config.json name different padding ids (got {own} and {expected})"
    if counts_from_padding(model):
        return (
            f"{differ}, and positions are counted from the padding. Fix: set pad_token_id in config.json to the "
            "tokenizer's, if the model was trained with this tokenizer"
        )
    print(f"note: {name}: {differ}; padding is masked, so embeddings do not depend on it", file=sys.stderr)
    return None


def counts_from_padding(model: Any) -> bool:
    """Tell whether an encoder counts positions from behind its padding id, as RoBERTa and its kin do."""
    return any(
        isinstance(module, torch.nn.Embedding)
        and name.endswith("position_embeddings")
        and module.padding_idx is not None
        for name, module in model.named_modules()
    )


def _foreign_types(tokenizer: Any, config: Any) -> str | None:
    known = getattr(config, "type_vocab_size", None)
    if not isinstance(known, int) or known < 1:
        return None
    highest = max(tokenizer("a").get("token_type_ids") or [0])
    if highest < known:
        return None
    return (
        f"the tokenizer gives token type {highest}, but config.json has type_vocab_size {known}. Fix: copy the model's "
        "own tokenizer files into its folder"
    )
