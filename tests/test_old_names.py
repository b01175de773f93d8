"""Old module names work for one release, and say where the name is now."""

import importlib
import subprocess
import sys
import warnings

import pytest

from jasper_fast._renamed import MODULES


def load(module, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return getattr(importlib.import_module(f"jasper_fast.{module}"), name)


@pytest.mark.parametrize(
    ("old", "name", "new"),
    [
        ("files", "publish_dir", "utils.atomic"),
        ("errors", "JasperError", "utils.errors"),
        ("model", "Student", "models.student"),
        ("evalsets", "load_eval", "data.eval_loaders"),
        ("sharding", "shard", "distributed.fsdp"),
        ("reference", "pair_scores", "losses.reference"),
        ("checkpoint", "Saver", "training.run.checkpoint"),
        ("data", "build_texts", "data.text_dataset"),  # a package now
        ("teachers", "load_teacher", "teachers.model"),
        ("config", "stage_problems", "config.stage"),
        ("export", "export_student", "exporting.student"),  # a command
        ("evaluate", "teacher_floors", "evaluation.score"),
    ],
)
def test_an_old_name_is_the_new_one_with_a_warning(old, name, new):
    assert load(old, name) is load(new, name)
    with pytest.warns(DeprecationWarning, match=rf"jasper_fast.{old}.{name} is now jasper_fast.{new}.{name}; "):
        getattr(importlib.import_module(f"jasper_fast.{old}"), name)


def test_setting_an_old_name_sets_the_new_one():
    old, new = (importlib.import_module(f"jasper_fast.{name}") for name in ("cache", "teachers.cache"))
    before = new.SHARD_ROWS
    try:
        with pytest.warns(DeprecationWarning):
            old.SHARD_ROWS = 7
        assert new.SHARD_ROWS == 7
    finally:
        new.SHARD_ROWS = before


@pytest.mark.parametrize("old", MODULES)
def test_every_old_module_imports(old):
    assert importlib.import_module(f"jasper_fast.{old}")
    for new in MODULES[old].split():
        assert importlib.import_module(f"jasper_fast.{new}")


@pytest.mark.parametrize("old", ["files", "data", "export", "config"])
def test_a_name_that_never_existed_is_an_error(old):
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        load(old, "no_such_name")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("jasper_fast.no_such_module")


def test_a_command_that_runs_as_main_has_no_old_names():
    command = "import runpy, jasper_fast._renamed as r; get = r.old_names('__main__'); get('x')"
    ended = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert "AttributeError: module 'jasper_fast.__main__' has no attribute 'x'" in ended.stderr


def test_the_warning_points_to_the_line_of_the_user():
    for name in ("from jasper_fast.config import stage_problems", "from jasper_fast.files import publish_dir"):
        with pytest.warns(DeprecationWarning) as warned:
            exec(compile(name, "users_file.py", "exec"), {})
        assert warned[0].filename == "users_file.py"


def test_the_package_itself_does_not_use_old_names():
    """Also not through ``from package import module``, for which Python asks the package first."""
    modules = "train, teach, evaluate, export, search, env, pictures, sentence_transformers, mips, losses"
    command = f"import jasper_fast; from jasper_fast import {modules}; from jasper_fast.ops import cost; import types; "
    command += "assert isinstance(cost, types.ModuleType)"
    subprocess.run([sys.executable, "-W", "error::DeprecationWarning:jasper_fast", "-c", command], check=True)
