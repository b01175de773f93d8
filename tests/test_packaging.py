"""Declared packages, data, dependencies and pins match the files, and the wheel works without the checkout."""

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from fnmatch import fnmatch
from importlib.metadata import packages_distributions
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]
EXTRAS = PROJECT["optional-dependencies"]
# What a machine with a GPU and little else may lack.
ABSENT = (
    *("accelerate", "datasets", "faiss", "hypothesis", "mteb", "onnx", "pyarrow", "pydantic", "pytrec_eval", "scipy"),
    *("sentence_transformers", "sklearn", "usearch"),
)


def requirements(*groups):
    return [Requirement(line) for group in groups for line in group]


def pins():
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return {
        canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in map(Requirement, filter(None, lines))
    }


def imported_by(folder):
    names = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(), str(file))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names - {"jasper_fast", "bench"}


def test_every_package_and_every_data_file_is_declared():
    data = SETUPTOOLS["package-data"]
    for file in (ROOT / "jasper_fast").rglob("*"):
        path = file.relative_to(ROOT)
        if file.is_dir() or "__pycache__" in path.parts or path.suffix == ".so" or "kernels" in path.parts:
            continue
        package = ".".join(path.parent.parts)
        if path.suffix == ".py":
            assert package in SETUPTOOLS["packages"], f"add {package} to [tool.setuptools] packages"
        else:
            places = [(".".join(folder.parts), path.relative_to(folder).as_posix()) for folder in path.parents]
            packed = [fnmatch(inside, glob) for package, inside in places for glob in data.get(package, ())]
            assert any(packed), f"{path} would not be in the wheel"


def test_kernels_is_the_symlinked_folder_and_no_regular_package():
    link = ROOT / "jasper_fast" / "kernels"
    assert link.is_symlink() and link.resolve() == ROOT / "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()  # it would hide the PyPI package that transformers imports


def test_every_direct_dependency_is_pinned_inside_its_range():
    pinned = pins()
    for requirement in requirements(PROJECT["dependencies"], *EXTRAS.values()):
        name = canonicalize_name(requirement.name)
        if name in ("jasper-fast", "triton"):  # torch brings the triton it was built with
            continue
        assert name in pinned, f"pin {name} in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), (
            f"{name}=={pinned[name]} is outside {requirement.specifier}"
        )


def test_every_third_party_import_is_declared():
    declared = {canonicalize_name(r.name) for r in requirements(PROJECT["dependencies"], *EXTRAS.values())}
    known = packages_distributions()
    for name in sorted(imported_by(ROOT / "jasper_fast") | imported_by(ROOT / "bench")):
        owners = {canonicalize_name(owner) for owner in known.get(name, [name])}
        assert owners & declared, f"{name} ({', '.join(owners)}) is imported but not declared in pyproject.toml"


@pytest.mark.parametrize("arguments", [["--help"], ["no_such_benchmark"]])
def test_bench_lists_what_there_is(arguments):
    done = subprocess.run([sys.executable, "-m", "bench", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == (0 if arguments == ["--help"] else 2)
    there = [
        f.stem for f in (ROOT / "bench").glob("*.py") if not f.stem.startswith(("_", "test_", "bench_", "conftest"))
    ]
    assert all(f"python -m bench {name}" in done.stderr for name in there)
    assert ("no benchmark called 'no_such_benchmark'" in done.stderr) == (arguments == ["no_such_benchmark"])


def test_without_a_name_the_suite_runs(monkeypatch):
    from bench import __main__ as command

    ran = []
    monkeypatch.setattr(
        command.importlib, "import_module", lambda name: SimpleNamespace(main=lambda argv: ran.append((name, argv)))
    )
    assert command.main(["binned", "--rows", "3"]) == 0 and ran == [("bench.losses.binned", ["--rows", "3"])]
    asked = []

    def run(line, timeout):
        asked.append((line[4:], timeout))
        if line[4] == "losses":
            raise subprocess.TimeoutExpired(line, timeout)
        return SimpleNamespace(returncode=-11 if line[4] == "mips" else 0)

    monkeypatch.setattr(command.subprocess, "run", run)
    assert command.main(["--device", "cuda"]) == 11
    assert asked == [([name, "--device", "cuda"], None) for name in ("losses", "mips", "train")]
    asked.clear()
    command.main(["--device", "cuda", "--budget", "300"])  # the first one's hundred seconds are not taken here
    assert asked[0] == (["losses", "--device", "cuda", "--budget", "100"], pytest.approx(160, abs=0.5))
    assert [line[-1] for line, _ in asked[1:]] == ["150", "300"]


@pytest.mark.soak
def test_the_wheel_works_away_from_the_checkout(tmp_path):
    source, site, elsewhere = tmp_path / "source", tmp_path / "site", tmp_path / "elsewhere"
    skip = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.so", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, source, symlinks=True, ignore=skip)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--quiet",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--wheel-dir",
        "dist",
        ".",
    ]
    subprocess.run(pip, cwd=source, env={**os.environ, "JASPER_FAST_REQUIRE_EXTENSION": "1"}, check=True)

    (wheel,) = (source / "dist").glob("*.whl")
    assert "-cp311-abi3-" in wheel.name
    zipfile.ZipFile(wheel).extractall(site)
    shutil.rmtree(source)
    elsewhere.mkdir()
    inside = {**os.environ, "PYTHONPATH": str(site)}

    def run(*arguments):
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=elsewhere, env=inside, capture_output=True, text=True, check=True).stdout

    found = json.loads(run("-m", "jasper_fast.env", "--json"))
    assert found["jasper_fast"]["path"] == str(site / "jasper_fast")
    assert found["extension"]["loaded"] and Path(found["extension"]["path"]).parent == site / "jasper_fast"
    assert (site / "jasper_fast" / "py.typed").is_file()
    recipes = {file.name for file in (ROOT / "jasper_fast" / "recipes").glob("*.yaml")}
    assert {file.name for file in (site / "jasper_fast" / "recipes").iterdir()} == recipes
    assert str(site) in run("-c", "import jasper_fast.kernels; print(list(jasper_fast.kernels.__path__))")


@pytest.mark.slow
@pytest.mark.parametrize("gpu", [False, True])
def test_gpu_tests_are_collected_where_only_torch_triton_and_transformers_are(tmp_path, gpu):
    """Other files may be skipped; none may stop pytest. With a GPU, all of the kernels' tests are GPU tests."""
    pytest.importorskip("triton")
    pretend = f"import sys, torch\nsys.modules.update(dict.fromkeys({ABSENT!r}))\n"
    (tmp_path / "lacking.py").write_text(pretend + f"torch.cuda.is_available = lambda: {gpu}\n")
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu"]
    command += ["-p", "lacking", "-p", "no:hypothesispytest", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in (
        "test_repeated_runs_are_identical",
        "test_millions_of_pairs_on_a_gpu",
        "test_the_order_of_fp64_of_drawn_cases",
    ):
        assert name in done.stdout
    assert ("test_dominance_counts_as_brute_force_does" in done.stdout) == gpu


def test_losses_search_and_their_benchmarks_need_none_of_what_a_gpu_machine_may_lack():
    modules = (
        "jasper_fast.losses, jasper_fast.mips, bench.losses.cuda, bench.mips.cuda, bench.losses.cpu, bench.mips.cpu"
    )
    command = (
        f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r})); import bench.__main__, bench.pages.gpu, {modules}"
    )
    subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=True)
