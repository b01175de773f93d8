"""Whatever the terminal is, output ends no work: encodings, closed pipes, full disks, streams that are not there."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jasper_fast.config.load import dump_config, load_config
from jasper_fast.utils.errors import JasperError, run_cli
from jasper_fast.utils.output import TolerantStream, tolerant_output
from tests.helpers.runs import settings, write_data

LINES = "läuft … 東京 🦊 \udcff"  # the last: a byte of a file name that is not UTF-8


def terminal(encoding: str, errors: str = "strict") -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)


def shown(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode(stream.encoding)


def broken_pipe() -> io.TextIOWrapper:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def closed() -> io.TextIOWrapper:
    stream = terminal("utf-8")
    stream.close()
    return stream


def full_disk() -> io.TextIOWrapper:
    return open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115


def status(main, monkeypatch, *argv: str, resumes: bool = False) -> int:
    monkeypatch.setattr(sys, "argv", ["command", *argv])
    with pytest.raises(SystemExit) as left:
        run_cli(main, resumes)
    return left.value.code


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", r"l\xe4uft \u2026 \u6771\u4eac \U0001f98a \udcff"),
        ("latin-1", r"läuft \u2026 \u6771\u4eac \U0001f98a \udcff"),
        ("iso-8859-15", r"läuft \u2026 \u6771\u4eac \U0001f98a \udcff"),
        ("cp1252", r"läuft … \u6771\u4eac \U0001f98a \udcff"),
        ("cp437", r"läuft \u2026 \u6771\u4eac \U0001f98a \udcff"),
        ("shift_jis", r"l\xe4uft … 東京 \U0001f98a \udcff"),
        ("koi8-r", r"l\xe4uft \u2026 \u6771\u4eac \U0001f98a \udcff"),
        ("utf-8", r"läuft … 東京 🦊 \udcff"),
        ("utf-16-le", r"läuft … 東京 🦊 \udcff"),
    ],
)
def test_what_an_encoding_lacks_is_escaped(encoding, expected, monkeypatch):
    for name in ("stdout", "stderr"):
        stream = terminal(encoding)
        monkeypatch.setattr(sys, name, stream)
        assert status(lambda argv, name=name: print(LINES, file=getattr(sys, name)), monkeypatch) == 0
        assert shown(stream) == expected + "\n"


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (broken_pipe, 141),
        (full_disk, 1),
        (closed, 1),
        (lambda: None, 0),
        (lambda: terminal("ascii"), 0),
        (io.StringIO, 0),
    ],
)
@pytest.mark.parametrize("amount", [1, 100_000])  # less and more than a buffer
def test_the_work_ends_and_the_status_tells_what_was_lost(stream, expected, amount, monkeypatch, capsys):
    done = []

    def main(argv):
        for _ in range(3):
            print(LINES * amount)
        done.append(argv)

    for resumes in (False, True):
        monkeypatch.setattr(sys, "stdout", stream())
        assert status(main, monkeypatch, "a", resumes=resumes) == (0 if resumes else expected)
    assert done == [["a"], ["a"]]
    told = capsys.readouterr().err
    assert ("error: standard output: " in told) == (expected == 1) and "Traceback" not in told


@pytest.mark.parametrize("stream", [broken_pipe, full_disk, closed, lambda: None, lambda: terminal("ascii")])
def test_bars_and_errors_survive_a_broken_standard_error(stream, monkeypatch, capsys):
    from tqdm import tqdm

    def main(argv):
        with tqdm(total=3, desc="läuft …", dynamic_ncols=True, file=sys.stderr) as bar:
            for _ in range(3):
                bar.update()
                bar.write("…", file=sys.stdout)
        raise JasperError("…")

    monkeypatch.setenv("COLUMNS", "1")
    monkeypatch.setattr(sys, "stderr", stream())
    assert status(main, monkeypatch) == 2
    assert capsys.readouterr().out == "…\n" * 3


@pytest.mark.parametrize(
    ("redirection", "expected"),
    [
        ("| true", 141),
        ("| head -c 1 > /dev/null", 141),
        ("> /dev/full", 1),
        (">&-", 0),
        ("2>&-", 0),
        ("2> /dev/full", 0),
        ("<&- >&- 2>&-", 0),
        ("2>&1 | true", 141),
    ],
)
def test_real_redirections(redirection, expected, tmp_path):
    """No traceback, also none from Python's own last flush; no file of ours gets a closed stream's descriptor."""
    code = (
        "import sys\n"
        "from jasper_fast.utils.errors import run_cli\n"
        "def main(argv):\n"
        "    out = open(argv[0], 'w')\n"
        "    [print('…' * 1000, file=f) for f in (sys.stdout, sys.stderr) for _ in range(200)]\n"
        "    input_ = sys.stdin.read()\n"
        "    out.write('whole')\n"
        "run_cli(main)\n"
    )
    command = f'"$0" -c "$1" "$2" {redirection}; exit "${{PIPESTATUS[0]}}"'
    file = tmp_path / "written"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    run = ["bash", "-c", command, sys.executable, code, str(file)]
    done = subprocess.run(run, capture_output=True, input=b"", env=environment, check=False)
    assert done.returncode == expected, done
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr, done
    assert file.read_text() == "whole"


def test_a_print_of_a_signal_handler_ends_nothing(monkeypatch):
    """Python refuses to write while a write is under way; the next print shows again."""

    class Busy(io.StringIO):
        refuses = True

        def write(self, text):
            if self.refuses:
                raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")
            return super().write(text)

    stream = Busy()
    monkeypatch.setattr(sys, "stdout", stream)
    with tolerant_output() as out:
        print("lost")
        stream.refuses = False
        print("shown")
        assert out.error is None and stream.getvalue().strip() == "shown"


def test_streams_are_the_users_again_and_a_tolerant_one_is_kept():
    before = sys.stdout, sys.stderr
    with tolerant_output() as outer, tolerant_output() as inner:
        assert outer is inner is sys.stdout and isinstance(sys.stderr, TolerantStream)
        assert sys.stdout.encoding == before[0].encoding  # the rest is the stream's own
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.parametrize(
    ("typed", "encoding", "read"),
    [
        ("für …".encode(), "utf-8", "für …"),
        ("für …".encode(), "ascii", "für …"),
        ("für".encode("latin-1"), "latin-1", "für"),
        ("für".encode("latin-1"), "ascii", None),
        ("für".encode("latin-1"), "utf-8", None),
        (b"\xf0\x9f\xa6\x8a", "ascii", "🦊"),
    ],
)
def test_questions_typed_in_another_encoding_are_read(typed, encoding, read, monkeypatch, capsys):
    from jasper_fast.search import _read_question

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed + b"\n"), encoding=encoding))
    found = []
    left = status(lambda argv: found.append(_read_question()), monkeypatch)
    assert (found, left) == (([], 2) if read is None else ([read], 0))


@pytest.mark.parametrize(
    ("argument", "read"),
    [
        ("für", "für"),
        ("f\udcc3\udcbcr", "für"),
        ("\udcf0\udc9f\udca6\udc8a", "🦊"),
        ("f\udcfcr", None),
        ("\ud800", None),
    ],
)
def test_bytes_of_an_argument_are_read_as_utf_8_where_they_are(argument, read):
    from jasper_fast.utils.command_line import text_argument

    if read is not None:
        assert text_argument(argument, "the question") == read
    else:
        with pytest.raises(JasperError, match="the question is not text in this terminal's encoding"):
            text_argument(argument, "the question")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_json_of_a_search_is_json_in_any_encoding(encoding, monkeypatch):
    from jasper_fast.search import _show
    from jasper_fast.text_index import Hit

    stream = terminal(encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    with tolerant_output():
        _show("für 🦊", [Hit(0.5, 0, "…" * 200)], True)
        _show("für 🦊", [Hit(0.5, 0, "…" * 200)], False)
    first, *_ = shown(stream).splitlines()
    assert json.loads(first) == {"question": "für 🦊", "hits": [{"score": 0.5, "id": 0, "text": "…" * 200}]}


def test_the_environment_on_a_terminal_of_ascii(monkeypatch):
    from jasper_fast import env

    stream = terminal("ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(env, "cpu_name", lambda: "CPU™")
    assert status(env.main, monkeypatch) == 0 and r"CPU\u2122" in shown(stream)


def test_a_finished_run_is_reported_from_python_too(tmp_path, monkeypatch):
    import jasper_fast

    run, config = tmp_path / "läuft…", load_config()
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    (run / "results.json").write_text("{}")
    stream = terminal("ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert jasper_fast.train(config, out=run) == run
    assert r"l\xe4uft\u2026 is finished" in shown(stream)


@pytest.mark.slow
def test_a_run_ends_whatever_its_names_and_its_terminal(tmp_path, tiny_bert, tiny_texts, monkeypatch):
    """Train on an ASCII terminal without standard error. A set has a formula in a name that is not UTF-8."""
    from jasper_fast.train import train

    folder = tmp_path / "läuft…"
    folder.mkdir()
    write_data(folder, tiny_texts)
    pairs = (folder / "pairs.tsv").rename(folder / "p$\\frac$\udcfe….tsv")
    tree = settings(folder, tiny_bert) | {"evaluate": [{"path": str(pairs)}]}
    tree["stages"], tree["student"]["heads"] = tree["stages"][:1], [32]
    stream = terminal("ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", broken_pipe())
    run = train(tree, out=folder / "run…")
    assert json.loads((run / "results.json").read_text(encoding="utf-8"))["sets"][0]["name"] == pairs.stem
    assert (run / "plots" / "sets.png").is_file() and r"\udcfe" in (run / "report.md").read_text(encoding="utf-8")
    assert r"report: " in shown(stream) and r"l\xe4uft\u2026" in shown(stream)


def test_a_folder_that_models_cannot_be_written_to_is_refused_before_the_work(tmp_path):
    from jasper_fast.train import train

    with pytest.raises(JasperError, match=r"\\udcff': not a name in UTF-8.*Fix: choose a name of plain letters"):
        train(out=str(tmp_path / "run\udcff"))
    assert not list(Path(tmp_path).iterdir())


@pytest.mark.parametrize(("setting", "shown"), [(None, False), ("0", True)])
def test_commands_hide_the_bars_of_datasets(setting, shown, tmp_path):
    program = (
        "from jasper_fast.utils.errors import run_cli\n"
        "def main(argv):\n"
        "    from datasets import Dataset\n"
        "    Dataset.from_dict({'text': ['a']}).to_parquet('texts.parquet')\n"
        "run_cli(main)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "HF_DATASETS_DISABLE_PROGRESS_BARS"}
    environment |= {"PYTHONPATH": os.getcwd()} | ({"HF_DATASETS_DISABLE_PROGRESS_BARS": setting} if setting else {})
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert ("Creating parquet" in done.stderr) == shown and (tmp_path / "texts.parquet").is_file()
