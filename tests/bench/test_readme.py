"""Examples in README and docs work: configurations are valid, and commands, names, files and links exist."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench.__main__ import BENCHMARKS
from jasper_fast.config.load import load_arguments, load_config, recipe_names
from jasper_fast.config.yaml import dump_yaml, parse_yaml

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROMPT = re.compile(r"^(?:\$ )?((?:python|jasper-fast|make|pip|pytest|torchrun|\.) .*)$")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language; "" for those without one."""
    found: list[tuple[str, list[str]]] = []
    fenced = False
    for line in text_of(page).splitlines():
        if line.startswith("```"):
            fenced = not fenced
            if fenced:
                found.append((line.removeprefix("```"), []))
        elif fenced:
            found[-1][1].append(line + "\n")
    return ["".join(lines) for name, lines in found if name == language]


def commands(page: Path) -> list[list[str]]:
    """Every command of a page's code blocks, without its comment, as a shell would split it."""
    found = []
    shown = [*blocks(page, ""), *re.findall(r"(?:^ {4}.*\n)+", text_of(page), flags=re.MULTILINE)]
    for block in shown:
        for line in block.replace("\\\n", " ").splitlines():
            if match := PROMPT.match(line.strip()):
                found.append(shlex.split(match[1], comments=True))
    return found


def ours(page: Path, module: str) -> list[list[str]]:
    """The arguments of every ``python -m jasper_fast.MODULE`` or ``jasper-fast MODULE`` of a page."""
    given = commands(page)
    as_module = [words[3:] for words in given if words[:3] == ["python", "-m", f"jasper_fast.{module}"]]
    return as_module + [words[2:] for words in given if words[:2] == ["jasper-fast", module]]


def test_there_are_commands_to_check():
    assert len(commands(ROOT / "README.md")) >= 6
    assert sum(len(commands(page)) for page in PAGES) > 30


def test_the_readme_is_short():
    assert len(text_of(ROOT / "README.md").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configurations_shown_are_valid(page):
    for shown in blocks(page, "yaml"):
        tree = parse_yaml(shown)
        base = {} if "student" in tree or "extends" in tree else {"extends": "minilm-docstrings"}
        assert load_config(base | tree).stages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_shown_compiles_and_imports_what_there_is(page):
    for block in blocks(page, "python"):
        compile(block, page.name, "exec")
        for module, names in re.findall(r"from (jasper_fast[\w.]*) import (.+)", block):
            found = importlib.import_module(module)
            assert all(hasattr(found, name.strip()) for name in names.split(","))
        assert all(
            find_spec(module) for module in re.findall(r"^import (jasper_fast[\w.]*)", block, flags=re.MULTILINE)
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_shown_exist(page):
    assert all(find_spec(module) for module in re.findall(r"-m ((?:jasper_fast|bench)[\w.]*)", text_of(page)))
    targets = set(re.findall(r"^(\w+):", text_of(ROOT / "Makefile"), flags=re.MULTILINE))
    assert {words[1] for words in commands(page) if words[0] == "make"} <= targets
    assert set(re.findall(r"`make (\w+)", text_of(page))) <= targets
    shown = re.findall(r"python -m bench ([a-z][\w-]*)", text_of(page))
    assert {name.replace("-", "_") for name in shown} <= set(BENCHMARKS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_training_commands_name_recipes_and_fields(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in re.findall(r"--config (\S+\.ya?ml)", text_of(page)):  # the page's own configuration, or any
        shown = blocks(page, "yaml")
        tree = load_config(parse_yaml(shown[0]) if shown else None).model_dump(mode="json")
        (tmp_path / file).write_text(dump_yaml(tree))
    for module in ("train", "teach"):
        for words in ours(page, module):
            parser = argparse.ArgumentParser()
            written = ("--texts", "--missing") if module == "teach" else ()  # for train, --texts is a field
            for option in ("--config", "--out", *written):
                parser.add_argument(option)
            for option in ("--dry-run", "--print-config", "--list", "--finish"):
                parser.add_argument(option, action="store_true")
            options, overrides = parser.parse_known_args(words)
            load_arguments(options.config, overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.parametrize("module", ["evaluate", "export", "search"])
def test_options_of_other_commands_exist(page, module):
    shown = ours(page, module)
    if not shown:
        return
    known = "".join(help_of(module, *words[:1] if module == "search" else ()) for words in shown)
    for words in shown:
        assert all(re.search(rf"(?<![\w-]){word}(?![\w-])", known) for word in words if re.match(r"--?[a-z]", word)), (
            words
        )


def help_of(module: str, *words: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        importlib.import_module(f"jasper_fast.{module}").main([*words, "--help"])
    return out.getvalue()


def test_the_command_for_images_of_ones_own_names_everything():
    (words,) = [words for words in ours(ROOT / "docs" / "images.md", "train") if "pictures-alt" in words]
    config = load_arguments(words[1], words[2:])
    assert config.images is not None
    images, texts = config.images.sources[0], config.data.sources[0]
    assert (images.path, images.captions, texts.path) == ("my_images.zip", *["my_captions.jsonl"] * 2)
    assert images.caption_columns == texts.columns == ["caption"]


def test_the_table_of_recipes_is_complete():
    section = text_of(ROOT / "docs" / "own-teacher.md").split("## Shipped recipes")[1].split("\n## ")[0]
    assert re.findall(r"^\| `([\w-]+)`", section, flags=re.MULTILINE)
    assert set(re.findall(r"^\| `([\w-]+)`", section, flags=re.MULTILINE)) == set(recipe_names())


def test_files_named_in_the_architecture_exist():
    page = text_of(ROOT / "docs" / "architecture.md").partition("### Add a loss")[0]
    for name in re.findall(r"`([\w/.]+\.(?:py|cpp|yaml))`", page):
        places = [ROOT / name, ROOT / "jasper_fast" / name]
        assert "NAME" in name or any(place.is_file() for place in places), name


def test_the_layer_table_has_every_package_and_command():
    page = text_of(ROOT / "docs" / "architecture.md")
    rows = page.split("| layer |")[1].split("\n\n")[0]
    layers = set(re.findall(r"`([\w/]+)`", "".join(line.split("|")[1] for line in rows.splitlines() if "|" in line)))
    package = ROOT / "jasper_fast"
    folders = {f"{file.parent.relative_to(package)}/" for file in package.rglob("__init__.py")} - {"./"}
    modules = {file.stem for file in package.glob("*.py") if not file.stem.startswith("_")}
    assert layers == folders | modules | {"kernels/"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file) if file else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", text_of(path), flags=re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, f"{page.name}: {target}"


def slug(heading: str) -> str:
    """The anchor that Markdown viewers give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_page_is_in_the_index():
    index = text_of(ROOT / "docs" / "index.md")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"({page.name})" not in index] == ["index.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_fit_an_editor(page):
    in_table = ("|", "!", "- **")  # generated lists of figures have a line per item
    lines = [line for line in text_of(page).splitlines() if not line.startswith(in_table)]
    generated = {"ablation.md", "peers.md", "binned.md", "kernels-compiled.md", "similarity-forms.md", "results.md"}
    if page.name not in generated:
        assert not [line for line in lines if len(line) > 125]
