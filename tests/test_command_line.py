"""`python -m jasper_fast` lists and runs every command, and `train --list` describes every recipe."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import pytest

import jasper_fast
from jasper_fast import __main__ as command_line
from jasper_fast.config.load import describe_recipes, recipe_names
from jasper_fast.utils.errors import JasperError

ROOT = Path(__file__).parent.parent


def started_as_a_module() -> dict[str, bool]:
    """Every module with a main block, and whether it calls ``run_cli(main, resumes=True)``."""
    calls = {}
    for file in sorted((ROOT / "jasper_fast").glob("*.py")):
        last = ast.parse(file.read_text()).body[-1]
        if isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'":
            calls[file.stem] = ast.unparse(last.body[0])
    del calls["__main__"]
    assert set(calls.values()) == {"run_cli(main)", "run_cli(main, resumes=True)"}
    return {name: call.endswith("resumes=True)") for name, call in calls.items()}


def run(monkeypatch, *arguments):
    """The exit status of the command line."""
    monkeypatch.setattr(sys, "argv", ["jasper-fast", *arguments])
    with pytest.raises(SystemExit) as leaving:
        command_line.run()
    return leaving.value.code


def shell(line):
    """A finished shell command line, in which $PYTHON is this interpreter."""
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    return subprocess.run(["bash", "-c", line], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_every_command_module_is_in_the_table():
    table = {name: command.resumes for name, command in command_line.COMMANDS.items()}
    assert table == started_as_a_module()


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_commands_are_listed(monkeypatch, capsys, arguments):
    assert run(monkeypatch, *arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in command_line.COMMANDS.items():
        assert [line.split(maxsplit=1)[1] for line in lines if line.split()[:1] == [name]] == [command.summary]
    assert max(map(len, lines)) <= 120


def test_the_version_is_printed(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"jasper_fast {jasper_fast.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian", "--config", "a b"], "did you mean `jasper-fast train --config 'a b'`?"),
        (["Search"], "did you mean `jasper-fast search`?"),
        (["my-run.yaml"], "'my-run.yaml' is not a command"),
        ([""], "'' is not a command"),
        (["--config", "my-run.yaml"], "'--config': expected a command first"),
    ],
)
def test_a_wrong_name_lists_the_commands(monkeypatch, capsys, arguments, expected):
    assert run(monkeypatch, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and expected in printed.err and not printed.out
    assert ", ".join(command_line.COMMANDS) in printed.err


@pytest.mark.parametrize("name", command_line.COMMANDS)
@pytest.mark.parametrize(
    ("result", "status"),
    [(0, 0), (None, 0), (130, 130), (JasperError("x"), 2), (SystemExit(2), 2), (KeyboardInterrupt(), 130)],
    ids=repr,
)
def test_a_command_runs_as_its_module_does(monkeypatch, capsys, name, result, status):
    calls = []

    def main(argv):
        calls.append(argv)
        if isinstance(result, BaseException):
            raise result
        return result

    def import_module(module):
        assert module == f"jasper_fast.{name}"
        return SimpleNamespace(main=main)

    monkeypatch.setattr(command_line, "importlib", SimpleNamespace(import_module=import_module))
    assert run(monkeypatch, name, "--a", "b c", name) == status
    assert calls == [["--a", "b c", name]]
    resumes = "Run the same command to resume" in capsys.readouterr().err
    assert resumes == (command_line.COMMANDS[name].resumes and isinstance(result, KeyboardInterrupt))


@pytest.mark.parametrize("name", command_line.COMMANDS)
def test_the_help_of_a_command_has_the_name_of_its_module(monkeypatch, capsys, name):
    assert run(monkeypatch, name, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: jasper-fast {name} ")


def test_messages_name_commands_as_they_are_installed():
    """`python -m jasper_fast…` is left to docstrings of modules, and to the list of commands for other environments."""
    package, found = Path(jasper_fast.__file__).parent, {}
    for file in package.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        documented = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        texts = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        wrong = [n.value for n in texts if id(n) not in documented and "python -m jasper_fast" in n.value]
        found |= {str(file.relative_to(package)): wrong} if wrong else {}
    assert [*found] == ["__main__.py"], found
    assert len(found["__main__.py"]) == 1 and "or: python -m jasper_fast COMMAND" in found["__main__.py"][0]


def test_a_closed_pipe_causes_no_traceback():
    done = shell('"$PYTHON" -m jasper_fast | true; echo "${PIPESTATUS[0]}"')
    assert not done.stderr and done.stdout in ("0\n", "141\n")


def test_the_list_needs_no_torch():
    code = "import runpy, sys; sys.argv = ['x']\ntry: runpy.run_module('jasper_fast', run_name='__main__')\nfinally: "
    code += "print(sorted({'torch', 'transformers', 'jasper_fast.train'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("\n[]\n"), done.stderr


def test_the_console_script_is_the_same_function():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert list(scripts) == ["jasper-fast"]
    module, _, function = scripts["jasper-fast"].partition(":")
    assert getattr(importlib.import_module(module), function) is command_line.run


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_begins_with_its_purpose_and_needs(name):
    text = (files("jasper_fast") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    purpose, needs = text.splitlines()[:2]
    assert re.fullmatch(r"# [A-Z].*\w\)?\.", purpose)
    assert re.fullmatch(
        r"# Needs: (?:(?:about|\d+ to) \d+ minutes on 2 CPU cores|.*(?:GPU|model hub|images).*)\.", needs
    )


def test_train_lists_the_recipes(capsys):
    from jasper_fast.train import main

    assert main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert printed == describe_recipes() + "\n"
    assert [line.split()[0] for line in printed.splitlines()] == recipe_names()
    assert max(map(len, printed.splitlines())) <= 120
    assert re.search(r"^minilm-docstrings +The default: .* \(needs 5 to 10 minutes on 2 CPU cores\)$", printed, re.M)
