"""A new loss touches four files: the steps of docs/architecture.md, made in a copy of the project."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAME = "l1_similarity"
TABLE, CASES = "jasper_fast/config/losses.py", "tests/helpers/loss_table.py"
TESTS = "tests/losses/test_every_loss.py"
# In one process, because imports take most of the time.
TRAIN_AND_CHECK = """
import json, sys
train, check = json.loads(sys.argv[1])
import pytest
from jasper_fast.train import main
assert not main(train)
sys.exit(pytest.main(check))
"""


def steps() -> dict[str, str]:
    """Return the code of each file from the section of the page."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.partition("### Add a loss")[2].partition("\n#")[0]
    return dict(re.findall(r"^\d\. `([^`]+)`.*?\n\n? *```\w*\n(.*?)^ *```", section, re.DOTALL | re.MULTILINE))


def dedent(code: str) -> str:
    return re.sub(r"^ {3}", "", code, flags=re.MULTILINE)


def insert(file: Path, after: str, line: str) -> None:
    """Put a line below the last one that begins with ``after``."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    place = max(i for i, own in enumerate(lines) if own.startswith(after))
    file.write_text("".join([*lines[: place + 1], line, *lines[place + 1 :]]), encoding="utf-8")


def digests(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def config(folder: Path, bert: Path) -> dict:
    stage = {"name": "one", "train": ["heads.*"], "heads": [32, 8], "batch_size": 8, "steps": 3, "lr": 1e-3}
    return {
        "name": "new-loss",
        "student": {"model": str(bert), "heads": [32, 8], "max_length": 16},
        "teachers": [{"model": str(bert), "max_length": 16}],
        "data": {"sources": [{"path": str(folder / "texts.txt")}], "cache": str(folder / "cache")},
        "stages": [{**stage, "weights": {"relative_similarity": 0, NAME: 5}}],
    }


@pytest.mark.slow
def test_a_new_loss_touches_four_files_and_trains(tiny_bert, tiny_texts, tmp_path):
    copy, code = tmp_path / "project", {file: dedent(text) for file, text in steps().items()}
    ignored = shutil.ignore_patterns("__pycache__", "kernels")
    shutil.copytree(ROOT / "jasper_fast", copy / "jasper_fast", ignore=ignored)
    shutil.copytree(ROOT / "kernels", copy / "jasper_fast" / "kernels", ignore=ignored)
    for file in ("CHANGELOG.md", "pyproject.toml", CASES, "tests/conftest.py", "tests/helpers/costs.py", TESTS):
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, copy / file)
    before = digests(copy)

    new_file = f"jasper_fast/losses/{NAME}.py"
    assert set(code) == {TABLE, new_file, CASES, "CHANGELOG.md"}
    insert(copy / TABLE, "    Loss(", "    " + code[TABLE].strip() + "\n")
    (copy / new_file).write_text(code[new_file], encoding="utf-8")
    insert(copy / CASES, '    "', "    " + code[CASES].strip() + "\n")
    insert(copy / "CHANGELOG.md", "- Add `jasper_fast.losses`", code["CHANGELOG.md"])
    after = digests(copy)
    assert {file for file in before | after if before.get(file) != after.get(file)} == set(code)

    (tmp_path / "texts.txt").write_text("\n".join(tiny_texts[:40]), encoding="utf-8")
    (tmp_path / "run.yaml").write_text(json.dumps(config(tmp_path, tiny_bert)), encoding="utf-8")
    train = ["--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run")]
    check = ["-q", "-p", "no:cacheprovider", TESTS, "-k", f"{NAME} or slow_form"]
    environment = os.environ | {"PYTHONPATH": str(copy)}
    command = [sys.executable, "-c", TRAIN_AND_CHECK, json.dumps([train, check])]
    done = subprocess.run(
        command, cwd=copy, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout

    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    logged = [line for line in lines if line["event"] == "step"]
    assert len(logged) == 3 and all(line[NAME] > 0 for line in logged)
    for line in logged:  # the weighted sum has it
        weighted = 10 * line["cosine"] + 200 * line["similarity"] + 5 * line[NAME]
        assert line["loss"] == pytest.approx(weighted, rel=1e-5)
    assert f"5 {NAME.replace('_', ' ')}" in (tmp_path / "run" / "report.md").read_text()
    assert f"5 {NAME}" in (tmp_path / "run" / "model" / "README.md").read_text()
    assert f"{NAME.replace('_', ' ')} " in done.stdout  # the printed line of a step
