"""`python -m jasper_fast.env` reports the libraries in use, and `import jasper_fast` stays light."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import jasper_fast
from jasper_fast import env
from jasper_fast.ops import dispatch, native
from jasper_fast.utils import hardware


def run(code_or_module, *arguments, cwd):
    """Output of a fresh interpreter in another folder, with this same package."""
    how = ["-m", code_or_module] if " " not in code_or_module else ["-c", code_or_module]
    inside = {**os.environ, "PYTHONPATH": str(Path(jasper_fast.__file__).parent.parent)}
    command = [sys.executable, *how, *arguments]
    return subprocess.run(command, cwd=cwd, env=inside, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("vendor", "flags", "allowed", "fast"),
    [
        ("GenuineIntel", "fpu sse2 avx avx2", None, False),
        ("GenuineIntel", "avx2 avx512f avx512_vnni amx_tile amx_int8", None, False),
        ("GenuineIntel", "avx2 avx512f avx512_bf16", None, False),
        ("GenuineIntel", "avx2 avx512f amx_tile amx_bf16", None, True),
        ("GenuineIntel", "avx2 avx512f amx_tile amx_bf16", "AVX512_CORE_BF16", False),
        ("GenuineIntel", "avx2 avx512f amx_tile amx_bf16", "avx512_core_amx", True),
        ("GenuineIntel", "avx2 avx512f amx_tile amx_bf16", "DEFAULT", True),
        ("AuthenticAMD", "avx2 avx512f avx512_vnni", None, False),
        ("AuthenticAMD", "avx2 avx512f avx512_bf16", None, True),
        ("AuthenticAMD", "avx2 avx512f avx512_bf16", "all", True),
        ("AuthenticAMD", "avx2 avx512f avx512_bf16", "AVX512_CORE_BF16", True),
        ("AuthenticAMD", "avx2 avx512f avx512_bf16", "AVX512_CORE_VNNI", False),
        ("", "", None, False),
    ],
)
def test_bf16_is_chosen_only_where_the_cpu_multiplies_it_faster(monkeypatch, vendor, flags, allowed, fast):
    monkeypatch.setattr(hardware, "cpu_vendor", lambda: vendor)
    monkeypatch.setattr(hardware, "cpu_features", lambda: frozenset(flags.split()))
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    if allowed is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", allowed)
    assert hardware.cpu_bf16_is_fast() is fast
    cpu = env.environment()["cpu"]
    assert cpu["precision"] == ("bf16" if fast else "fp32")
    assert ("slower" in cpu["precision_reason"]) is not fast


def test_cpuinfo_is_read_by_its_own_keys(monkeypatch):
    lines = (
        "processor\t: 0\nmodel name\t: A CPU: fast\nvmx flags\t: vnmi\nflags\t\t: fpu avx2 amx_bf16\nbugs\t\t: none\n"
    )
    monkeypatch.setattr(env.Path, "is_file", lambda self: True)
    monkeypatch.setattr(env.Path, "read_text", lambda self, encoding, errors: lines)
    hardware.cpu_features.cache_clear()
    try:
        assert hardware.cpu_features() == {"fpu", "avx2", "amx_bf16"}
        assert env._cpu()["model"] == "A CPU: fast"
    finally:
        hardware.cpu_features.cache_clear()


def test_the_report_is_json_and_true(tmp_path):
    found = json.loads(run("jasper_fast.env", "--json", cwd=tmp_path))
    assert found["libraries"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["jasper_fast"]["version"] == jasper_fast.__version__
    assert found["extension"]["loaded"] is (native.extension_error() is None)
    assert len(found["gpus"]["devices"]) == torch.cuda.device_count()
    assert found["kernels"]["in_use"] or found["kernels"]["reason"]


def test_a_missing_extension_is_said_with_its_reason(monkeypatch):
    monkeypatch.setattr(native, "extension_path", lambda: None)
    monkeypatch.setattr(native, "extension_error", lambda: "no _C*.so beside the package")
    text = env.describe(env.environment())
    assert "extension" in text and "not in use: no _C*.so beside the package" in text


def test_gpus_are_listed(monkeypatch):
    card = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=141_000_000_000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    text = env.describe(env.environment())
    assert text.count("NVIDIA H200, sm_90, 141.0 GB") == 2
    assert "none in use" not in text
    monkeypatch.setattr(env, "_version", lambda name: "1.0")
    assert env.environment()["kernels"] == {"in_use": True, "reason": None}
    assert "in use on the GPUs" in env.describe(env.environment())


def test_absent_tools_say_what_to_type(monkeypatch):
    monkeypatch.setattr(env, "_version", lambda name: None)
    text = env.describe(env.environment())
    assert "not installed. Fix: pip install trackio" in text  # the text of an error of `log.trackers`
    assert "not installed. Fix: pip install onnx onnxscript onnxruntime" in text


def test_imports_stay_light(pytestconfig):
    modules = "jasper_fast, jasper_fast.losses, jasper_fast.ops, jasper_fast.env, bench.__main__"
    heavy = "{'transformers', 'datasets', 'sentence_transformers', 'matplotlib', 'sklearn', 'pandas'}"
    out = run(f"import sys, {modules}; print(sorted({heavy} & set(sys.modules)))", cwd=pytestconfig.rootpath)
    assert out.strip() == "[]"


IMPORT_ORDERS = [
    "import jasper_fast; t = jasper_fast.train",
    "import jasper_fast.train; t = jasper_fast.train",
    "from jasper_fast import train as t",
    "import jasper_fast.train as t",
    "from jasper_fast.train import Stopped; import jasper_fast; t = jasper_fast.train",
    "import importlib; t = importlib.import_module('jasper_fast.train')",
]


def test_train_is_the_function_and_the_module_in_every_order_of_imports(tmp_path):
    # One process forks for each order: the package is new in each, the slow imports of other packages are shared.
    code = f"""
import os, pydantic, ruamel.yaml, scipy.stats, sys, torch.distributed.fsdp, torch.distributed.tensor
assert "jasper_fast" not in sys.modules
for order in {IMPORT_ORDERS!r}:
    if os.fork() == 0:
        names = {{}}
        exec(order, names)
        t = names["t"]
        from jasper_fast.utils.errors import JasperError
        assert t.train.__name__ == "train" and callable(t.main)
        try:
            t({{"no such key": 1}})
        except JasperError as error:
            print(order, "->", "no such key" in str(error), flush=True)
        os._exit(0)
    os.wait()
"""
    assert run(code, cwd=tmp_path).splitlines() == [f"{order} -> True" for order in IMPORT_ORDERS]


def test_what_the_readme_names_is_there_after_one_import(tmp_path):
    code = (
        "import jasper_fast as j; print(j.mips.topk.__name__, j.losses.JasperLoss, j.sentence_transformers.JasperLoss)"
    )
    assert run(code, cwd=tmp_path).startswith("topk <class")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        jasper_fast.trian  # noqa: B018


@pytest.fixture
def gpus(monkeypatch):
    """Return a function that puts GPUs of these compute capabilities into the machine."""
    dispatch.why_no_triton.cache_clear()

    def install(*capabilities, hip=None):
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(dispatch, "_TRITON", True)
        monkeypatch.setattr(env, "_version", lambda name: "3.6.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
        monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda i: SimpleNamespace(
                name=f"GPU{i}", major=capabilities[i][0], minor=capabilities[i][1], total_memory=8e9
            ),
        )

    yield install
    dispatch.why_no_triton.cache_clear()


def takes_kernels(index: int, dtype=torch.float32) -> bool:
    return dispatch.uses_triton([SimpleNamespace(is_cuda=True, device=torch.device("cuda", index), dtype=dtype)])


def test_kernels_run_on_gpus_that_compile_them(gpus):
    gpus((7, 5), (8, 0), (9, 0))
    assert [takes_kernels(index) for index in range(3)] == [False, True, True]
    assert not takes_kernels(2, torch.float64)
    text = env.describe(env.environment())
    assert "not in use, PyTorch instead: the kernels need sm_80 or newer, and this GPU is sm_75" in text
    assert "in use on the GPUs" in text


def test_an_old_gpu_or_rocm_falls_back_with_a_reason(gpus):
    gpus((7, 0))
    kernels = env.environment()["kernels"]
    assert kernels == {"in_use": False, "reason": "the kernels need sm_80 or newer, and this GPU is sm_70"}
    dispatch.why_no_triton.cache_clear()
    gpus((9, 4), hip="6.4")
    assert not takes_kernels(0)
    assert "ROCm 6.4" in env.describe(env.environment())
