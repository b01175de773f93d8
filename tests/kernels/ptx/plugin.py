"""pytest plugin: the tests of the kernels, compiled and run by the emulator on CPU tensors.

    EMULATED_GPU=90 python -m pytest --noconftest -p tests.kernels.ptx.plugin -m "" tests/kernels/test_kernels.py -k ...

bfloat16, tensor descriptors, asynchronous copies, wgmma and real layouts are exercised. What needs CUDA itself, such as
streams and graphs, is not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

os.environ.pop("TRITON_INTERPRET", None)
pytest.register_assert_rewrite("tests.helpers")

from tests.kernels.ptx import driver  # noqa: E402

CAPABILITY = int(os.environ.get("EMULATED_GPU", "90"))
EMULATOR = driver.install(CAPABILITY)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Start every test from the same torch random state, as tests/conftest.py does."""
    torch.manual_seed(0)
    yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Report what was emulated."""
    for name, count in sorted(EMULATOR.launches.items()):
        seconds = EMULATOR.seconds[name]
        terminalreporter.write_line(f"{name}: {count} launches for sm_{CAPABILITY}, {seconds:.1f} s")
