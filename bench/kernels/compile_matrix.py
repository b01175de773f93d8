"""``python -m bench compile_matrix``: compile every Triton kernel in every form for sm_80, sm_90 and sm_100.

No GPU is needed. The table lists the resources of threads and blocks, and the tensor-core instructions. A form is an
error if it spills beyond its allowance, exceeds the shared memory or does not use the tensor cores. All forms are
compiled before any is checked, so one run reports every fault.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.kernels import forms

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes of shared memory of a block
TENSOR_CORES = {80: ("mma.sync",), 90: ("wgmma",), 100: ("tcgen05.mma",)}
# Bytes of a thread's stack by version of Triton and kind of form (`forms.Form.kind`). Other kinds use none.
STACK = {
    "3.6": {
        "scan by pointers, float32": 384,
        "scan by pointers, odd": 6144,
        "scan of scores, odd": 128,
        "unpack_kernel": 8,
        "coefficients_kernel": 8,
    },
    "3.7": {
        "scan by pointers": 8,
        "scan by pointers, float32": 448,
        "scan by pointers, odd": 6144,
        "scan of scores": 16,
        "scan of scores, odd": 192,
        "select_kernel": 8,
        "unpack_kernel": 8,
    },
    "3.8": {
        "scan by descriptors": 16,
        "scan by pointers, float32": 384,
        "scan by pointers, odd": 6144,
        "scan of scores, odd": 128,
        "pair_scores_kernel": 32,
        "contrast_kernel": 16,
        "unpack_kernel": 8,
    },
    "3.9": {
        "scan by pointers": 8,
        "scan by pointers, float32": 384,
        "scan by pointers, odd": 6144,
        "scan of scores, odd": 128,
        "select_kernel": 8,
    },
}
OUT = Path("bench/results/compile-matrix.json")
VERSIONS = Path("bench/results/compile-versions.json")
TABLE = Path("docs/kernels-compiled.md")


def main(argv: list[str]) -> int:
    """Compile, write the JSON and its table, and print the faults."""
    parser = argparse.ArgumentParser(prog="python -m bench compile_matrix", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="compile the representative forms only, and write nothing")
    parser.add_argument(
        "--write",
        action="store_true",
        help="write a part of the matrix too; results of some kernels replace theirs in the file",
    )
    parser.add_argument(
        "--kernel", nargs="+", default=[], help="compile only kernels with one of these in the name, and write nothing"
    )
    parser.add_argument(
        "--version",
        action="store_true",
        help=f"write only the stack of each kind of forms, to {VERSIONS}, as for a version of Triton that is not CI's",
    )
    parser.add_argument("--table", action="store_true", help="only write the table of the committed JSON")
    options = parser.parse_args(argv)
    versions: dict[str, Any] = json.loads(VERSIONS.read_text()) if VERSIONS.exists() else {}
    if options.table:
        TABLE.write_text(table(json.loads(OUT.read_text()), versions))
        return 0
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 is set, so kernels would not be compiled. Fix: unset it")
    results = compile_all(options.quick, *options.kernel)
    faults = [fault for entry in results["forms"] for fault in entry["faults"]]
    if options.version:
        versions[results["triton"]] = stack_of_kinds(results)
        VERSIONS.write_text(json.dumps(dict(sorted(versions.items())), indent=1) + "\n")
        TABLE.write_text(table(json.loads(OUT.read_text()), versions))
        print(f"wrote {VERSIONS} and {TABLE}")
    elif options.write or not (options.quick or options.kernel):
        if options.kernel:
            results = _replaced(json.loads(OUT.read_text()), results, options.quick)
        OUT.write_text(dump(results))
        TABLE.write_text(table(results, versions))
        print(f"wrote {OUT} and {TABLE}")
    print(f"{len(results['forms'])} compilations with triton {results['triton']}, {len(faults)} faults")
    print("\n".join(faults))
    return 1 if faults else 0


def compile_all(quick: bool, *names: str) -> dict[str, Any]:
    """Compile each form for each architecture, then check the results.

    Args:
        quick: compile the representative forms only.
        names: parts of kernel names. Without any all kernels are compiled.
    """
    import triton

    candidates = [form for form in forms.record() if form.quick or not quick]
    chosen = [form for form in candidates if not names or any(name in form.name for name in names)]
    built = [(form, sm, compile_form(form, sm)) for form in chosen for sm in form.architectures]
    entries = []
    for form, sm, result in built:
        entry: dict[str, Any] = {"kernel": form.name, "form": form.label, "kind": form.kind, "sm": sm, **result}
        faults = judge(form, sm, result, triton.__version__)
        entry["faults"] = [f"{form.name} [{form.label}] sm_{sm}: {fault}" for fault in faults]
        entries.append(entry)
    return {"triton": triton.__version__, "whole": not quick and not names, "forms": entries}


def stack_of_kinds(results: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of compilations and errors, and the most bytes of stack by kind of forms and architecture."""
    stack: dict[str, dict[str, int]] = {}
    for entry in results["forms"]:
        if entry.get("stack"):
            most, sm = stack.setdefault(entry["kind"], {}), f"sm_{entry['sm']}"
            most[sm] = max(most.get(sm, 0), entry["stack"])
    errors = sum("error" in entry for entry in results["forms"])
    return {"whole": results["whole"], "compilations": len(results["forms"]), "errors": errors, "stack": stack}


def _replaced(older: dict[str, Any], results: dict[str, Any], quick: bool) -> dict[str, Any]:
    """Return the older results with those of some kernels replaced. ``quick`` results make them partial."""
    kernels = {entry["kernel"] for entry in results["forms"]}
    others = [entry for entry in older["forms"] if entry["kernel"] not in kernels]
    whole = older["whole"] and not quick and older["triton"] == results["triton"]
    entries = sorted([*others, *results["forms"]], key=lambda entry: entry["kernel"])
    return {**results, "whole": whole, "forms": entries}


def compile_form(form: forms.Form, sm: int) -> dict[str, Any]:
    """Return registers, stack, shared memory and tensor-core instructions of one form, or the compiler's error."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = form.kernel.arg_names
    signature = {n: form.types[n].partition(":")[0] if n in form.types else "constexpr" for n in names}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n, t in form.types.items() if t.endswith(":16")}
    source = ASTSource(form.kernel, signature, dict(form.constants), aligned)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=dict(form.options))
    except (triton.CompilationError, triton.runtime.errors.OutOfResources, RuntimeError) as error:
        return {"error": f"{type(error).__name__}: {error}"[-600:]}
    ptx = compiled.asm["ptx"]
    return {
        **resources(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
        "tensor_cores": [t for t in ("mma.sync", "wgmma", "tcgen05.mma") if t in ptx],
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Return the registers and bytes of stack of a thread, as cuobjdump reports them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    match = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    if match is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {done.stdout!r}")
    return {"registers": int(match[1]), "stack": int(match[2])}


def judge(form: forms.Form, sm: int, result: dict[str, Any], triton: str) -> list[str]:
    """Return the faults of one compilation by a version of Triton."""
    if "error" in result:
        return [result["error"]]
    faults = []
    allowed = allowed_stack(triton).get(form.kind, 0)
    if result["stack"] > allowed:
        faults.append(f"{result['stack']} bytes of stack, allowed {allowed}")
    if result["shared"] > SHARED_LIMIT[sm]:
        faults.append(f"{result['shared']} bytes of shared memory, the limit is {SHARED_LIMIT[sm]}")
    if form.needs_tensor_cores(sm) and not set(result["tensor_cores"]) & set(TENSOR_CORES[sm]):
        faults.append(f"no {' or '.join(TENSOR_CORES[sm])}: found {result['tensor_cores'] or 'none'}")
    return faults


def allowed_stack(triton: str) -> dict[str, int]:
    """Return the bytes of a thread's stack that kinds of forms may use, for a version of Triton or the nearest older.

    Other kinds may use none.
    """
    given, versions = _minor(triton), sorted(STACK, key=_minor)
    return STACK[max((own for own in versions if _minor(own) <= given), key=_minor, default=versions[0])]


def _minor(version: str) -> tuple[int, int]:
    """Return the first two numbers of a version."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def dump(results: dict[str, Any]) -> str:
    """Return JSON with a line for each form and architecture."""
    lines = ",\n".join("  " + json.dumps(entry) for entry in results["forms"])
    head = json.dumps({key: value for key, value in results.items() if key != "forms"})
    return f'{head[:-1]}, "forms": [\n{lines}\n]}}\n'


def table(results: dict[str, Any], versions: dict[str, Any]) -> str:
    """Return three Markdown tables: kernels, forms that spill or do not compile, and other versions of Triton.

    Args:
        results: results of one version.
        versions: results of `stack_of_kinds` by other versions.
    """
    lines = [
        "# The Triton kernels, compiled",
        "",
        f"Written by `python -m bench compile_matrix` with triton {results['triton']} from "
        "`bench/results/compile-matrix.json`, which has the figures of each form. The kernels were compiled for each "
        "architecture, but not run, since no GPU was available.",
        "All forms are included." if results["whole"] else "These are representative forms. `make soak` compiles all.",
        "A form combines dtype, tile, layout and other properties of a launch, such as odd strides or a mask.",
        "",
        "| kernel | forms | on sm_80, 90, 100 | registers of a thread | most shared memory of a block | tensor cores |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    kernels: dict[str, list[dict[str, Any]]] = {}
    for entry in results["forms"]:
        kernels.setdefault(entry["kernel"], []).append(entry)
    lines += [_kernel_line(name, entries) for name, entries in kernels.items()]
    lines += [
        "",
        "Values that do not fit a thread's registers go to its stack. These forms use it:",
        "",
        "| kernel | form | bytes of a thread's stack |",
        "| --- | --- | --- |",
    ]
    lines += [line for name, entries in kernels.items() for line in _stack_lines(name, entries)]
    lines += [
        "",
        f"Other versions of Triton were tried too (`--version`, `{VERSIONS}`):",
        "",
        *(f"- {version}: {v['compilations']} compilations, {v['errors']} errors" for version, v in versions.items()),
        "",
        "| triton | kind of forms that use the stack | most bytes on sm_80, 90, 100 | limit |",
        "| --- | --- | ---: | ---: |",
    ]
    lines += [line for version, found in versions.items() for line in _version_lines(version, found["stack"])]
    return "\n".join(lines) + "\n"


def _kernel_line(name: str, entries: list[dict[str, Any]]) -> str:
    good = [e for e in entries if "error" not in e]
    by_sm = ", ".join(str(sum(e["sm"] == sm for e in entries)) for sm in ARCHITECTURES)
    registers = [e["registers"] for e in good]
    cores = ", ".join(sorted({core for e in good for core in e["tensor_cores"]})) or "–"
    return (
        f"| {name} | {len({e['form'] for e in entries})} | {by_sm} | {min(registers, default=0)} to "
        f"{max(registers, default=0)} | {max((e['shared'] for e in good), default=0) / 1024:.1f} KiB | {cores} |"
    )


def _stack_lines(name: str, entries: list[dict[str, Any]]) -> Iterator[str]:
    for form in dict.fromkeys(e["form"] for e in entries):
        uses = [
            f"sm_{e['sm']}: {e.get('error') or e['stack']}"
            for e in entries
            if e["form"] == form and (e.get("error") or e["stack"])
        ]
        if uses:
            yield f"| {name} | {form} | {', '.join(uses)} |"


def _version_lines(version: str, stack: dict[str, dict[str, int]]) -> Iterator[str]:
    allowed = allowed_stack(version)
    for kind, most in sorted(stack.items()):
        by_sm = ", ".join(str(most.get(f"sm_{sm}", 0)) for sm in ARCHITECTURES)
        yield f"| {version} | {kind} | {by_sm} | {allowed.get(kind, 0)} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
