"""``python -m tests.kernels.ptx.mutants``: remove barriers, waits, masks and roundings from compiled kernels in turn.

A mutant is noticed if it faults or gives another result. ``--quick`` tries the first few of each kind.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from tests.kernels.ptx import driver
from tests.kernels.ptx.memory import Fault

MUTATIONS = {  # pattern, and what replaces it
    "barrier": (r"^\s*bar\.sync\s+0;", ""),
    "wait for copies": (r"^\s*cp\.async\.wait_group\s+\d+;", ""),
    "wait for products": (r"^\s*wgmma\.wait_group\.sync\.aligned \d+;", ""),
    "mask": (r"@!?%p\d+ ((?:ld|st|atom|red)\.global)", r"\1"),
    "rounding": (r"(add\.s32\s+\S+ \S+), 4096;", r"\1, 0;"),
}
QUICK = 3  # mutants of each kind in a quick run

Call = Callable[[], tuple[Tensor, ...]]


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    """Return True for equal results, NaN included."""
    return all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(one, other, strict=True))


def fate(emulator: driver.Emulator, call: Call, expected: tuple[Tensor, ...]) -> str:
    """Return what became of a mutant."""
    try:
        return "unnoticed" if same(call(), expected) else "another result"
    except Fault as error:
        return "race" if "race" in str(error) else "fault"


def study(emulator: driver.Emulator, kernel: str, call: Call, kind: str, limit: int | None) -> list[str]:
    """Return the fates of the mutants of one kind of a kernel."""
    pattern, replacement = MUTATIONS[kind]
    sites = 0
    chosen: int | None = None

    def edit(name: str, ptx: str) -> str:
        nonlocal sites
        if name != kernel:
            return ptx
        found = list(re.finditer(pattern, ptx, flags=re.M))
        sites = len(found)
        if chosen is None or chosen >= sites:
            return ptx
        site = found[chosen]
        return ptx[: site.start()] + site.expand(replacement) + ptx[site.end() :]

    emulator.edit = edit
    expected = call()
    fates = []
    for chosen in range(sites if limit is None else min(sites, limit)):  # noqa: B007
        fates.append(fate(emulator, call, expected))
    emulator.edit = None
    return fates


def calls() -> dict[str, Call]:
    """Return a call for each kernel under study."""
    from jasper_fast.kernels import dominance_counts, pair_losses, pairs
    from jasper_fast.kernels.strips import Rows
    from jasper_fast.losses.relative_exact import merged

    torch.manual_seed(0)
    student, teacher = torch.randn(9, 20).bfloat16(), torch.randn(9, 15).bfloat16()
    unit = torch.nn.functional.normalize(torch.randn(20, 40))

    def dominance(places: int) -> Call:
        x, place = torch.randn(places).sort().values, torch.randperm(places).int()
        return lambda: dominance_counts.dominance(merged(x, place, 0.3))

    def losses() -> tuple[Tensor, ...]:
        found, (gradient,), _ = pair_losses.tiles([Rows.of(student)], Rows.of(teacher), 1.0, True, False)
        other, (other_gradient,) = pair_losses.neighbourhood([student], teacher, 0.05, True)
        return found, gradient, other, other_gradient

    return {
        "digit_counts_kernel": dominance(300),
        "distribute_kernel": dominance(300),
        "leaf_kernel": dominance(100),  # one leaf
        "pair_scores_kernel": lambda: (pairs.pair_scores(unit),),
        "difference_kernel": losses,
        "divergence_kernel": losses,
    }


# In a quick run each must be noticed at least once.
QUICK_STUDIES = (
    ("distribute_kernel", "barrier"), ("pair_scores_kernel", "wait for products"), ("leaf_kernel", "mask"),
    ("pair_scores_kernel", "rounding"), ("divergence_kernel", "barrier"),
)  # fmt: skip


def main(argv: list[str]) -> int:
    """Print the fates. Return the number of kinds of a kernel of which no mutant was noticed."""
    emulator = driver.install(90)
    quick, missed, fates = "--quick" in argv, 0, Counter[str]()
    for kernel, call in calls().items():
        for kind in MUTATIONS:
            if quick and (kernel, kind) not in QUICK_STUDIES:
                continue
            found = Counter(study(emulator, kernel, call, kind, QUICK if quick else None))
            if found:
                print(
                    f"{kernel}, {kind} removed: " + ", ".join(f"{n} {fate}" for fate, n in sorted(found.items())),
                    flush=True,
                )
                missed += set(found) == {"unnoticed"}
                fates += found
            elif quick:
                print(f"{kernel}, {kind}: none to remove")
                missed += 1
    total = sum(fates.values())
    print(f"{total - fates['unnoticed']} of {total} mutants noticed")
    return missed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
