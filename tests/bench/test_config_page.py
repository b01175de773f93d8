"""docs/config.md is what the schema gives, and explains every field."""

from __future__ import annotations

from bench.__main__ import main as bench
from bench.pages.config import page, parts, sections
from jasper_fast.config.comments import field_meanings
from jasper_fast.config.stage import StageConfig


def test_the_committed_page_is_up_to_date():
    assert bench(["config-page", "--check"]) == 0, "run python -m bench config-page"


def test_every_field_has_a_meaning():
    for part in parts():
        meanings = field_meanings(part.model)
        for name, info in part.model.model_fields.items():
            assert meanings.get(name) or list(sections(info.annotation)), f"{part.model.__name__}.{name}: add a comment"


def test_comments_above_a_field_and_on_its_line_are_read():
    found = field_meanings(StageConfig)
    assert found["steps"] == "optimizer steps; 0: `minutes` decides"
    assert found["train"].startswith("parameters to train: globs")


def test_comments_are_read_from_the_module_of_the_class(tmp_path, monkeypatch):
    fields = "    steps: int = 3  # number of steps\n    # peak rate\n    rate: float = 0.1\n"
    (tmp_path / "section_elsewhere.py").write_text(
        f"from jasper_fast.config.run import Section\nclass Other(Section):\n{fields}"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from section_elsewhere import Other

    assert field_meanings(Other) == {"steps": "number of steps", "rate": "peak rate"}


def test_types_and_defaults_are_shown():
    text = page()
    assert "| `lr` | number > 0 | *required* | peak learning rate |" in text
    assert '| `mode` | `ddp`, `fsdp` | `"ddp"` |' in text
    assert "| `student` | [section](#student) | *required* |" in text
