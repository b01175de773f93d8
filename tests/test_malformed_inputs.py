"""Malformed inputs to every command give one clear message and exit status 2, no traceback, and no partial output.

A case has the arguments of a command and a function that prepares an empty folder. In the arguments, ``{w}`` is a
folder of good inputs and ``{t}`` the prepared folder. The output path is ``{t}/out``.
"""

from __future__ import annotations

import gzip
import importlib
import io
import re
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jasper_fast.config.load import load_config
from jasper_fast.config.yaml import dump_yaml
from jasper_fast.utils.errors import run_cli
from tests.helpers.runs import settings, write_data

JUNK = bytes(range(256)) * 8
Make = Callable[[Path, Path], None]
Content = bytes | str | Callable[[bytes], bytes] | None  # None: removed


class Case(NamedTuple):
    """Arguments of ``python -m jasper_fast.COMMAND``, the preparation of the folder, and a pattern of the message."""

    name: str
    command: str
    arguments: str | list[str]
    make: Make
    message: str = "."


def nothing(world: Path, folder: Path) -> None:
    pass


def file(name: str, content: str | bytes) -> Make:
    def make(world: Path, folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def folder_at(name: str) -> Make:
    return lambda world, folder: (folder / name).mkdir(parents=True)


def config(change: Callable[[dict], object]) -> Make:
    """Write a changed copy of the good configuration to ``run.yaml``."""

    def make(world: Path, folder: Path) -> None:
        tree = load_config(world / "run.yaml").model_dump(mode="json")
        change(tree)
        (folder / "run.yaml").write_text(dump_yaml(tree))

    return make


def source(name: str, **fields: object) -> Make:
    def make(world: Path, folder: Path) -> None:
        config(lambda tree: tree["data"].update(sources=[{"path": str(folder / name), **fields}]))(world, folder)

    return make


def vectors(name: str) -> Make:
    """Write a configuration with a file of precomputed embeddings as the teacher."""

    def make(world: Path, folder: Path) -> None:
        config(lambda tree: tree.update(teachers=[{"vectors": str(folder / name)}]))(world, folder)

    return make


def all_of(*makes: Make) -> Make:
    def make(world: Path, folder: Path) -> None:
        for one in makes:
            one(world, folder)

    return make


def damaged(kind: str, name: str, content: Content) -> Make:
    """Copy a good model or index and replace, change or remove one of its files."""

    def make(world: Path, folder: Path) -> None:
        shutil.copytree(world / kind, folder / kind)
        path = folder / kind / name
        if content is None:
            path.unlink()
        elif callable(content):
            path.write_bytes(content(path.read_bytes()))
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def beir(place: str, content: str) -> Make:
    """Write a retrieval set with one file replaced."""
    good = {
        "corpus.jsonl": "".join(f'{{"_id": "d{i}", "title": "", "text": "{i} apples"}}\n' for i in (1, 2)),
        "queries.jsonl": '{"_id": "q1", "text": "fruit"}\n',
        "qrels/test.tsv": "query-id\tcorpus-id\tscore\nq1\td1\t1\n",
    }
    assert place in good
    return all_of(*(file(f"beir/{name}", text) for name, text in {**good, place: content}.items()))


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def future(world: Path, folder: Path) -> None:
    """Write a run folder of a newer version."""
    (folder / "out").mkdir()
    (folder / "out" / "log.jsonl").touch()
    (folder / "out" / "config.yaml").write_text("name: tiny\nfrom_2030: 1")


def link_to_itself(world: Path, folder: Path) -> None:
    (folder / "loop").symlink_to(folder / "loop")


def archive(world: Path, folder: Path) -> None:
    with zipfile.ZipFile(folder / "x.zip", "w") as opened:
        opened.writestr("readme.txt", "no picture")


def replaced(old: str, new: str) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        assert old.encode() in content
        return content.replace(old.encode(), new.encode())

    return change


def saved(values: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, values)
    return content.getvalue()


def bert(name: str, place: str, content: Content) -> Case:
    return Case(name, "evaluate", "{t}/bert {w}/pairs.tsv", damaged("bert", place, content))


def run(name: str, place: str, content: Content) -> Case:
    return Case(f"run: {name}", "evaluate", "{t}/run {w}/pairs.tsv", damaged("run", f"model/{place}", content))


def exported(name: str, place: str, content: Content) -> Case:
    return Case(f"export: {name}", "export", "{t}/run --out {t}/out", damaged("run", f"model/{place}", content))


def index(name: str, place: str, content: Content, message: str = "damaged") -> Case:
    return Case(f"index: {name}", "search", "ask {t}/index a", damaged("index", place, content), message)


def trained(name: str, place: str, content: str | bytes) -> Case:
    return Case(f"texts: {name}", "train", RUN, all_of(file(place, content), source(place)))


def searched(name: str, table: pa.Table) -> Case:
    arguments = "build {w}/run {t}/x.parquet --out {t}/out"
    return Case(f"parquet: {name}", "search", arguments, lambda w, folder: pq.write_table(table, folder / "x.parquet"))


def taught(name: str, place: str, content: bytes) -> Case:
    return Case(f"vectors: {name}", "train", RUN, all_of(file(place, content), vectors(place)), place)


def scored(name: str, place: str, content: str | bytes) -> Case:
    return Case(f"pairs: {name}", "evaluate", f"{{w}}/run {{t}}/{place}", file(place, content), place)


def adapted(name: str, more: str, make: Make = nothing, message: str = ".") -> Case:
    return Case(f"adapt: {name}", "adapt", f"{ADAPT} {more}", make, message)


def retrieval(name: str, place: str, content: str) -> Case:
    return Case(f"retrieval: {name}", "evaluate", "{w}/run {t}/beir", beir(place, content))


RUN = "--config {t}/run.yaml --out {t}/out"
GOOD = "--config {w}/run.yaml --out {t}/out"
EVALUATE = "{w}/run {w}/pairs.tsv"
ADAPT = "{w}/texts.jsonl --model {w}/run --teacher {w}/bert --out {t}/out --cache {t}/cache"
BUILD = "build {w}/run {w}/texts.jsonl --out {t}/out"
PICTURES = "build {w}/run {t}/p --pictures --out {t}/out"
STUDENT = "--config {w}/run.yaml --out {t}/out --student.model {t}/bert"
TEACHER = "--config {w}/run.yaml --data.cache {t}/cache --teachers.0.model {t}/bert"
WEIGHTS, PIECE = "model.safetensors", "vectors/piece-00000.safetensors"
negative_width = replaced('"hidden_size": 32', '"hidden_size": -32')

CASES = [
    # configurations
    Case("broken yaml", "train", RUN, file("run.yaml", "name: [a"), "not YAML: line 1"),
    Case("tabs", "train", RUN, file("run.yaml", "name: a\n\tseed: 1"), "not YAML: line 2"),
    Case("a key twice", "train", RUN, file("run.yaml", "name: a\nname: b"), "`name` is given twice"),
    Case("two documents", "train", RUN, file("run.yaml", "name: a\n---\nname: b"), "single document"),
    Case("an alias of itself", "train", RUN, file("run.yaml", "a: &a [*a]"), "contain themselves"),
    Case("empty yaml", "train", RUN, file("run.yaml", ""), "found nothing"),
    Case("a list", "train", RUN, file("run.yaml", "- a"), "expected a mapping of fields, found list"),
    Case("keys that are numbers", "train", RUN, file("run.yaml", "1: a"), "a field's name must be text"),
    Case("binary yaml", "train", RUN, file("run.yaml", JUNK), "not text in UTF-8"),
    Case("yaml in latin-1", "train", RUN, file("run.yaml", "name: träge".encode("latin-1")), "not text in UTF-8"),
    Case("broken json", "train", "--config {t}/run.json --out {t}/out", file("run.json", '{"name": '), "not YAML"),
    Case("a folder for a file", "train", RUN, folder_at("run.yaml"), "cannot be read: Is a directory"),
    Case("a link to itself", "train", "--config {t}/loop --out {t}/out", link_to_itself, "neither a file nor a recipe"),
    Case("no such recipe", "train", "--config minilm-docstring --out {t}/out", nothing, "`minilm-docstrings`"),
    Case("missing fields", "train", RUN, file("run.yaml", "name: a"), "student: Field required"),
    Case("text for a number", "train", RUN, config(lambda t: t["stages"][0].update(lr="fast")), "stages.0.lr"),
    Case("a list for a section", "train", RUN, config(lambda t: t.update(student=[1])), "student: Input should be"),
    Case("a section for a list", "train", RUN, config(lambda t: t.update(stages={"a": 1})), "stages: a list is"),
    Case("null for a section", "teach", "--config {t}/run.yaml", config(lambda t: t.update(data=None)), "data: Input"),
    Case("a negative number", "train", RUN, config(lambda t: t["stages"][0].update(steps=-1)), "than or equal to 0"),
    Case("a huge seed", "train", RUN, config(lambda t: t.update(seed=10**30)), "seed: Input should be less than"),
    Case("infinity", "train", RUN, config(lambda t: t["stages"][0].update(lr=float("inf"))), "finite number"),
    Case("conflicting options", "train", RUN, config(lambda t: t["teachers"][0].update(vectors="x")), "give either"),
    Case("an unknown choice", "train", RUN, config(lambda t: t.update(precision="fp8")), "'auto', 'fp32' or 'bf16'"),
    Case("an unknown head", "train", RUN, config(lambda t: t["stages"][0].update(heads=[7])), "the student has"),
    # the command line
    Case("a file without --config", "train", "{w}/run.yaml --out {t}/out", nothing, "did you mean --config"),
    Case("a field of a stage", "train", GOOD + " --lr 1", nothing, r"did you mean `--stages.N.lr`"),
    Case("an option twice", "train", GOOD + " --seed 1 --seed 2", nothing, "--seed is given twice"),
    Case("--out twice", "train", GOOD + " --out {t}/other", nothing, "argument --out: given twice"),
    Case("no value", "train", GOOD + " --seed", nothing, "--seed needs a value"),
    Case("an empty --out", "train", ["--config", "{w}/run.yaml", "--out", ""], nothing, "--out: needs a value"),
    Case("an empty --config", "teach", ["--config="], nothing, "--config: needs a value"),
    Case("a negative position", "train", GOOD + " --stages.-1.lr 1", nothing, "indexed by position"),
    Case("bytes that are no text", "train", ["--config", "{w}/run.yaml", "--name", "\udcff"], nothing, "name: "),
    Case("a place that is no text", "train", ["--config", "{w}/run.yaml", "--out", "{t}/\udcff"], nothing, "UTF-8"),
    Case("texts of another kind", "teach", "--config {w}/run.yaml --texts {t}/x.csv", nothing, "ends with .parquet"),
    Case("texts onto a folder", "teach", "--config {w}/run.yaml --texts {t}/x.parquet", folder_at("x.parquet")),
    Case("a positional for teach", "teach", "{w}/run.yaml", nothing, "did you mean --config"),
    Case("an unknown option", "env", "--jsn", nothing, "unrecognized arguments"),
    Case("arguments for env", "env", "now", nothing, "unrecognized arguments"),
    Case("no arguments", "evaluate", "", nothing, "required: model"),
    Case("no sets", "evaluate", "{w}/run", nothing, "no evaluation set is given"),
    Case("a configuration for a model", "evaluate", "{w}/run.yaml {w}/pairs.tsv", nothing, "is a configuration"),
    Case("widths that are words", "evaluate", EVALUATE + " --widths a,b", nothing, "--widths takes numbers"),
    Case("a width of zero", "evaluate", EVALUATE + " --widths 0", nothing, "--widths takes numbers"),
    Case("an unknown width", "evaluate", EVALUATE + " --widths 31", nothing, "31"),
    Case("a limit of zero", "evaluate", EVALUATE + " --limit 0", nothing, "whole number from 1"),
    Case("a negative limit", "evaluate", EVALUATE + " --limit -3", nothing, "--limit"),
    Case("a huge limit", "evaluate", EVALUATE + f" --limit {10**30}", nothing, "whole number from 1"),
    Case("an unknown precision", "evaluate", EVALUATE + " --precision int3", nothing, "int3"),
    Case("scores onto a folder", "evaluate", EVALUATE + " --json {t}", nothing, "a folder is where a file should be"),
    Case("scores below a file", "evaluate", EVALUATE + " --json {w}/pairs.tsv/x", nothing, "a file is where a folder"),
    Case("no command", "search", "", nothing, "required: command"),
    Case("an index for a command", "search", "{w}/index apples", nothing, "did you mean .* ask .*index apples`"),
    Case("a misspelt command", "search", "biuld {w}/run {w}/texts.jsonl", nothing, "did you mean .* build "),
    Case("no --out", "search", "build {w}/run {w}/texts.jsonl", nothing, "--out"),
    Case("columns of nothing", "search", [*BUILD.split(), "--columns", " "], nothing, "expected column names"),
    Case("columns of commas", "search", [*BUILD.split(), "--columns", ",,"], nothing, "expected column names"),
    Case("an unknown column", "search", BUILD + " --columns title", nothing, "title"),
    Case("an unknown dtype", "search", BUILD + " --dtype int4", nothing, "invalid choice"),
    Case("an index onto a folder", "search", BUILD, file("out/mine.txt", "x"), "not a text index"),
    Case("an index below a file", "search", BUILD + "/x", file("out", ""), "a file is where a folder should be"),
    Case("a name that is too long", "search", BUILD + "x" * 300, nothing, "name is too long"),
    Case("a configuration to search", "search", "build {w}/run.yaml {w}/few.txt --out {t}/out", nothing, "configur"),
    Case("a question and a file", "search", "ask {w}/index a --file b", nothing, "not both"),
    Case("an empty question", "search", ["ask", "{w}/index", " "], nothing, "the question is empty"),
    Case("a question that is no text", "search", ["ask", "{w}/index", "\udcff"], nothing, "encoding"),
    Case("a missing file of questions", "search", "ask {w}/index --file {t}/none", nothing, "cannot be read"),
    Case("a folder of questions", "search", "ask {w}/index --file {t}", nothing, "cannot be read"),
    Case("binary questions", "search", "ask {w}/index --file {t}/q", file("q", JUNK), "NUL is not a text character"),
    Case("no hits", "search", "ask {w}/index a -k 0", nothing, "whole number from 1"),
    Case("a configuration to export", "export", "{w}/run.yaml", nothing, "is a configuration"),
    Case("export of nothing", "export", "{t}/none --out {t}/out", nothing, "there is no such folder"),
    Case("export of a plain model", "export", "{w}/bert --out {t}/out", nothing, "no finished model"),
    Case("export of an unknown width", "export", "{w}/run --width 31 --out {t}/out", nothing, "31"),
    Case("export of no width", "export", "{w}/run --width x --out {t}/out", nothing, "whole number from 1"),
    Case("export onto a folder", "export", "{w}/run --out {t}/out", file("out/x", ""), "exists already"),
    Case("export below a file", "export", "{w}/run --out {t}/out/x", file("out", ""), "a file is where a folder"),
    Case("scores onto /proc", "evaluate", EVALUATE + " --json /proc/nope/x", nothing, "cannot be written"),
    Case("an index onto /proc", "search", "build {w}/run {w}/few.txt --out /proc/nope", nothing, "cannot be written"),
    Case("an index onto a broken link", "search", "build {w}/run {w}/few.txt --out {t}/loop", link_to_itself),
    Case("texts onto /proc", "teach", "--config {w}/run.yaml --texts /proc/nope.parquet", nothing, "cannot be written"),
    # outputs of a run, and numbers that are huge
    Case("a width of a trillion", "train", GOOD + f" --student.heads {10**13}", nothing, "equal to 1000000"),
    Case("layers beyond 64 bits", "train", GOOD + f" --student.layers {10**25}", nothing, "less than or equal to"),
    Case("a layer beyond the last", "train", GOOD + " --student.layers 99", nothing, "99"),
    Case("a length beyond the positions", "train", GOOD + " --student.max_length 999999", nothing, "999"),
    Case("a batch beyond the texts", "train", GOOD + " --stages.0.batch_size 999999", nothing, "999"),
    Case("a plan below a file", "train", GOOD + "/x --dry-run", file("out", ""), "a file is where a folder should be"),
    Case("a plan on a run of another configuration", "train", GOOD + " --dry-run", future, "of another version"),
    Case("a run below a file", "train", GOOD + "/x", file("out", ""), "a file is where a folder should be"),
    Case("a run onto a file", "train", GOOD, file("out", ""), "a file is where a folder should be"),
    Case("a run with a long name", "train", GOOD + "x" * 300, nothing, "name is too long"),
    Case("a cache below a file", "train", GOOD + " --data.cache {w}/pairs.tsv/x", nothing, "a file is where a folder"),
    Case("a stored configuration of the future", "train", GOOD, future, "of another version"),
    Case(
        "a stored configuration that is damaged", "train", GOOD,
        all_of(file("out/log.jsonl", ""), file("out/config.yaml", "name: [")), "restore it as the run wrote it",
    ),
    Case("no whole checkpoint", "train", GOOD, file("out/checkpoints/step-00000001/manifest.json", "{"), "whole"),
    # models
    Case("no such model", "evaluate", "{t}/none {w}/pairs.tsv", nothing, "no such model"),
    Case("a model with a long name", "evaluate", ["x" * 5000, "{w}/pairs.tsv"], nothing, "use a shorter name"),
    Case("a name with a null character", "evaluate", ["a\0b", "{w}/pairs.tsv"], nothing),
    Case("a name that is no text", "evaluate", ["a\udcff", "{w}/pairs.tsv"], nothing, "lone surrogate"),
    Case("a file for a model", "evaluate", "{w}/pairs.tsv {w}/pairs.tsv", nothing),
    Case("an empty folder for a model", "evaluate", "{t} {w}/pairs.tsv", nothing, "holds no model"),
    Case("a link to itself for a model", "evaluate", "{t}/loop {w}/pairs.tsv", link_to_itself),
    Case("no model in a package", "evaluate", "package:no_such/model {w}/pairs.tsv", nothing, "no_such"),
    bert("cut weights", WEIGHTS, half),
    bert("no weights", WEIGHTS, None),
    bert("empty weights", WEIGHTS, b""),
    bert("binary weights", WEIGHTS, JUNK),
    bert("a broken config", "config.json", "{"),
    bert("a binary config", "config.json", JUNK),
    bert("a config that is a list", "config.json", "[]"),
    bert("an unknown kind of model", "config.json", '{"model_type": "x"}'),
    bert("a broken tokenizer", "tokenizer.json", "{"),
    bert("a binary tokenizer", "tokenizer.json", JUNK),
    bert("a tokenizer that is a list", "tokenizer.json", "[]"),
    bert("no tokenizer", "tokenizer.json", None),
    bert("broken settings of a tokenizer", "tokenizer_config.json", "{"),
    run("broken modules", "modules.json", "[{"),
    run("modules that are a section", "modules.json", "{}"),
    run("no modules", "modules.json", "[]"),
    run("an unknown module", "modules.json", '[{"idx": 0, "name": "0", "path": "", "type": "no.such.Module"}]'),
    run("broken settings of a model", "config_sentence_transformers.json", "{"),
    run("broken settings of a transformer", "sentence_bert_config.json", "["),
    run("broken settings of pooling", "1_Pooling/config.json", "{"),
    run("an unknown pooling", "1_Pooling/config.json", '{"pooling_mode": "nope"}'),
    run("a router that is a list", "2_Router/router_config.json", "[]"),
    Case("a student with cut weights", "train", STUDENT, damaged("bert", WEIGHTS, half)),
    Case("a student with a broken tokenizer", "train", STUDENT, damaged("bert", "tokenizer.json", "{")),
    Case("a student with binary settings", "train", STUDENT, damaged("bert", "tokenizer_config.json", JUNK)),
    Case("a student of negative width", "train", STUDENT, damaged("bert", "config.json", negative_width)),
    Case("a teacher with a broken config", "teach", TEACHER, damaged("bert", "config.json", "[")),
    # indexes
    Case("no index", "search", "ask {t} a", nothing, "no text index here"),
    Case("a file for an index", "search", "ask {w}/pairs.tsv a", nothing, "damaged|no text index"),
    Case("an index with a long name", "search", ["ask", "x" * 5000, "a"], nothing, "name too long"),
    Case("an index of another model", "search", "ask {w}/index a --model {w}/bert", nothing, "not the model"),
    index("broken settings", "search.json", "{"),
    index("settings that are a list", "search.json", "[]"),
    index("binary settings", "search.json", JUNK),
    index("settings without a revision", "search.json", replaced("revision", "rev"), "revision is None"),
    index("a model that is a number", "search.json", replaced('"model": "', '"model": 3, "x": "'), "model is 3"),
    index("a length that is a word", "search.json", replaced('"max_length": null', '"max_length": "x"'), "is 'x'"),
    index("an unknown role", "search.json", replaced('"role": "query"', '"role": "x"'), "role is 'x'"),
    index("another width", "search.json", replaced('"width": 32', '"width": 99'), "99"),
    index("cut texts", "texts.arrow", half),
    index("empty texts", "texts.arrow", b""),
    index("no texts in it", "texts.arrow", None, "no text index here"),
    index("a cut piece", PIECE, half),
    index("a missing piece", PIECE, None, "missing"),
    index("a manifest of nothing", "vectors/manifest.json", "{}", "manifest"),
    index("rows that are words", "vectors/manifest.json", replaced('"rows": 9', '"rows": "x"'), "manifest"),
    index("a negative width", "vectors/manifest.json", replaced('"dim": 32', '"dim": -3'), "."),
    # texts
    Case("no texts", "train", RUN, source("none.jsonl"), "none.jsonl"),
    Case("an empty folder of texts", "train", RUN, all_of(folder_at("texts"), source("texts"))),
    Case("a link to itself for texts", "train", RUN, all_of(link_to_itself, source("loop"))),
    Case("texts with a long name", "train", RUN, source("x" * 300)),
    trained("empty", "texts.jsonl", ""),
    trained("cut rows", "texts.jsonl", '{"text": "a"}\n{"text": '),
    trained("rows that are lists", "texts.jsonl", '["a"]\n'),
    trained("numbers", "texts.jsonl", '{"text": 3}\n'),
    trained("binary", "texts.jsonl", JUNK),
    trained("latin-1", "texts.txt", "träge\n".encode("latin-1")),
    trained("a cut gzip", "texts.jsonl.gz", half(gzip.compress(b'{"text": "a"}\n' * 999))),
    trained("no gzip", "texts.jsonl.gz", JUNK),
    trained("no parquet", "texts.parquet", JUNK),
    trained("no such column", "texts.csv", "a,b\n1,2\n"),
    trained("a kind that is unknown", "texts.xyz", "x"),
    searched("no such column", pa.table({"a": ["b"]})),
    searched("numbers", pa.table({"text": [1, 2]})),
    searched("lists of numbers", pa.table({"text": [[1, 2], [3]]})),
    searched("sections", pa.table({"text": [{"a": 1}]})),
    searched("nothing but null", pa.table({"text": pa.nulls(3)})),
    searched("bytes", pa.table({"text": [b"\xff\xfe"]})),
    Case("no pictures", "search", "build {w}/run {t}/none --pictures --out {t}/out", nothing),
    Case("a folder without pictures", "search", PICTURES, file("p/x.txt", "")),
    Case("broken pictures", "search", PICTURES, file("p/x.png", JUNK)),
    Case("an archive without pictures", "search", "build {w}/run {t}/x.zip --pictures --out {t}/out", archive),
    # ready vectors
    Case("no vectors", "train", RUN, vectors("none.npy"), "none.npy"),
    Case("a folder of vectors", "train", RUN, all_of(folder_at("v.npy"), vectors("v.npy"))),
    taught("binary", "v.npy", JUNK),
    taught("empty", "v.npy", b""),
    taught("no parquet", "v.parquet", JUNK),
    taught("too few", "v.npy", saved(np.ones((3, 32), np.float32))),
    taught("text", "v.npy", saved(np.full((160, 32), "a"))),
    taught("objects", "v.npy", saved(np.full((160, 32), None))),
    taught("one dimension", "v.npy", saved(np.ones(160, np.float32))),
    taught("complex", "v.npy", saved(np.ones((160, 32), complex))),
    taught("NaN", "v.npy", saved(np.full((160, 32), np.nan, np.float32))),
    taught("a cut file", "v.npy", half(saved(np.ones((160, 32), np.float32)))),
    # evaluation sets
    Case("no set", "evaluate", "{w}/run {t}/none.tsv", nothing, "none.tsv"),
    Case("a set that is no text", "evaluate", ["{w}/run", "{t}/\udcff.tsv"], nothing),
    Case("a set with a long name", "evaluate", ["{w}/run", "x" * 5000], nothing, "no such file or folder"),
    Case("an empty folder for a set", "evaluate", "{w}/run {t}/s", folder_at("s")),
    Case("an archive for a set", "evaluate", "{w}/run {t}/x.zip", archive),
    Case("a set in a configuration", "train", RUN, config(lambda t: t.update(evaluate=[{"path": "x.tsv"}])), "x.tsv"),
    scored("empty", "x.tsv", ""),
    scored("binary", "x.tsv", JUNK),
    scored("no gzip", "x.tsv.gz", JUNK),
    scored("words for scores", "x.tsv", "score\tsentence1\tsentence2\na\tb\tc\n"),
    scored("endless scores", "x.tsv", "score\tsentence1\tsentence2\n1e400\tb\tc\n2\td\te\n"),
    scored("short rows", "x.tsv", "score\tsentence1\tsentence2\n1\tb\n"),
    retrieval("broken rows", "corpus.jsonl", '{"_id": '),
    retrieval("an empty corpus", "corpus.jsonl", ""),
    retrieval("rows that are lists", "corpus.jsonl", "[1]\n"),
    retrieval("texts that are numbers", "corpus.jsonl", '{"_id": 1, "text": 2}\n'),
    retrieval("questions without ids", "queries.jsonl", '{"text": "a"}\n'),
    retrieval("words for judgements", "qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\tyes\n"),
    retrieval("no judgements", "qrels/test.tsv", ""),
    retrieval("binary judgements", "qrels/test.tsv", "\0\1\2"),
]  # fmt: skip

CASES += [
    exported("a broken router", "2_Router/router_config.json", "{"),
    exported("a router that is a list", "2_Router/router_config.json", "[]"),
    exported("a router of nothing", "2_Router/router_config.json", "{}"),
    exported("cut weights", WEIGHTS, half),
    exported("a cut head", "2_Router/32_0_Dense/model.safetensors", half),
    run("settings that are a list", "config_sentence_transformers.json", "[]"),
    run("a length that is a word", "sentence_bert_config.json", '{"max_seq_length": "x"}'),
    bert("a width that is a word", "config.json", replaced('"hidden_size": 32', '"hidden_size": "a"')),
]

few_documents = file("few.jsonl", "".join(f'{{"text": "The number {i} is here."}}\n' for i in range(9)))
CASES += [
    Case("adapt: no arguments", "adapt", "", nothing, "required: DOCUMENTS, --out"),
    Case("adapt: no --out", "adapt", "{w}/texts.jsonl", nothing, "required: --out"),
    Case("adapt: no such documents", "adapt", "{t}/none.jsonl --out {t}/out --cache {t}/cache", nothing, "none.jsonl"),
    Case(
        "adapt: too few documents", "adapt",
        "{t}/few.jsonl --model {w}/run --teacher {w}/bert --out {t}/out --cache {t}/cache", few_documents,
        "too few documents .*got 9",
    ),
    Case(
        "adapt: an unknown teacher of a model", "adapt",
        "{w}/texts.jsonl --model {w}/bert --out {t}/out --cache {t}/cache", nothing,
        "does not say which teacher .*Fix: give --teacher",
    ),
    Case(
        "adapt: a configuration for a model", "adapt", "{w}/texts.jsonl --model {w}/run.yaml --out {t}/out", nothing,
        "is a configuration",
    ),
    Case(
        "adapt: no such model", "adapt", "{w}/texts.jsonl --model {t}/none --out {t}/out --cache {t}/cache", nothing,
        "there is no such folder",
    ),
    adapted("an unknown column", "--columns title", nothing, "title"),
    adapted("an unknown id column", "--id-column number", nothing, "number"),
    adapted("columns of commas", "--columns ,,", nothing, "expected column names"),
    adapted("minutes that are a word", "--minutes soon", nothing, "expected a number of minutes"),
    adapted("no minutes", "--minutes 0", nothing, "minutes: got 0.*Fix: "),
    adapted("endless minutes", "--minutes nan", nothing, "minutes: got nan.*Fix: "),
    adapted("widths that are words", "--widths a,b", nothing, "whole number from 1"),
    adapted("a width above the teacher's", "--widths 64", nothing, "--widths: 64 is wider .*at most 32.*Fix: "),
    adapted("a length of zero", "--max-length 0", nothing, "whole number from 1"),
    adapted("a length beyond the positions", "--max-length 999", nothing, "64 positions"),
    adapted("a model twice", "--model {t}/none", nothing, "given twice"),
    adapted("a folder of something else", "", file("out/mine.txt", "x"), "holds something else .*mine.txt.*Fix: "),
    adapted("a file for a folder", "", file("out", ""), "a file is where a folder should be"),
    adapted("vectors that are missing", "", nothing, "none.npy")._replace(
        arguments="{w}/texts.jsonl --model {w}/run --teacher {t}/none.npy --out {t}/out --cache {t}/cache"
    ),
    adapted("an option of --into", "--pairs 5", nothing, "--pairs is for --into"),
    adapted("an option that --into has not", "--into {t}/old.npy", nothing, "leave out --teacher"),
    Case("adapt: --into alone", "adapt", "{w}/texts.jsonl --into {t}/x.npy --out {t}/out", nothing, "--model"),
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_bert, tiny_texts) -> Path:
    """Write a configuration, texts, a similarity set, a plain model, the model of a run, and an index."""
    from jasper_fast import search
    from jasper_fast.exporting.student import export_student
    from jasper_fast.models.student import build_student

    folder = tmp_path_factory.mktemp("good")
    write_data(folder, tiny_texts)
    shutil.copytree(tiny_bert, folder / "bert")
    tree = settings(folder, folder / "bert")
    tree["stages"], tree["student"]["heads"] = tree["stages"][:1], [32]
    (folder / "run.yaml").write_text(dump_yaml(tree))
    export_student(build_student(load_config(tree)), folder / "run" / "model")
    (folder / "few.txt").write_text("\n".join(tiny_texts[:9]))
    search.main(["build", str(folder / "run"), str(folder / "few.txt"), "--out", str(folder / "index")])
    return folder


def test_there_are_more_than_sixty_of_them_and_their_names_differ():
    assert len(CASES) > 60 and len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_malformed_input_is_one_clear_message(case, world, tmp_path, monkeypatch, capsys):
    case.make(world, tmp_path)
    before = set(tmp_path.rglob("*"))
    given = case.arguments.split() if isinstance(case.arguments, str) else case.arguments
    given = [argument.replace("{w}", str(world)).replace("{t}", str(tmp_path)) for argument in given]
    monkeypatch.setattr(sys, "argv", [case.command, *given])
    with pytest.raises(SystemExit) as left:
        run_cli(importlib.import_module(f"jasper_fast.{case.command}").main)
    output = capsys.readouterr().err
    assert left.value.code == 2 and "error: " in output and "Traceback" not in output, output
    assert re.search(case.message, output.partition("error: ")[2], re.DOTALL), output
    # A rejected run may leave its lock, its configuration (later runs may change it), and complete texts in the cache.
    created = {str(path.relative_to(tmp_path)) for path in set(tmp_path.rglob("*")) - before}
    assert not [name for name in created if not re.fullmatch(r"out(/config\.yaml|/\.lock)?|cache(/.*)?", name)], created
    assert not [name for name in created if ".unfinished-" in name], created
