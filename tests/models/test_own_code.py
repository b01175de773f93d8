"""Models with their own code run only with permission, in training and in every command."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from jasper_fast import evaluate, pictures, search
from jasper_fast.config.models import StudentConfig
from jasper_fast.exporting.student import export_student
from jasper_fast.models import folder as models_folder
from jasper_fast.models.student import Student
from jasper_fast.train import train
from jasper_fast.utils.errors import JasperError

CODE = """
from transformers import BertConfig, BertModel


class HomemadeConfig(BertConfig):
    model_type = "homemade"


class HomemadeModel(BertModel):
    config_class = HomemadeConfig
"""

EYES = """
from transformers import SiglipVisionConfig, SiglipVisionModel

with open({marker!r}, "a") as file:
    file.write("it ran\\n")


class EyesConfig(SiglipVisionConfig):
    model_type = "eyes"


class EyesModel(SiglipVisionModel):
    config_class = EyesConfig

    def __init__(self, config):
        super().__init__(config)
        with open({marker!r}, "a") as file:  # the module itself is imported once in a process
            file.write("it ran again\\n")
"""
TOWER = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
TOWER |= {"num_attention_heads": 2}


@pytest.fixture
def homemade(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Save the tiny BERT as an architecture that only the folder's own code defines."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return bring_code(shutil.copytree(tiny_bert, tmp_path / "homemade"), "homemade", "Homemade", CODE)


def bring_code(folder: Path, kind: str, name: str, code: str) -> Path:
    """Make a saved model depend on ``code``, which defines the classes nameConfig and nameModel."""
    (folder / f"{kind}_code.py").write_text(code)
    settings = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": f"{kind}_code.{name}Config", "AutoModel": f"{kind}_code.{name}Model"}
    settings |= {"model_type": kind, "architectures": [f"{name}Model"], "auto_map": auto}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_trusted_code_trains_and_is_evaluated_and_searched(
    homemade: Path, tiny_bert: Path, tiny_texts: list[str], tmp_path: Path
) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(tiny_texts[:60]))
    lines = [f"{i % 5}.0\t{tiny_texts[80 + i]}\t{tiny_texts[120 + i]}" for i in range(12)]
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("\n".join(["score\tsentence1\tsentence2", *lines]) + "\n")
    tree = {
        "name": "homemade",
        "student": {"model": str(homemade), "heads": [16], "max_length": 16, "layers": 2},
        "teachers": [{"model": str(tiny_bert), "max_length": 16}],
        "data": {"sources": [{"path": str(tmp_path / "texts.txt")}], "cache": str(tmp_path / "cache")},
        "evaluate": [{"path": str(pairs)}],
        "stages": [{"name": "all", "train": ["*"], "heads": [16], "batch_size": 8, "steps": 2, "lr": 1e-3}],
    }
    tree["stages"][0]["weights"] = {"cosine": 0}
    run = tmp_path / "run"
    with pytest.raises(JasperError, match="set student.trust_remote_code: true"):
        train(tree, out=tmp_path / "other")
    train(tree, out=run, overrides=[("student.trust_remote_code", True)])
    rows = json.loads((run / "results.json").read_text())["rows"]
    assert any(row["model"] == "student" and row["width"] == 16 for row in rows)

    with pytest.raises(JasperError, match="custom code, .* --trust-remote-code"):
        evaluate.main([str(run), str(pairs)])
    assert evaluate.main([str(run), str(pairs), "--trust-remote-code"]) == 0

    texts, index = str(tmp_path / "texts.txt"), str(tmp_path / "index")
    with pytest.raises(JasperError, match="custom code, .* --trust-remote-code"):
        search.main(["build", str(run), texts, "--out", index])
    assert search.main(["build", str(run), texts, "--out", index, "--trust-remote-code"]) == 0
    with pytest.raises(JasperError, match="custom code, .* --trust-remote-code"):
        search.main(["ask", index, tiny_texts[0]])
    assert search.main(["ask", index, tiny_texts[0], "--trust-remote-code"]) == 0


def test_mteb_and_onnx_need_permission(homemade: Path, tmp_path: Path) -> None:
    from jasper_fast.exporting import onnx, student
    from jasper_fast.mteb import load

    config = StudentConfig(model=str(homemade), heads=[16], max_length=16, trust_remote_code=True)
    model = student.export_student(Student.build(config), tmp_path / "model")
    with pytest.raises(JasperError, match="custom code"):
        load(model)
    assert load(model, trust_remote_code=True).mteb_model_meta.embed_dim == 16
    for trusted in (False, True):
        try:
            written = onnx.export_onnx(model, None, tmp_path / "onnx", trust_remote_code=trusted)
        except JasperError as error:
            assert not trusted and "custom code" in str(error)
        else:
            assert trusted and (written / onnx.ONNX_FILE).is_file()


def test_a_folder_cannot_permit_its_own_code(homemade: Path, tiny_bert: Path, tmp_path: Path) -> None:
    """``training.json`` records the permission of the training run, which does not extend to later users."""
    from PIL import Image

    from jasper_fast.models.vision_tower import new_tower

    (tmp_path / "shown").mkdir()
    picture = tmp_path / "shown" / "grey.png"
    Image.new("RGB", (8, 8), (90, 90, 90)).save(picture)
    marker = tmp_path / "marker"
    new_tower(TOWER).save_pretrained(tmp_path / "eyes")
    eyes = bring_code(tmp_path / "eyes", "eyes", "Eyes", EYES.format(marker=str(marker)))
    towers = {"words": {"tower": TOWER}, "eyes": {"model": str(eyes), "trust_remote_code": True}}
    for name, tower in towers.items():
        own = name == "words"
        fields = {"model": str(homemade if own else tiny_bert), "heads": [16], "max_length": 16}
        vision = {**tower, "image_tokens": 2}
        config = StudentConfig(**fields, trust_remote_code=own, vision=vision)
        folder = export_student(Student.build(config), tmp_path / f"model-{name}")
        facts = json.loads((folder / "training.json").read_text())["student"]
        assert facts["trust_remote_code"] or facts["vision"]["trust_remote_code"]

        marker.unlink(missing_ok=True)
        with pytest.raises(JasperError, match="custom code, .* --trust-remote-code"):
            pictures.load(folder)
        index = str(tmp_path / f"index-{name}")
        build = ["build", str(folder), str(picture.parent), "--pictures", "--out", index]
        with pytest.raises(JasperError, match="custom code, .* --trust-remote-code"):
            search.main(build)
        assert not marker.exists()
        assert pictures.load(folder, trust_remote_code=True).encode([picture]).shape == (1, 16)
        assert search.main([*build, "--trust-remote-code"]) == 0
        if not own:  # permission can be for the tower's code alone
            assert marker.exists()
            with pytest.raises(JasperError, match="custom code"):
                models_folder.load_student(folder, trust_remote_code=True, trust_tower_code=False)
            assert models_folder.load_student(folder, trust_tower_code=True).vision_tower.side == 16


def test_recipes_do_not_permit_remote_code() -> None:
    from jasper_fast.config.load import load_config, recipe_names

    for name in recipe_names():
        config = load_config(name)
        assert not any(teacher.trust_remote_code for teacher in config.teachers), name
        assert not config.student.trust_remote_code, name
