"""A new text source is one file and one line: the steps of docs/architecture.md, made in a copy of the project."""

from __future__ import annotations

import calendar
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE, NEW = "jasper_fast/data/text_sources.py", "jasper_fast/data/days.py"
READ = """
import json
from jasper_fast.config.data import SourceConfig
from jasper_fast.data.text_sources import (
    check_source, is_local, read_source, sample_texts, source_files, source_stamp
)
source = SourceConfig(path="days")
check_source(source)
drawn = [row for row, _ in sample_texts(source.model_copy(update={"limit": 3}), seed=0)]
print(json.dumps([[*read_source(source)], drawn, is_local(source), source_files(source), source_stamp(source)]))
"""


def steps() -> tuple[str, str]:
    """Return the new file and the new line from the section of the documentation."""
    pages = "\n".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md")))
    section = pages.partition("### Add a text source")[2].partition("\n#")[0]
    file = re.search(rf"^1\. `{NEW}`.*?```python\n(.*?)^ *```", section, re.DOTALL | re.MULTILINE)
    line = re.search(rf"^2\. `{TABLE}`: the line `(.*?)` in `BUILT_IN`", section, re.MULTILINE)
    assert file and line
    return textwrap.dedent(file[1]), line[1]


def test_a_new_source_is_one_file_and_one_line(tmp_path: Path) -> None:
    file, line = steps()
    ignored = shutil.ignore_patterns("__pycache__", "kernels")
    shutil.copytree(ROOT / "jasper_fast", tmp_path / "jasper_fast", ignore=ignored)
    (tmp_path / NEW).write_text(file, encoding="utf-8")
    table = (tmp_path / TABLE).read_text(encoding="utf-8")
    head, opening, rest = table.partition("BUILT_IN: dict[str, str] = {\n")
    (tmp_path / TABLE).write_text(f"{head}{opening}    {line}\n{rest}", encoding="utf-8")

    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", READ], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows, drawn, local, files, stamp = json.loads(run.stdout)
    assert rows == [[name] for name in calendar.day_name] and local and files == [] and len(stamp[0]) == 64
    assert len(drawn) == 3 and all(row in rows for row in drawn)
