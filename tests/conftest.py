"""Tiny real models and texts for many tests. They need no network and no model hub."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
# On a CPU with fast bf16, `precision: auto` would be bf16, and tests would compare rounded numbers.
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# Forking after tokenizers has started its threads would only print warnings.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Without a GPU, kernels are interpreted. Triton reads this when it decorates a kernel, so set it before any import.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

pytest.register_assert_rewrite("tests.helpers")

KERNEL_TESTS = (
    *("test_kernels", "test_kernel_properties", "test_relative_similarity_kernels"),
    *("test_ranking_kernels", "test_mips_cuda", "test_mips_rerank", "test_mips_chunks", "test_mips_replay"),
)
HIDDEN, MAX_LENGTH = 32, 64
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

SUBJECTS = (
    "The old lighthouse keeper",
    "A retired physics teacher",
    "My neighbour's youngest daughter",
    "The city council",
    "An unusually patient librarian",
    "The crew of the research vessel",
    "Every gardener in the valley",
    "A small company from the north",
)
ACTIONS = (
    "repaired",
    "wrote a long letter about",
    "quietly sold",
    "could never explain",
    "measured",
)
OBJECTS = (
    "the broken telescope before the winter storms arrived.",
    "a map of the river, although nobody had asked for one.",
    "forty boxes of apples.",
    "the wooden bridge near the station; it took three weeks and most of the money that was left.",
    "an engine that runs on warm air.",
)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Collect only files with GPU tests for ``-m gpu``, because a machine with a GPU may lack what others import.

    A folder without such files is left out with its conftest.py.
    """
    if config.option.markexpr.strip() != "gpu":
        return None
    if collection_path.is_dir():
        files = [*collection_path.rglob("test_*.py")]
    elif collection_path.suffix == ".py":
        files = [collection_path]
    else:
        return None
    return None if any(map(_has_gpu_tests, files)) else True


def _has_gpu_tests(file: Path) -> bool:
    return file.stem in KERNEL_TESTS or "mark.gpu" in file.read_text(encoding="utf-8")


@pytest.hookimpl(tryfirst=True)  # before pytest selects by -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first, so that no process is left alone with them at the end.

    On a machine with a GPU, all tests of the kernels are GPU tests, because the kernels are compiled for it.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if torch.cuda.is_available():
        for item in items:
            if item.path.stem in KERNEL_TESTS:
                item.add_marker("gpu")


@pytest.fixture(scope="session")
def tiny_texts() -> list[str]:
    """Return 200 distinct English sentences of 8 to 29 words, in a fixed order that mixes subjects."""
    texts = [f"{subject} {action} {thing}" for thing, action, subject in product(OBJECTS, ACTIONS, SUBJECTS)]
    assert len(set(texts)) == len(texts) == 200
    return texts


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory, tiny_texts: list[str]) -> Path:
    """Save a random BERT as a plain Hugging Face folder: 3 layers, hidden 32, 2 heads, 64 positions, tokenizer."""
    from transformers import BertConfig, BertModel

    tokenizer = _wordpiece(tiny_texts)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=2 * HIDDEN,
        max_position_embeddings=MAX_LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        # With the usual 0.02, all texts have nearly the same embedding at this width.
        initializer_range=0.2,
    )
    return _save(BertModel, config, tokenizer, tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory, tiny_texts: list[str]) -> Path:
    """Save a random Qwen2 decoder as a plain Hugging Face folder: 2 layers, hidden 32, 2 heads (1 key-value head)."""
    from transformers import Qwen2Config, Qwen2Model

    tokenizer = _byte_level_bpe(tiny_texts)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=2 * HIDDEN,
        max_position_embeddings=MAX_LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
    )
    return _save(Qwen2Model, config, tokenizer, tmp_path_factory.mktemp("models") / "tiny-qwen2")


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield a Python command that needs no time for imports. See :mod:`tests.helpers.warm_python`."""
    from tests.helpers.processes import fork_server
    from tests.helpers.warm_python import serve, write_client

    folder = tmp_path_factory.mktemp("python")
    path, command = folder / "s", folder / "python"
    server = fork_server().Process(target=serve, args=(str(path),), daemon=True)
    server.start()
    while not path.exists():
        assert server.is_alive()
        time.sleep(0.02)
    write_client(command, str(path))
    yield str(command)
    server.kill()
    server.join()


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Start every test from the same torch random state."""
    torch.manual_seed(0)
    yield


def _wordpiece(texts: list[str]):
    """Build a lower-casing WordPiece tokenizer with BERT's special tokens, letters, and five of six words.

    The vocabulary is fixed, because training assigns other token ids in each process.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted(set(re.findall(r"\w+", " ".join(texts).lower())))
    whole = [word for i, word in enumerate(words) if len(word) > 1 and i % 6]
    characters = sorted(set("".join(texts).lower()) - {" "})
    pieces = [*SPECIAL_TOKENS, *characters, *(f"##{c}" for c in characters), *whole]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    cls, sep = pieces.index("[CLS]"), pieces.index("[SEP]")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_LENGTH,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def _byte_level_bpe(texts: list[str]):
    """Build Qwen2's tokenizer class, because transformers loads every Qwen2 folder with it."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import Qwen2Tokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return Qwen2Tokenizer(vocab=model["vocab"], merges=merges, model_max_length=MAX_LENGTH)


def _save(model_class, config, tokenizer, folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = model_class(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert (folder / "model.safetensors").is_file()
    return folder


@pytest.fixture(scope="session", autouse=True)
def _no_measured_speed() -> Iterator[None]:
    """Plan runs with fixed speeds: tests neither wait for measured steps nor count them among their own.

    The speed of encoding that reports give is measured on few texts.
    """
    from tests.helpers.costs import fixed_costs

    with pytest.MonkeyPatch.context() as patch:
        for module in ("preflight", "dry_run"):
            patch.setattr(f"jasper_fast.training.{module}.measure_costs", fixed_costs)
        patch.setattr("jasper_fast.training.encoding.LONG_ENOUGH", 0.01)
        yield
