"""An exported tiny model with its golden file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic

from jasper_fast.config.models import StudentConfig
from jasper_fast.drift.stock import StockSide
from jasper_fast.exporting.golden import Text, golden_facts, write_golden
from jasper_fast.exporting.onnx import export_onnx
from jasper_fast.exporting.student import export_student
from jasper_fast.models.student import Student
from tests.helpers.adapted import PROMPTS

WIDTH, LENGTH = 24, 40


@pytest.fixture(scope="session")
def exported(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Flat folder with a query prompt, a Dense head of 24, graphs in fp32 and dynamic int8, and a golden file."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("drift")
    fields = {"heads": [WIDTH, 8], "layers": [0, 2], "max_length": LENGTH, "prompts": PROMPTS}
    export_student(Student.build(StudentConfig(model=str(tiny_bert), **fields)), folder / "run" / "model")
    out = export_onnx(folder / "run", WIDTH, folder / "flat")
    graph = out / "onnx" / "model.onnx"
    quantize_dynamic(graph, graph.with_name("model_int8.onnx"), weight_type=QuantType.QInt8, per_channel=True)
    side = StockSide(str(out))
    facts = golden_facts(out)
    write_golden(out, lambda texts, role: side.embed([Text(role, text) for text in texts]), facts)
    return out
