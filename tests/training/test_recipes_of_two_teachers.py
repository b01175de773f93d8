"""Recipes with two teachers run as they are written, with tiny models in place of theirs."""

from __future__ import annotations

import json
import re

import pytest

from jasper_fast.config.load import load_config
from jasper_fast.config.yaml import dump_yaml
from jasper_fast.train import main
from tests.helpers.graphs import text_graph

NARROWER = (24, 16, 8, 4)  # widths of the tiny models below 32


def shrunk(name, tiny_bert, tiny_texts, folder):
    """The tree of a recipe in which models, widths, texts and batches are tiny. Everything else is the recipe's."""
    tree = load_config(name).model_dump(mode="json")
    widest, *narrow = tree["student"]["heads"]
    widths = {widest: 32, **dict(zip(narrow, NARROWER, strict=False))}
    layers = tree["student"]["layers"]
    tree["student"] |= {"model": str(tiny_bert), "layers": layers and [0, 1, 2], "max_length": 32}
    tree["student"]["heads"] = [*widths.values()]
    text_graph(tiny_bert, folder / "graph")
    for teacher, model in zip(tree["teachers"], (tiny_bert, folder / "graph"), strict=True):
        teacher |= {"model": str(model), "max_length": 32, "prompts": {"query": "the ", "document": ""}}
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_texts))
    tree["data"] |= {"sources": [{"path": str(texts), "columns": ["text"]}], "cache": str(folder / "cache")}
    tree["data"] |= {"limit": None, "held_out": 0}
    tree["evaluate"] = []
    for stage in tree["stages"]:
        stage["heads"] = [widths[width] for width in stage["heads"]]
        stage["train"] = [re.sub(r"\d+", lambda found: str(widths[int(found[0])]), glob) for glob in stage["train"]]
        stage |= {"steps": 2, "batch_size": 32 if stage["rank"] is None else 4, "texts": None, "micro_batch": 16}
    return tree


@pytest.mark.parametrize("name", ["two-teachers", "open-en"])
def test_a_dry_run_accepts_the_recipe(name, tiny_bert, tiny_texts, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(dump_yaml(shrunk(name, tiny_bert, tiny_texts, tmp_path)))
    assert main(["--config", "mine.yaml", "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert "44 wide, are reduced to the widest head, 32, by PCA" in printed.out + printed.err
    for stage in load_config(name).stages:
        assert stage.name in printed.out


def test_the_reduced_target_is_close_to_the_student(tiny_bert, tiny_texts, tmp_path):
    """`head_init: identity` starts near the target of two teachers, because the target is turned towards it."""
    import numpy as np
    import torch

    from jasper_fast.data.prepare import prepare_texts
    from jasper_fast.models.encode import student_encoder
    from jasper_fast.models.student import build_student
    from jasper_fast.teachers.label import ensure_teachers

    found = {}
    for start in ("identity", "random"):
        tree = shrunk("two-teachers", tiny_bert, tiny_texts, tmp_path)
        tree["student"]["head_init"] = start
        config = load_config(tree)
        texts = prepare_texts(config).texts
        student = build_student(config)
        target = ensure_teachers(config, texts, progress=False, student=student).read(np.arange(len(texts)))
        own = student_encoder(student, [32], 32, torch.device("cpu"), "fp32")(texts["text"][:], "document")[32]
        found[start] = float((own * target.numpy()).sum(axis=1).mean())
    assert found["identity"] > 0.8 > 0.5 > abs(found["random"])
