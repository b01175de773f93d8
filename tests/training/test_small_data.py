"""A configuration without stages trains, also on a few texts. What changes for them is in the plan and the log."""

from __future__ import annotations

import json

import pytest

from jasper_fast.config.load import load_config
from jasper_fast.train import main, train
from jasper_fast.training.data import TrainingData
from jasper_fast.training.preflight import fit_small_data
from jasper_fast.utils.errors import JasperError
from tests.helpers.runs import records

MINIMAL = {"student": "m", "teachers": "m", "data": {"sources": "x"}}


@pytest.mark.parametrize(
    ("texts", "batches", "changes"),
    [
        (5000, [128, 32, 512], {}),
        (1024, [128, 32, 512], {}),
        (600, [128, 32, 296], {}),
        (130, [128, 32, 64], {}),
        (127, [127, 32, 56], {"narrow_start": "as_is"}),
        (20, [20, 20, 8], {"narrow_start": "as_is"}),
        (12, [12, 12, 12], {"narrow_start": "as_is", "batches": "random"}),
    ],
)
def test_batches_shrink_with_the_number_of_texts(texts, batches, changes):
    config = load_config(MINIMAL)
    fitted = fit_small_data(config, TrainingData(range(texts)))
    assert [stage.batch_size for stage in fitted.stages] == batches
    assert len(fitted.notes) - len(config.notes) == sum(
        ours.batch_size != theirs.batch_size for ours, theirs in zip(fitted.stages, config.stages, strict=True)
    )
    last, plain = fitted.stages[2].model_dump(exclude={"batch_size"}), config.stages[2].model_dump()
    assert {key: value for key, value in last.items() if value != plain[key]} == changes


def test_minimal_configuration_trains_on_forty_texts(tmp_path, tiny_bert, tiny_texts, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": text}) for text in tiny_texts[:40]]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    (tmp_path / "mine.yaml").write_text(
        f"student: {{model: '{tiny_bert}', layers: [0, 2], heads: [32, 16, 8], max_length: 32}}\n"
        f"teachers: '{tiny_bert}'\ndata: {{sources: docs.jsonl, cut_share: 0, shuffle_share: 0}}\n"
        "stages: {head: {steps: 2}, distil: {steps: 2}, reduce: {steps: 2}}\n"
    )
    note = "stage 'reduce': batch_size 512 -> "
    assert main(["--config", "mine.yaml", "--dry-run"]) == 0
    plan = capsys.readouterr().out
    few = "quality without labels will not be measured: 4 documents are held out, and it needs 21."
    assert few in plan and note in plan and "run mine in runs/mine" in plan and "stages: none given" in plan
    assert main(["--config", "mine.yaml"]) == 0
    assert note in capsys.readouterr().out
    run = tmp_path / "runs" / "mine"
    assert any(record["event"] == "note" and note in record["text"] for record in records(run))
    assert main(["--config", "mine.yaml"]) == 0 and "is finished" in capsys.readouterr().out
    with pytest.raises(JasperError, match="stage 'reduce': a batch of 64 from"):
        train("mine.yaml", out="runs/other", overrides=[("stages.reduce.batch_size", 64)])


def test_a_stage_that_reads_fewer_texts_than_axes_starts_those_heads_as_they_are(
    tiny_bert, tiny_texts, tmp_path, capsys
):
    """A stage of two small batches of neighbours reads fewer texts than there are in the training set."""
    from jasper_fast.train import train

    (tmp_path / "texts.txt").write_text("\n".join(tiny_texts[:44]))
    tree = {
        "student": {"model": str(tiny_bert), "heads": [32, 24, 8], "max_length": 16},
        "teachers": str(tiny_bert),
        "data": {"sources": str(tmp_path / "texts.txt"), "cache": str(tmp_path / "cache"), "cut_share": 0},
        "stages": {"head": {"steps": 1}, "distil": {"steps": 1}, "reduce": {"steps": 1}},
    }
    run = train(tree, out=tmp_path / "run")
    assert "head 24 starts as it is: the stage reads 16 texts, too few for its axes" in capsys.readouterr().out
    assert (run / "results.json").is_file()
