"""The search benchmark at small size: it builds once, asks every question, and its times are consistent."""

from __future__ import annotations

import json

from bench.mips.search import main


def test_a_question_is_timed_with_and_without_the_model(tiny_bert, tiny_texts, tmp_path, capsys):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_texts))
    command = ["--model", str(tiny_bert), "--texts", str(texts), "--limit", "50", "--asked", "20", "--max-length", "32"]
    command += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "found.json")]
    main(command)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["texts"] == 50 and found["questions"] == 20 and found["build_seconds"] > 0
    assert 0 < found["search_milliseconds"] < found["milliseconds"] <= found["milliseconds_p95"]
    assert "50 texts, embeddings 32 wide" in capsys.readouterr().out
    main([*command, "--questions", str(texts)])
    assert json.loads((tmp_path / "found.json").read_text())["build_seconds"] is None
