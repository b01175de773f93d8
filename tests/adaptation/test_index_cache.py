"""`search build` of an adapted model takes the teacher's embeddings from the cache that `adapt` filled."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest

import jasper_fast
from jasper_fast.mips import FlatIPIndex
from jasper_fast.search import main
from jasper_fast.teachers.cache import TeacherCache
from jasper_fast.text_index import build, cached

pytestmark = pytest.mark.usefixtures("fast")


@pytest.fixture(scope="module")
def adapted(world, tmp_path_factory):
    """An adapted model with its own cache."""
    folder = tmp_path_factory.mktemp("cached")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jasper_fast.adaptation.steps.SECONDS", 0.05)
        jasper_fast.adapt(world.few, out=folder / "out", **world.options(cache=str(folder / "cache")))
    return folder


def vectors_of(folder):
    index = FlatIPIndex.load(folder / "vectors")
    return index.search(np.eye(index.dim, dtype=np.float32), len(index))


def build_index(world, adapted, out, *more):
    given = ["--columns", "title,text", "--cache", str(adapted / "cache"), "--out", str(out), *more]
    assert main(["build", str(adapted / "out" / "asymmetric"), str(world.many), *given]) == 0
    return vectors_of(out)


@pytest.mark.parametrize("width", ["32", "8"])
def test_cached_embeddings_give_the_index_that_encoding_gives(world, adapted, tmp_path, monkeypatch, capsys, width):
    encoded, honest = [], cached.rows_encoder

    def spy(encode, width):
        rows = honest(encode, width)
        return lambda texts, start: encoded.extend(texts) or rows(texts, start)

    monkeypatch.setattr(
        importlib.import_module("jasper_fast.text_index.build"), "rows_encoder", spy
    )  # not the function
    ours = build_index(world, adapted, tmp_path / "ours", "--width", width)
    said = capsys.readouterr().err
    assert "90 of 130 embeddings from the cache" in said and "stored as float16" in said
    assert len(encoded) == 40 + cached.PROBES  # the texts that adapt did not have, and those that are compared
    texts = [f"{row['title']}\n{row['text']}" for row in map(json.loads, world.many.read_text().splitlines())]
    build(str(adapted / "out" / "asymmetric"), texts, tmp_path / "theirs", width=int(width))
    theirs = vectors_of(tmp_path / "theirs")
    for one, other in zip(ours[1], theirs[1], strict=True):
        assert sorted(one) == sorted(other)
    for scores, ids, expected, of in zip(*ours, *theirs, strict=True):
        np.testing.assert_allclose(
            scores[np.argsort(ids)], expected[np.argsort(of)], atol=5e-3
        )  # the cache may be in bf16


def test_other_settings_are_encoded(world, adapted, tmp_path, capsys):
    build_index(world, adapted, tmp_path / "length", "--max-length", "16")
    build_index(world, adapted, tmp_path / "none", "--cache", str(tmp_path / "absent"))
    main(["build", str(world.teacher), str(world.few), "--cache", str(adapted / "cache"), "--out", str(tmp_path / "t")])
    assert "from the cache" not in capsys.readouterr().err


def test_a_cache_of_other_embeddings_is_not_used(world, adapted, tmp_path, monkeypatch, capsys):
    honest = TeacherCache.read_shard
    monkeypatch.setattr(TeacherCache, "read_shard", lambda *args: honest(*args)[:, ::-1].copy())
    build_index(world, adapted, tmp_path / "i")
    said = capsys.readouterr().err
    assert "has other embeddings than" in said and "so none are taken from it" in said


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_the_precision_of_the_cache_is_named_if_it_is_known(world, adapted, tmp_path, monkeypatch, capsys, precision):
    honest = TeacherCache.facts
    monkeypatch.setattr(TeacherCache, "facts", lambda *args: {**honest(*args), "precision": precision})
    build_index(world, adapted, tmp_path / "i")
    said = capsys.readouterr().err
    assert ("computed in bf16, stored" in said) == (precision == "bf16") == ("other embeddings" not in said)
