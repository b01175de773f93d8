"""``python -m bench compile_matrix``: every Triton kernel in every form, compiled for sm_80, sm_90 and sm_100.

No GPU is needed. The table says what a thread and a block use, and which tensor-core instructions were chosen; a form
that spills beyond its allowance, outgrows shared memory or lost its tensor cores is an error. All forms are compiled
before any is judged, so that one run names every fault.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes of shared memory that a block may have
TENSOR_CORES = {80: ("mma.sync",), 90: ("wgmma",), 100: ("tcgen05.mma",)}
OUT = Path("bench/results/compile-matrix.json")
TABLE = Path("docs/kernels-compiled.md")


def main(argv: list[str]) -> int:
    """Compile, write the JSON and the table drawn from it, and name what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench compile_matrix", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the representative forms only; nothing is written")
    parser.add_argument(
        "--write",
        action="store_true",
        help="write also what is not the whole matrix; some kernels go beside the others",
    )
    parser.add_argument(
        "--kernel", nargs="+", default=[], help="only kernels with one of these in the name; not written"
    )
    parser.add_argument("--table", action="store_true", help="only write the table from the committed JSON")
    options = parser.parse_args(argv)
    if options.table:
        TABLE.write_text(table(json.loads(OUT.read_text())))
        return 0
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 is set, so kernels would not be compiled: unset it")
    found = compile_all(options.quick, *options.kernel)
    faults = [fault for entry in found["forms"] for fault in entry["faults"]]
    if options.write or not (options.quick or options.kernel):
        if options.kernel:
            found = _beside(json.loads(OUT.read_text()), found, options.quick)
        OUT.write_text(dump(found))
        TABLE.write_text(table(found))
        print(f"written to {OUT} and {TABLE}")
    print(f"{len(found['forms'])} compilations with triton {found['triton']}, {len(faults)} faults")
    print("\n".join(faults))
    return 1 if faults else 0


def compile_all(quick: bool, *names: str) -> dict[str, Any]:
    """First compile each form for each architecture, then judge the results."""
    import triton

    from jasper_fast.kernels import registry

    asked = [form for form in registry.forms() if form.quick or not quick]
    chosen = [form for form in asked if not names or any(name in form.kernel.__name__ for name in names)]
    built = [(form, sm, compile_form(form, sm)) for form in chosen for sm in form.architectures]
    entries = []
    for form, sm, result in built:
        entry: dict[str, Any] = {"kernel": form.kernel.__name__, "form": form.label, "sm": sm, **result}
        entry |= {"warps": form.warps, "stages": form.stages}
        entry["faults"] = [f"{entry['kernel']} [{form.label}] sm_{sm}: {fault}" for fault in judge(form, sm, result)]
        entries.append(entry)
    return {"triton": triton.__version__, "whole": not quick and not names, "forms": entries}


def _beside(older: dict[str, Any], found: dict[str, Any], quick: bool) -> dict[str, Any]:
    """The older result with some kernels compiled anew; as whole as it was, unless only ``quick`` forms are new."""
    kernels = {entry["kernel"] for entry in found["forms"]}
    kept = [entry for entry in older["forms"] if entry["kernel"] not in kernels]
    whole = older["whole"] and not quick and older["triton"] == found["triton"]
    return {**found, "whole": whole, "forms": [*kept, *found["forms"]]}


def compile_form(form: Any, sm: int) -> dict[str, Any]:
    """Registers, stack, shared memory and tensor-core instructions of one form, or what the compiler said."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = form.kernel.arg_names
    missing = set(names) ^ (set(form.types) | set(form.constants))
    if missing:
        return {"error": f"the form and the kernel differ in arguments {sorted(missing)}"}
    signature = {n: form.types[n].partition(":")[0] if n in form.types else "constexpr" for n in names}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n, t in form.types.items() if t.endswith(":16")}
    source = ASTSource(form.kernel, signature, dict(form.constants), aligned)
    options = {"num_warps": form.warps, "num_stages": form.stages}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    except (triton.CompilationError, triton.runtime.errors.OutOfResources, RuntimeError) as error:
        return {"error": f"{type(error).__name__}: {error}"[-600:]}
    ptx = compiled.asm["ptx"]
    return {
        **resources(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
        "tensor_cores": [t for t in ("mma.sync", "wgmma", "tcgen05.mma") if t in ptx],
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack of a thread, as cuobjdump reports them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {done.stdout!r}")
    return {"registers": int(found[1]), "stack": int(found[2])}


def judge(form: Any, sm: int, result: dict[str, Any]) -> list[str]:
    """What is wrong with one compilation."""
    if "error" in result:
        return [result["error"]]
    faults = []
    if result["stack"] > form.stack.get(sm, 0) and not form.spills:
        faults.append(f"{result['stack']} bytes of stack, allowed {form.stack.get(sm, 0)}")
    if result["shared"] > SHARED_LIMIT[sm]:
        faults.append(f"{result['shared']} bytes of shared memory, the limit is {SHARED_LIMIT[sm]}")
    wanted = form.tensor_cores is True or (form.tensor_cores and sm in form.tensor_cores)
    if wanted and not set(result["tensor_cores"]) & set(TENSOR_CORES[sm]):
        faults.append(f"no {' or '.join(TENSOR_CORES[sm])}: found {result['tensor_cores'] or 'none'}")
    return faults


def dump(found: dict[str, Any]) -> str:
    """JSON with a line for each form and architecture."""
    lines = ",\n".join("  " + json.dumps(entry) for entry in found["forms"])
    head = json.dumps({key: value for key, value in found.items() if key != "forms"})
    return f'{head[:-1]}, "forms": [\n{lines}\n]}}\n'


def table(found: dict[str, Any]) -> str:
    """Two Markdown tables: a line for each kernel, and one for each form that spills or does not compile."""
    lines = [
        "# The Triton kernels, compiled",
        "",
        f"Written by `python -m bench compile_matrix` with triton {found['triton']} from "
        "`bench/results/compile-matrix.json`, which has every form. The kernels were compiled for each architecture, "
        "but not run, since no GPU was available.",
        "All forms are included." if found["whole"] else "Some forms stand for all; `make soak` compiles all.",
        "A form is a dtype, a tile, a layout and whatever else a launch may find: odd strides, counts of 1, a mask.",
        "",
        "| kernel | forms | on sm_80, 90, 100 | registers of a thread | most shared memory of a block | tensor cores |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    kernels: dict[str, list[dict[str, Any]]] = {}
    for entry in found["forms"]:
        kernels.setdefault(entry["kernel"], []).append(entry)
    for name, entries in kernels.items():
        good = [e for e in entries if "error" not in e]
        by_sm = ", ".join(str(sum(e["sm"] == sm for e in entries)) for sm in ARCHITECTURES)
        registers = [e["registers"] for e in good]
        cores = ", ".join(sorted({core for e in good for core in e["tensor_cores"]})) or "–"
        lines.append(
            f"| {name} | {len({e['form'] for e in entries})} | {by_sm} | {min(registers, default=0)} to "
            f"{max(registers, default=0)} | {max((e['shared'] for e in good), default=0) / 1024:.1f} KiB | {cores} |"
        )
    lines += [
        "",
        "Values that do not fit a thread's registers go to its stack. These forms have one:",
        "",
        "| kernel | form | bytes of a thread's stack |",
        "| --- | --- | --- |",
    ]
    for name, entries in kernels.items():
        for form in dict.fromkeys(e["form"] for e in entries):
            told = [
                f"sm_{e['sm']}: {e.get('error') or e['stack']}"
                for e in entries
                if e["form"] == form and (e.get("error") or e["stack"])
            ]
            if told:
                lines.append(f"| {name} | {form} | {', '.join(told)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
