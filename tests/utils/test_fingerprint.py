"""Digests name caches on disk, so each stays what it was, byte for byte."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import jasper_fast
from jasper_fast.data.augment import _hash
from jasper_fast.data.docstrings import _key
from jasper_fast.data.text import text_digest
from jasper_fast.ops import native as env
from jasper_fast.ops.native import extension_path
from jasper_fast.teachers.cache import TeacherCache, joined_fingerprint
from jasper_fast.training.parameters import frozen_digest
from jasper_fast.training.pooled import POOL_CHUNK, PooledStates
from jasper_fast.utils.fingerprint import code_digest, content_digest, file_sha256, settings_digest, sha256

TEXTS = ["", "plain", "ü…🦊", "half \udcff", "nul\0"]
SETTINGS = {"b": [1, 2.5, None], "a": {"d": "ü", "c": True}}


def blake2b(content: bytes, size: int) -> str:
    return hashlib.blake2b(content, digest_size=size).hexdigest()


def test_digests_are_pinned():
    assert content_digest("document\0text") == "f63f7e1bc47750d61c3cde64f32e7143"
    assert content_digest("0\0cut\0text", size=8) == "da9987b27eb42642"
    assert settings_digest(SETTINGS) == "e6c73f847b0b68db"
    assert sha256("a b") == "c8687a08aa5d6ed2044328fa6a697ab8e96dc34291e8c2034ae8c38e6fcc6d65"


def test_identities_of_cached_results_are_pinned(tmp_path):
    """Their formulas are those of the first release. Other values would make users compute everything again."""
    caches = [TeacherCache(tmp_path, {"model": "a/b", "x": [1, {"z": 2, "a": None}]}, 10)]
    caches.append(TeacherCache(tmp_path, {"vectors": "ü"}, 11))
    for cache in caches:
        assert cache.fingerprint == blake2b(json.dumps(cache.identity, sort_keys=True).encode(), 8)
    assert joined_fingerprint(caches) == blake2b("".join(cache.fingerprint for cache in caches).encode(), 16)

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 4).bfloat16()
    model.bias.requires_grad_(False)
    assert frozen_digest(model) == blake2b(b"bias" + model.bias.detach().view(torch.uint8).numpy().tobytes(), 16)

    PooledStates(tmp_path / "pooled", rows := np.arange(5), "key ü")
    assert (tmp_path / "pooled" / "key").read_text() == blake2b(f"key ü {POOL_CHUNK} ".encode() + rows.tobytes(), 16)

    body = "Ein  Text\nmit Wörtern"
    assert _key(body) == hashlib.sha256("ein text mit wörtern".encode()).hexdigest()
    number = int.from_bytes(hashlib.blake2b(b"3\0cut\0text", digest_size=8).digest())
    assert _hash(3, "cut", "text") == number


@pytest.mark.parametrize("size", [8, 16, 64])
@pytest.mark.parametrize("text", TEXTS)
def test_contents_are_hashed_as_utf_8(text, size):
    content = text.encode("utf-8", "surrogatepass")
    assert content_digest(text, size=size) == content_digest(content, size=size) == blake2b(content, size)
    assert sha256(text) == hashlib.sha256(content).hexdigest()
    assert text_digest(text, "query") == content_digest(f"query\0{text}")


def test_parts_are_hashed_as_their_concatenation():
    rows = np.arange(7)
    weights = torch.randn(3, 4)
    parts = ["name", memoryview(weights.view(torch.uint8).numpy().reshape(-1)), rows.tobytes(), bytearray(b"x")]
    whole = b"name" + weights.numpy().tobytes() + rows.tobytes() + b"x"
    assert content_digest(iter(parts)) == blake2b(whole, 16)
    assert sha256(parts) == hashlib.sha256(whole).hexdigest()
    assert content_digest([]) == blake2b(b"", 16) and sha256([]) == hashlib.sha256().hexdigest()
    incremental = hashlib.sha256()
    for text in TEXTS[:3]:
        incremental.update(f"{text}\0".encode())
    assert sha256(f"{text}\0" for text in TEXTS[:3]) == incremental.hexdigest()


def test_settings_are_hashed_as_sorted_json():
    expected = blake2b(json.dumps(SETTINGS, sort_keys=True).encode(), 8)
    assert settings_digest(SETTINGS) == settings_digest(dict(reversed(SETTINGS.items()))) == expected
    cached = ["key", "query", TEXTS]  # without mappings, sorting changes nothing
    assert settings_digest(cached, size=16) == blake2b(json.dumps(cached).encode(), 16)


def test_a_key_gives_another_digest():
    expected = hashlib.blake2b(b"text", key=b"order 3", digest_size=8)
    assert content_digest("text", size=8, key=b"order 3") == expected.hexdigest() != content_digest("text", size=8)


def test_hexadecimal_digits_stand_for_the_bytes():
    """Numbers from digests, and the order of digests, are the same from hexadecimal digits."""
    raw = [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in TEXTS]
    digits = [content_digest(text, size=8) for text in TEXTS]
    assert [int(one, 16) for one in digits] == [int.from_bytes(one) for one in raw]
    assert [bytes.fromhex(one) for one in digits] == raw
    assert sorted(range(5), key=digits.__getitem__) == sorted(range(5), key=raw.__getitem__)


def test_a_file_has_the_digest_of_its_content(tmp_path):
    (tmp_path / "x").write_bytes(content := bytes(range(256)) * 99)
    assert file_sha256(tmp_path / "x") == file_sha256(str(tmp_path / "x")) == sha256(content)


def test_the_code_is_hashed_by_name_and_content(tmp_path):
    package = Path(jasper_fast.__file__).parent.resolve()
    expected = hashlib.blake2b(digest_size=8)
    sources = sorted({*package.rglob("*.py"), *(package / "kernels").rglob("*.py")})
    for path in [*sources, *filter(None, [extension_path()])]:
        expected.update(path.name.encode() + path.read_bytes())
    assert env.code_digest() == code_digest(package, extension_path()) == expected.hexdigest()
    assert any("kernels" in path.parts for path in sources)
    (tmp_path / "a.py").write_text("1")
    first = code_digest(tmp_path, None)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert first != code_digest(tmp_path, None) != code_digest(tmp_path, tmp_path / "b.py")
