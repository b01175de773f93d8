"""The command `adapt` from documents to models: it finishes, resumes, continues with more documents, and says so."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from sentence_transformers import SentenceTransformer

import jasper_fast
from jasper_fast.adapt import main
from jasper_fast.adaptation import pipeline
from jasper_fast.adaptation.scores import recommended
from jasper_fast.adaptation.state import ADAPT, STATISTICS
from jasper_fast.exporting.axes import ROTATION
from jasper_fast.fitting.statistics import PairStatistics
from jasper_fast.models.quantization import read_ranges
from jasper_fast.utils.errors import JasperError

pytestmark = pytest.mark.usefixtures("fast")


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """An adaptation of the few documents."""
    out = tmp_path_factory.mktemp("finished") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jasper_fast.adaptation.steps.SECONDS", 0.05)
        jasper_fast.adapt(world.few, out=out, **world.options())
    return out


def test_one_call_writes_models_report_and_results(world, finished):
    assert {"symmetric", "asymmetric", "report.md", "results.json", ADAPT, STATISTICS, ROTATION} <= {
        path.name for path in finished.iterdir()
    }
    results = results_of(finished)
    assert results["held_out"]["documents"] == 9 and results["held_out"]["questions"] > 9
    assert results["student"]["same_space"] and results["teacher"]["width"] == 32
    assert {row["width"] for row in results["label_free"]["rows"] if row["model"] == "student"} == {32, 8}
    form, width = recommended(results["label_free"])
    assert results["next"][0].startswith(
        f"jasper-fast search build {finished / form} {world.few} --columns title,text "
    )
    assert (f"--width {width}" in results["next"][0]) == (width != 32)
    assert f"Use {form} at width {width} " in results["recommendation"]
    symmetric = SentenceTransformer(str(finished / "symmetric"))
    texts = ["A note on apples.", "The old bridge"]
    assert symmetric.encode(texts).shape == (2, 32) and symmetric.encode(texts, task="8").shape == (2, 8)
    asymmetric = SentenceTransformer(str(finished / "asymmetric"))
    teacher = SentenceTransformer(str(world.teacher)).encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(asymmetric.encode_document(texts), teacher, atol=1e-5)
    assert asymmetric.encode_query(texts).shape == (2, 32)


def test_both_forms_have_cards_of_their_own_scores(finished):
    results = results_of(finished)
    assert [choice["width"] for choice in results["projections"]] == [8]
    for form in ("symmetric", "asymmetric"):
        card = (finished / form / "README.md").read_text()
        table = card[card.index("| width | neighbours | nDCG@10 | kept |") :].partition("\n\n")[0].splitlines()
        assert [line.split("|")[1].strip() for line in table[2:]] == ["32", "8"]


def test_every_width_of_both_forms_has_int8_ranges(world, finished):
    """The codes' inner products are those of the embeddings, up to the rounding, and the card says how."""
    from sentence_transformers.util import quantize_embeddings

    texts = [f"{row['title']}\n{row['text']}" for row in map(json.loads, world.few.read_text().splitlines())]
    for form, task in (("symmetric", "{}"), ("asymmetric", "document-{}")):
        model = SentenceTransformer(str(finished / form))
        ranges = read_ranges(finished / form)
        assert sorted(ranges) == [8, 32]
        for width, pair in ranges.items():
            rows = model.encode(texts, prompt_name="document", task=task.format(width))
            codes = quantize_embeddings(rows, "int8", ranges=pair).astype(np.float64)
            step = (pair[1, 0] - pair[0, 0]) / 255
            np.testing.assert_allclose(codes @ codes.T * step**2, rows @ rows.T, atol=0.05)
            assert np.abs(codes * step - rows).max() <= 2 * step  # the ranges come from the cache, perhaps in bf16
        card = (finished / form / "README.md").read_text()
        assert 'quantize_embeddings(documents, "int8", ranges=ranges)  # documents 8 wide' in card


def test_the_statistics_are_those_of_the_embeddings(world, finished):
    """The sums equal those of stock embeddings in float64, up to the rounding of the float16 cache."""
    from jasper_fast.adaptation.documents import read_corpus
    from jasper_fast.adaptation.request import make_request

    request = make_request(world.few, finished, **world.options())
    corpus = read_corpus(request.config.data)
    texts = corpus.texts[corpus.held_out : corpus.documents]["text"]
    length = json.loads((finished / ADAPT).read_text())["facts"]["length"]["length"]
    rows = []
    for path, tokens in ((world.student / "model", length), (world.teacher, 64)):
        model = SentenceTransformer(str(path))
        model.max_seq_length = tokens
        rows.append(model.encode(texts, normalize_embeddings=True).astype(np.float64))
    saved = PairStatistics.of_arrays(load_file(finished / STATISTICS), "documents.")
    assert saved.count == 81 == len(texts)
    np.testing.assert_allclose(saved.source, rows[0].T @ rows[0], atol=2e-2)
    np.testing.assert_allclose(saved.cross, rows[0].T @ rows[1], atol=2e-2)
    np.testing.assert_allclose(saved.target, rows[1].T @ rows[1], atol=2e-2)


def test_the_same_call_again_only_says_that_it_is_finished(world, finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    jasper_fast.adapt(world.few, out=finished, **world.options())
    assert f"{finished} is finished: see" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}


STEPS = (
    *("read_request_corpus", "embed", "pick_length", "with_length", "count_pairs", "choose_maps", "project"),
    *("label_free_table", "export_forms", "write_adapt_report"),
)


def test_it_continues_after_an_interruption_at_any_step(world, finished, tmp_path):
    """Each call stops at a later step than the one before. The last one has the results of an undisturbed call."""
    out = tmp_path / "out"
    for step in STEPS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, step, lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                jasper_fast.adapt(world.few, out=out, **world.options())
        assert not (out / "results.json").exists() and not [*out.rglob(".unfinished-*")]
        assert not (out / ".lock").exists()
    jasper_fast.adapt(world.few, out=out, **world.options())
    ours, theirs = results_of(out), results_of(finished)
    for key in ("maps", "documents", "held_out"):
        assert ours[key] == theirs[key], key
    saved, expected = load_file(out / STATISTICS), load_file(finished / STATISTICS)
    assert all(np.array_equal(saved[name], expected[name]) for name in expected)


def test_more_documents_add_only_new_ones(world, finished, tmp_path, capsys, monkeypatch):
    import shutil

    from jasper_fast.teachers.model import Teacher

    out = tmp_path / "out"
    shutil.copytree(finished, out)
    cache = shutil.copytree(world.cache, tmp_path / "cache")  # no other test has encoded the new documents there
    encoded, honest = [], Teacher.encode

    def spy(self, texts, role="document", *, rows=None, progress=None):
        if progress is not None:
            encoded.extend((self.name, text) for text in texts)
        return honest(self, texts, role, rows=rows, progress=progress)

    monkeypatch.setattr(Teacher, "encode", spy)
    jasper_fast.adapt(world.many, out=out, **world.options(cache=str(cache)))
    said = capsys.readouterr().out
    before, after = load_file(finished / STATISTICS), load_file(out / STATISTICS)
    old, new = set(before["documents.texts"].tolist()), set(after["documents.texts"].tolist())
    results = results_of(out)
    assert "earlier" not in results["documents"] and len(old) == 81 and old < new
    assert f"{len(new) - len(old)} new documents" in said and len(new) == 130 - results["held_out"]["documents"]
    texts = [text for _, text in encoded]
    known = {row["text"] for row in map(json.loads, world.few.read_text().splitlines())}
    assert texts and not known & {text.partition("\n")[2] or text for text in texts}
    assert len(set(encoded)) == len(encoded)  # each text once by each model
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(world.few.read_text().splitlines(keepends=True)[:60]))
    jasper_fast.adapt(fewer, out=out, **world.options(cache=str(cache)))
    assert "is finished" in capsys.readouterr().out and results_of(out) == results  # nothing is new


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": ["text"]}, r"columns.0: 'title' -> 'text'"),
        ({"max_length": 16}, r"max_length: not set -> 16"),
        ({"teacher": "{student}"}, r"teacher.revision: 'sha256:"),
        ({"model": "{teacher}", "teacher": "{teacher}"}, r"student.revision: 'sha256:"),
        ({"minutes": 1.0}, r"minutes: not set -> 1.0"),
    ],
)
def test_a_changed_call_is_an_error_with_the_difference(world, finished, changes, message):
    names = {"{student}": str(world.student / "model"), "{teacher}": str(world.teacher)}
    given = {key: names.get(value, value) if isinstance(value, str) else value for key, value in changes.items()}
    with pytest.raises(JasperError, match=rf"(?s)other settings.*{message}.*Fix: "):
        jasper_fast.adapt(world.few, out=finished, **world.options(**given))


def test_other_widths_are_written_from_the_saved_statistics(world, finished, tmp_path, capsys):
    import shutil

    out = shutil.copytree(finished, tmp_path / "out")
    jasper_fast.adapt(world.few, out=out, **world.options(widths=[16, 4]))
    assert "0 new documents" in capsys.readouterr().out
    assert SentenceTransformer(str(out / "symmetric")).encode(["a"], task="4").shape == (1, 4)


def test_dry_run_says_what_would_be_done_and_writes_nothing(world, tmp_path, capsys):
    given = ["--columns", "title,text", "--model", str(world.student), "--cache", str(world.cache), "--dry-run"]
    assert main([str(world.few), *given, "--out", str(tmp_path / "out"), "--minutes", "3"]) == 0
    said = capsys.readouterr().out
    assert "90 documents read, 9 held out" in said and "after 3 minutes of training in" in said
    assert "symmetric and asymmetric; widths 32, 16" not in said and "width 32" in said
    assert main([str(world.few), *given, "--out", str(tmp_path / "out")]) == 0
    assert "symmetric and asymmetric; widths 32, 16" in capsys.readouterr().out  # the widths of the student
    assert not (tmp_path / "out").exists()


def test_a_rejected_call_leaves_no_folder(world, tmp_path):
    few = tmp_path / "five.jsonl"
    few.write_text("".join(world.few.read_text().splitlines(keepends=True)[:5]))
    with pytest.raises(JasperError, match="too few documents"):
        jasper_fast.adapt(few, out=tmp_path / "out", **world.options())
    assert not (tmp_path / "out").exists()


def test_a_student_without_narrow_heads_gets_the_documented_widths(world):
    from jasper_fast.adaptation.export import narrow_widths

    assert narrow_widths(None, str(world.teacher), 384, False) == [128, 64, 32]
    assert narrow_widths(None, str(world.teacher), 64, False) == [32]
    assert narrow_widths(None, str(world.student), 32, False) == [16]  # its own
