"""A run of an older version resumes: its configuration is loaded through today's schema before it is compared."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
import torch
from pydantic import AliasChoices, Field

from jasper_fast.config.load import load_config
from jasper_fast.config.run import Config
from jasper_fast.config.types import Section
from jasper_fast.config.yaml import dump_yaml
from jasper_fast.training.run.folder import existing_difference, keep_older_meaning, result_settings, stored_difference
from jasper_fast.utils.errors import JasperError
from tests.helpers.runs import assert_same_run, settings, write_data

OLDER = [
    ("losses",),
    ("parallel",),
    ("log",),
    ("checkpoint",),
    ("images",),
    ("evaluate",),
    ("precision",),
    ("student", "vision"),
    ("student", "head_init"),
    ("data", "cut_share"),
    ("data", "min_chars"),
    ("data", "sources", 0, "variants"),
    ("teachers", 0, "truncate_dim"),
    ("stages", 0, "average"),
    ("stages", 0, "temperature"),
    ("stages", 0, "weights", "neighbourhood"),
]


def without(tree: dict[str, Any], *places: tuple) -> dict[str, Any]:
    """A stored configuration of a version that did not have these fields."""
    tree = copy.deepcopy(tree)
    for *path, last in places:
        node: Any = tree
        for part in path:
            node = node[part]
        del node[last]
    return tree


def plain() -> Config:
    """A run that leaves every field at its default where there is one."""
    stage = {"name": "a", "train": ["*"], "heads": [8], "steps": 1, "lr": 0.1}
    data = {"sources": [{"path": "x"}]}
    return load_config(
        {"name": "n", "student": {"model": "m", "heads": [8]}, "teachers": [{"model": "m"}], "data": data}
        | {"stages": [stage]}
    )


def started(folder, tree: dict[str, Any]):
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_yaml(tree))
    (folder / "log.jsonl").touch()
    return folder


@pytest.mark.parametrize("place", OLDER)
def test_a_field_that_an_older_version_lacked_is_no_difference(place, tmp_path):
    config = plain()
    tree = without(config.model_dump(mode="json"), place)
    assert existing_difference(started(tmp_path / "run", tree), config) == []
    if place[0] not in ("log", "checkpoint", "parallel"):
        facts = json.loads(json.dumps(without(result_settings(config), place)))
        assert stored_difference(facts, config, "the checkpoint") == []


def test_all_of_them_at_once_and_a_field_that_is_set_now(tmp_path):
    config = plain()
    outer = [place for place in OLDER if not any(place[: len(o)] == o and place != o for o in OLDER)]
    run = started(tmp_path / "run", without(config.model_dump(mode="json"), *outer))
    assert existing_difference(run, config) == []
    set_now = load_config(config.model_dump(), [("stages.0.average", 0.9), ("log.every", 3)])
    assert existing_difference(run, set_now) == ["stages.0.average: 0.0 -> 0.9"]


MEANING = [("data", "held_out"), ("data", "sources", 0, "join"), ("refit",)]  # absent: not today's default


@pytest.mark.parametrize("explicit", [False, True])
def test_a_run_of_an_older_version_keeps_its_meaning(explicit, tmp_path):
    config = plain()
    run = started(tmp_path / "run", without(config.model_dump(mode="json"), *MEANING))
    if explicit:  # what the user writes is compared, not replaced
        config = load_config(config.model_dump(mode="json"))
        assert keep_older_meaning(run, config) == config
        assert sorted(existing_difference(run, config)) == [
            "data.held_out: 0 -> 500",
            "data.sources.0.join: false -> true",
            "refit: false -> true",
        ]
        return
    kept = keep_older_meaning(run, config)
    assert kept.data.held_out == 0 and kept.data.sources[0].join is False and kept.refit is False
    assert existing_difference(run, kept) == []
    (run / "config.yaml").write_text(dump_yaml(kept.model_dump(mode="json")))  # as the resumed run writes it
    assert existing_difference(run, keep_older_meaning(run, config)) == []


def test_a_new_run_has_the_defaults_of_today(tmp_path):
    assert keep_older_meaning(tmp_path / "absent", plain()) == plain()
    run = started(tmp_path / "run", plain().model_dump(mode="json"))
    assert keep_older_meaning(run, plain()) == plain()
    (run / "config.yaml").write_text("data: {sources: 3}")
    assert keep_older_meaning(run, plain()) == plain()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"from_2030": 1}, "from_2030: unknown key"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"student": {"model": "m", "heads": [8], "wings": 2}}, "student.wings: unknown key"),
        ({"stages": []}, "stages: List should have at least 1 item"),
        ({"stages": "none"}, "stages: Input should be a valid list"),
        ({"teachers": None}, "teachers: Input should be a valid list"),
    ],
)
def test_what_this_version_does_not_understand_is_refused(change, problem, tmp_path):
    config = plain()
    tree = config.model_dump(mode="json") | change
    fix = "of another version of jasper_fast, or was edited. Fix: resume with the version that began the run, or use"
    with pytest.raises(JasperError, match=f"{re.escape(problem)}[^$]*config.yaml is {fix}"):
        existing_difference(started(tmp_path / "run", tree), config)
    with pytest.raises(JasperError, match=f"{re.escape(problem)}[^$]*the checkpoint is {fix}"):
        stored_difference(tree, config, "the checkpoint")


@pytest.mark.parametrize("stored", [None, [], "text", 3, {}, {"name": "n"}])
def test_facts_without_a_configuration_are_refused(stored):
    with pytest.raises(JasperError, match="the checkpoint is of another version"):
        stored_difference(stored, plain(), "the checkpoint")


def test_a_renamed_field_is_read_under_its_old_name(monkeypatch, tmp_path):
    class Renamed(Config):
        start: int = Field(default=0, validation_alias=AliasChoices("start", "seed"))
        seed: int = 0

    assert issubclass(Renamed, Section)
    monkeypatch.setattr("jasper_fast.config.load.Config", Renamed)
    old = plain().model_dump(mode="json") | {"seed": 5}
    del old["start"]
    run = started(tmp_path / "run", old)
    assert existing_difference(run, Renamed.model_validate(old)) == []


@pytest.mark.slow
def test_an_unfinished_run_of_an_older_version_resumes_bit_for_bit(tmp_path, tiny_bert, tiny_texts, monkeypatch):
    import jasper_fast.train as module
    import jasper_fast.training.loop as loop

    write_data(tmp_path, tiny_texts)
    tree = settings(tmp_path, tiny_bert) | {"evaluate": []}
    tree["data"] |= {"min_chars": 2, "held_out": 0}  # the default, and what older versions did
    module.train(tree, out=tmp_path / "alone")

    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        take, steps = loop.take_gradients, iter(range(9))  # the last is in the second stage

        def interrupted(*given):
            if next(steps, None) is None:
                raise KeyboardInterrupt
            return take(*given)

        patched.setattr(loop, "take_gradients", interrupted)
        with pytest.raises(KeyboardInterrupt):
            module.train(tree, out=run)
    outer = [
        ("losses",),
        ("images",),
        ("precision",),
        ("data", "min_chars"),
        *MEANING,
        ("student", "vision"),
        ("stages", 0, "average"),
    ]
    stored = load_config(run / "config.yaml").model_dump(mode="json")
    (run / "config.yaml").write_text(dump_yaml(without(stored, *outer, ("log",))))
    manifests = sorted((run / "checkpoints").glob("step-*/manifest.json"))
    for manifest in manifests:
        content = json.loads(manifest.read_text())
        content["facts"]["config"] = without(content["facts"]["config"], *outer)
        manifest.write_text(json.dumps(content))
    assert manifests
    del tree["data"]["held_out"]  # the same command as before the upgrade
    with pytest.raises(JasperError, match=r"was started with another configuration:\n  - seed: 0 -> 1"):
        module.train(tree, out=run, overrides=[("seed", 1)])
    torch.manual_seed(99)
    module.train(tree, out=run)
    assert_same_run(run, tmp_path / "alone")
