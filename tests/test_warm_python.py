"""A fork of the warm Python behaves as the process of a command does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import warm_python

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """Start a server without slow imports, and return the first words of a client's command."""
    path = tmp_path_factory.mktemp("warm") / "s"
    program = "from tests.helpers import warm_python as w; import sys; w.SLOW_IMPORTS = (); w.serve(sys.argv[1])"
    server = subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=ROOT)
    while not path.exists():
        assert server.poll() is None
    yield [sys.executable, "-IS", warm_python.__file__, str(path)]
    server.kill()
    server.wait()


@pytest.mark.parametrize(
    ("code", "status", "out", "err"),
    [
        ("import os, sys; print(os.getcwd(), os.environ['MARK'], sys.argv[1:])", 0, "{folder} set ['a b']\n", ""),
        ("import sys; sys.exit(3)", 3, "", ""),
        ("raise SystemExit('a reason')", 1, "", "a reason\n"),
        ("print(1 / 0)", 1, "", "ZeroDivisionError: division by zero\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 247, "", ""),
        ("import sys; print(sys.stdin.read())", 0, "given\n", ""),
    ],
)
def test_a_fork_has_the_streams_folder_environment_and_status_of_a_command(client, tmp_path, code, status, out, err):
    done = subprocess.run(
        [*client, "-c", code, "a b"],
        cwd=tmp_path, env={**os.environ, "MARK": "set"}, input="given", capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == status and done.stdout == out.format(folder=tmp_path)
    assert done.stderr == err or (err and done.stderr.endswith(err))


def test_a_module_runs_as_main(client, tmp_path):
    done = subprocess.run([*client, "-m", "json.tool"], input="[1]", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "[\n    1\n]\n"
