"""Load models with checks: the files hold exactly the weights that the model needs, and the tokenizer fits the model.

All students, teachers, and models for evaluation and search load through this module. transformers only warns about
missing or unexpected weights, and builds an empty tokenizer if its files are missing. Here both are errors.
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

from jasper_fast.utils.errors import JasperError

T = TypeVar("T")

# Levels that training wrappers (torch.compile, FSDP, activation checkpointing, DeepSpeed) add to weight names.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
WRAPPER = re.compile(rf"(?:{'|'.join(WRAPPERS)})\.")
MAX_WRAPPERS = 3  # maximum wrappers in one name
UNUSED = ("pooler",)  # modules that mean pooling ignores; checkpoints often lack them
MAX_LISTED = 3  # weight names that an error lists
# Allowed rows of an embedding table beyond the vocabulary. Padding to a multiple is common. More means another model.
SPARE_ROWS, SPARE_FRACTION, SPARE_OF_FEW = 1024, 0.04, 0.25
PROBE_WORDS = 20  # words of a tokenizer's vocabulary that must get different ids


@dataclass(frozen=True)
class LoadedWeights:
    """Result of one ``from_pretrained`` call: the model and the names of weights that do not match."""

    model: Any
    missing: frozenset[str]
    unexpected: frozenset[str]
    mismatched: frozenset[tuple[str, tuple[int, ...], tuple[int, ...]]]  # name, shape in the file, shape expected


def load_checked(load: Callable[[dict[str, Any]], T], name: str) -> T:
    """Load one or several transformers and reject weights that do not match.

    Prefixes of training wrappers (``module.``, ``_orig_mod.``, ``0.auto_model.``) are stripped from weight names.

    Args:
        load: function from keyword arguments for ``from_pretrained`` to a loaded object.
        name: model, for messages.

    Returns:
        The result of ``load``.

    Raises:
        JasperError: a weight is missing, has another shape, or has no place in the model.
    """
    with record_loads() as loads:
        loaded = load({})
    renames = _wrapper_renames(loads)
    if renames:
        with record_loads() as loads:
            loaded = load({"key_mapping": renames})
    for loaded_weights in loads:
        if problem := weight_problem(loaded_weights):
            raise JasperError(f"{name}: {problem}")
    return loaded


@contextmanager
def record_loads() -> Iterator[list[LoadedWeights]]:
    """Record the result of every ``from_pretrained`` call in the block, without its warnings and progress bars.

    Not thread-safe.
    """
    from transformers import PreTrainedModel

    original = PreTrainedModel.__dict__["from_pretrained"]
    loads: list[LoadedWeights] = []

    def recording(cls: Any, *args: Any, output_loading_info: bool = False, **options: Any) -> Any:
        options["ignore_mismatched_sizes"] = True  # `weight_problem` rejects them by name, which transformers does not
        model, info = original.__func__(cls, *args, output_loading_info=True, **options)
        names = (frozenset(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        loads.append(LoadedWeights(model, *names))
        return (model, info) if output_loading_info else model

    PreTrainedModel.from_pretrained = classmethod(recording)
    try:
        with _errors_only(), without_bars():
            yield loads
    finally:
        PreTrainedModel.from_pretrained = original


@contextmanager
def _errors_only() -> Iterator[None]:
    """Silence the warnings of transformers in the block. Not thread-safe."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def without_bars() -> Iterator[None]:
    """Silence the progress bars of transformers for loading and saving weights in the block. Not thread-safe.

    The bars of downloads remain, and so do the user's settings after the block.
    """
    from transformers.utils import logging

    if not hasattr(logging, "set_tqdm_hook"):  # missing in early 5.x
        yield
        return
    previous = logging.set_tqdm_hook(lambda factory, args, kwargs: logging.EmptyTqdm(*args, **kwargs))
    try:
        yield
    finally:
        logging.set_tqdm_hook(previous)


def weight_problem(load: LoadedWeights) -> str | None:
    """Describe how a file's weights differ from the model's, or return None."""
    missing = sorted(name for name in load.missing if not _is_unused(name))
    unexpected = sorted(name for name in load.unexpected if not _is_head(load.model, name))
    architecture = type(load.model).__name__
    if load.mismatched:
        name, actual, expected = sorted(load.mismatched)[0]
        return (
            f"{len(load.mismatched)} weights have another shape than config.json says (got {name} {tuple(actual)}, "
            f"expected {tuple(expected)}). Fix: copy or download the model again, weights and config.json together"
        )
    if missing:
        return (
            f"{_listed(missing)} missing from its files, so {architecture} would use random values for them"
            + (f" (the files also hold {_listed(unexpected)} unknown to it)" if unexpected else "")
            + ". Fix: copy or save the whole model again"
        )
    if unexpected:
        return (
            f"its files hold {_listed(unexpected)} unknown to {architecture}, so part of the model would not load. "
            "Fix: save the model again with the config.json of these weights, and merge adapters before saving"
        )
    return None


def _is_unused(name: str) -> bool:
    return name.partition(".")[0] in UNUSED


def _is_head(model: Any, name: str) -> bool:
    """Return True if an unexpected weight belongs to a task head, which a plain encoder does not have."""
    name = name.removeprefix(f"{model.base_model_prefix}.")
    part = name.partition(".")[0]
    if _is_unused(name):
        return True
    if part in dict(model.named_children()):
        return False
    return model.is_custom_code() or part in _task_heads(model)


def _task_heads(model: Any) -> set[str]:
    """List the top-level modules of all classes in transformers that accept the model's configuration."""
    import transformers
    from transformers.models.auto import modeling_auto

    tables = [table for key, table in vars(modeling_auto).items() if re.fullmatch(r"MODEL_\w+_MAPPING", key)]
    entries = [table[type(model.config)] for table in tables if type(model.config) in table]
    classes = {c for entry in entries for c in (entry if isinstance(entry, tuple) else (entry,))}
    classes |= {getattr(transformers, name, None) for name in model.config.architectures or []} - {None}
    names: set[str] = set()
    for model_class in classes:
        try:
            with torch.device("meta"), _errors_only():  # some classes warn about uses that nobody has in mind here
                names.update(name for name, _ in model_class(model.config).named_children())
        except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, ImportError):
            continue  # a class that this configuration cannot build has not saved these weights
    return names


def _wrapper_renames(loads: list[LoadedWeights]) -> dict[str, str]:
    """Return regular expressions that strip a training wrapper's levels from unexpected names. {} means no wrapper."""
    renames: dict[str, str] = {}
    for load in loads:
        missing = {name for name in load.missing if not _is_unused(name)}
        unwrapped = [WRAPPER.sub("", name) for name in load.unexpected]
        prefixes = Counter(prefix for name in unwrapped if (prefix := _prefix(name, missing)) is not None)
        if not missing or not prefixes:
            continue
        prefix, _ = prefixes.most_common(1)[0]
        for depth in range(MAX_WRAPPERS):  # transformers replaces one match of each expression
            renames[rf"(?:{WRAPPER.pattern}){{1,{depth + 1}}}"] = ""
        if prefix:
            renames[rf"^{re.escape(prefix)}"] = ""
    return renames


def _prefix(name: str, known_names: set[str]) -> str | None:
    """Return the part of ``name`` before a wanted name, or None if it ends in none of them."""
    start = 0
    while name[start:] not in known_names:
        start = name.find(".", start) + 1
        if not start:
            return None
    return name[:start]


def _listed(names: list[str]) -> str:
    more = len(names) - MAX_LISTED
    return f"{len(names)} weights ({', '.join(names[:MAX_LISTED])}{f' and {more} more' if more > 0 else ''})"


def check_tokenizer(tokenizer: Any, model: Any, name: str) -> None:
    """Reject a tokenizer that is empty or belongs to another model.

    Args:
        tokenizer: Hugging Face tokenizer.
        model: transformer that takes its ids.
        name: model, for messages.

    Raises:
        JasperError: the vocabulary is missing, ids exceed the embedding table, positions depend on another padding
            id, or token types are unknown.
    """
    problem = (
        _empty_vocabulary(tokenizer)
        or _ids_out_of_range(tokenizer, embedding_rows(model))
        or _padding_out_of_range(tokenizer, model, name)
        or _types_out_of_range(tokenizer, text_config(model))
    )
    if problem:
        raise JasperError(f"{name}: {problem}")


def embedding_rows(model: Any) -> int | None:
    """Return the number of rows of the input embedding table, or None for a model without one."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except (NotImplementedError, AttributeError):
        return None
    return int(weight.shape[0]) if isinstance(weight, torch.Tensor) else None


def text_config(model: Any) -> Any:
    """Return the configuration of the model's text encoder."""
    return model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config


def _empty_vocabulary(tokenizer: Any) -> str | None:
    tokens = sorted(set(_vocabulary(tokenizer)) - set(tokenizer.all_special_tokens), key=len, reverse=True)
    words = [tokenizer.convert_tokens_to_string([token]) for token in tokens[:PROBE_WORDS]]
    ids = {tuple(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in ("a", "1", *words)}
    if len(ids) > 1:
        return None
    return (
        f"its tokenizer maps all words to the same ids (got {len(tokenizer)} tokens, expected a vocabulary). Fix: copy "
        "the tokenizer files (tokenizer.json, vocab.txt, spiece.model or the like) into the model's folder"
    )


def _vocabulary(tokenizer: Any) -> Mapping[str, int]:
    try:
        return tokenizer.get_vocab()
    except NotImplementedError:  # optional for custom tokenizers
        return {}


def _ids_out_of_range(tokenizer: Any, rows: int | None) -> str | None:
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
            f"the tokenizer belongs to another model (got {top + 1} tokens, expected about {rows}, the rows of the "
            "embedding table). Fix: copy the model's own tokenizer files into its folder"
        )
    return None


def _padding_out_of_range(tokenizer: Any, model: Any, name: str) -> str | None:
    """Describe a padding id that shifts positions. Other models mask padding, so a note is enough."""
    actual, expected = tokenizer.pad_token_id, getattr(text_config(model), "pad_token_id", None)
    if actual is None or expected is None or expected < 0 or actual == expected:
        return None
    differ = f"tokenizer and config.json have different padding ids (got {actual} and {expected})"
    if has_padding_offset(model):
        return (
            f"{differ}, and positions are counted from the padding id. Fix: set pad_token_id in config.json to "
            "the tokenizer's, if the model was trained with this tokenizer"
        )
    print(f"note: {name}: {differ}. Padding is masked, so embeddings do not depend on it", file=sys.stderr)
    return None


def has_padding_offset(model: Any) -> bool:
    """Return True if an encoder's positions start after its padding id, as in RoBERTa and related models."""
    return any(
        isinstance(module, torch.nn.Embedding)
        and name.endswith("position_embeddings")
        and module.padding_idx is not None
        for name, module in model.named_modules()
    )


def _types_out_of_range(tokenizer: Any, config: Any) -> str | None:
    types = getattr(config, "type_vocab_size", None)
    if not isinstance(types, int) or types < 1:
        return None
    highest = max(tokenizer("a").get("token_type_ids") or [0])
    if highest < types:
        return None
    return (
        f"the tokenizer gives token type {highest}, but config.json has type_vocab_size {types}. Fix: copy the model's "
        "own tokenizer files into its folder"
    )
