"""Arguments of `adapt` that are rejected by files and numbers alone, before a model is loaded."""

from __future__ import annotations

import json
import shutil

import pytest
import sentence_transformers

from jasper_fast.adaptation.migrate import migrate
from jasper_fast.adaptation.request import make_request
from jasper_fast.models.hub import configured_width
from jasper_fast.utils.errors import JasperError


@pytest.fixture
def no_model(monkeypatch):
    """Fail if a model is loaded."""

    def load(self, *args, **kwargs):
        pytest.fail("a model was loaded")

    monkeypatch.setattr(sentence_transformers.SentenceTransformer, "__init__", load)


@pytest.fixture
def cross_encoder(tiny_bert, tmp_path):
    """A folder as a cross-encoder of transformers: no list of modules, and a classifier's architecture."""
    folder = shutil.copytree(tiny_bert, tmp_path / "cross")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "architectures": ["BertForSequenceClassification"]}))
    (folder / "modules.json").unlink(missing_ok=True)
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minutes": 0}, r"minutes: got 0, expected a number above 0. Fix: "),
        ({"widths": [512]}, r"--widths: 512 is wider than the teacher \(got 512, expected at most 32\). Fix: "),
        ({"widths": [0]}, r"widths: got \[0\], expected .* Fix: "),
    ],
)
def test_impossible_numbers_are_rejected_before_a_model_is_loaded(world, tmp_path, no_model, changes, message):
    with pytest.raises(JasperError, match=message):
        make_request(world.few, tmp_path / "out", **world.options(**changes))
    assert not (tmp_path / "out").exists()


def test_numbers_are_rejected_before_the_documents_are_read(world, tmp_path):
    with pytest.raises(JasperError, match="minutes: got 0"):
        make_request(tmp_path / "absent.jsonl", tmp_path / "out", **world.options(minutes=0))


@pytest.mark.parametrize("option", ["teacher", "model"])
def test_a_cross_encoder_is_rejected_by_its_name(world, tmp_path, no_model, cross_encoder, option):
    with pytest.raises(JasperError, match="BertForSequenceClassification, a cross-encoder .*Fix: choose an embedding"):
        make_request(world.few, tmp_path / "out", **world.options(**{option: cross_encoder}))


def test_a_cross_encoder_cannot_be_mapped_into_an_index(world, tmp_path, no_model, cross_encoder):
    with pytest.raises(JasperError, match="a cross-encoder or classifier"):
        migrate(world.few, tmp_path / "absent.npy", cross_encoder, tmp_path / "out")


def test_the_width_comes_from_the_files_of_a_model(tiny_bert, world, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    parts = [modules.Transformer(str(tiny_bert)), modules.Pooling(32, "mean"), modules.Dense(32, 16)]
    SentenceTransformer(modules=parts, device="cpu").save_pretrained(str(tmp_path / "dense"))
    assert configured_width(str(tmp_path / "dense")) == 16
    assert configured_width(str(tiny_bert)) == 32
    assert configured_width(str(world.student)) is None  # a Router of widths


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([{"text": "a b"}], {"columns": ["title"]}, r"no column 'title' .*--columns"),
        ([{"text": "."}] * 40, {"columns": ["text"]}, r"no training text is left .*--columns"),
        ([{"text": f"note {i}", "id": f"d{i}"} for i in range(40)], {"teacher": "{vectors}"}, r"--id-column"),
        (
            [{"text": f"note {i}", "id": f"d{i}"} for i in range(40)],
            {"teacher": "{ids}", "id_column": "id"},
            r"no row has an id of the documents .*--id-column",
        ),
    ],
    ids=["column", "short texts", "too few vectors", "other ids"],
)
def test_messages_name_the_options_of_the_command(world, tmp_path, rows, changes, message):
    """No message sends a user of `adapt` to fields of a configuration, which the command does not have."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from jasper_fast.adaptation.pipeline import read_request_corpus

    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    np.save(tmp_path / "v.npy", np.eye(30, dtype=np.float32))
    pq.write_table(pa.table({"id": ["x1"], "embedding": [[1.0, 0.0]]}), tmp_path / "v.parquet")
    places = {"{vectors}": str(tmp_path / "v.npy"), "{ids}": str(tmp_path / "v.parquet")}
    given = {key: places.get(value, value) if isinstance(value, str) else value for key, value in changes.items()}
    options = world.options(**{"columns": ["text"], "cache": str(tmp_path / "cache"), **given})
    with pytest.raises(JasperError, match=rf"(?s){message}") as raised:
        read_request_corpus(make_request(tmp_path / "docs.jsonl", tmp_path / "out", **options))
    assert "data.sources" not in str(raised.value) and "this configuration" not in str(raised.value)
